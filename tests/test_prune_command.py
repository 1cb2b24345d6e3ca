"""`hf-prune prune`: from a folder and a file of text to a smaller folder, and what it refuses before it starts."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch
from command_line import CommandLine
from helpers import table_of
from models import tiny
from reloading import reload, save_expected
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import hf_prune
from hf_prune import CardFacts, ConfigError, PruningConfig, PruningRule, condense
from hf_prune.files import read_object
from hf_prune.model.positions import longest_row
from hf_prune.oneshot.data import calibration_batches, row_length

SENTENCES = [row["sentence"] for row in quickstart.make_rows(48, seed=3)]
TOKENIZER = quickstart.make_tokenizer(SENTENCES)
BERT = "bert-AutoModelForSequenceClassification"
LLAMA = "llama-AutoModelForCausalLM"


def save(family: str, head: str, folder: Path) -> PreTrainedModel:
    """A tiny model of the tokenizer's words, and the tokenizer."""
    model = tiny(family, head, vocab_size=len(TOKENIZER))
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a language model, and text for both."""
    folder = tmp_path_factory.mktemp("home")
    save("bert", "sequence-classification", folder / BERT)
    save("llama", "causal-lm", folder / LLAMA)
    (folder / BERT / "notes.md").write_text("mine")
    (folder / BERT / "eval_results.json").write_text('{"eval_accuracy": 0.75}')
    settings = read_object(folder / LLAMA / "generation_config.json") | {"max_new_tokens": 7}
    (folder / LLAMA / "generation_config.json").write_text(json.dumps(settings))
    quickstart.write_rows(folder / "rows.jsonl", [{"sentence": text, "label": "sense"} for text in SENTENCES])
    (folder / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    return folder


def prune_in_python(folder: Path, auto: Any, heads: str, file: Path, length: int | None) -> PreTrainedModel:
    """What the command shall do, by hand."""
    model = auto.from_pretrained(folder)
    config = PruningConfig(target_sparsity=0.5, rules=[PruningRule(pattern=heads), PruningRule(pattern="neuron")])
    batches = calibration_batches(model, AutoTokenizer.from_pretrained(folder), file, max_length=length)
    hf_prune.prune(model, config, batches)
    small: PreTrainedModel = condense(model)
    return small


def test_a_search_is_reported_and_on_the_card(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    printed = cli.json("prune", home / BERT, tmp_path / "out", "--data", home / "rows.jsonl", "--sparsity", 0.5, "--search", 3)
    ((before, after),) = printed["report"]["searched"].values()
    assert 0 < after <= before
    assert "3 tries" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("option", "value"), [("--parameters", 0.9), ("--speedup", 1.05)])
def test_costs_can_be_the_target(option: str, value: float, cli: CommandLine, home: Path, tmp_path: Path) -> None:
    dense = AutoModelForSequenceClassification.from_pretrained(home / BERT)
    settings: tuple[Any, ...] = ()
    if option == "--speedup":
        settings = ("--latency-table", table_of(dense, tmp_path / "t.json"))
    made = cli.json("prune", home / BERT, tmp_path / "out", "--data", home / "rows.jsonl", option, value, *settings)
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    reached = made["report"]["budget"]
    if option == "--speedup":
        assert reached["speedup"] >= value
    else:
        assert reached["parameters"] == small.num_parameters() <= value * dense.num_parameters()
        shown = cli("prune", home / BERT, tmp_path / "again", "--data", home / "rows.jsonl", option, value)
        assert re.search(rf"parameters, as predicted +│ {small.num_parameters():,} ", shown)


@pytest.mark.parametrize(
    ("name", "auto", "heads", "data", "length"),
    [
        (BERT, AutoModelForSequenceClassification, "head", "rows.jsonl", None),
        (LLAMA, AutoModelForCausalLM, "kv_group", "text.txt", 16),
    ],
)
def test_prune_end_to_end(
    name: str, auto: Any, heads: str, data: str, length: int | None, cli: CommandLine, home: Path, tmp_path: Path
) -> None:
    """What is loaded again in a new process computes what `prune()` and `condense()` in Python give."""
    out = tmp_path / "made" / name
    settings = [] if length is None else ["--max-length", length]
    made = cli.json("prune", home / name, out, "--data", home / data, "--sparsity", 0.5, *settings)
    assert made["report"]["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert made["parameters"] < made["parameters_before"]
    assert made["condensed"]
    assert made["difference"] < 1e-6

    small = prune_in_python(home / name, auto, heads, home / data, length)
    assert made["parameters"] == small.num_parameters()
    config = PruningConfig.from_pretrained(out)
    assert [rule.pattern for rule in config.rules] == [heads, "neuron"]
    assert (config.criterion, config.update) == ("obs", "least_squares")
    save_expected(small, out)
    if name == LLAMA:
        assert read_object(out / "generation_config.json")["max_new_tokens"] == 7
        (out / "tokenizer.json").unlink()  # else it would be tried as a classifier
    assert reload("import", tmp_path / "made", tmp_path / "again")[name]["gap"] < 1e-6


def test_the_folder_is_complete_and_says_what_was_done(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    printed = cli("prune", home / BERT, tmp_path / "out", "--data", home / "rows.jsonl", "--sparsity", 0.5, "--seed", 3)
    for line in ("parameters", "heads kept", "neurons kept", "held-out error", "seconds", "not pruned: classifier", "Written to"):
        assert line in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "notes.md", "README.md", "pictures", "pruning_config.json", "pruning_facts.json"} <= names
    assert "eval_results.json" not in names
    assert "Left out: eval_results.json" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pruned without training, from calibration data alone, and then condensed" in card
    assert "while it was trained" not in card
    assert f"Pruning started from `{BERT}`" in card
    assert "| data | rows.jsonl |" in card
    assert "| seed | 3 |" in card
    assert "| update |" in card
    facts = CardFacts.load(tmp_path / "out")
    assert (facts.metrics_before, facts.metrics) == ({"accuracy": 0.75}, {})
    assert str(home.parent) not in (tmp_path / "out" / "pruning_facts.json").read_text() + card
    cli("card", tmp_path / "out", "--no-measure")
    assert "pruned without training" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.core
def test_no_condense_leaves_zeros(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    common = ("--data", home / "rows.jsonl", "--sparsity", 0.5)
    masked = cli.json("prune", home / BERT, tmp_path / "masked", *common, "--no-condense")
    small = cli.json("prune", home / BERT, tmp_path / "small", *common)
    assert not masked["condensed"]
    assert masked["parameters"] == masked["parameters_before"]
    assert masked["sparsity"] == pytest.approx(small["sparsity"])
    assert masked["original_blocks"] == small["original_blocks"]
    assert cli.json("inspect", tmp_path / "masked")["parameters_after_condense"] == small["parameters"]
    assert "without training, from calibration data alone: pruned weights are zeros" in (tmp_path / "masked/README.md").read_text()


def test_what_cannot_be_cut_out_is_saved_as_zeros(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    settings = ("--sparsity", 0.2, "--pattern", "1x1", "--criterion", "random", "--update", "zero", "--device", "cpu")
    printed = cli("prune", home / BERT, tmp_path / "out", "--data", home / "rows.jsonl", *settings)
    assert "There is nothing to cut out" in printed
    config = PruningConfig.from_pretrained(tmp_path / "out")
    assert (config.pattern, config.criterion, config.update, config.rules) == ("1x1", "random", "zero", [])
    assert cli.json("inspect", tmp_path / "out")["sparsity"] == pytest.approx(0.2, abs=0.02)


def test_a_config_from_a_file(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    PruningConfig(pattern="neuron", target_sparsity=0.3, update="bias").to_json_file(tmp_path / "config.json")
    made = cli.json("prune", home / BERT, tmp_path / "out", "--data", home / "rows.jsonl", "--config", tmp_path / "config.json")
    assert made["report"]["target"] == 0.3
    kept = {block["kind"]: block["alive"] / block["units"] for block in made["original_blocks"]}
    assert kept["heads"] == 1 > kept["neurons"]


def test_same_seed_same_file_another_another(cli: CommandLine, home: Path, tmp_path: Path) -> None:
    weights = []
    for place, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(place)
        common = ("--data", home / "rows.jsonl", "--sparsity", 0.5, "--rows", 16, "--batch-size", 5)
        made = cli.json("prune", home / BERT, out, *common, "--seed", seed)
        assert made["report"]["held_out_error"] is not None
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def command(home: Path, folder: Path, **changes: Any) -> list[object]:
    """A command line that would work, with changes; None leaves an option out."""
    options = {"--data": home / "rows.jsonl", "--sparsity": 0.5} | {
        f"--{name.replace('_', '-')}": value for name, value in changes.items() if name not in ("model", "out")
    }
    flags = [part for name, value in options.items() if value is not None for part in (name, value)]
    return ["prune", changes.get("model", home / BERT), changes.get("out", folder / "out"), *flags]


def bad_files(folder: Path) -> None:
    """Files that cannot be used."""
    (folder / "broken.jsonl").write_text('{"sentence": "one"}\n{"sentence": \n')
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("one\ntwo\n\n")
    (folder / "words.pdf").write_text("one")
    (folder / "full").mkdir()
    (folder / "full" / "file").write_text("mine")
    quickstart.write_rows(folder / "three.jsonl", [{"a": "one", "b": "two", "c": "three", "number": "1"}] * 9)  # type: ignore[list-item]
    (folder / "numbers.jsonl").write_text('{"sentence": "one", "length": 3}\n' * 9)
    (folder / "only.jsonl").write_text('{"length": 3}\n' * 9)
    PruningConfig(pattern="neuron").to_json_file(folder / "config.json")


BAD: dict[str, tuple[dict[str, Any], int, Sequence[str]]] = {
    "neither": ({"sparsity": None}, 2, ["Give --config, --sparsity, --speedup, --parameters: one of them."]),
    "both": ({"config": "{tmp}/config.json"}, 2, ["Give --config, --sparsity, --speedup, --parameters: one of them."]),
    "two targets": ({"speedup": 2}, 2, ["Give --config, --sparsity, --speedup, --parameters: one of them."]),
    "a pattern beside a config": ({"config": "{tmp}/config.json", "sparsity": None, "pattern": "head"}, 2, ["--pattern"]),
    "no data": ({"data": None}, 2, ["--data"]),
    "OUT is there": ({"out": "{tmp}/full"}, 1, ["is not empty; give a new folder"]),
    "OUT is MODEL": ({"out": f"{{home}}/{BERT}"}, 1, ["is not empty; give a new folder"]),
    "OUT is a file": ({"out": "{tmp}/short.txt"}, 1, ["is a file; give a new folder"]),
    "no such file": ({"data": "{home}/row.jsonl"}, 1, ["is no file. Did you mean", "rows.jsonl"]),
    "no such kind": ({"data": "{tmp}/words.pdf"}, 1, ["must end in .txt, .csv, .json, .jsonl"]),
    "broken file": ({"data": "{tmp}/broken.jsonl"}, 1, ["broken.jsonl': cannot be read as json"]),
    "empty file": ({"data": "{tmp}/empty.txt"}, 1, ["empty.txt': "]),
    "few rows": ({"data": "{tmp}/short.txt"}, 1, ["has 2 rows; it must have at least 8"]),
    "few tokens": (
        {"model": f"{{home}}/{LLAMA}", "data": "{tmp}/short.txt"},
        1,
        ["has 0 rows of 40 tokens; it must have at least 8"],
    ),
    "few wanted": ({"rows": 3}, 1, ["rows=3: must be at least 8"]),
    "no such column": ({"text_column": "sentnce"}, 1, ["text_column='sentnce': must be one", "Did you mean 'sentence'?"]),
    "no text": ({"data": "{tmp}/numbers.jsonl", "text_column": "length"}, 1, ["holds int64; must be one with text: sentence"]),
    "no text at all": ({"data": "{tmp}/only.jsonl"}, 1, ["has no column with text"]),
    "which column": ({"data": "{tmp}/three.jsonl"}, 1, ["text_column=None: must say which is meant; the data has a, b, c, number"]),
    "long rows": ({"max_length": 41}, 1, ["max_length=41: must be from 1 to 40"]),
    "sparsity": ({"sparsity": 1.5}, 1, ["target_sparsity=1.5"]),
    "criterion": ({"criterion": "obss"}, 1, ["criterion='obss'", "Did you mean 'obs'?"]),
    "trained criterion": ({"criterion": "movement"}, 1, ["criterion='movement'"]),
    "what does not go together": ({"pattern": "1x1", "update": "obs"}, 1, ["update='obs'"]),
    "device": ({"device": "hpux"}, 1, ["device='hpux'"]),
    "no model": ({"model": "{tmp}/full"}, 1, ["has no config.json"]),
    "no tokenizer": ({"model": "{tmp}/bare"}, 1, ["has no tokenizer"]),
    "condensed already": ({"model": "{tmp}/small"}, 1, ["is condensed already"]),
    "choices": ({"model": "{tmp}/choices"}, 1, ["model='BertForMultipleChoice': reads several texts a row"]),
    "images": ({"model": "{tmp}/vit"}, 1, ["takes pixel_values, and no text"]),
    "a link to elsewhere": ({"model": "{tmp}/linked"}, 1, ["is a link to elsewhere"]),
}


@pytest.fixture(scope="module")
def bad(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What cannot be used: files, and models."""
    folder = tmp_path_factory.mktemp("bad")
    bad_files(folder)
    tiny("bert", "sequence-classification", vocab_size=len(TOKENIZER)).save_pretrained(folder / "bare")
    small = prune_in_python(home / BERT, AutoModelForSequenceClassification, "head", home / "rows.jsonl", None)
    small.save_pretrained(folder / "small")
    TOKENIZER.save_pretrained(folder / "small")
    tiny("bert", "multiple-choice", vocab_size=len(TOKENIZER)).save_pretrained(folder / "choices")
    TOKENIZER.save_pretrained(folder / "choices")
    tiny("vit").save_pretrained(folder / "vit")
    TOKENIZER.save_pretrained(folder / "vit")
    shutil.copytree(home / BERT, folder / "linked")
    (folder / "linked" / "vocab.txt").symlink_to(home / "text.txt")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_nothing_is_left(case: str, cli: CommandLine, home: Path, bad: Path) -> None:
    changes, code, messages = BAD[case]
    given = {name: value.format(home=home, tmp=bad) if isinstance(value, str) else value for name, value in changes.items()}
    before = sorted([*home.rglob("*"), *bad.rglob("*")])
    cli(*command(home, bad, **given), code=code)
    said = " ".join(cli.err.replace("│", " ").split())
    for message in messages:
        assert message in said
    assert cli.out == ""
    assert sorted([*home.rglob("*"), *bad.rglob("*")]) == before


