"""Faults of the systems that hf_prune replaces, each as a test that they would fail (Intel Neural Compressor 3.7, NNI 3.0)."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from helpers import tiny_bert
from models import ragged_batch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune import ConfigError, Pruner, PruningConfig, PruningRule, condense, condense_plan, sparsity_report
from hf_prune.model import find_blocks
from hf_prune.model.targets import weight_target
from hf_prune.pruning.criteria.gradients import SnipMomentum


def prune(model: PreTrainedModel, config: PruningConfig, steps: int = 6, of: int | None = None) -> Pruner:
    """A short run with real gradients, or the first steps of a longer one."""
    pruner = Pruner(model, config, total_steps=of or steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(steps):
        batch = ragged_batch(model, seed=step)
        model.train()(
            **batch, labels=torch.zeros(4, dtype=torch.long) if model.config.model_type != "gpt2" else batch["input_ids"]
        ).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    return pruner


# ------------------------------------------------------------------------------------------------------ Intel Neural Compressor


def test_a_typo_in_a_key_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'target_sparsity'"):
        PruningConfig.from_dict({"pattern": "4x1", "target_sparsitty": 0.5})


def test_two_configs_share_nothing() -> None:
    first, second = PruningConfig(pattern="4x1"), PruningConfig(pattern="4x1")
    first.rules.append(PruningRule(pattern="head"))
    assert second.rules == []


def test_all_zero_scores_prune_as_much_as_was_asked_for_and_wipe_no_layer() -> None:
    model = tiny_bert(num_hidden_layers=2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner = Pruner(model, PruningConfig(pattern="4x1", schedule="constant", exclude_modules=["pooler.dense"]), total_steps=2)
    pruner.observe()
    pruner.step()
    assert pruner.reached_sparsity() == 0.5
    assert {module.sparsity for module in sparsity_report(model).modules if "pooler" not in module.name} == {0.5}


def test_a_shape_that_4x1_does_not_divide_is_left_dense_and_reported() -> None:
    model = tiny_bert(num_hidden_layers=1, intermediate_size=42)
    pruner = prune(model, PruningConfig(pattern="4x1", frequency=1))
    assert "not divisible" in pruner.plan().left_out["bert.encoder.layer.0.intermediate.dense"]
    assert bool((model.bert.encoder.layer[0].intermediate.dense.weight != 0).all())
    with pytest.raises(ConfigError, match="42x32 is not divisible by 4x1"):
        Pruner(
            tiny_bert(num_hidden_layers=1, intermediate_size=42),
            PruningConfig(pattern="4x1", target_modules=["intermediate.dense"]),
            total_steps=2,
        )


def test_the_floor_of_each_module_is_enforced() -> None:
    model = tiny_bert(num_hidden_layers=2)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight.mul_(1000)  # it would keep everything
    prune(model, PruningConfig(pattern="1x1", criterion="magnitude", min_sparsity_per_module=0.3, frequency=1))
    sparsity = {module.name: module.sparsity for module in sparsity_report(model).modules}
    assert sparsity["bert.encoder.layer.0.output.dense"] == pytest.approx(0.3, abs=1e-3)
    assert min(sparsity.values()) >= 0.3 - 1e-3


def test_a_target_above_the_cap_is_an_error_not_another_target() -> None:
    with pytest.raises(ConfigError, match=r"target_sparsity=0\.99 unreachable"):
        PruningConfig(pattern="4x1", target_sparsity=0.99)
    model = tiny_bert(num_hidden_layers=1)
    pruner = prune(model, PruningConfig(pattern="1x1", target_sparsity=0.99, max_sparsity_per_module=1.0, frequency=1))
    assert pruner.reached_sparsity() == pytest.approx(0.99, abs=1e-4)


def test_biases_of_removed_rows_go_with_the_row() -> None:
    model = tiny_bert(num_hidden_layers=1)
    prune(model, PruningConfig(pattern="1xchannel", frequency=1))
    for module in model.bert.encoder.layer[0].modules():
        if isinstance(module, torch.nn.Linear):
            gone = (module.weight == 0).all(dim=1)
            assert torch.equal(module.bias == 0, gone)


def test_locking_2_4_keeps_what_is_there() -> None:
    model = tiny_bert(num_hidden_layers=1)
    prune(model, PruningConfig(pattern="2:4", criterion="magnitude", scope="local", frequency=1)).finish()
    before = sparsity_report(model).sparsity
    prune(model, PruningConfig(keep_zeros=True))
    assert sparsity_report(model).sparsity == before == 0.5


@pytest.mark.parametrize("pattern", ["2:4", "4x1", "1xchannel", "head", "neuron"])
def test_gpt2_is_pruned_along_the_right_axis_and_counted_once(pattern: str) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_positions=40, n_embd=32, n_layer=2, n_head=4, pad_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    if pattern in ("head", "neuron"):
        try:
            find_blocks(model)
        except ValueError:
            pytest.skip("GPT-2 has no architecture spec")
    pruner = prune(model, PruningConfig(pattern=pattern, frequency=1, scope="local"))
    assert pruner.reached_sparsity() == pytest.approx(0.5, abs=0.01)
    module = model.transformer.h[0].mlp.c_fc
    out_in = module.weight.detach().T  # Conv1D stores [in, out]
    assert torch.equal(weight_target("m", module).matrix(module.weight), module.weight.T)
    if pattern == "2:4":
        assert (out_in == 0).view(out_in.shape[0], -1, 4).sum(dim=2).unique().tolist() == [2]
    elif pattern == "4x1":
        assert (out_in == 0).view(-1, 4, out_in.shape[1]).sum(dim=1).unique().tolist() == [0, 4]
    elif pattern == "1xchannel":
        rows = (out_in == 0).all(dim=1)
        assert int(rows.sum()) == out_in.shape[0] // 2
        assert torch.equal(module.bias == 0, rows)


def test_scoring_stops_when_no_update_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    observe = SnipMomentum.observe
    monkeypatch.setattr(SnipMomentum, "observe", lambda self, group: (calls.append(group.name), observe(self, group))[1])
    prune(tiny_bert(num_hidden_layers=1), PruningConfig(pattern="head", frequency=1, cooldown_steps=4), steps=6)
    assert len(calls) == 2


# ------------------------------------------------------------------------------------------------------------------------- NNI


def test_a_head_whose_queries_alone_are_zero_stays() -> None:
    model = tiny_bert(num_hidden_layers=1)
    attention = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        attention.query.weight[:8] = 0
    batch = ragged_batch(model)
    with torch.no_grad():
        before = model.eval()(**batch).logits
    assert not condense_plan(model).changed
    condense(model)
    assert attention.num_attention_heads == 4
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


def test_a_run_that_prunes_nothing_fails_loudly() -> None:
    pruner = Pruner(tiny_bert(num_hidden_layers=1), PruningConfig(pattern="head", schedule="constant"), total_steps=1)
    pruner.steps = 1
    with pytest.raises(RuntimeError, match="no weight is zero"):
        pruner.finish()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_is_cut_short_before_its_first_update_ends_as_it_is(steps: int) -> None:
    pruner = prune(tiny_bert(num_hidden_layers=1), PruningConfig(pattern="4x1", warmup_steps=1, frequency=4), steps=steps, of=12)
    pruner.finish()
    assert pruner.sparsity() == 0
    assert pruner.shortfall is not None


@pytest.mark.parametrize("criterion", ["apoz", "mean_activation", "wanda"])
def test_padding_is_no_data(criterion: str) -> None:
    def scores(padding: int) -> list[Tensor]:
        model = tiny_bert(num_hidden_layers=1)
        batch = ragged_batch(model)
        rows = {name: torch.nn.functional.pad(value, (0, padding), value=0) for name, value in batch.items()}
        pruner = Pruner(model, PruningConfig(pattern="neuron", criterion=criterion), total_steps=3)
        model.train()(**rows, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
        pruner.observe()
        rule = pruner.rules[0]
        return [rule.criterion.scores(group) for group in rule.groups]

    for left, right in zip(scores(0), scores(7)):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", ["head", "neuron", "1x1"])
def test_one_global_group_does_not_wipe_a_layer(pattern: str) -> None:
    model = tiny_bert(num_hidden_layers=3)
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[1].parameters():
            parameter.mul_(1e-3)
    prune(model, PruningConfig(pattern=pattern, criterion="magnitude", frequency=1, exclude_modules=["pooler.dense"]))
    for block in sparsity_report(model).blocks:
        assert block.alive >= 1, block


def test_what_was_condensed_equals_what_was_masked_whatever_the_inputs() -> None:
    """NNI traced one constant batch; here real, ragged inputs are compared, and copies share nothing."""
    model = tiny_bert(num_hidden_layers=2)
    prune(model, PruningConfig(rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")], frequency=1)).finish()
    masked = copy.deepcopy(model).eval()
    condense(model.eval())
    for seed in range(3):
        batch = ragged_batch(model, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, masked(**batch).logits, rtol=0, atol=1e-5)


def test_large_activations_are_no_difference() -> None:
    """Rounding in float32 alone exceeds 1e-5 where a trained model's hidden states are large."""
    model = tiny_bert(num_hidden_layers=3)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.LayerNorm.weight.mul_(300)
            layer.attention.output.dense.weight[:, :8] = 0
            layer.intermediate.dense.weight[::3] = 0
    batch = ragged_batch(model)
    with torch.no_grad():
        before = model(**batch, output_hidden_states=True).hidden_states[-1]
        condense(model)
        after = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert float((after - before).abs().max()) > 1e-5
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-3)
