"""Every command line of the README and of the results' page, every recipe, and every Python block, run as written on tiny models.

Bash expands the blocks itself, with `python` and `hf-prune` replaced by functions that write down what they were called with; so
variables, loops and functions of a block mean what they mean to a reader. Each command with new flags is then run in this process,
in order, with flags added that make it small.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import quickstart
import torch
from accelerate import Accelerator
from datasets import Dataset
from helpers import arguments, forget_criterion
from hub_server import run_with_hub, serving
from models import tiny
from script_cases import EXAMPLES
from transformers import AutoModelForSequenceClassification

import hf_prune.cli
from hf_prune.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

PAGES = {"README": ROOT / "README.md", "results": ROOT / "model_cards" / "results" / "README.md"}
RECIPES = [path for path in sorted((SCRIPTS / "recipes").glob("*.json")) if "stages" in json.loads(path.read_text())]

#: Functions in the place of the commands: each call becomes a line of JSON. `-c` code is run, but for the path of the package.
PREAMBLE = """
record() { "$REAL_PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@" >> "$CALLS"; }
python() {
    if [ "$1" = -c ]; then
        case "$2" in *get_model_path*) echo start ;; *) "$REAL_PYTHON" "$@" ;; esac
    else
        record "$@"
    fi
}
hf-prune() { record hf-prune "$@"; }
bash() { record bash "$@"; }
pip() { record pip "$@"; }
set -euo pipefail
"""

#: What makes a command small, added to its flags; the last one given wins.
TINY = {
    "scripts/run_glue.py": """--max_steps=6 --save_strategy=no --max_train_samples=24 --max_eval_samples=8 --disable_tqdm=true
        --use_cpu""",
    "scripts/run_qa.py": "--max_steps=4 --save_strategy=no --max_seq_length=12 --doc_stride=2 --disable_tqdm=true --use_cpu",
    "scripts/run_clm.py": "--max_steps=4 --save_strategy=no --block_size=16 --disable_tqdm=true --use_cpu",
    "scripts/prune_pipeline.py": "--max_train_samples=24 --max_eval_samples=8 --disable_tqdm=true --use_cpu",
    "scripts/results/reproduce.py": """--rows half --seeds 1 --use_cpu --model_name_or_path start --overrides
        '{"max_steps": 6, "max_train_samples": 24, "max_eval_samples": 8}' --results runs/results""",
    "hf-prune benchmark": "--repeats=1",
    "hf-prune card": "--repeats=1",
}


def code(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shrink(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a few steps a stage, and scores that move fast enough for them."""
    for stage in recipe["stages"]:
        stage["training"] = {**stage.get("training", {}), "max_steps": 12, "save_strategy": "no", "per_device_train_batch_size": 2}
        if pruning := stage.get("pruning"):
            pruning["score_learning_rate"] = 1.0
            pruning |= {name: 0.1 for name in pruning if name.endswith("_epochs")}
            pruning |= {"updates": 3} if "updates" in pruning else {"frequency": 1}
    return recipe


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader's checkout, with the files that the pages speak of, all tiny."""
    rows = [{**row, "label": int(row["label"] == "sense")} for row in quickstart.make_rows(32, seed=3)]
    quickstart.make_start(tmp_path / "start", [str(row["sentence"]) for row in rows])
    for folder in ("", "mrpc", "sst2", "glue/mrpc", "glue/sst2"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        quickstart.write_rows(tmp_path / folder / "train.jsonl", rows[:24])
        quickstart.write_rows(tmp_path / folder / "validation.jsonl", rows[24:])
    for task in ("mrpc", "sst2"):
        shutil.copytree(tmp_path / "start", tmp_path / "runs" / task / "dense-1")
    tokenizer = quickstart.make_tokenizer([row["context"] for row in EXAMPLES])
    for family, head, task in (("bert", "question-answering", "squad"), ("gpt2", "causal-lm", "gpt2")):
        tiny(family, head, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "runs" / task / "dense")
        tokenizer.save_pretrained(tmp_path / "runs" / task / "dense")
    for folder, name in (("squad", "train.json"), ("squad", "dev.json"), ("text", "train.txt"), ("text", "validation.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        text = json.dumps(EXAMPLES) if folder == "squad" else "\n".join(row["context"] for row in EXAMPLES)
        (tmp_path / folder / name).write_text(text)
    shutil.copytree(SCRIPTS / "recipes", tmp_path / "scripts" / "recipes")
    for path in RECIPES:
        (tmp_path / "scripts" / "recipes" / path.name).write_text(json.dumps(shrink(json.loads(path.read_text()))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_PRUNE_GLUE_DIR", str(tmp_path / "glue"))
    return tmp_path


def calls(page: Path, sandbox: Path) -> Iterator[list[str]]:
    """The commands of a page as bash expands them, those with the same flags once."""
    log = sandbox / "calls"
    environment = os.environ | {"REAL_PYTHON": sys.executable, "CALLS": str(log)}
    script = PREAMBLE + "\n".join(code(page, "bash"))
    done = subprocess.run(["bash", "-c", script], cwd=sandbox, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = set()
    for line in log.read_text().splitlines():
        call = json.loads(line)
        flags = sorted(word for word in call if word.startswith("--"))
        condensed = any(word.endswith("condensed") for word in call)
        signature = (call[0], call[1] if call[0] in ("hf-prune", "bash") else "", condensed, *flags)
        if signature not in seen:
            seen.add(signature)
            yield call


def execute(call: list[str], sandbox: Path) -> None:
    """Run a command in this process, made small."""
    name = " ".join(call[:2]) if call[0] == "hf-prune" else call[0]
    call = call + shlex.split(TINY.get(name, ""))
    if call[0] == "bash":
        script = ROOT / call[1]
        assert script.is_file()
        subprocess.run(["bash", "-n", str(script)], check=True)
    elif call[:2] == ["hf-prune", "push"]:
        with serving() as (hub, endpoint):
            done = run_with_hub(
                "import sys; from hf_prune.cli import main; main(sys.argv[1:])", *call[1:], endpoint=endpoint, home=sandbox / "hub"
            )
            assert done.returncode == 0, done.stdout + done.stderr
            published = hub.branches.get(call[3], {}).get("main", {})
            assert ("model.safetensors" in published) != ("--dry-run" in call)
    elif call[0] == "hf-prune":
        with pytest.raises(SystemExit) as ended:
            hf_prune.cli.main(call[1:])
        assert not ended.value.code
    else:
        script = importlib.import_module(Path(call[0]).stem)
        assert Path(str(script.__file__)) == ROOT / call[0]
        script.main(call[1:])


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_runs(page: str, sandbox: Path) -> None:
    commands = list(calls(PAGES[page], sandbox))
    assert len(commands) > 5
    for command in commands:
        execute(command, sandbox)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, sandbox: Path) -> None:
    recipe = Recipe.from_json_file(path)
    flags = (
        "--task_name=mrpc --train_file=train.jsonl --validation_file=validation.jsonl --model_name_or_path=start --output_dir=out"
    )
    execute(["scripts/prune_pipeline.py", f"--recipe=scripts/recipes/{path.name}", *flags.split()], sandbox)
    rows = json.loads((sandbox / "out" / "pipeline_results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [stage.name for stage in recipe.stages]
    assert rows[-1]["parameters"] < rows[0]["parameters"]


def ingredients(sandbox: Path) -> dict[str, Any]:
    """What the blocks take for granted: a model and all that trains it."""
    model = AutoModelForSequenceClassification.from_pretrained(sandbox / "start")
    rows = [
        {"input_ids": [1, 2, 3 + index], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 0], "labels": index % 2}
        for index in range(16)
    ]
    data = Dataset.from_list(rows)
    return {
        "model": model,
        "args": arguments(sandbox / "out", num_train_epochs=2, per_device_train_batch_size=2),
        "data": data,
        "accelerator": Accelerator(cpu=True),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": torch.utils.data.DataLoader(data.with_format("torch"), batch_size=4),
    }


def test_python_blocks(sandbox: Path) -> None:
    """The blocks in order, in one namespace with what a reader has."""
    shutil.copytree(sandbox / "start", sandbox / "bert-base-fine-tuned")
    names: dict[str, Any] = {}
    try:
        for block in code(PAGES["README"], "python"):
            names |= ingredients(sandbox)
            exec(compile(block, "README.md", "exec"), names)
    finally:
        forget_criterion("sensitivity")
    dense = AutoModelForSequenceClassification.from_pretrained(sandbox / "start")
    small = AutoModelForSequenceClassification.from_pretrained(sandbox / "condensed")
    assert small.num_parameters() < dense.num_parameters()
    assert names["model"].num_parameters() < dense.num_parameters()
