"""Model cards: they say what the model is, the Hub's metadata survives a round trip, a Trainer makes them by itself."""

from __future__ import annotations

import itertools
import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from card_cases import FACTS, HALF, accuracy, halved, rows
from helpers import arguments, ragged_rows, tiny_bert
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_eval_result, metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from PIL import Image
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.pytorch_utils import Conv1D

import hf_prune
from hf_prune import CardFacts, ConfigError, ModelCardCallback, PruningCallback, PruningConfig, PruningRule, condense
from hf_prune.hub.card import PICTURES, auto_class, pipeline_tag, write_card
from hf_prune.measure.latency import benchmark, compare, warm
from hf_prune.measure.sparsity import original_blocks, stock_twin, total_sparsity
from hf_prune.model import find_blocks


def weights_of(model: nn.Module) -> tuple[int, int]:
    """Weights that are not zero, and all weights, of every linear layer below the base model: a slow count."""
    matrices = [module.weight for module in model.base_model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    return sum(int((matrix != 0).sum()) for matrix in matrices), sum(matrix.numel() for matrix in matrices)


# ---------------------------------------------------------------------------------------------------------- what a card counts


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sizes_before_condensing_are_remembered(family: str) -> None:
    masked = halved(family, "out")
    dense = weights_of(masked)[1]
    before = [(block.name, block.units, block.alive) for block in original_blocks(masked)]
    assert total_sparsity(masked) == pytest.approx(1 - weights_of(masked)[0] / dense)
    condensed = condense(masked)
    assert [(block.name, block.units, block.alive) for block in original_blocks(condensed)] == before
    assert [row[2] for row in before[:2]] == [2, 37]
    assert total_sparsity(condensed) == pytest.approx(1 - weights_of(condensed)[0] / dense)
    fresh = models.tiny(family)
    assert stock_twin(condensed, "meta").num_parameters() == fresh.num_parameters() > condensed.num_parameters()


def test_removed_layers_are_remembered() -> None:
    model = models.tiny("qwen2")
    for block in find_blocks(model)[2:4]:
        units = block.num_units
        models.zero_units(block, list(range(units)), "out")
    condense(model)
    assert model.config.num_hidden_layers == 2
    assert [block.alive for block in original_blocks(model)] == [8, 40, 0, 0, 8, 40]
    assert stock_twin(model, "meta").num_parameters() == models.tiny("qwen2").num_parameters()


def test_the_comparison_weighs_both_models() -> None:
    model = condense(halved())
    seen: list[range] = []
    comparison = compare(model, rows=2, tokens=8, repeats=1, track=lambda rounds: seen.append(rounds) or rounds)
    assert comparison.model.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert comparison.dense.parameters == models.tiny().num_parameters()
    assert comparison.model.weight_bytes == sum(
        tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers())
    )
    assert comparison.latency_ratio == comparison.dense.milliseconds / comparison.model.milliseconds > 0
    assert "batch of 2 × 8" in comparison.protocol
    assert "warm forwards in 1 turns" in comparison.protocol
    assert len(seen) == 1
    assert "dense" in str(comparison)


def test_models_take_turns() -> None:
    calls: list[str] = []
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    for name, module in {"one": one, "other": other}.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    benchmark({"one": one, "other": other}, {"input": torch.zeros(1)}, repeats=2)
    assert [name for name, _ in itertools.groupby(calls)] == ["one", "other"] * 2


@pytest.mark.parametrize(("seconds", "forwards", "counted"), [(0.3, 2, 1), (0.02, 4, 2), (0.001, 17, 8), (0.0, 17, 8)])
def test_the_second_half_of_a_turn_counts(seconds: float, forwards: int, counted: int) -> None:
    calls: list[int] = []

    def clock() -> float:
        return seconds * len(calls)

    cpu, wall = warm(lambda: calls.append(0), (clock, lambda: float(len(calls) ** 2)))
    assert len(calls) == forwards
    assert cpu == pytest.approx([seconds] * counted)
    assert wall == [(call + 1) ** 2 - call**2 for call in range(forwards - counted, forwards)]


FAULTS = """
import resource
import torch
from hf_prune.measure.latency import warm

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(7 << 18) for _ in range(6)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(8 << 18)
cold = faults(), faults()
warm(lambda: None, (float,))
torch.ones(8 << 18)
faults()
print(*cold, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="says how glibc's allocator works")
def test_a_timed_forward_does_not_wait_for_memory() -> None:
    """A fresh process gives memory back after each forward and faults it in again; not once something was timed."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    _, cold, after = map(int, done.stdout.split())
    assert after < 100 < 1000 < cold


