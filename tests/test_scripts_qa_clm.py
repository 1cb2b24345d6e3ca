"""run_qa.py and run_clm.py: their data and metrics against slow references, and the whole job on tiny models."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import quickstart
import run_clm
import run_qa
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny
from script_cases import EXAMPLES, WORDS, example
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerBase

from hf_prune import PruningConfig, PruningRule
from hf_prune.model import find_blocks

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return quickstart.make_tokenizer([" ".join(("what", "comes", *WORDS))])


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with data and a random model."""
    folder = tmp_path_factory.mktemp("squad")
    quickstart.write_rows(folder / "train.jsonl", EXAMPLES[:16])
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"])
                    ],
                }
            ],
        }
        for row in EXAMPLES[16:]
    ]
    (folder / "dev.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "weather", "paragraphs": paragraphs}]}))
    tiny("bert", "question-answering", vocab_size=len(tokenizer)).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    return folder


# -------------------------------------------------------------------------------------------------------------------------- data


def test_nested_and_flat_files_hold_the_same(squad: Path, tmp_path: Path) -> None:
    expected = EXAMPLES[16:]
    (tmp_path / "flat.json").write_text(json.dumps({"data": expected}))
    (tmp_path / "list.json").write_text(json.dumps(expected))
    quickstart.write_rows(tmp_path / "lines.jsonl", expected)
    for file in (squad / "dev.json", *tmp_path.iterdir()):
        assert run_qa.read_squad(str(file)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "dev.json: is not valid JSON"),
        ("[]", "dev.json: has no questions"),
        (json.dumps([{"id": 1, "question": "?", "context": "rain"}]), "example 0 has no 'answers', only id, question, context"),
        (
            json.dumps([{**EXAMPLES[0], "answers": {"text": ["rain"], "answer_start": [1000]}}]),
            "answer 'rain' of example 0 is not at 1000 in its context",
        ),
    ],
)
def test_a_file_in_another_format(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run_qa.read_squad(str(tmp_path / "dev.json"))


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 10**6), length=st.integers(2, 40), stride=st.integers(0, 5))
def test_windows_hold_the_context_and_the_answer(number: int, length: int, stride: int, tokenizer: PreTrainedTokenizerBase) -> None:
    row = example(number, length)
    rows = run_qa.windows(Dataset.from_list([row]), tokenizer, 16, stride, keep=True)
    seen, whole = set(), []
    for window in rows:
        inside = [pair for pair in window["offsets"] if pair[0] >= 0]
        seen |= {tuple(pair) for pair in inside}
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        fits = inside[0][0] <= start and start + len(text) <= inside[-1][1]
        found = window["start_positions"], window["end_positions"]
        if fits:
            whole.append(row["context"][window["offsets"][found[0]][0] : window["offsets"][found[1]][1]])
        else:
            assert found == (0, 0)
    assert len(seen) == 2 * length - 1  # each token of the context is in some window
    assert set(whole) <= {row["answers"]["text"][0]}
    assert whole or stride < 2  # neighbouring windows that share two tokens hold any three


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), longest=st.integers(1, 4), threshold=st.sampled_from([None, 0.0, 1.0]))
def test_the_best_answer_is_the_best_of_all_spans(
    seed: int, longest: int, threshold: float | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = Dataset.from_list([example(seed, 25), example(seed + 1, 6)])
    rows = run_qa.windows(examples, tokenizer, 16, 3, keep=True)
    width = max(len(ids) for ids in rows["input_ids"])
    starts, ends = np.random.default_rng(seed).normal(size=(2, len(rows), width))
    expected = []
    for number, context in enumerate(examples["context"]):
        scored, null = [], math.inf
        for place, window in enumerate(rows):
            if window["example"] != number:
                continue
            null = min(null, starts[place, 0] + ends[place, 0])
            offsets = window["offsets"]
            for first in range(len(offsets)):
                for last in range(first, min(first + longest, len(offsets))):
                    if offsets[first][0] >= 0 and offsets[last][0] >= 0:
                        scored.append((starts[place, first] + ends[place, last], context[offsets[first][0] : offsets[last][1]]))
        score, text = max(scored)
        expected.append("" if threshold is not None and null - score > threshold else text)
    found = run_qa.best_answers((starts, ends), rows, examples, 100, longest, threshold)
    assert found == expected


def test_exact_match_and_f1() -> None:
    found = ["The  Rain, again", "snow and wind", "", "fog", "hail storm storm"]
    answers = [["rain again", "snow"], ["snow", "a wind or snow"], [], [], ["storm"]]
    f1 = [1, 2 * 2 / (3 + 3), 1, 0, 2 * 1 / (3 + 1)]
    assert run_qa.squad_scores(found, answers) == {
        "exact_match": pytest.approx(100 * 2 / 5),
        "f1": pytest.approx(100 * sum(f1) / 5),
    }


# -------------------------------------------------------------------------------------------------------------------------- jobs


def halves(folder: Path, *patterns: str) -> Path:
    """A pruning config for half of these units."""
    rules = [PruningRule(pattern=pattern, target_sparsity=0.5) for pattern in patterns]
    PruningConfig(frequency=1, cooldown_steps=1, rules=rules).to_json_file(folder / "pruning.json")
    return folder / "pruning.json"


def flags(folder: Path, **changes: object) -> list[str]:
    """A short run."""
    common = {"output_dir": folder / "out", "do_train": True, "do_eval": True, "max_steps": 4, "save_strategy": "no"}
    common |= {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "learning_rate": 1e-3}
    return [f"--{name}={value}" for name, value in (common | changes).items() if value is not None]


def test_answers_with_half_of_the_heads_and_neurons(squad: Path, tmp_path: Path) -> None:
    """Windows, a teacher, pruning, the condensed model and what it says after it was loaded again; predictions."""
    command = flags(
        tmp_path,
        model_name_or_path=squad / "start",
        train_file=squad / "train.jsonl",
        validation_file=squad / "dev.json",
        test_file=squad / "dev.json",
        do_predict=True,
        max_seq_length=12,
        doc_stride=2,
        do_prune=True,
        pruning_config=halves(tmp_path, "head", "neuron"),
        distill_alpha_hidden=1,
    )
    metrics = run_qa.main(command)
    for name in ("exact_match", "f1"):
        assert metrics[f"eval_{name}"] == metrics[f"condensed_{name}"] == metrics[f"reloaded_{name}"]
    assert metrics["reloaded_loss"] == metrics["condensed_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    condensed = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out" / "condensed")
    heads = [block.num_units for block in find_blocks(condensed) if block.kind == "attention"]
    before = [
        block.num_units
        for block in find_blocks(AutoModelForQuestionAnswering.from_pretrained(squad / "start"))
        if block.kind == "attention"
    ]
    assert sum(heads) == sum(before) / 2

    predictions = json.loads((tmp_path / "out" / "predict_predictions.json").read_text())
    expected = run_qa.squad_scores(list(predictions.values()), [row["answers"]["text"] for row in EXAMPLES[16:]])
    assert list(predictions) == [row["id"] for row in EXAMPLES[16:]]
    assert expected["f1"] == pytest.approx(metrics["eval_f1"])


def test_a_model_learns_where_the_answer_is(squad: Path, tmp_path: Path) -> None:
    """Windows, labels and answers fit together: who learns the labels by heart gives the answers."""
    rows = [{**row, "id": f"{row['id']}-{place}"} for place, row in enumerate(EXAMPLES[:4])]
    quickstart.write_rows(tmp_path / "rows.jsonl", rows)
    metrics = run_qa.main(
        flags(
            tmp_path,
            model_name_or_path=squad / "start",
            train_file=tmp_path / "rows.jsonl",
            validation_file=tmp_path / "rows.jsonl",
            max_seq_length=12,
            doc_stride=4,
            max_steps=150,
            learning_rate=5e-3,
            dropout=0.0,
        )
    )
    assert metrics["eval_exact_match"] == 100
    assert not (tmp_path / "out" / "condensed").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_stride": 384}, "doc_stride=384: must be less than max_seq_length=384"),
        ({"validation_file": None}, "validation_file=None: must be given for this run; the data has only train"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"pruning_pattern": "heads", "do_prune": True}, "Did you mean 'head'"),
        ({"pruning_pattern": "head", "do_prune": True, "do_train": False}, "do_train=False: must be set with --do_prune"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_of_run_qa(squad: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    files = {"train_file": squad / "train.jsonl", "validation_file": squad / "dev.json"}
    with pytest.raises(ValueError, match=message):
        run_qa.main(flags(tmp_path, model_name_or_path=squad / "start", **(files | changes)))
    assert not (tmp_path / "out").exists()


def slow_perplexity(folder: Path, lines: list[str], size: int) -> float:
    """Token by token. Not e to the Trainer's `eval_loss`, which counts a token too many in each row of a GPT-2."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "out"), AutoTokenizer.from_pretrained(folder / "out")
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    losses = []
    for start in range(0, len(tokens) - size + 1, size):
        row = torch.tensor([tokens[start : start + size]])
        probabilities = model(row).logits[0].softmax(-1)
        losses += [-math.log(probabilities[place, row[0, place + 1]]) for place in range(size - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("family", "patterns"), [("gpt2", ("head", "neuron")), ("llama", ("kv_group", "neuron"))])
@pytest.mark.parametrize("form", ["txt", "jsonl"])
def test_language_models(
    family: str, patterns: tuple[str, ...], form: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tiny(family, "causal-lm", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    lines = [row["context"] for row in EXAMPLES]
    for name, part in (("train", lines[:16]), ("validation", lines[16:])):
        file = tmp_path / f"{name}.{form}"
        if form == "txt":
            file.write_text("\n".join(part))
        else:
            quickstart.write_rows(file, [{"text": line} for line in part])
    command = flags(
        tmp_path,
        model_name_or_path=tmp_path / "start",
        train_file=tmp_path / f"train.{form}",
        validation_file=tmp_path / f"validation.{form}",
        block_size=16,
        do_prune=True,
        pruning_config=halves(tmp_path, *patterns),
        distill_alpha_logits=0.5,
    )
    if (family, form) == ("gpt2", "txt"):  # once as a person would, who copied the script
        (tmp_path / "alone").mkdir()
        script = shutil.copy(SCRIPTS / "run_clm.py", tmp_path / "alone")
        done = subprocess.run([sys.executable, str(script), *command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    else:
        metrics = run_clm.main(command)
    assert metrics["eval_perplexity"] == pytest.approx(slow_perplexity(tmp_path, lines[16:], 16), rel=1e-4)
    assert metrics["condensed_perplexity"] == pytest.approx(metrics["eval_perplexity"], rel=1e-5)
    assert metrics["reloaded_perplexity"] == metrics["condensed_perplexity"]
    small, start = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out/condensed", "start"))
    assert small.num_parameters() < start.num_parameters()


def test_rows_of_tokens_are_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [row["context"] for row in EXAMPLES]
    raw = run_clm.DatasetDict({"train": Dataset.from_dict({"text": lines})})
    blocks = run_clm.blocks_of_text(raw, tokenizer, "text", 10)["train"]
    tokens = [token for line in lines for token in tokenizer(line)["input_ids"]]
    assert [token for row in blocks["input_ids"] for token in row] == tokens[: len(tokens) // 10 * 10]
    assert {len(row) for row in blocks["input_ids"]} == {10}
    assert blocks["labels"] == blocks["input_ids"]
    with pytest.raises(ValueError, match="block_size=10000: the train data has fewer tokens"):
        run_clm.blocks_of_text(raw, tokenizer, "text", 10000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "Give --dataset_name, or --train_file"),
        ({"do_predict": "True"}, "do_predict=True: must not be set"),
        ({"train_file": "data.parquet"}, "train_file='data.parquet': the extension must be one of .txt"),
        ({"train_file": "lines.jsonl", "text_column": "texts"}, "text_column='texts': the train data has only text"),
    ],
)
def test_errors_of_run_clm(changes: dict[str, str], message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    quickstart.write_rows(tmp_path / "lines.jsonl", [{"text": "rain"}])
    if "train_file" in changes and changes["train_file"].endswith("jsonl"):
        changes = changes | {"train_file": str(tmp_path / "lines.jsonl")}
    with pytest.raises(ValueError, match=message):
        run_clm.main(flags(tmp_path, model_name_or_path=tmp_path, **changes))
