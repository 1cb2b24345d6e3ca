"""Checkpoints of transformers 4 with pruned heads, and others with tensors smaller than their config, load as what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune import convert_v4_pruned_heads
from hf_prune.model import find_blocks

#: Which heads transformers 4 was told to prune, by layer.
PRUNED = {0: [1, 2], 1: [0, 1, 2, 3], 2: [3]}


def left(heads: list[int]) -> Tensor:
    """The features of the heads that are left, four of width 8."""
    return torch.tensor([feature for feature in range(32) if feature // 8 not in heads], dtype=torch.long)


def prune_as_v4(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict that transformers 4 saves after `model.prune_heads(PRUNED)`, cut out by hand."""
    state = model.state_dict()
    for layer, heads in PRUNED.items():
        kept = left(heads)
        if model.config.model_type == "gpt2":
            start = f"transformer.h.{layer}.attn."
            packed = torch.cat([kept, kept + 32, kept + 64])
            state[f"{start}c_attn.weight"] = state[f"{start}c_attn.weight"][:, packed]
            state[f"{start}c_attn.bias"] = state[f"{start}c_attn.bias"][packed]
            state[f"{start}c_proj.weight"] = state[f"{start}c_proj.weight"][kept]
        elif model.config.model_type == "t5":
            start = f"encoder.block.{layer}.layer.0.SelfAttention."
            for name in "qkv":
                state[f"{start}{name}.weight"] = state[f"{start}{name}.weight"][kept]
            state[f"{start}o.weight"] = state[f"{start}o.weight"][:, kept]
        else:
            start = f"bert.encoder.layer.{layer}.attention."
            for name in ("query", "key", "value"):
                for kind in ("weight", "bias"):
                    state[f"{start}self.{name}.{kind}"] = state[f"{start}self.{name}.{kind}"][kept]
            state[f"{start}output.dense.weight"] = state[f"{start}output.dense.weight"][:, kept]
    return state


def save(folder: Path, model: PreTrainedModel, state: dict[str, Tensor], form: str = "safetensors", **config: Any) -> None:
    folder.mkdir(exist_ok=True)
    settings = {**model.config.to_dict(), "architectures": [type(model).__name__], **config}
    (folder / "config.json").write_text(json.dumps(settings))
    state = {name: value.clone() for name, value in state.items()}
    if form == "safetensors":
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")


def masked(model: PreTrainedModel) -> Tensor:
    """What a model gives with the pruned heads' columns zeroed: in transformers 4 a pruned head adds nothing, not even its bias."""
    for block in find_blocks(model):
        if block.kind == "attention" and "decoder" not in block.name:
            models.zero_units(block, PRUNED[int(block.layer.rpartition(".")[2])], "out")
    return logits(model)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**models.ragged_batch(model))[0]
    return output


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("family", "head"), [("bert", "sequence-classification"), ("gpt2", "causal-lm"), ("t5", "seq2seq-lm"), ("bert", "masked-lm")]
)
def test_pruned_heads(family: str, head: str, form: str, tmp_path: Path) -> None:
    model = models.tiny(family, head)
    state = prune_as_v4(model)
    tied = set(model._tied_weights_keys or {}) & state.keys()
    state = {name: value for name, value in state.items() if name not in tied}
    save(tmp_path / "v4", model, state, form, pruned_heads={str(layer): heads for layer, heads in PRUNED.items()})
    wanted = masked(model)
    converted = convert_v4_pruned_heads(tmp_path / "v4")
    assert type(converted) is type(model)
    assert float((logits(converted) - wanted).abs().max()) <= 1e-5
    assert [block.num_units for block in find_blocks(converted) if block.kind == "attention"][:3] == [2, 0, 3]
    assert "pruned_heads" not in converted.config.to_dict()
    converted.save_pretrained(tmp_path / "v5")
    loaded = type(model).from_pretrained(tmp_path / "v5")
    assert logits(loaded).equal(logits(converted))


def smaller_ffn(model: PreTrainedModel) -> dict[str, Tensor]:
    state = prune_as_v4(model)
    layer = "bert.encoder.layer.1."
    for name, index in (("intermediate.dense.weight", 0), ("intermediate.dense.bias", 0), ("output.dense.weight", 1)):
        state[layer + name] = state[layer + name].narrow(index, 0, 7)
    return state


