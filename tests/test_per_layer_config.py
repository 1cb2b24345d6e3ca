"""Checkpoints that say their sizes in transformers' own `per_layer_config`: what they hold, and who loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from command_line import CommandLine
from reloading import reload, save_expected
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_prune import condense, export_model
from hf_prune.settings.errors import ConfigError

FAMILIES = (
    "llama",
    "llama-with-biases",
    "qwen2",
    pytest.param("qwen3", marks=pytest.mark.slow),
    pytest.param("gemma", marks=pytest.mark.slow),
)


def uneven(family: str = "llama", **settings: Any) -> PreTrainedModel:
    """A model whose first layer has no heads and whose second has no neurons."""
    model = models.tiny(family, "causal-lm", **settings)
    models.prune_randomly(model)
    return condense(model, verify=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_per_layer_config(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = uneven(family).to(dtype)
    model.generation_config.max_new_tokens = 7
    (tmp_path / "model").mkdir()
    made = export_model(model, tmp_path / "model", tmp_path / "out" / "small", "per-layer-config")
    assert made.agreement.difference <= (1e-5 if dtype == torch.float32 else 0.1)
    said = json.loads((tmp_path / "out" / "small" / "config.json").read_text())
    layers = said["per_layer_config"]
    assert layers["0"]["num_attention_heads"] == layers["0"].get("num_key_value_heads", 1) == 1  # of zeros
    assert layers["1"]["intermediate_size"] == 0
    assert said["auto_map"]["AutoModelForCausalLM"] == f"modeling_hf_prune.{type(model).__name__}"
    assert said["use_cache"] is True
    assert json.loads((tmp_path / "out" / "small" / "generation_config.json").read_text())["max_new_tokens"] == 7
    weights = load_file(tmp_path / "out" / "small" / "model.safetensors")
    for number, sizes in layers.items():
        width = said["head_dim"]
        shape = weights[f"model.layers.{number}.self_attn.q_proj.weight"].shape
        assert shape[0] == width * sizes.get("num_attention_heads", said["num_attention_heads"])
        assert weights[f"model.layers.{number}.mlp.up_proj.weight"].shape[0] == sizes.get(
            "intermediate_size", said["intermediate_size"]
        )
        assert weights[f"model.layers.{number}.mlp.up_proj.weight"].dtype == dtype


@pytest.mark.slow
def test_it_loads_with_hf_prune_with_remote_code_and_with_neither_not(tmp_path: Path) -> None:
    model, name = uneven(), "llama-AutoModelForCausalLM"
    (tmp_path / "model").mkdir()
    export_model(model, tmp_path / "model", tmp_path / "out" / name, "per-layer-config")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name).eval()
    save_expected(loaded, tmp_path / "out" / name)
    rows = {way: reload(way, tmp_path / "out", tmp_path / way)[name] for way in ("import", "remote")}
    assert [row["gap"] for row in rows.values()] == [0, 0]
    assert all("condensed with hf_prune" in reason for reason in rows["remote"]["stock"])
    loaded.save_pretrained(tmp_path / "again")  # what is loaded and saved by hf_prune may be pruned further
    assert not json.loads((tmp_path / "again" / "config.json").read_text()).keys() & {"per_layer_config"}


def test_what_transformers_itself_does_with_it() -> None:
    """It checks the field and resolves it by layer, and builds equal layers: for that there is the modelling file."""
    sizes = {"per_layer_config": {"1": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}}}
    stock = models.FAMILIES["llama"]().to_dict()
    config = LlamaConfig.from_dict(stock | sizes | {"allow_global_per_layer_attribute_access": True})
    assert config.is_heterogeneous
    assert [config.per_layer_config[place].intermediate_size for place in range(3)] == [40, 24, 40]
    assert [layer.mlp.up_proj.out_features for layer in LlamaForCausalLM(config).model.layers] == [40] * 3
    with pytest.raises(Exception, match="is a per-layer attribute and may vary across layers"):
        LlamaForCausalLM(LlamaConfig.from_dict(stock | sizes))


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("t5", "seq2seq-lm", "has layers in decoder.block, encoder.block; per_layer_config has one number for each layer"),
        ("bert", "sequence-classification", "BertConfig has no head_dim: readers would take them for wider ones"),
    ],
)
def test_what_the_field_cannot_say_is_refused(family: str, head: str, message: str, tmp_path: Path) -> None:
    model = models.tiny(family, head)
    models.prune_randomly(model)
    with pytest.raises(ConfigError, match=message):
        export_model(condense(model, verify=False), tmp_path, tmp_path / "out", "per-layer-config")
    assert not list(tmp_path.iterdir())


def test_equal_layers_never_carry_it(cli: CommandLine, tmp_path: Path) -> None:
    model = models.tiny("llama", "causal-lm")
    models.prune_evenly(model, heads=True)
    condense(model, uniform=True).save_pretrained(tmp_path / "model")
    cli("export", tmp_path / "model", tmp_path / "out", "--format", "per-layer-config", code=1)
    assert "is an ordinary model: its config says its sizes" in " ".join(cli.err.split())
    assert not (tmp_path / "out").exists()