def test_activations_are_counted_where_they_live() -> None:
    """Of two linear layers in a row, input, hidden and output never live all three; the largest pair is hidden and output."""
    from hf_prune.measure.memory import activation_bytes

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.last = nn.Linear(4, 100), nn.Linear(100, 30), nn.Linear(30, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.up(x)
            x = self.down(x)
            return self.last(x)

    assert activation_bytes(Chain(), {"x": torch.zeros(5, 4)}) == 4 * 5 * (100 + 30)


# ---------------------------------------------------------------------------------------------------------------------- cards


@pytest.mark.parametrize("condensed", [False, True], ids=["masked", "condensed"])
def test_card_of_a_model(condensed: bool, tmp_path: Path) -> None:
    model = halved(how="out")
    dense = model.num_parameters()
    if condensed:
        condense(model)
        facts = CardFacts(**{**vars(FACTS), "comparison": compare(model, rows=1, tokens=8, repeats=1).to_dict()})
    else:
        facts = FACTS
    card = write_card(tmp_path, model, HALF, facts, "me/tiny-half")
    text = (tmp_path / "README.md").read_text()
    assert text == str(card)
    for part in (
        f"{model.num_parameters():,} ({dense:,} before)",
        "| accuracy | 0.7500 | 0.6875 | -0.0625 |",
        "| f1 |  | 0.5000 |  |",
    ):
        assert part in text
    assert "2 of 4 heads" in text
    assert "37 of 40 neurons" in text
    assert r"| rules\[1\] | neuron | 0.5 | snip_momentum | global | cubic |" in text
    assert f"transformers {__import__('transformers').__version__}" in text
    assert 'AutoModelForSequenceClassification.from_pretrained("me/tiny-half"' in text
    assert ("trust_remote_code" in text) == condensed
    assert ("would cut" in text) == (not condensed)
    assert ("Protocol: batch of 1 × 8" in text) == condensed
    assert "{{" not in text
    assert "{%" not in text
    assert "\n\n\n\n" not in text

    pictures = {"kept.png", "history.png"} | ({"latency.png"} if condensed else set())
    assert {path.name for path in (tmp_path / PICTURES).iterdir()} == pictures
    for name in pictures:
        assert f"]({PICTURES}/{name})" in text
        with Image.open(tmp_path / PICTURES / name) as image:
            assert len(image.convert("L").getcolors() or []) > 20
    assert CardFacts.load(tmp_path) == facts
    assert PruningConfig.from_pretrained(tmp_path) == HALF


def test_metadata_survives_the_hubs_own_reader(tmp_path: Path) -> None:
    write_card(tmp_path, halved(), HALF, FACTS)
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "tiny-half"
    assert {result.metric_type: result.metric_value for result in results} == {"accuracy": 0.6875, "f1": 0.5}
    assert {(result.task_type, result.dataset_type, result.dataset_config, result.dataset_split) for result in results} == {
        ("text-classification", "glue", "mrpc", "validation")
    }
    assert eval_results_to_model_index(name, results) == data["model-index"]
    one = metadata_eval_result(
        model_pretty_name="tiny-half",
        task_pretty_name="Text Classification",
        task_id="text-classification",
        metrics_pretty_name="f1",
        metrics_id="f1",
        metrics_value=0.5,
        dataset_pretty_name="glue mrpc",
        dataset_id="glue",
    )["model-index"][0]["results"][0]
    assert data["model-index"][0]["results"][0].keys() <= one.keys()
    assert {key: data[key] for key in ("base_model", "datasets", "language", "license", "library_name", "pipeline_tag")} == {
        "base_model": "someone/tiny",
        "datasets": "glue",
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
    }
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.to_dict() == data


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    card = hf_prune.model_card(halved(), facts=CardFacts(base_model=str(tmp_path), metrics={"accuracy": 0.5}))
    assert card.data.base_model is None
    assert f"started from `{tmp_path.name}`" in card.text
    assert str(tmp_path.parent) not in card.text
    assert card.data.eval_results is None
    assert "| accuracy |  | 0.5000 |  |" in card.text
    assert "No pruning config was recorded." in card.text
    assert "No evaluation was recorded." in hf_prune.model_card(halved()).text


@pytest.mark.parametrize(("family", "head"), [("bert", "masked-lm"), ("gpt2", "causal-lm"), ("vit", None), ("bert", "bare")])
def test_card_of_any_head(family: str, head: str | None) -> None:
    model = models.tiny(family, head)
    assert f"transformers import {auto_class(model)}" in hf_prune.model_card(model).text
    expected = {
        "masked-lm": "fill-mask",
        "causal-lm": "text-generation",
        None: "image-classification",
        "bare": "feature-extraction",
    }
    assert pipeline_tag(model) == expected[head]


def test_a_family_without_a_spec_has_a_card() -> None:
    from transformers import FNetConfig, FNetModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 16}
    text = hf_prune.model_card(FNetModel(FNetConfig(**sizes))).text
    assert "0.00% of the model's body" in text


