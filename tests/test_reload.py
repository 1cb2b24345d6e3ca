"""Condensed models load in fresh processes, with hf_prune and without, and can be saved again; malformed sizes are refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from reloading import reload, save_expected, save_tokenizer
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune import condense, condense_plan
from hf_prune.condense.refusal import NEEDED_OR_REMOTE
from hf_prune.hooks import install_reload_hook
from hf_prune.hub import MODELING, modeling_source
from hf_prune.measure.sparsity import sparsity_report, stock_twin, total_sparsity
from hf_prune.model import find_blocks

# What a user's process does with every checkpoint in a folder: load it in one way, compare with what the model computed before it
# was saved, save it again. It prints a JSON report.


#: Each family with the head that classifies; BERT with more.
CLASSIFIERS = [(family, None) for family in models.FAMILIES] + [("bert", "bare"), ("bert", "masked-lm")]


def test_fresh_processes(tmp_path: Path) -> None:
    check_fresh_processes(tmp_path, CLASSIFIERS)


@pytest.mark.slow
def test_fresh_processes_everywhere(tmp_path: Path) -> None:
    check_fresh_processes(tmp_path, models.MATRIX)


def check_fresh_processes(tmp_path: Path, cases: Sequence[tuple[str, str | None]]) -> None:
    first, by_import, by_remote, last = (tmp_path / name for name in ("first", "by-import", "by-remote", "last"))
    classes = {}
    for family, head in cases:
        head = head or models.classifier_of(family)
        model = models.tiny(family, head)
        models.prune_randomly(model)
        # silent: a decoder alone keeps a layer whose cross-attention adds a constant
        removed = models.empty_layers(model, {2}, silent=True) if family in models.PRE_NORM else {}
        condense(model, verify=False)
        assert model.config.hf_prune.get("removed_layers", {}) == removed
        folder = first / f"{family}-{models.HEADS[head].__name__}"
        model.save_pretrained(folder)
        save_expected(model, folder)
        classes[folder.name] = type(model).__name__
    name = "bert-AutoModelForSequenceClassification"
    save_tokenizer(first / name)

    reports = {
        "by import": reload("import", first, by_import),
        "saved after import, by remote code": reload("remote", by_import, by_remote),
        "saved after remote code, by import": reload("import", by_remote, last),
    }
    for way, report in reports.items():
        assert report.keys() == classes.keys()
        for checkpoint, row in report.items():
            assert row["gap"] <= 1e-6, (way, checkpoint)
            assert row.get("both", 0) <= 1e-6, (way, checkpoint)
            assert row.get("directly", 0) <= 1e-6, (way, checkpoint)
            assert row["class"] == classes[checkpoint]
            assert row["module"].startswith("transformers_modules." if "by remote" in way else "transformers.models.")
            if "by remote" in way:
                assert all(NEEDED_OR_REMOTE in refusal for refusal in row["stock"]), (checkpoint, row["stock"])
    scores = [report[name]["pipeline"] for report in reports.values()]
    assert scores == [scores[0]] * 3

    for folder in last.iterdir():
        config = json.loads((folder / "config.json").read_text())
        assert config["hf_prune"] == json.loads((first / folder.name / "config.json").read_text())["hf_prune"]
        assert (folder / f"{MODELING}.py").read_text() == modeling_source(config["model_type"])


def test_models_whose_layers_agree_are_ordinary_ones(tmp_path: Path) -> None:
    first, by_stock, by_import = (tmp_path / name for name in ("first", "by-stock", "by-import"))
    for family in models.FAMILIES:
        model = models.tiny(family)
        before = [parameter.numel() for parameter in stock_twin(model, "meta").parameters()]
        models.prune_evenly(model, heads=family in models.SET_HEADS)
        condense(model, verify=False, uniform=True)
        assert [parameter.numel() for parameter in stock_twin(model, "meta").parameters()] == before
        folder = first / f"{family}-{models.HEADS[models.classifier_of(family)].__name__}"
        model.save_pretrained(folder)
        save_expected(model, folder)
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
        config = json.loads((folder / "config.json").read_text())
        assert not {"auto_map", "transformers_weights"} & config.keys()
        assert config["hf_prune"]["layers"] == {}
        assert {40} <= set(config["hf_prune"]["original"].values()) <= {40, 8, 4, 1}
        heads = {"num_attention_heads", "num_heads"} & config["hf_prune"]["original"].keys()
        assert bool(heads) == (family in models.SET_HEADS)
    reports = [reload("stock", first, by_stock), reload("import", by_stock, by_import)]
    for report in reports:
        assert len(report) == len(models.FAMILIES)
        assert {checkpoint: row["gap"] for checkpoint, row in report.items() if row["gap"]} == {}
        assert all(row["module"].startswith("transformers.models.") for row in report.values())
    for folder in by_import.iterdir():
        sizes = [json.loads((root / folder.name / "config.json").read_text())["hf_prune"] for root in (first, by_import)]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "t5", "vit", "llama"])
def test_an_ordinary_model_condensed_again(family: str, tmp_path: Path) -> None:
    model = models.tiny(family)
    auto = models.HEADS[models.classifier_of(family)]
    models.prune_evenly(model, heads=family in models.SET_HEADS)
    condense(model).save_pretrained(tmp_path / "even")
    original = model.config.hf_prune["original"]

    model = auto.from_pretrained(tmp_path / "even")
    block = next(block for block in find_blocks(model) if block.kind == "feed_forward")
    models.zero_units(block, [3, 4], "out")
    condense(model).save_pretrained(tmp_path / "uneven")
    assert model.config.hf_prune["original"] == original
    assert model.config.hf_prune["layers"] == {block.layer: {block.key: {"intermediate_size": 28}}}
    assert (tmp_path / "uneven" / f"{MODELING}.py").exists()
    loaded = auto.from_pretrained(tmp_path / "uneven")
    weights = [sparsity_report(each).modules for each in (models.tiny(family), loaded)]
    dense, left = (sum(module.parameters for module in modules) for modules in weights)
    assert total_sparsity(loaded) == pytest.approx(1 - left / dense)
    assert same_outputs(loaded, model)

    for other in find_blocks(loaded):
        if other.kind == "feed_forward" and other.num_units == 30:
            models.zero_units(other, [0, 1], "out")
    condense(loaded).save_pretrained(tmp_path / "even again")
    config = json.loads((tmp_path / "even again" / "config.json").read_text())
    assert config["hf_prune"] == {"version": 1, "layers": {}, "original": original}
    assert not {"auto_map", "transformers_weights"} & config.keys()
    assert same_outputs(auto.from_pretrained(tmp_path / "even again"), loaded)


def same_outputs(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    inputs = models.ragged_batch(one)
    with torch.no_grad():
        return bool(one(**inputs)[0].equal(other(**inputs)[0]))


#: Family and what is zeroed in all layers alike → what keeps the result from being an ordinary model.
IN_THE_WAY = {
    ("bert", "heads"): "the config of bert has no field for num_attention_heads=2 of encoder.layer.0.attention.self",
    ("mpnet", "heads"): "the config of mpnet has no field for num_attention_heads=2 of encoder.layer.0.attention.attn",
    (
        "t5",
        "other heads in each layer",
    ): "encoder.block.1.layer.0.SelfAttention keeps heads [0, 3], but encoder.block.0 keeps [2, 3]",
    ("llama", "heads"): "stock llama refuses num_attention_heads=6, num_key_value_heads=3",
    ("qwen2", "new biases"): "layers.0.self_attn has a new bias, for what dead units or removed layers added",
    ("bert", "no neurons"): "encoder.layer.0.intermediate.dense has nothing left",
    ("gpt2", "one layer"): "h.1.mlp.c_fc has intermediate_size=40, but h.0.mlp.c_fc has intermediate_size=30",
    ("qwen3", "a removed layer"): "layers.0.mlp.up_proj has a new bias",
}


@pytest.mark.parametrize(("family", "cause"), IN_THE_WAY)
def test_what_the_config_cannot_say(family: str, cause: str, tmp_path: Path) -> None:
    """Such a model is refused by `uniform=True`, which then changes nothing, and else condensed as it is."""
    model = models.tiny(family, **{"attention_bias": True} if cause == "a removed layer" else {})
    if cause == "a removed layer":
        models.empty_layers(model, {1})
    for block in find_blocks(model) if cause != "a removed layer" else ():
        if block.kind == "feed_forward" and (cause != "one layer" or block.layer == "h.0"):
            models.zero_units(block, list(range(40 if cause == "no neurons" else 10)), "out")
        elif block.kind == "attention" and cause == "heads":  # Llama's heads have to divide its hidden size
            models.zero_units(block, [0, 1], "out")
        elif block.kind == "attention" and cause == "other heads in each layer":
            models.zero_units(block, [0, 1] if block.layer.endswith("0") else [1, 2], "out")
        elif block.kind == "attention" and cause == "new biases":
            models.zero_units(block, [0, 1], "in")
    before, shapes_before = model.config.to_dict(), {name: value.shape for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=re.escape(f"uniform=True, but {IN_THE_WAY[family, cause]}")):
        condense(model, uniform=True)
    assert model.config.to_dict() == before
    assert {name: value.shape for name, value in model.named_parameters()} == shapes_before
    condense(model).save_pretrained(tmp_path)
    assert "original" not in model.config.hf_prune
    assert model.config.hf_prune["layers"]
    assert json.loads((tmp_path / "config.json").read_text())["transformers_weights"] == NEEDED_OR_REMOTE
    with pytest.raises(ValueError, match="uniform=True, but "):  # now there is nothing to cut
        condense(model, uniform=True)


def test_removed_layers_leave_an_ordinary_model_or_one_that_stock_code_refuses(tmp_path: Path) -> None:
    """What a removed layer added may become a bias that no stock layer has: tensors more, of which transformers only warns."""
    refused = {}
    for family in filter(models.FAMILIES.get, models.PRE_NORM):
        changes = {"attention_bias": True} if family in ("modernbert", "llama", "qwen3", "gemma") else {}
        model = models.tiny(family, **changes)
        models.empty_layers(model, {1})
        plan = condense_plan(model)
        assert plan.removed
        condense(model, verify=False)
        folder = tmp_path / "first" / f"{family}-{models.HEADS[models.classifier_of(family)].__name__}"
        model.save_pretrained(folder)
        save_expected(model, folder)
        refused[folder.name] = any(block.adds_bias for block in plan.blocks)
    assert {name.partition("-")[0] for name, new in refused.items() if new} == {"modernbert", "llama", "qwen2", "qwen3", "gemma"}
    for name, row in reload("remote", tmp_path / "first", tmp_path / "last").items():
        assert row["gap"] == row["directly"] == 0
        assert [NEEDED_OR_REMOTE in (refusal or "") for refusal in row["stock"]] == [refused[name]] * 2, (name, row["stock"])


@pytest.mark.parametrize("first", ["code", "pipeline"])
def test_code_of_others_is_not_vouched_for(first: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("bert")
    foreign = "someone/repo--configuration.Config"
    if first == "code":
        model.config.auto_map = {"AutoConfig": foreign, "AutoModel": "modeling_hf_prune.BertModel"}
    else:
        model.config.custom_pipelines = {"classify": {"impl": foreign}}
    models.prune_evenly(model, heads=False)
    condense(model).save_pretrained(tmp_path / "even")  # its card says nothing of trust_remote_code
    assert foreign in (tmp_path / "even" / "config.json").read_text()
    assert "modeling_hf_prune" not in (tmp_path / "even" / "config.json").read_text()
    assert not caplog.records

    models.prune_randomly(model)
    condense(model).save_pretrained(tmp_path / "uneven")
    assert foreign not in (tmp_path / "uneven" / "config.json").read_text()
    assert foreign in caplog.text
    auto_map = json.loads((tmp_path / "uneven" / "config.json").read_text())["auto_map"]
    assert {code.partition(".")[0] for code in auto_map.values()} == {MODELING}


@pytest.mark.core
def test_every_way_to_a_config_is_let_in(condensed: PreTrainedModel, tmp_path: Path) -> None:
    condensed.save_pretrained(tmp_path)
    config = transformers.BertConfig.from_json_file(tmp_path / "config.json")
    assert config.transformers_weights == NEEDED_OR_REMOTE
    kind = type(condensed)
    for loaded in (kind.from_pretrained(tmp_path), kind.from_pretrained(tmp_path, config=config)):
        assert shapes(loaded) == shapes(condensed)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "transformers_weights")


@pytest.fixture
def condensed() -> PreTrainedModel:
    model = models.tiny("bert")
    models.prune_randomly(model)
    return condense(model)


def shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.base_model.encoder.named_parameters()}


@pytest.mark.core
def test_other_heads_dtypes_and_devices(condensed: PreTrainedModel, tmp_path: Path) -> None:
    condensed.save_pretrained(tmp_path)
    auto = transformers.AutoModelForTokenClassification
    model = auto.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu", low_cpu_mem_usage=True)
    assert shapes(model) == shapes(condensed)
    assert model.dtype == torch.bfloat16
    with torch.device("meta"):
        assert shapes(auto.from_config(condensed.config)) == shapes(condensed)
    fresh = auto.from_config(condensed.config)
    assert shapes(fresh) == shapes(condensed)
    assert all(parameter.isfinite().all() and parameter.device.type == "cpu" for parameter in fresh.parameters())


def test_what_is_not_condensed_is_saved_as_ever(tmp_path: Path) -> None:
    models.tiny("bert").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert not {"auto_map", "hf_prune"} & json.loads((tmp_path / "config.json").read_text()).keys()


def test_hook_is_installed_once() -> None:
    before = dict(vars(PreTrainedModel)), dict(vars(PreTrainedConfig))
    install_reload_hook()
    assert (dict(vars(PreTrainedModel)), dict(vars(PreTrainedConfig))) == before


@pytest.mark.parametrize("method", ["push_to_hub", "save_pretrained"])
def test_push_uploads_the_modeling_file(
    method: str, condensed: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: set[str] = set()

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repository", (), {"repo_id": repo_id})

        def create_commit(self, operations: list[Any], **kwargs: Any) -> None:
            uploaded.update(operation.path_in_repo for operation in operations)

        def create_branch(self, **kwargs: Any) -> None: ...

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard(""))
    if method == "push_to_hub":
        condensed.push_to_hub("someone/model")
    else:
        condensed.save_pretrained(tmp_path / "model", push_to_hub=True)
    assert uploaded >= {"config.json", "model.safetensors", f"{MODELING}.py"}


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_modeling_file_stands_alone(family: str, tmp_path: Path) -> None:
    source = modeling_source(models.EVERY_FAMILY[family]().model_type)
    file = tmp_path / f"{MODELING}.py"
    file.write_text(source)
    lint = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E9", str(file)], capture_output=True, text=True
    )
    assert lint.returncode == 0, lint.stdout
    assert not re.search(r"^\s*(import|from) (hf_prune|\.)", source, re.MULTILINE)
    assert len(source.splitlines()) < 700


LAYER = "encoder.layer.0"
ATTENTION = "attention.self"
HEADS_OF = "num_attention_heads"


def entry(layers: Any, version: Any = 1) -> dict[str, Any]:
    return {"version": version, "layers": layers}


def heads(value: Any) -> dict[str, Any]:
    return entry({LAYER: {ATTENTION: {HEADS_OF: value}}})


MALFORMED: dict[str, tuple[Any, str]] = {
    "a list": (
        [],
        "config.hf_prune is []; it must be an object with keys among: version, layers, removed_layers, original, architecture.",
    ),
    "empty": ({}, "config.hf_prune['version'] is None; this code reads version 1."),
    "unknown key": (
        {**heads(1), "layer": {}},
        "config.hf_prune has an unknown key 'layer'; allowed: version, layers, removed_layers, original, architecture. Did",
    ),
    "newer version": (entry({}, 2), "['version'] is 2; this code reads version 1."),
    "version as text": (entry({}, "1"), "['version'] is '1'; this code reads version 1."),
    "version as bool": (entry({}, True), "['version'] is True; this code reads version 1."),
    "no layers": ({"version": 1, "layers": None}, "config.hf_prune['layers'] is None; it must be an object"),
    "layers as list": (entry([1]), "config.hf_prune['layers'] is [1]; it must be an object"),
    "layer beyond the last": (entry({"encoder.layer.3": {}}), "unknown key 'encoder.layer.3'; allowed: encoder.layer.0, "),
    "layer elsewhere": (entry({"pooler": {}}), "config.hf_prune['layers'] has an unknown key 'pooler'"),
    "layer with prefix": (entry({f"bert.{LAYER}": {}}), "Did you mean 'encoder.layer.0'?"),
    "path upwards": (entry({"..": {}}), "config.hf_prune['layers'] has an unknown key '..'"),
    "layer is a number": (entry({LAYER: 3}), "config.hf_prune['layers']['encoder.layer.0'] is 3; it must be an object"),
    "unknown block": (
        entry({LAYER: {"attention": {}}}),
        "unknown key 'attention'; allowed: attention.self, intermediate.dense.",
    ),
    "block elsewhere": (entry({LAYER: {"output.dense": {}}}), "has an unknown key 'output.dense'"),
    "wrong size": (
        entry({LAYER: {ATTENTION: {"intermediate_size": 1}}}),
        "has an unknown key 'intermediate_size'",
    ),
    "no size": (entry({LAYER: {ATTENTION: {}}}), "['num_attention_heads'] is None; allowed: a whole number from 0 to 4, the stock"),
    "negative": (heads(-1), f"['{HEADS_OF}'] is -1; allowed: a whole number from 0 to 4, the stock size."),
    "larger than stock": (heads(5), f"['{HEADS_OF}'] is 5; allowed: a whole number from 0 to 4"),
    "huge": (heads(10**18), f"['{HEADS_OF}'] is 1000000000000000000; allowed"),
    "float": (heads(2.0), f"['{HEADS_OF}'] is 2.0; allowed: a whole number"),
    "bool": (heads(True), f"['{HEADS_OF}'] is True; allowed: a whole number"),
    "text": (heads("2"), f"['{HEADS_OF}'] is '2'; allowed: a whole number"),
    "removed layers as list": (
        {**entry({}), "removed_layers": [1]},
        "config.hf_prune['removed_layers'] is [1]; it must be an object with keys among: encoder.layer.",
    ),
    "removed layers elsewhere": (
        {**entry({}), "removed_layers": {"encoder.layers": [1]}},
        "['removed_layers'] has an unknown key 'encoder.layers'; allowed: encoder.layer. Did you mean 'encoder.layer'?",
    ),
    "removed layers as number": (
        {**entry({}), "removed_layers": {"encoder.layer": 1}},
        "['encoder.layer'] is 1; allowed: a list of numbers from 0 to 2, ascending.",
    ),
    "removed layers as text": (
        {**entry({}), "removed_layers": {"encoder.layer": ["1"]}},
        "is ['1']; allowed: a list",
    ),
    "removed layers twice": (
        {**entry({}), "removed_layers": {"encoder.layer": [1, 1]}},
        "is [1, 1]; allowed: a list",
    ),
    "removed layers beyond": (
        {**entry({}), "removed_layers": {"encoder.layer": [1, 5]}},
        "['encoder.layer'] is [1, 5]; allowed: a list of numbers from 0 to 4, ascending.",
    ),
    "original size unknown": (
        {**entry({}), "original": {"intermediate": 4}},
        "config.hf_prune['original'] has an unknown key 'intermediate'; allowed: hidden_size, intermediate_size, ",
    ),
    "original size of zero": (
        {**entry({}), "original": {"intermediate_size": 0}},
        "['original']['intermediate_size'] is 0; allowed: a whole number from 1, or null.",
    ),
    "removed layers negative": ({**entry({}), "removed_layers": {"encoder.layer": [-1]}}, "is [-1]; allowed: a list"),
    "ten thousand letters": (
        entry({"x" * 10_000: {}}),
        "unknown key 'xxxxxxxxxxxx...xxxxxxxxxxxxx';",
    ),
    "a hundred thousand layers": (
        entry(list(range(100_000))),
        "['layers'] is [0, 1, 2, 3, 4, 5, ...]; it must be an object",
    ),
    "null": (heads(None), f"['{HEADS_OF}'] is None; allowed: a whole number"),
}


@pytest.mark.parametrize(
    ("family", "block", "message"),
    [
        (
            "llama",
            {"num_attention_heads": 4},
            "['num_key_value_heads'] is None; allowed: a whole number from 0 to 4, the stock size.",
        ),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 5}, "['num_key_value_heads'] is 5; allowed: a whole number"),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}, "is 3; it must divide num_attention_heads, which is 4."),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 0}, "is 0; it must divide num_attention_heads, which is 4."),
        ("llama", {"num_attention_heads": 0, "num_key_value_heads": 1}, "is 1; it must divide num_attention_heads, which is 0."),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "output_bias": 1}, "['output_bias'] is 1; allowed: true or"),
        ("llama", {"num_attention_heads": 1, "num_key_value_heads": 1, "heads": [0]}, "has an unknown key 'heads'"),
        ("mpnet", {"num_attention_heads": 2}, "['heads'] is None; allowed: 2 of [0, 1, 2, 3], ascending."),
        ("mpnet", {"num_attention_heads": 2, "heads": [1]}, "['heads'] is [1]; allowed: 2 of [0, 1, 2, 3], ascending."),
        ("mpnet", {"num_attention_heads": 2, "heads": [1, 4]}, "['heads'] is [1, 4]; allowed: 2 of"),
        ("mpnet", {"num_attention_heads": 2, "heads": [2, 1]}, "['heads'] is [2, 1]; allowed: 2 of"),
        ("mpnet", {"num_attention_heads": 2, "heads": [1, 1]}, "['heads'] is [1, 1]; allowed: 2 of"),
        ("mpnet", {"num_attention_heads": 2, "heads": [0, "1"]}, "['heads'] is [0, '1']; allowed: 2 of"),
    ],
)
def test_malformed_sizes_of_other_families(family: str, block: dict[str, Any], message: str) -> None:
    layer, attention = {"llama": ("layers.0", "self_attn"), "mpnet": ("encoder.layer.0", "attention.attn")}[family]
    config = models.FAMILIES[family]()
    config.hf_prune = entry({layer: {attention: block}})
    with pytest.raises(ValueError, match=r"config\.hf_prune") as error:
        transformers.AutoModel.from_config(config)
    assert message in str(error.value)


@pytest.mark.parametrize(("family", "part"), [("bart", "BartForCausalLM"), ("t5", "T5EncoderModel")])
def test_a_part_of_a_condensed_model(family: str, part: str, tmp_path: Path) -> None:
    whole = models.tiny(family, "bare")
    models.prune_randomly(whole)
    condense(whole).save_pretrained(tmp_path)
    sizes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    loaded = getattr(transformers, part).from_pretrained(tmp_path)
    inner = {name.removeprefix("model."): parameter for name, parameter in loaded.named_parameters()}
    assert len(inner.keys() & sizes.keys()) > 20
    assert all(inner[name].shape == sizes[name] for name in inner.keys() & sizes.keys())
    with torch.no_grad():
        assert loaded(**models.ragged_batch(loaded))[0].isfinite().all()


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_sizes(name: str, tmp_path: Path) -> None:
    value, message = MALFORMED[name]
    config = models.FAMILIES["bert"]()
    config.hf_prune = value
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "architectures": ["BertModel"]}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    loads: list[Callable[[], Any]] = [
        lambda: transformers.AutoModel.from_config(config),
        lambda: transformers.AutoModel.from_pretrained(tmp_path),
    ]
    for load in loads:
        with pytest.raises(ValueError, match=r"config\.hf_prune") as error:
            load()
        assert message in str(error.value)


# Loads every malformed config, of BERT-base's width, and prints its CPU seconds and by how many MB the process grew at its peak.
REFUSE = """
import json, resource, sys, time
import hf_prune, transformers

