"""Perplexity against a slow and obvious loop, and the command that prints it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch
from command_line import CommandLine
from models import tiny
from torch import Tensor
from transformers import ByT5Tokenizer

from hf_prune import ConfigError
from hf_prune.measure.perplexity import perplexity
from hf_prune.oneshot.data import text_tokens

SENTENCES = [row["sentence"] for row in quickstart.make_rows(30, seed=3)]
TOKENIZER = quickstart.make_tokenizer(SENTENCES)


def tokens(number: int, vocabulary: int) -> Tensor:
    return torch.randint(5, vocabulary, (number,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def one_by_one(model: Any, text: Tensor, length: int, stride: int) -> tuple[float, int]:
    """Each token by itself, from what its window has before it: the first window that has anything there."""
    losses = []
    for place in range(len(text)):
        starts = [start for start in range(0, len(text) - length + 1, stride) if start < place < start + length]
        if starts:
            logits = model(input_ids=text[None, starts[0] : place]).logits[0, -1]
            losses.append(-float(logits.double().log_softmax(-1)[text[place]]))
    return math.exp(sum(losses) / len(losses)), len(losses)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("number", "length", "stride"), [(40, 10, None), (47, 10, None), (47, 10, 4), (21, 20, 1), (10, 10, 3)])
def test_perplexity_is_that_of_a_loop_over_tokens(family: str, number: int, length: int, stride: int | None) -> None:
    model = tiny(family, "causal-lm")
    text = tokens(number, model.config.vocab_size)
    model.train()
    found = perplexity(model, text, length, stride)
    assert model.training
    expected, counted = one_by_one(model.eval(), text, length, stride or length)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.predicted == counted
    if stride is None:
        assert counted == number // length * (length - 1)


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        ("causal-lm", {"length": 1}, "length=1: must be at least 2"),
        ("causal-lm", {"length": 10, "stride": 11}, "stride=11: must be from 1 to length=10"),
        ("causal-lm", {"length": 31}, "length=31: must be at most 30, the tokens of the text"),
        ("sequence-classification", {"length": 10}, "is no causal language model"),
    ],
)
def test_bad_settings_are_named(head: str, settings: dict[str, int], message: str) -> None:
    model = tiny("llama", head)
    with pytest.raises(ConfigError, match=message):
        perplexity(model, tokens(30, model.config.vocab_size), **settings)


def test_a_model_that_gives_nan_has_no_perplexity() -> None:
    model = tiny("llama", "causal-lm")
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ConfigError, match="gives NaN or infinity"):
        perplexity(model, tokens(30, model.config.vocab_size), 10)


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    """With all its empty lines; rows are joined by one, and those without text are none."""
    tokenizer = ByT5Tokenizer()
    (tmp_path / "text.txt").write_text("one\n\n two\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": " two\\n"}\n')
    for name in ("text.txt", "rows.jsonl"):
        assert tokenizer.decode(text_tokens(tokenizer, tmp_path / name), skip_special_tokens=True) == "one\n\n two\n"


def test_evaluate(cli: CommandLine, tmp_path: Path) -> None:
    model = tiny("llama", "causal-lm", vocab_size=len(TOKENIZER))
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    (tmp_path / "joined.txt").write_text("\n\n".join(SENTENCES))
    found = cli.json("evaluate", tmp_path / "model", "--data", tmp_path / "text.txt", "--length", 10, "--stride", 5)
    ids = torch.tensor(TOKENIZER("\n".join(SENTENCES))["input_ids"])
    assert found["perplexity"] == pytest.approx(perplexity(model, ids, 10, 5).perplexity)
    rows, joined = (cli.json("evaluate", tmp_path / "model", "--data", tmp_path / name) for name in ("rows.jsonl", "joined.txt"))
    assert rows["perplexity"] == joined["perplexity"]
    assert rows["length"] == rows["stride"] == 40
    assert f"perplexity {rows['perplexity']:.4f}" in cli("evaluate", tmp_path / "model", "--data", tmp_path / "rows.jsonl")
    cli("evaluate", tmp_path / "model", "--data", tmp_path / "text.txt", "--length", 41, code=1)
    assert "Error: length=41: must be from 1 to 40" in cli.err
