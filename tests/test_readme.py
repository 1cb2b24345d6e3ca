"""Every command line of the README and of the results' page, every recipe, and every Python block, run as written on tiny models.

Bash expands the blocks itself, with `python` and `hf-prune` replaced by functions that write down what they were called with; so
variables, loops and functions of a block mean what they mean to a reader. Each command with new flags is then a test: it is run in
this process, with flags added that make it small, in a folder with what the commands before it would have left.
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
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import quickstart
import reproduce
import run_glue
import torch
from accelerate import Accelerator
from card_cases import HALF
from datasets import Dataset
from helpers import arguments, forget_criterion, forget_update
from hub_server import run_with_hub, serving
from models import prune_randomly, tiny, tiny_mixture
from script_cases import EXAMPLES
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_prune.cli
from hf_prune import condense
from hf_prune.hub import save_made_from, write_card
from hf_prune.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"

DOCS = ROOT / "docs"
PAGES = {"README": ROOT / "README.md", "model_cards": ROOT / "model_cards" / "results" / "README.md"} | {
    str(path.relative_to(DOCS).with_suffix("")): path for path in sorted(DOCS.rglob("*.md")) if path.parent.name != "api"
}
RECIPES = [path for path in sorted((SCRIPTS / "recipes").glob("*.json")) if "stages" in json.loads(path.read_text())]
#: Recipes of which the others differ in numbers.
KINDS_OF_RECIPES = ("nni_bert_mnli", "mrpc_half", "sst2_quarter")

#: Functions in the place of the commands: each call becomes a record. `-c` code is run, but for the path of the package.
PREAMBLE = r"""
record() { printf '%s\x1f' "$@" >> "$CALLS"; printf '\x1e' >> "$CALLS"; }
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
    "hf-prune benchmark": "--repeats=1 --tokens=32",
    "hf-prune latency": "--repeats=1 --batch-size=1 --length=8",
    "hf-prune card": "--repeats=1",
    "hf-prune vocabulary": "--min-count=9",
    "hf-prune shrink": "--hidden-size=16 --batch-size=2",
}


