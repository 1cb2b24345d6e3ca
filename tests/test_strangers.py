"""The library as strangers use it: other people's trainers and launchers, each in a script that its users would write.

The scripts, in `strangers/`, run in processes of their own, on tiny random models, without the Hub, with the versions pinned in
`strangers/requirements.txt`. If these tests do not run where they are all installed, and `STRANGERS_PYTHON` does not name a Python
that has them, a virtual environment is made for them (several minutes).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from safetensors.torch import load_file

STRANGERS = Path(__file__).with_name("strangers")
REQUIREMENTS = STRANGERS / "requirements.txt"

pytestmark = pytest.mark.slow

_INSTALLED = """
import importlib.metadata, sys
wanted = [line.strip().split("==") for line in open(sys.argv[1]) if "==" in line]
found = [(name, version) for name, version in wanted if importlib.metadata.version(name).partition("+")[0] == version]
sys.exit(len(wanted) != len(found))
"""


def has_all(python: Path) -> bool:
    """Whether an environment has the pinned versions."""
    return subprocess.run([python, "-c", _INSTALLED, REQUIREMENTS], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the pinned versions."""
    if named := os.environ.get("STRANGERS_PYTHON"):
        assert has_all(Path(named)), f"STRANGERS_PYTHON={named} has not what {REQUIREMENTS} pins"
        return Path(named)
    if has_all(Path(sys.executable)):
        return Path(sys.executable)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    made = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    installed = subprocess.run([made, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"pip cannot install {REQUIREMENTS.name}: {installed.stderr.strip()[-500:]}")
    return made


def run(python: Path, script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """Run a script in a process of its own; what it printed."""
    environment = os.environ | {
        "PYTHONPATH": str(STRANGERS.parents[1]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(part) for part in (python, *launcher, STRANGERS / script, *arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return result.stdout


_START = "import json, start; start.make({folder!r}); print(json.dumps(start.sentences(128)))"


def run_glue(python: Path, folder: Path, *more: object, launcher: tuple[str, ...] = ()) -> str:
    """Sixteen steps of `run_glue.py` from a tiny start."""
    code = _START.format(folder=str(folder / "start"))
    environment = os.environ | {"PYTHONPATH": str(STRANGERS)}
    made = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    rows = [json.dumps({"sentence": text, "label": label}) for text, label in zip(*json.loads(made.splitlines()[-1]))]
    (folder / "rows.json").write_text("\n".join(rows))
    files = ["--train_file", folder / "rows.json", "--validation_file", folder / "rows.json"]
    steps = ["--max_steps", 16, "--logging_steps", 4, "--save_strategy", "steps", "--save_steps", 8, "--use_cpu"]
    what = ["--do_train", "--do_eval", "--output_dir", folder / "out", "--model_name_or_path", folder / "start"]
    return run(python, "run_glue.py", *what, *files, *steps, *more, launcher=launcher)


def neurons_left(folder: Path) -> set[int]:
    """How many neurons the layers of a saved BERT have that are not zero."""
    weights = load_file(folder / "model.safetensors")
    return {
        int((value != 0).any(0).sum())
        for name, value in weights.items()
        if name.endswith("output.dense.weight") and value.shape[1] == 48
    }


LAUNCHERS = {
    "one process": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_run_glue_with_one_line_added(python: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    run_glue(python, tmp_path, "--report_to", "none", *(["--ddp_backend", "gloo"] if launcher else []), launcher=launcher)
    assert neurons_left(tmp_path / "out") == {24}
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["reached_sparsity"] for entry in history if "loss" in entry][-1] == pytest.approx(0.5)
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    run_glue(python, tmp_path, "--report_to", "none", "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-8")
    assert neurons_left(tmp_path / "out") == {24}


def test_tensorboard_shows_sparsity(python: Path, tmp_path: Path) -> None:
    run_glue(python, tmp_path, "--report_to", "tensorboard")
    folder = max((path.parent for path in (tmp_path / "out").rglob("events.out.tfevents.*")), key=lambda path: path.name)
    scalars = json.loads(run(python, "read_events.py", folder).splitlines()[-1])
    last = {tag.rpartition("/")[2]: values[-1] for tag, values in scalars.items()}
    assert last["reached_sparsity"] == pytest.approx(last["target_sparsity"]) == pytest.approx(0.5), sorted(scalars)
    assert 0 < last["sparsity"] < 0.5  # of all weights of the body


def test_trl_sft_with_lora(python: Path, tmp_path: Path) -> None:
    run(python, "sft_lora.py", tmp_path)
    run(python, "reload_causal.py", tmp_path)


@pytest.mark.parametrize("mode", [[], ["remote"]], ids=["import hf_prune", "trust_remote_code"])
def test_sentence_transformers(python: Path, tmp_path: Path, mode: list[str]) -> None:
    run(python, "embeddings.py", tmp_path)
    run(python, "reload_embeddings.py", tmp_path, *mode)


def test_setfit(python: Path, tmp_path: Path) -> None:
    run(python, "setfit_classifier.py", tmp_path)
    run(python, "reload_setfit.py", tmp_path)
