"""GLUE in the scripts: each task's metric against a slow reference, local files, MNLI's two halves, and pushing what came out."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import quickstart
import run_glue
from hub_server import run_with_hub, serving
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import AutoModel, EvalPrediction

from hf_prune import PruningConfig, PruningRule

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])

CLASSIFIED = sorted(run_glue.TASK_TO_KEYS.keys() - {"stsb"})
SENTENCES = [str(row["sentence"]) for row in quickstart.make_rows(30, seed=5)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny BERT without a classifier, and its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    quickstart.make_start(folder, SENTENCES)
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """Some of GLUE's tasks as files."""
    pairs = [{"a": first, "b": second} for first, second in zip(SENTENCES, reversed(SENTENCES))]
    for task in ("mnli", "stsb", "mrpc"):
        first, second = run_glue.TASK_TO_KEYS[task]
        labels = (
            [place / 7 for place in range(30)] if task == "stsb" else [place % (3 if task == "mnli" else 2) for place in range(30)]
        )
        rows = [{first: pair["a"], second: pair["b"], "label": label} for pair, label in zip(pairs, labels)]
        (tmp_path / "glue" / task).mkdir(parents=True)
        halves = ("validation_matched", "validation_mismatched") if task == "mnli" else ("validation",)
        for place, name in enumerate(("train", *halves)):
            quickstart.write_rows(tmp_path / "glue" / task / f"{name}.jsonl", rows[10 * place : 10 * place + 10])
    return tmp_path / "glue"


def flags(**arguments: object) -> list[str]:
    common = {"do_train": True, "do_eval": True, "max_steps": 2, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return [f"--{name}={value}" for name, value in (common | {"save_strategy": "no"} | arguments).items()]


# ----------------------------------------------------------------------------------------------------------------------- metrics


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30), task=st.sampled_from(CLASSIFIED))
def test_classes(pairs: list[tuple[bool, bool]], task: str) -> None:
    hit, false, missed, rest = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    logits = np.array([[0.0, 1.0] if predicted else [1.0, 0.0] for predicted, _ in pairs])
    labels = np.array([label for _, label in pairs], dtype=int)
    scores = run_glue.metrics_for(task, regression=False)(EvalPrediction(logits, labels))
    spread = (hit + false) * (hit + missed) * (rest + false) * (rest + missed)
    expected = {
        "accuracy": (hit + rest) / len(pairs),
        "f1": 2 * hit / max(2 * hit + false + missed, 1),
        "matthews_correlation": (hit * rest - false * missed) / math.sqrt(spread) if spread else 0.0,
    }
    names = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}.get(task, ["accuracy"])
    assert scores == {name: pytest.approx(expected[name]) for name in names}


def ranks(values: list[float]) -> list[float]:
    """From 1 on; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2 for value in values]


@given(pairs=st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=3, max_size=20))
def test_regression(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = (np.array(column, dtype=float) for column in zip(*pairs))
    assume(predicted.std() > 0 and labels.std() > 0)
    scores = run_glue.metrics_for("stsb", regression=True)(EvalPrediction(predicted[:, None], labels))
    by_rank = np.corrcoef(ranks(predicted.tolist()), ranks(labels.tolist()))[0, 1]
    assert scores == {
        "pearson": pytest.approx(np.corrcoef(predicted, labels)[0, 1], abs=1e-9),
        "spearmanr": pytest.approx(by_rank, abs=1e-9),
    }


# -------------------------------------------------------------------------------------------------------------------------- jobs


def test_mnli_has_two_halves(start: Path, glue: Path, tmp_path: Path) -> None:
    command = flags(model_name_or_path=start, task_name="mnli", glue_dir=glue, output_dir=tmp_path / "out")
    metrics = run_glue.main(command)
    assert {"eval_accuracy", "eval_accuracy_mm"} <= metrics.keys()
    only = [*command, f"--model_name_or_path={tmp_path / 'out'}", f"--output_dir={tmp_path / 'again'}", "--do_train=False"]
    matched, mismatched = (glue / "mnli" / f"validation_{half}.jsonl" for half in ("matched", "mismatched"))
    first, second = matched.read_text(), mismatched.read_text()
    matched.write_text(second)
    mismatched.write_text(first)
    swapped = run_glue.main(only)
    assert swapped["eval_loss"] == pytest.approx(metrics["eval_loss_mm"], rel=1e-6)
    assert swapped["eval_loss_mm"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert metrics["eval_loss"] != metrics["eval_loss_mm"]


def test_regression_with_the_folder_from_the_environment(
    start: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STS-B, pruned and distilled: a regressor learns from the teacher's values."""
    monkeypatch.setenv("HF_PRUNE_GLUE_DIR", str(glue))
    halved = PruningConfig(frequency=1, rules=[PruningRule(pattern="head"), PruningRule(pattern="neuron")])
    halved.to_json_file(tmp_path / "pruning.json")
    settings = {"do_prune": True, "pruning_config": tmp_path / "pruning.json", "distill_alpha_logits": 0.5}
    metrics = run_glue.main(flags(model_name_or_path=start, task_name="stsb", output_dir=tmp_path / "out", **settings))
    for name, apart in (("pearson", 1e-3), ("spearmanr", 1e-3), ("loss", 1e-5)):  # predictions are close together
        assert metrics[f"eval_{name}"] == pytest.approx(metrics[f"condensed_{name}"], abs=apart)
        # where weights lie in memory decides how MKL rounds sums, on some processors
        assert metrics[f"reloaded_{name}"] == pytest.approx(metrics[f"condensed_{name}"], abs=apart)
    assert json.loads((tmp_path / "out" / "condensed" / "config.json").read_text())["id2label"] == {"0": "LABEL_0"}


def test_a_folder_without_the_task(start: Path, glue: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"glue_dir='.*': has no rte/train.jsonl"):
        run_glue.main(flags(model_name_or_path=start, task_name="rte", glue_dir=glue, output_dir=tmp_path / "out"))


def test_push(start: Path, glue: Path, tmp_path: Path) -> None:
    """The condensed model is published, or the pruned one when nothing could be cut out."""
    settings = {"do_prune": True, "pruning_frequency": 1, "push_to_hub": True, "save_strategy": "epoch"}
    settings |= {"model_name_or_path": start, "task_name": "mrpc", "glue_dir": glue}
    commands = [
        flags(**settings, pruning_pattern=pattern, hub_model_id=f"me/{name}", output_dir=tmp_path / name)
        for name, pattern in (("small", "head"), ("sparse", "2:4"))
    ]
    code = """import json, sys
import run_glue
for arguments in json.loads(sys.argv[1]):
    run_glue.main(arguments)"""
    with serving() as (hub, endpoint):
        done = run_with_hub(code, json.dumps(commands), endpoint=endpoint, home=tmp_path / "hub", PYTHONPATH=PATHS)
        assert done.returncode == 0, done.stdout + done.stderr
        small, sparse = (hub.branches[f"me/{name}"]["main"] for name in ("small", "sparse"))
    for files in (small, sparse):
        assert {"model.safetensors", "README.md", "pruning_config.json", "tokenizer.json"} <= set(files)
    assert "hf_prune" in json.loads(small["config.json"])
    assert "hf_prune" not in json.loads(sparse["config.json"])
    assert "modeling_hf_prune.py" in small
    assert "modeling_hf_prune.py" not in sparse