def write(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *([text, 1] for text in texts)])
    elif path.suffix == ".txt":
        path.write_text("\n".join(texts))
    else:
        rows = [{"text": text, "label": 1} for text in texts]
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(left, right, strict=True)
    )


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    model = tiny("bert", "sequence-classification", vocab_size=len(TOKENIZER))
    found = [
        calibration_batches(model, TOKENIZER, write(tmp_path / f"rows{ending}", [*SENTENCES, "", " "]), batch_size=20)
        for ending in (".txt", ".csv", ".json", ".jsonl")
    ]
    assert [len(batch["input_ids"]) for batch in found[0]] == [20, 20, 8]  # rows without text are none
    assert all(same(found[0], other) for other in found[1:])
    read = sorted(TOKENIZER.decode(ids, skip_special_tokens=True) for batch in found[0] for ids in batch["input_ids"])
    assert read == sorted(SENTENCES)
    assert set(found[0][0]) == {"input_ids", "attention_mask"}


def test_pairs_are_read_as_pairs(tmp_path: Path) -> None:
    model = tiny("bert", "sequence-classification", vocab_size=len(TOKENIZER))
    rows = [{"sentence1": text, "sentence2": "the old ant", "id": "x", "label": "sense"} for text in SENTENCES]
    quickstart.write_rows(tmp_path / "rows.jsonl", rows)
    guessed = calibration_batches(model, TOKENIZER, tmp_path / "rows.jsonl")
    named = calibration_batches(model, TOKENIZER, tmp_path / "rows.jsonl", ["sentence1", "sentence2"])
    assert same(guessed, named)
    read = sorted(TOKENIZER.decode(ids).replace(" [PAD]", "") for batch in guessed for ids in batch["input_ids"])
    assert read == sorted(f"[CLS] {text} [SEP] the old ant [SEP]" for text in SENTENCES)
    with pytest.raises(ConfigError, match="must name 1 or 2 of"):
        calibration_batches(model, TOKENIZER, tmp_path / "rows.jsonl", ["sentence1", "sentence2", "id"])