def test_tensors_smaller_than_the_config(tmp_path: Path) -> None:
    model = models.tiny("bert")
    save(tmp_path, model, smaller_ffn(model))
    models.zero_units(find_blocks(model)[3], list(range(7, 40)), "out")
    assert float((logits(convert_v4_pruned_heads(tmp_path)) - masked(model)).abs().max()) <= 1e-5


def test_what_is_not_pruned_loads_as_ever(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = models.tiny("bert")
    model.save_pretrained(tmp_path)
    converted = convert_v4_pruned_heads(tmp_path, dtype=torch.float64)
    assert "There is nothing to convert" in caplog.text
    assert converted.dtype == torch.float64
    assert not hasattr(converted.config, "hf_prune")


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    model = models.tiny("bert")
    state = prune_as_v4(model)
    save(tmp_path, model, {name: value for name, value in state.items() if ".2.output.dense" not in name})
    with pytest.raises(ValueError, match=r"encoder\.layer\.2\.output\.dense\.weight is not in the checkpoint"):
        convert_v4_pruned_heads(tmp_path)

    narrow = {**state, "bert.embeddings.word_embeddings.weight": state["bert.embeddings.word_embeddings.weight"][:, :30]}
    save(tmp_path, model, narrow)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has the shape \(99, 30\).*\(99, 32\) by its config"):
        convert_v4_pruned_heads(tmp_path)

    name = "bert.encoder.layer.0.attention.output.dense.weight"
    save(tmp_path, model, {**state, name: state[name][:, :13]})
    with pytest.raises(ValueError, match="has 13 inputs in the checkpoint; whole heads are 8 wide"):
        convert_v4_pruned_heads(tmp_path)

    model = models.tiny("t5", "seq2seq-lm")
    state = prune_as_v4(model)
    save(tmp_path, model, {name: value for name, value in state.items() if "embed_tokens" not in name and name != "lm_head.weight"})
    with pytest.raises(ValueError, match=r"has 2 of 4 heads.*lists \[\] for this layer"):
        convert_v4_pruned_heads(tmp_path)


# What a user of transformers 4 did: prune heads, save, and here also what the model computed.
V4 = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
assert transformers.__version__.startswith("4.")
torch.set_grad_enabled(False)
for folder in Path(sys.argv[1]).iterdir():
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = cls.from_pretrained(folder, attn_implementation="eager").eval()
    model.prune_heads({int(layer): heads for layer, heads in json.loads(sys.argv[2]).items()})
    inputs = load_file(folder / "inputs.safetensors")
    save_file({"output": model(**inputs)[0].contiguous()}, folder / "expected.safetensors")
    model.save_pretrained(folder)
"""

#: What transformers 4 could prune; of T5 only the encoder.
V4_FAMILIES = {
    "bert": "sequence-classification",
    "roberta": "masked-lm",
    "electra": "bare",
    "distilbert": "token-classification",
    "gpt2": "causal-lm",
    "vit": "image-classification",
}


@pytest.mark.slow
def test_real_v4_checkpoints(tmp_path: Path) -> None:
    """transformers 4 in an environment of its own, which borrows torch from this one."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    packages = ["transformers<5", "tokenizers>=0.22,<=0.23", "huggingface_hub<1"]
    install = [environment / "bin/pip", "install", "--quiet", "--ignore-installed", "--no-deps", *packages]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("transformers 4 cannot be installed here")
    torch.manual_seed(0)
    encoder = models.randomize(transformers.T5EncoderModel(models.FAMILIES["t5"]())).eval()
    cases: dict[str, PreTrainedModel] = {family: models.tiny(family, head) for family, head in V4_FAMILIES.items()} | {
        "t5": encoder
    }
    for family, model in cases.items():
        model.save_pretrained(tmp_path / "v4" / family)
        inputs = {name: value.clone() for name, value in models.ragged_batch(model).items()}
        save_file(inputs, tmp_path / "v4" / family / "inputs.safetensors")
    pruned = json.dumps({0: [1, 2], 2: [3]})
    command = [environment / "bin/python", "-c", V4, tmp_path / "v4", pruned]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    for family in cases:
        folder = tmp_path / "v4" / family
        with pytest.raises(RuntimeError):
            getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0]).from_pretrained(folder)
        model = convert_v4_pruned_heads(folder)
        with torch.no_grad():
            output = model(**load_file(folder / "inputs.safetensors"))[0]
        assert float((output - load_file(folder / "expected.safetensors")["output"]).abs().max()) <= 1e-5, family
