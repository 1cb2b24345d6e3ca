"""Saved models with what they compute, and fresh processes that load them: by `import hf_prune`, or by remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROCESS = """
import json, shutil, sys
from pathlib import Path

way, source, target = sys.argv[1:]

if way == "import":
    import hf_prune
else:
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "hf_prune":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Absent())
    try:
        import hf_prune
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("hf_prune is there after all")

import torch, transformers
from safetensors.torch import load_file

def flat(name, value):
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    return {key: tensor for part, nested in parts for key, tensor in flat(f"{name}.{part}", nested).items()}

def gap(model):
    values = flat("output", dict(model(**inputs, output_hidden_states=True)))
    assert values.keys() == expected.keys(), values.keys() ^ expected.keys()
    return max(float((value - expected[name]).abs().max()) for name, value in values.items())

def refusal(load):
    try:
        load()
    except ValueError as error:
        return str(error)

transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)
remote = {"trust_remote_code": True}
report = {}
for folder in sorted(Path(source).iterdir()):
    tensors = load_file(folder / "expected.safetensors")
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    expected = {name: value for name, value in tensors.items() if not name.startswith("input.")}
    auto = getattr(transformers, folder.name.rpartition("-")[2])
    row = report[folder.name] = {}
    if way == "remote":
        named = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
        stock = [lambda: auto.from_pretrained(folder), lambda: named.from_pretrained(folder, ignore_mismatched_sizes=True)]
        row["stock"] = [refusal(load) for load in stock]
    model = auto.from_pretrained(folder, **(remote if way == "remote" else {}))
    row["gap"] = gap(model)
    row["class"], row["module"] = type(model).__name__, type(model).__module__
    if way == "remote":
        row["directly"] = gap(type(model).from_pretrained(folder, local_files_only=True))
    if way == "import" and folder.name.startswith("bert-"):
        row["both"] = gap(auto.from_pretrained(folder, **remote))
    if (folder / "tokenizer.json").exists():
        pipe = transformers.pipeline("text-classification", str(folder), **(remote if way == "remote" else {}))
        row["pipeline"] = pipe("two three five")[0]["score"]
    model.save_pretrained(Path(target, folder.name))
    for file in folder.iterdir():
        if "token" in file.name or file.name == "expected.safetensors":
            shutil.copy(file, Path(target, folder.name))
print(json.dumps(report))
"""


def reload(way: str, source: Path, target: Path) -> dict[str, dict[str, Any]]:
    """Run PROCESS in a directory from which hf_prune cannot be imported by chance."""
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(source.parent / f"home-{target.name}"),
        "OMP_NUM_THREADS": "1",
    }
    environment["PYTHONPATH"] = str(root) if way == "import" else ""
    target.mkdir()
    command = [sys.executable, "-c", PROCESS, way, str(source), str(target)]
    result = subprocess.run(command, cwd=source.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    report: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return report


def save_tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "one", "two", "three", "four", "five"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def save_expected(model: PreTrainedModel, folder: Path) -> None:
    inputs = models.ragged_batch(model)
    with torch.no_grad():
        outputs = dict(model(**inputs, output_hidden_states=True))
    tensors = {f"input.{name}": value for name, value in inputs.items()} | flat("output", outputs)
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        folder / "expected.safetensors",
    )


def flat(name: str, value: object) -> dict[str, Tensor]:
    """The tensors in nested outputs by their dotted names."""
    if isinstance(value, Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (tuple, list)) else ()
    return {key: tensor for part, nested in parts for key, tensor in flat(f"{name}.{part}", nested).items()}


def without(folder: Path, *names: str) -> None:
    """Take tensors out of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name not in names}
    assert len(kept) == len(tensors) - len(names)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