def test_a_language_model_gets_windows_of_joined_text(tmp_path: Path) -> None:
    """All of one length, none padded, each a piece of the text as it is; at random where there are more than enough."""
    model = tiny("llama", "causal-lm", vocab_size=len(TOKENIZER))
    file = write(tmp_path / "text.txt", SENTENCES)
    tokens = TOKENIZER("\n".join(SENTENCES))["input_ids"]
    found = calibration_batches(model, TOKENIZER, file, max_length=10, rows=12, seed=1)
    assert [list(batch) for batch in found] == [["input_ids", "attention_mask"]]
    pieces = {tuple(tokens[start : start + 10]) for start in range(0, len(tokens) - 9, 10)}
    chosen = [tuple(row) for row in found[0]["input_ids"].tolist()]
    assert len(set(chosen)) == 12
    assert set(chosen) <= pieces
    assert bool(found[0]["attention_mask"].all())
    assert not same(found, calibration_batches(model, TOKENIZER, file, max_length=10, rows=12, seed=2))
    with pytest.raises(ConfigError, match="must name 1 of"):
        calibration_batches(model, TOKENIZER, write(tmp_path / "rows.csv", SENTENCES), ["text", "text"])


def test_rows_are_taken_until_there_are_tokens_enough(tmp_path: Path) -> None:
    model = tiny("bert", "sequence-classification", vocab_size=len(TOKENIZER))
    file = write(tmp_path / "rows.txt", [" ".join(["ant"] * 38)] * 1000)  # 40 tokens with [CLS] and [SEP]

    def number(**settings: int) -> int:
        return sum(len(batch["input_ids"]) for batch in calibration_batches(model, TOKENIZER, file, **settings))

    assert number() == 820  # the first number of rows that have 2¹⁵ tokens
    assert number(rows=900) == 900
    assert number(max_length=4) == 1000
    causal = tiny("llama", "causal-lm", vocab_size=len(TOKENIZER))
    assert len(calibration_batches(causal, TOKENIZER, file, batch_size=1000)[0]["input_ids"]) == 820


