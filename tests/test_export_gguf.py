"""GGUF files in llama.cpp give what the model gives, for layers of any sizes and every tokenizer that can be written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from command_line import CommandLine
from tokenizer_cases import CORPUS, case
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_prune import condense, export_model
from hf_prune.export import gguf as written
from hf_prune.export import llama_cpp
from hf_prune.export.compare import ExportError
from hf_prune.settings.errors import ConfigError

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

GPT2, LLAMA2 = "byte-level BPE, GPT-2", "BPE with byte fallback, Llama 2"
#: Family, tokenizer, settings of the family.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", GPT2, {}),
    ("llama-with-biases", GPT2, {}),
    (
        "llama",
        GPT2,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    ("llama", GPT2, {"tie_word_embeddings": True}),
    ("mistral", LLAMA2, {"sliding_window": None}),
    ("qwen2", GPT2, {}),
    ("qwen2", GPT2, {"head_dim": 4}),
]
#: Quantization → by how much a log-probability of these tiny models may differ.
BOUNDS = {None: 1e-4, "f16": 0.02, "q8_0": 0.3}


def saved(folder: Path, family: str = "llama", kind: str = GPT2, uneven: bool = True, **settings: Any) -> PreTrainedModel:
    """A model whose first layer has no heads and whose second has no neurons, and its tokenizer in a folder."""
    _, tokenizer = case(kind)
    tokenizer.save_pretrained(folder)
    model = models.tiny(family, "causal-lm", vocab_size=len(tokenizer) + 5, **settings)
    if uneven:
        models.prune_randomly(model)
        condense(model, verify=False)
    model.save_pretrained(folder)
    return model


def fields(file: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("quantize", BOUNDS)
@pytest.mark.parametrize("uneven", [True, False])
@pytest.mark.parametrize(("family", "kind", "settings"), CASES)
def test_gguf(family: str, kind: str, settings: dict[str, Any], uneven: bool, quantize: str | None, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", family, kind, uneven, **settings)
    made = export_model(model, tmp_path / "model", tmp_path / "out", "gguf", quantize=quantize)
    assert made.agreement.difference <= BOUNDS[quantize]
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    found = fields(tmp_path / "out" / made.file)
    own = "qwen2" if family == "qwen2" and settings else "deci" if family == "qwen2" else "llama"
    name = "deci" if uneven else own
    assert found["general.architecture"] == name
    heads = found[f"{name}.attention.head_count"]
    assert isinstance(heads, list) == (name == "deci")
    if uneven:
        assert heads[0] == 1  # of zeros
        assert found["deci.feed_forward_length"][1] == 32


def test_what_is_generated_is_the_same(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    export_model(model, tmp_path / "model", tmp_path / "out", "gguf")
    prompt = [65, 70, 75]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(torch.tensor([prompt]), **settings)[0, 3:].tolist()
    request = {"prompt": prompt, "n_predict": 12, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    with llama_cpp.serving(tmp_path / "out" / "model.gguf", 128) as server:
        assert llama_cpp.ask(server, "/completion", request)["tokens"] == wanted


def test_a_file_that_llama_cpp_does_not_load_is_an_error(tmp_path: Path) -> None:
    """Whatever it does upon it; and no process is left."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ExportError, match=r"llama\.cpp does not load the file: "), llama_cpp.serving(tmp_path / "model.gguf", 128):
        pass


def test_the_command_writes_a_file_for_a_users_runtime(cli: CommandLine, tmp_path: Path) -> None:
    saved(tmp_path / "model")
    (tmp_path / "rows.txt").write_text("\n".join(f"one and two and {number}" for number in range(200)))
    data = ("--data", tmp_path / "rows.txt", "--max-length", 8, "--rows", 8)
    made = cli.json("export", tmp_path / "model", tmp_path / "out", "--format", "gguf", *data)
    assert made["agreement"]["rows"] == 17
    assert made["runtime"].startswith("xllamacpp ")
    assert "of log-probability" in cli("export", tmp_path / "model", tmp_path / "f16", "--format", "gguf", "--quantize", "f16")


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # merges across words
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=ByteLevel.alphabet(), special_tokens=["<s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    across = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    across.save_pretrained(tmp_path / "model")
    model = models.tiny("llama", "causal-lm", vocab_size=len(across))
    with pytest.raises(ConfigError, match="splits text by ByteLevel, which must be one of"):
        export_model(model, tmp_path / "model", tmp_path / "out", "gguf")
    monkeypatch.setattr(written, "pre_tokenizer", lambda state: "gpt-2")
    monkeypatch.setattr(written, "_TEXTS", CORPUS[:5])
    with pytest.raises(ExportError, match=r"llama\.cpp's tokenizer makes \["):
        export_model(model, tmp_path / "model", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_every_kind_of_splitting_that_llama_cpp_names() -> None:
    """As tokenizers of published models write it."""
    from transformers import GPT2Tokenizer, Qwen2Tokenizer

    for name, kind in (("gpt-2", GPT2Tokenizer), ("qwen2", Qwen2Tokenizer)):
        assert written.pre_tokenizer(json.loads(kind().backend_tokenizer.to_str())) == name
    digits = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    smollm = {"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": digits}}
    assert written.pre_tokenizer(smollm) == "smollm"


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma", {}, "must be a causal language model of llama, mistral, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "has the activation 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "positions of type 'dynamic'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(family: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = models.tiny(family, "causal-lm", **settings)
    with pytest.raises(ConfigError, match=message):
        export_model(model, tmp_path, tmp_path / "out", "gguf")
    with pytest.raises(ConfigError, match="must be a causal language model"):
        export_model(models.tiny("llama", "sequence-classification"), tmp_path, tmp_path / "out", "gguf")
    assert not list(tmp_path.iterdir())


def test_a_model_without_tokenizer_or_with_another_kind_is_refused(tmp_path: Path) -> None:
    model = saved(tmp_path / "words", kind="words", uneven=False)
    with pytest.raises(ConfigError, match="splits text by Whitespace, which must be one of"):
        export_model(model, tmp_path / "words", tmp_path / "out", "gguf")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        export_model(model, tmp_path / "bare", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