def code(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def shrink(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with a few steps a stage, and scores that move fast enough for them."""
    for stage in recipe["stages"]:
        stage["training"] = {**stage.get("training", {}), "max_steps": 12, "save_strategy": "no", "per_device_train_batch_size": 2}
        if "hidden_size" in stage:
            stage["hidden_size"] = 16
        if pruning := stage.get("pruning"):
            pruning |= {"target_parameters": 0.9} if "target_parameters" in pruning else {}
            pruning["score_learning_rate"] = 1.0
            pruning |= {name: 0.1 for name in pruning if name.endswith("_epochs")}
            pruning |= {"updates": 3} if "updates" in pruning else {"frequency": 1}
    return recipe


def write_data(folder: Path) -> None:
    """The files of data that the pages speak of."""
    rows = [{**row, "label": int(row["label"] == "sense")} for row in quickstart.make_rows(32, seed=3)]
    for part in ("", "mrpc", "sst2", "glue/mrpc", "glue/sst2"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        quickstart.write_rows(folder / part / "train.jsonl", rows[:24])
        quickstart.write_rows(folder / part / "validation.jsonl", rows[24:])
    for part, name in (("squad", "train.json"), ("squad", "dev.json"), ("text", "train.txt"), ("text", "validation.txt")):
        (folder / part).mkdir(exist_ok=True)
        text = json.dumps(EXAMPLES) if part == "squad" else "\n".join(row["context"] for row in EXAMPLES)
        (folder / part / name).write_text(text)


def expanded(page: Path) -> tuple[list[list[str]], dict[str, str]]:
    """The commands of a page as bash expands them, those with the same flags once, and the files that the blocks write."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "checkout")
        folder.mkdir()
        write_data(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        Path(name, "calls").touch()
        environment = os.environ | {"REAL_PYTHON": sys.executable, "CALLS": f"{name}/calls"}
        script = PREAMBLE + "\n".join(code(page, "bash"))
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records = Path(name, "calls").read_text().split("\x1e")[:-1]
        files = [path for path in folder.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()]
        written = {str(path.relative_to(folder)): path.read_text() for path in files}
    commands: dict[object, list[str]] = {}
    for record in records:
        call = record.split("\x1f")[:-1]
        flags = sorted(word for word in call if word.startswith("--"))
        condensed = any(word.endswith("condensed") for word in call)
        signature = (call[0], call[1] if call[0] in ("hf-prune", "bash") else "", condensed, *flags)
        commands.setdefault(signature, call)
    return list(commands.values()), written


EXPANDED = {name: expanded(page) for name, page in PAGES.items()}
COMMANDS = [
    pytest.param(page, place, id=f"{page} {place}: {' '.join(call[:2])}")
    for page, (commands, _) in EXPANDED.items()
    for place, call in enumerate(commands)
]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's checkout, with the files that the pages speak of, all tiny; and what commands leave for those after them."""
    folder = tmp_path_factory.mktemp("home")
    write_data(folder)
    quickstart.make_start(folder / "start", [row["sentence"] for row in quickstart.make_rows(32, seed=3)])
    for task in ("mrpc", "sst2"):
        shutil.copytree(folder / "start", folder / "runs" / task / "dense-1")
    (folder / "pruning.json").write_text('{"target_sparsity": 0.5, "rules": [{"pattern": "head"}, {"pattern": "neuron"}]}')
    tokenizer = quickstart.make_tokenizer([row["context"] for row in EXAMPLES])
    for family, head, task in (("bert", "question-answering", "squad"), ("gpt2", "causal-lm", "gpt2")):
        tiny(family, head, vocab_size=len(tokenizer)).save_pretrained(folder / "runs" / task / "dense")
        tokenizer.save_pretrained(folder / "runs" / task / "dense")
    shutil.copytree(SCRIPTS / "recipes", folder / "scripts" / "recipes")
    for path in RECIPES:
        (folder / "scripts" / "recipes" / path.name).write_text(json.dumps(shrink(json.loads(path.read_text()))))
    model = AutoModelForSequenceClassification.from_pretrained(folder / "start")
    prune_randomly(model)
    shutil.copytree(folder / "start", folder / "made" / "pruned")
    model.save_pretrained(folder / "made" / "pruned")
    write_card(folder / "made" / "pruned", model, HALF)
    save_made_from(condense(model), folder / "made" / "pruned", folder / "made" / "condensed")
    return folder


@pytest.fixture
def sandbox(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout, which is the working directory."""
    folder = tmp_path / "checkout"
    shutil.copytree(home, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_PRUNE_GLUE_DIR", str(folder / "glue"))
    return folder


def provide(call: list[str], sandbox: Path) -> None:
    """Put pruned and condensed models where a command reads what one before it has left."""
    written = (
        call[3]
        if call[0] == "hf-prune" and call[1] in ("prune", "condense", "convert", "latency", "vocabulary", "shrink", "export")
        else None
    )
    for before, word in pairwise(call):
        if word.startswith("runs/") and before not in ("--output_dir", "--output", "--results") and word != written:
            target = sandbox / word
            if not target.exists():
                made = "made/condensed" if target.name in ("small", "condensed") else "made/pruned"
                shutil.copytree(sandbox / ("runs/gpt2/dense" if target.parent.name == "gpt2" else made), target)


def execute(call: list[str], sandbox: Path) -> None:
    """Run a command in this process, made small."""
    name = " ".join(call[:2]) if call[0] == "hf-prune" else call[0]
    call = call + shlex.split(TINY.get(name, ""))
    if call[0] == "bash":
        script = ROOT / call[1]
        assert script.is_file()
        subprocess.run(["bash", "-n", str(script)], check=True)
    elif call[:2] == ["hf-prune", "push"] and "--dry-run" not in call:
        with serving() as (hub, endpoint):
            done = run_with_hub(
                "import sys; from hf_prune.cli import main; main(sys.argv[1:])", *call[1:], endpoint=endpoint, home=sandbox / "hub"
            )
            assert done.returncode == 0, done.stdout + done.stderr
            published = hub.branches.get(call[3], {}).get("main", {})
            assert "model.safetensors" in published
    elif call[0] == "hf-prune":
        with pytest.raises(SystemExit) as ended:
            hf_prune.cli.main(call[1:])
        assert not ended.value.code
    else:
        script = importlib.import_module(Path(call[0]).stem)
        assert Path(str(script.__file__)) == ROOT / call[0]
        script.main(call[1:])


def write_files(page: str, sandbox: Path) -> None:
    """What the blocks themselves write, such as a config."""
    for name, text in EXPANDED[page][1].items():
        (sandbox / name).parent.mkdir(parents=True, exist_ok=True)
        (sandbox / name).write_text(text)


@pytest.mark.parametrize(("page", "place"), COMMANDS)
def test_a_command_line_runs(page: str, place: int, sandbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four processes would import torch for one step each; `test_reproduce.py` has them.
    monkeypatch.setattr(reproduce, "run_glue", lambda arguments, log: run_glue.main([str(arguments)]))
    command = EXPANDED[page][0][place]
    write_files(page, sandbox)
    provide(command, sandbox)
    execute(command, sandbox)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_runs_in_its_turn(page: str, sandbox: Path) -> None:
    """Each with what those before it really left."""
    write_files(page, sandbox)
    for command in EXPANDED[page][0]:
        execute(command, sandbox)


def test_pages_have_commands() -> None:
    assert {page for page, (commands, _) in EXPANDED.items() if len(commands) > 1} >= {
        "README",
        "model_cards",
        "tour",
        "guides/hub",
    }


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=() if path.stem in KINDS_OF_RECIPES else pytest.mark.slow) for path in RECIPES],
)
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
        "tokenizer": AutoTokenizer.from_pretrained(sandbox / "start"),
        "texts": [row["sentence"] for row in quickstart.make_rows(2, seed=3)],
        "other_texts": [row["sentence"] for row in quickstart.make_rows(8, seed=4)],
        "accelerator": Accelerator(cpu=True),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": torch.utils.data.DataLoader(data.with_format("torch"), batch_size=4),
        "mixture": tiny_mixture("olmoe"),
        "text_loader": torch.utils.data.DataLoader(data.select_columns("input_ids").with_format("torch"), batch_size=4),
    }


@pytest.mark.parametrize("page", [page for page, path in PAGES.items() if code(path, "python")])
def test_python_blocks(page: str, sandbox: Path) -> None:
    """The blocks in order, in one namespace with what a reader has."""
    shutil.copytree(sandbox / "start", sandbox / "bert-base-fine-tuned")
    shutil.copytree(sandbox / "made" / "condensed", sandbox / "condensed")
    names: dict[str, Any] = {}
    try:
        for block in code(PAGES[page], "python"):
            names |= ingredients(sandbox)
            exec(compile(block, PAGES[page].name, "exec"), names)
    finally:
        forget_criterion("sensitivity")
        forget_update("rescaled")
    if page != "README":
        return
    dense = AutoModelForSequenceClassification.from_pretrained(sandbox / "start")
    for name in ("condensed", "smaller"):
        small = AutoModelForSequenceClassification.from_pretrained(sandbox / name)
        assert small.num_parameters() < dense.num_parameters()