def test_rows_are_chosen_by_the_seed(tmp_path: Path) -> None:
    """So that a sorted file gives all kinds of rows."""
    model = tiny("bert", "sequence-classification", vocab_size=len(TOKENIZER))
    file = write(tmp_path / "rows.txt", SENTENCES)

    def chosen(seed: int) -> list[str]:
        (batch,) = calibration_batches(model, TOKENIZER, file, rows=12, seed=seed)
        return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"]]

    assert chosen(1) == chosen(1) != chosen(2)
    assert set(chosen(1)) < set(SENTENCES)
    assert not set(chosen(1)) <= set(SENTENCES[:24])


def test_documents_of_a_language_model_end_where_they_end(tmp_path: Path) -> None:
    model, tokenizer = tiny("llama", "causal-lm", vocab_size=len(TOKENIZER)), quickstart.make_tokenizer(SENTENCES)
    tokenizer.eos_token = "[UNK]"
    found = calibration_batches(model, tokenizer, write(tmp_path / "rows.csv", SENTENCES), max_length=10)
    between = tokenizer.decode(torch.cat([batch["input_ids"].flatten() for batch in found])).count("[SEP] [UNK] [CLS]")
    assert between > 20  # some are cut by the windows


def test_an_encoder_decoder_reads_one_column_and_writes_the_other(tmp_path: Path) -> None:
    model = tiny("t5", "seq2seq-lm", vocab_size=len(TOKENIZER))
    rows = [{"question": text, "answer": text.split(" ")[1]} for text in SENTENCES]
    quickstart.write_rows(tmp_path / "rows.jsonl", rows)
    found = calibration_batches(model, TOKENIZER, tmp_path / "rows.jsonl", ["question", "answer"])
    batch = found[0]
    assert set(batch) == {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}
    assert bool((batch["decoder_input_ids"][:, 0] == model.config.decoder_start_token_id).all())
    assert batch["decoder_attention_mask"].shape == batch["decoder_input_ids"].shape
    assert hf_prune.prune(model, PruningConfig(pattern="neuron"), found).sparsity == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ConfigError, match="must say two, what is read and what is written; the data has question, answer"):
        calibration_batches(model, TOKENIZER, tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("family", "longest"), [("bert", 40), ("roberta", 38), ("opt", 40), ("t5", None)])
def test_the_longest_row(family: str, longest: int | None) -> None:
    """It runs, and one token more does not; RoBERTa has positions that no token gets."""
    model = tiny(family)
    assert longest_row(model) == longest
    if longest is None:
        assert row_length(model, TOKENIZER) == 64  # the tokenizer's
        return
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))