rows = {}
for name, folder in json.loads(sys.argv[1]).items():
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        transformers.AutoModel.from_pretrained(folder)
    except ValueError as error:
        assert "config.hf_prune" in str(error) and len(str(error)) < 1000, error
        seconds = time.process_time() - start
        rows[name] = (seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    folders = {}
    for number, (name, (value, _)) in enumerate([("warm-up", (heads(13), "")), *MALFORMED.items()]):
        folder = tmp_path_factory.mktemp(f"malformed-{number}")
        config = {
            **transformers.BertConfig(num_hidden_layers=3, num_attention_heads=4).to_dict(),
            "architectures": ["BertModel"],
            "hf_prune": value,
        }
        (folder / "config.json").write_text(json.dumps(config))
        save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
        folders[name] = str(folder)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [sys.executable, "-c", REFUSE, json.dumps(folders)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows: dict[str, tuple[float, float]] = json.loads(result.stdout.splitlines()[-1])
    assert rows.pop("warm-up")
    return rows


def test_malformed_sizes_allocate_nothing(refusals: dict[str, tuple[float, float]]) -> None:
    assert refusals.keys() == MALFORMED.keys()
    assert {name: megabytes for name, (_, megabytes) in refusals.items() if megabytes >= 200} == {}


@pytest.mark.slow
def test_malformed_sizes_are_refused_at_once(refusals: dict[str, tuple[float, float]]) -> None:
    for name, (seconds, megabytes) in refusals.items():
        print(f"{name:<28} {seconds:.3f} CPU s, {megabytes:.1f} MB")
    assert max(seconds for seconds, _ in refusals.values()) < 1
