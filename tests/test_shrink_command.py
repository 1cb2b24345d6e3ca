"""`hf-prune shrink`: from a folder and a file of text to one with fewer layers or a smaller hidden size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch
from command_line import CommandLine
from models import ragged_batch, tiny, tiny_mixture
from reloading import reload, save_expected
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import CardFacts, shrink_depth
from hf_prune.measure.sparsity import total_sparsity
from hf_prune.oneshot.data import calibration_batches
from hf_prune.shrink.hidden import shrink_hidden

SENTENCES = [row["sentence"] for row in quickstart.make_rows(48, seed=3)]
TOKENIZER = quickstart.make_tokenizer(SENTENCES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of the tokenizer's words, and text."""
    folder = tmp_path_factory.mktemp("home")
    for family, head in (("bert", "sequence-classification"), ("t5", "seq2seq-lm")):
        tiny(family, head, vocab_size=len(TOKENIZER)).save_pretrained(folder / family)
        TOKENIZER.save_pretrained(folder / family)
    (folder / "bert" / "eval_results.json").write_text('{"eval_accuracy": 0.75}')
    quickstart.write_rows(folder / "rows.jsonl", [{"sentence": text, "label": "sense"} for text in SENTENCES])
    quickstart.write_rows(folder / "pairs.jsonl", [{"text": text, "summary": text} for text in SENTENCES])
    return folder


def test_layers_and_channels_go(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    """As in Python; the folder is complete, says what was done, and loads as a stock model where hf_prune is not installed."""
    name = "bert-AutoModelForSequenceClassification"
    common = ("--data", home / "rows.jsonl", "--batch-size", 4, "--num-layers", 2, "--hidden-size", 24)
    made = cli.json("shrink", home / "bert", tmp_path / "out" / name, *common)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / name)
    assert made["parameters"] == model.num_parameters() < made["parameters_before"]
    assert (model.config.hidden_size, made["smaller"]["hidden size"]) == (24, [24, 32])
    assert made["removed_layers"] == model.config.hf_prune["removed_layers"]
    assert model.config.num_hidden_layers == 2
    assert made["held_out_error"] > 0
    assert total_sparsity(model) > 1 / 3

    expected = AutoModelForSequenceClassification.from_pretrained(home / "bert")
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    batches = calibration_batches(expected, tokenizer, home / "rows.jsonl", batch_size=4)
    chosen = [batch for index, batch in enumerate(batches) if index % 10]
    shrink_hidden(shrink_depth(expected, 2, chosen), 24, chosen)
    batch = ragged_batch(model)
    with torch.no_grad():
        assert expected.eval()(**batch).logits.equal(model(**batch).logits)

    card = (tmp_path / "out" / name / "README.md").read_text()
    assert "was made smaller as a whole: 24 of 32 hidden size, 2 of 3 layers in encoder.layer" in " ".join(card.split())
    assert "| layers in encoder.layer | 2 of 3 |" in card
    assert "| hidden size | 24 of 32 |" in card
    facts = CardFacts.load(tmp_path / "out" / name)
    assert (facts.metrics_before, facts.metrics) == ({"accuracy": 0.75}, {})
    save_expected(model, tmp_path / "out" / name)
    row = reload("import", tmp_path / "out", tmp_path / "again")[name]
    assert row["gap"] == 0


def test_experts_go(cli: CommandLine, tmp_path: Path) -> None:
    """Of a family that has no architecture spec, too."""
    tiny_mixture("qwen2-moe", vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "whole")
    TOKENIZER.save_pretrained(tmp_path / "whole")
    text = ("--data", tmp_path / "text.txt", "--max-length", 8)
    (tmp_path / "text.txt").write_text("\n".join(str(text) for text in SENTENCES))
    made = cli.json("shrink", tmp_path / "whole", tmp_path / "out", *text, "--num-experts", 3, "--moe-intermediate-size", 8)
    assert made["smaller"] == {"experts in a layer": [3, 8], "neurons in an expert": [8, 16]}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (3, 8)
    assert model.num_parameters() == made["parameters"] < made["parameters_before"]
    assert "| experts in a layer | 3 of 8 |" in (tmp_path / "out" / "README.md").read_text()
    assert "3 of 8" in cli("inspect", tmp_path / "out")
    for wrong in (("--num-experts", 1), ("--moe-intermediate-size", 12)):
        cli("shrink", tmp_path / "whole", tmp_path / "none", *text, *wrong, code=1)
    assert not (tmp_path / "none").exists()


def test_every_list_of_layers(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    numbers = ("--num-layers", "encoder.block=2", "--num-layers", "decoder.block=1")
    columns = ("--text-column", "text", "--text-column", "summary")
    printed = cli("shrink", home / "t5", tmp_path / "out", "--data", home / "pairs.jsonl", *numbers, *columns)
    assert "gone from decoder.block" in printed
    assert "held-out error" in printed
    common = ("--data", home / "pairs.jsonl", *numbers, *columns, "--batch-size", 64)  # all rows are one batch
    assert cli.json("shrink", home / "t5", tmp_path / "whole", *common)["held_out_error"] is None
    assert "Written to" in printed


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 1, "num_layers=None: must be given, or hidden_size, num_experts or moe_intermediate_size."),
        (("--num-layers", 3), 1, "num_layers=3: must be a whole number from 1 to 2"),
        (("--hidden-size", 20), 1, "hidden_size=20: must be a multiple of 8"),
        (("--num-layers", "two"), 2, "'two' is no number of layers"),
        (("--num-layers", 2, "--num-layers", 1), 2, "is no number of layers; give NUMBER, or LIST=NUMBER once for each list"),
        (("--num-layers", 2, "--criterion", "greedy"), 1, "criterion='greedy': must be one of"),
        (("--hidden-size", 24, "--rotate"), 1, "rotate=True"),
    ],
)
def test_what_cannot_be_is_refused(
    options: tuple[object, ...], code: int, message: str, cli: CommandLine, home: Path, tmp_path: Path
) -> None:
    cli("shrink", home / "bert", tmp_path / "out", "--data", home / "rows.jsonl", *options, code=code)
    assert message in " ".join(cli.err.replace("│", " ").split())
    assert not list(tmp_path.iterdir())