def test_unknown_facts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"datset='glue'.*Did you mean 'dataset'"):
        ModelCardCallback(datset="glue")


# -------------------------------------------------------------------------------------------------------------------- training


def trainer_with_card(folder: Path, callback: TrainerCallback, **settings: Any) -> Trainer:
    return Trainer(
        model=tiny_bert(),
        args=arguments(folder, **{"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2} | settings),
        train_dataset=rows(32),
        eval_dataset=rows(16),
        compute_metrics=accuracy,
        callbacks=[PruningCallback(HALF), callback],
    )


def test_a_trainer_fills_the_card(tmp_path: Path) -> None:
    callback = ModelCardCallback(language="en")
    trainer = trainer_with_card(tmp_path / "half", callback, learning_rate=0.0123, save_strategy="steps", save_steps=2)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    facts = CardFacts.load(tmp_path / "half")
    assert facts.metrics_before == {"loss": before["eval_loss"], "accuracy": before["eval_accuracy"]}
    assert facts.metrics == {"loss": after["eval_loss"], "accuracy": after["eval_accuracy"]}
    assert (facts.model_name, facts.dataset, facts.dataset_config) == ("half", "glue", "mrpc")
    assert [entry["step"] for entry in facts.history if "accuracy" in entry][:2] == [2, 4]
    assert facts.history[-1]["reached_sparsity"] == pytest.approx(0.5)
    assert PruningConfig.from_pretrained(tmp_path / "half") == HALF
    text = (tmp_path / "half" / "README.md").read_text()
    assert "| learning_rate | 0.0123 |" in text
    assert "2 of 4 heads" in text or "1 of 4 heads" in text
    trainer.create_model_card(model_name="half")  # as `push_to_hub` does, right before it uploads
    assert (tmp_path / "half" / "README.md").read_text() == text

    resumed = trainer_with_card(tmp_path / "half", ModelCardCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert CardFacts.load(tmp_path / "half").metrics_before == facts.metrics_before


def test_the_card_has_the_metrics_of_the_best_model(tmp_path: Path) -> None:
    settings = {"eval_on_start": True, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    callback = ModelCardCallback()
    trainer = trainer_with_card(tmp_path, callback, metric_for_best_model="eval_loss", learning_rate=0.5, **settings)
    trainer.train()
    logged = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert callback.facts.metrics_before["loss"] == logged[0]
    assert callback.facts.metrics["loss"] == logged[trainer.state.best_global_step]
    assert callback.facts.dataset == "glue"


def test_where_a_model_lay_is_not_published(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "dense")
    callback = ModelCardCallback()
    trainer = trainer_with_card(tmp_path / "out", callback)
    trainer.model.config.name_or_path = str(tmp_path / "dense")
    trainer.train()
    files = [path.read_text() for path in (tmp_path / "out").glob("*.*") if path.suffix in (".md", ".json")]
    assert len(files) == 3
    assert all(str(tmp_path) not in text for text in files)
    assert callback.facts.base_model == "./dense"
    assert "base_model" not in files[0].partition("# out")[0]


def test_a_trainer_without_the_callback_writes_its_own_card(tmp_path: Path) -> None:
    trainer = Trainer(model=tiny_bert(), args=arguments(tmp_path), train_dataset=ragged_rows(8))
    trainer.create_model_card()
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()
    assert "hf_prune" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("where", ["out", "elsewhere"])
def test_the_card_of_a_saved_model_knows_its_run(where: str, tmp_path: Path) -> None:
    """Config, metrics and base model of a Trainer that had no callback for cards, as `hf-prune card` finds them."""
    trainer = Trainer(tiny_bert(), arguments(tmp_path / "out", max_steps=3), train_dataset=rows(24), eval_dataset=rows(16))
    trainer.add_callback(PruningCallback(HALF))
    folder = tmp_path / where
    trainer.save_model(str(tmp_path / "before"))
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_metrics("eval", measured)
    trainer.save_model(None if where == "out" else str(folder))
    trainer.create_model_card(finetuned_from="someone/tiny", language="en", license="apache-2.0")
    if where == "elsewhere":
        for name in ("README.md", "eval_results.json"):
            (tmp_path / "out" / name).rename(folder / name)
    assert PruningConfig.from_pretrained(folder) == HALF
    assert not (tmp_path / "before" / "pruning_config.json").exists()
    facts = CardFacts.load(folder)
    assert (facts.base_model, facts.language, facts.license) == ("someone/tiny", "en", "apache-2.0")
    assert facts.metrics == {"loss": measured["eval_loss"]}
    text = str(write_card(folder, trainer.model, PruningConfig.from_pretrained(folder), facts))
    assert "No pruning config" not in text
    assert "No evaluation" not in text
    assert "base_model: someone/tiny" in text


def test_what_the_trainers_card_was_told_is_kept(tmp_path: Path) -> None:
    trainer = trainer_with_card(tmp_path, ModelCardCallback(language="de"))
    trainer.train()
    trainer.create_model_card(finetuned_from="someone/tiny", language="en", license="mit")
    data = metadata_load(tmp_path / "README.md")
    assert data is not None
    assert (data["base_model"], data["language"], data["license"]) == ("someone/tiny", "de", "mit")


@pytest.mark.parametrize("readme", ["no metadata", "---\n- a\n---\n", "---\na: [\n---\n", "---\nbase_model: [a, b]\n---\n"])
def test_a_readme_of_ones_own_says_nothing(readme: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "eval_results.json").write_text('{"eval_name": "x", "eval_f1": 0.5, "epoch": 1}')
    assert CardFacts.load(tmp_path) == CardFacts(metrics={"f1": 0.5})


EVIL = "x\n# Heading\n| a | b |\n<script>alert(1)</script> [link](http://evil) `code` ``` ![](http://evil)"


def test_names_are_no_markup(tmp_path: Path) -> None:
    names = dict.fromkeys(("model_name", "base_model", "dataset", "dataset_name", "dataset_split"), EVIL)
    measured = compare(models.tiny(), models.tiny(), EVIL, rows=1, tokens=8, repeats=1).to_dict()
    facts = CardFacts(metrics={EVIL: 0.5}, training={EVIL: EVIL}, comparison={**measured, "protocol": EVIL}, **names)
    config = PruningConfig(rules=[PruningRule(pattern="head", target_modules=[EVIL])])
    card = hf_prune.model_card(halved(), config, facts)
    plain = hf_prune.model_card(halved(), HALF, FACTS)
    shown = re.sub(r"```python\n.*?\n```|(?<!\\)`[^`\n]*`", "", card.text, flags=re.DOTALL)  # code shows what it holds as it is
    for part in ("<script", "\n# Heading", "\n| a |", " [link]", "![](http", "``"):
        assert part not in shown, part
    assert [line for line in card.text.splitlines() if line.startswith("#")][1:] == [
        line for line in plain.text.splitlines() if line.startswith("#")
    ][1:]


def test_no_pictures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    write_card(tmp_path, halved(), HALF, FACTS)
    assert not (tmp_path / PICTURES).exists()
    assert "![" not in (tmp_path / "README.md").read_text()


def test_facts_are_plain_json(tmp_path: Path) -> None:
    FACTS.save(tmp_path)
    assert json.loads((tmp_path / "pruning_facts.json").read_text())["dataset"] == "glue"
    assert CardFacts.load(tmp_path / "elsewhere") == CardFacts()


@pytest.mark.parametrize("content", ["{", "[0.5]", "\x00"])
def test_results_that_cannot_be_read_are_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "eval_results.json").write_text(content)
    with pytest.raises(ValueError, match=r"eval_results\.json (is not valid JSON|must hold a JSON object)"):
        CardFacts.load(tmp_path)


@pytest.mark.parametrize("even", [True, False])
def test_only_a_model_that_needs_it_is_said_to_need_hf_prune(even: bool) -> None:
    model = models.tiny("bert")
    if even:
        models.prune_evenly(model, heads=False)
    else:
        models.prune_randomly(model)
    text = str(hf_prune.model_card(condense(model)))
    assert "then condensed" in text
    assert ("hf_prune is not needed" in text) == even
    assert ("trust_remote_code" in text) == ("pip install hf-prune" in text) == (not even)
