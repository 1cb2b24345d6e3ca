"""A condensed model is an ordinary model: it trains, checkpoints, takes adapters, and is pruned and condensed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from helpers import LENGTH, arguments, assert_equal, prune_at_once, ragged_rows, snapshot, tiny_bert
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_prune import PruningCallback, PruningConfig, PruningRule, condense, condense_plan
from hf_prune.model import find_blocks


def condensed(family: str = "bert", head: str | None = None, **config: Any) -> PreTrainedModel:
    """Uneven sizes; nothing left in the first layer of each list but what its biases add."""
    model = models.tiny(family, head, **config)
    models.prune_randomly(model)
    models.empty_layers(model, {0})
    return condense(model, verify=False)


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(**batch)[0]
    return output


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_lora(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = condensed(family)
    model.save_pretrained(tmp_path / "base")
    task = peft.TaskType.SEQ_CLS
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type=task))
    batch = models.ragged_batch(model)
    before = logits(adapted, batch)
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(2):  # in the first step lora_A gets no gradient yet
        adapted.train()(**batch, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
    trained = logits(adapted, batch)
    assert not torch.allclose(trained, before, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert logits(loaded, batch).equal(trained)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch), trained, rtol=0, atol=1e-5)


def test_trainer_checkpoints_resume(tmp_path: Path) -> None:
    tiny = tiny_bert()
    models.prune_randomly(tiny)
    condense(tiny).save_pretrained(tmp_path / "condensed")

    def train(folder: str, **settings: Any) -> Trainer:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "condensed")
        resume = settings.pop("resume", None)
        options = arguments(tmp_path / folder, save_strategy="steps", save_steps=2, **settings)
        trainer = Trainer(model=model, args=options, train_dataset=ragged_rows(32))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train("whole")
    assert whole.state.global_step == 4
    resumed = train("resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(snapshot(whole.model), snapshot(resumed.model))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    assert_equal(snapshot(whole.model), snapshot(loaded))
    assert loaded.config.hf_prune == whole.model.config.hf_prune


@pytest.mark.parametrize("pattern", ["head", "block", "4x1"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "mpnet"])
def test_pruned_and_condensed_again(family: str, pattern: str, tmp_path: Path) -> None:
    model = models.tiny(family)
    models.prune_randomly(model)
    condense(model)
    pattern = "kv_group" if (family, pattern) == ("llama", "head") else pattern
    rules = [PruningRule(pattern=pattern, target_sparsity=0.5)] + ([PruningRule(pattern="neuron")] if pattern != "block" else [])
    config = PruningConfig(criterion="magnitude", schedule="constant", scope="global", target_sparsity=0.5, rules=rules)
    prune_at_once(model, config)
    batch, plan, parameters = models.ragged_batch(model), condense_plan(model), model.num_parameters()
    before = logits(model, batch)
    assert plan.parameters > 0
    torch.testing.assert_close(logits(condense(model), batch), before, rtol=0, atol=1e-5)
    assert model.num_parameters() == parameters - plan.parameters
    model.save_pretrained(tmp_path)
    assert logits(type(model).from_pretrained(tmp_path), batch).equal(logits(model, batch))


def test_pruned_again_in_the_trainer(tmp_path: Path) -> None:
    model = tiny_bert()
    models.prune_randomly(model)
    condense(model)
    config = PruningConfig(pattern="neuron", criterion="magnitude", frequency=1, target_sparsity=0.5)
    callback = PruningCallback(config)
    Trainer(model=model, args=arguments(tmp_path), train_dataset=ragged_rows(32), callbacks=[callback]).train()
    batch = {"input_ids": torch.arange(2 * LENGTH).view(2, LENGTH)}
    before = logits(model, batch)
    parameters = model.num_parameters()
    torch.testing.assert_close(logits(condense(model), batch), before, rtol=0, atol=1e-5)
    assert model.num_parameters() < parameters


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama-with-biases", "t5"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout_rate")
    config = models.FAMILIES[family]()
    model = condensed(family, **{name: 0.0 for name in names if hasattr(config, name)}).train()
    assert any(block.num_units == 0 for block in find_blocks(model) if block.kind == "attention")
    batch = {**models.ragged_batch(model), "labels": torch.tensor([0, 1, 1, 0])}
    gradients: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch).loss.backward()
        named = ((name, parameter.grad) for name, parameter in model.named_parameters())
        gradients.append({name: gradient.clone() for name, gradient in named if gradient is not None})
    assert len(gradients[0]) > 20
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
def test_static_cache(family: str) -> None:
    model = models.tiny(family, models.GENERATORS[family])
    models.prune_randomly(model)
    for block in find_blocks(model):
        if block.kind == "attention" and block.layer.endswith(".0"):
            models.zero_units(block, list(range(block.num_units)), "out")
    inputs = {"input_ids": torch.tensor([[7, 8, 9], [0, 6, 4]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    settings |= {"cache_implementation": "static", "disable_compile": True}
    before = model.generate(**inputs, **settings)
    after = condense(model).generate(**inputs, **settings)
    assert find_blocks(model)[0].num_units == 0
    assert before.sequences.equal(after.sequences)
    assert max(float((one - other).abs().max()) for one, other in zip(before.logits, after.logits)) <= 1e-5


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("family", ["gpt2", "bart", "bert"])
def test_cross_attention_to_states_from_elsewhere(family: str, which: str) -> None:
    """A decoder whose encoder is another model's, as in `EncoderDecoderModel`, step by step with a cache."""
    config = models.FAMILIES[family]()
    config.update({"is_decoder": True, "add_cross_attention": True})
    torch.manual_seed(0)
    cls = {"gpt2": "GPT2LMHeadModel", "bart": "BartForCausalLM", "bert": "BertLMHeadModel"}[family]
    model = models.randomize(getattr(transformers, cls)(config)).eval()
    heads = [0, 1, 2, 3] if which == "all" else [1, 2]
    for block in find_blocks(model):
        if block.kind == "attention" and block.layer.endswith((".0", ".2")):
            models.zero_units(block, heads, "in")
    ids, states = torch.tensor([[7, 8, 9, 10], [5, 6, 4, 3]]), torch.randn(2, 5, 32)
    others = {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}

    def steps() -> list[Tensor]:
        with torch.no_grad():
            whole = model(ids, **others).logits
            first = model(ids[:, :3], **others, use_cache=True)
            last = model(ids[:, 3:], **others, past_key_values=first.past_key_values, use_cache=True)
        return [whole, first.logits, last.logits]

    before = steps()
    condense(model)
    crosses = [block for block in find_blocks(model) if block.kind == "attention"]
    assert {block.num_units for block in crosses} == {4 - len(heads), 4}
    for wanted, given in zip(before, steps()):
        torch.testing.assert_close(given, wanted, rtol=0, atol=1e-5)
