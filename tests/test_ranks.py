"""Two processes train as one does: launched for real on the CPU, with `accelerate launch` (DDP) and `torchrun` (shards).

A launch costs seconds, so there is one for each kind and it runs many cases, those of `ranks.py`; the same cases run alone here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distillation_cases import TASKS
from helpers import assert_equal
from ranks import CASES, STEPS, STUDENTS, TRAINED, Result
from safetensors.torch import load_file
from torch import Tensor

from hf_prune import ConfigError, Pruner, PruningConfig

SCRIPT = Path(__file__).with_name("ranks.py")
BIN = Path(sys.executable).parent

LAUNCHERS = {
    # The way to several processes without MPI; the script says that they use the CPU.
    "accelerate": [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
    "torchrun": [BIN / "torchrun", "--nproc_per_node", "2", "--standalone"],
}

FAST = ["sharded taylor heads", "sharded wanda", "sharded movement", "sharded nested", "sharded gpt2", "reloaded movement"]
SLOW = [name for name in CASES if name.startswith(("sharded", "reloaded")) and name not in FAST]
IN_SHARDS = [*FAST, "too early", "adapted", "flat", "trained in shards", "family in shards", "tensor parallel"]
WHOLE = [name for name in CASES if name not in SLOW + IN_SHARDS]

Runs = Callable[[str], list[Result]]


def launch(launcher: str, names: list[str], folder: Path) -> Runs:
    """Run cases on two processes. What each of them returned, by case."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])}
    command = [*LAUNCHERS[launcher], SCRIPT, folder, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]

    def of_case(name: str) -> list[Result]:
        return [
            json.loads((folder / f"{name}.{rank}.json").read_text()) | load_file(folder / f"{name}.{rank}.safetensors")
            for rank in (0, 1)
        ]

    return of_case


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch("accelerate", WHOLE, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch("torchrun", IN_SHARDS, tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def more_shards(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return launch("torchrun", [*SLOW, "sharded wanda"], tmp_path_factory.mktemp("more"))


def tensors(result: Result, of: str = "") -> dict[str, Tensor]:
    return {name: value for name, value in result.items() if isinstance(value, Tensor) and name.startswith(of)}


def assert_same_run(ours: Result, alone: Result) -> None:
    """The same masks, and otherwise the same up to rounding."""
    assert tensors(ours).keys() == tensors(alone).keys()
    for name, value in tensors(alone).items():
        if value.is_floating_point():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert torch.equal(ours[name], value), name
        # A zero of one run is a zero of the other.
        if not name.startswith("pruner") and "state" not in name:
            assert torch.equal(ours[name] == 0, value == 0), name


def assert_same_logs(ours: list[dict[str, float]], alone: list[dict[str, float]]) -> None:
    assert [log.keys() for log in ours] == [log.keys() for log in alone]
    for mine, other in zip(ours, alone):
        for key in mine.keys() - {"total_flos"}:
            assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=1e-8), key


# ------------------------------------------------------------------------------------------------------------------------ DDP


def same_alone(name: str, two: Runs, folder: Path) -> tuple[Result, Result, Result]:
    """What two processes and one make in a case: the same run, with the same logs."""
    first, second = two(name)
    assert_equal(tensors(first), tensors(second))
    alone = CASES[name](folder)
    assert_same_run(first, alone)
    assert_same_logs(first["logs"], alone["logs"])
    return first, second, alone


@pytest.mark.parametrize("name", TRAINED)
def test_a_trainer_on_two_processes_prunes_as_on_one(name: str, two: Runs, tmp_path: Path) -> None:
    first, second, _ = same_alone(f"trained {name}", two, tmp_path)
    assert first["world"] == second["world"] == 2
    assert first["logs"][-1]["reached_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_a_family_of_two_processes_is_that_of_one(two: Runs, tmp_path: Path) -> None:
    first, second, alone = same_alone("family", two, tmp_path)
    assert first["files"] == second["files"] == alone["files"]
    assert [member["folder"] for member in first["members"]] == ["parameters-0.95", "parameters-0.9"]
    for mine, other in zip(first["members"], alone["members"], strict=True):
        assert mine["metrics"] == pytest.approx(other["metrics"], rel=1e-6)
        assert {**mine, "metrics": None} == {**other, "metrics": None}


def test_distillation_on_two_processes_is_that_of_one(two: Runs, tmp_path: Path) -> None:
    same_alone("distilled", two, tmp_path)


@pytest.mark.parametrize("task", STUDENTS)
def test_a_student_of_two_processes_is_that_of_one(task: str, two: Runs, tmp_path: Path) -> None:
    first, second = two(f"student of {task}")
    alone = CASES[f"student of {task}"](tmp_path)
    assert (alone["world"], first["world"], second["world"]) == (1, 2, 2)
    assert_equal(tensors(first), tensors(second))
    assert tensors(first).keys() == tensors(alone).keys()
    start = TASKS[task](seed=0, count=1)[0].state_dict()
    assert any((alone[name] - start[name]).abs().max() > 1e-3 for name in start.keys() & alone.keys())
    for name, tensor in tensors(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for before, after in zip(alone["logs"], first["logs"], strict=True):
        assert after == pytest.approx(before, rel=1e-4)


def test_ragged_batches_leave_ranks_together(two: Runs) -> None:
    first, second = two("ragged")
    assert_equal(tensors(first), tensors(second))
    assert first["logs"] == second["logs"]


@pytest.mark.parametrize("name", ["blocks", "wanda"])
def test_a_resumed_run_goes_on_and_one_process_writes(name: str, two: Runs) -> None:
    for result in two(f"resumed {name}"):
        through, again = (
            {key.removeprefix(run): value for key, value in tensors(result, run).items()} for run in ("through/", "again/")
        )
        if name == "blocks":
            assert_equal(through, again)
        else:  # sums over processes are added in another order
            assert_same_run(through, again)
    files = two(f"resumed {name}")[0]["files"]
    assert files == [f"checkpoint-{step}/{file}" for step in (3, 6) for file in ("pruner.safetensors", "pruning_config.json")]


def test_a_checkpoint_is_complete_with_what_every_process_writes(two: Runs) -> None:
    for result in two("saved"):
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(result["recorded"])
        assert (result["before"], result["after"]) == (f"checkpoint-{STEPS}", None)


def test_saving_upon_a_signal_is_refused_on_two_processes(two: Runs) -> None:
    for result in two("terminated"):
        assert result["error"].startswith(
            "ValueError: enable_jit_checkpoint=True does not work with PruningCallback on 2 processes"
        )
        assert result["step"] == 0


def test_an_accelerate_loop_on_two_processes_is_that_of_one(two: Runs, tmp_path: Path) -> None:
    first, second = two("accelerated")
    assert_equal(tensors(first), tensors(second))
    assert_same_run(first, CASES["accelerated"](tmp_path))


def test_ranks_that_disagree_say_so(two: Runs) -> None:
    errors = {result["error"] for result in two("disagreeing")}
    assert len(errors) == 1
    assert errors.pop().startswith(
        "RuntimeError: Ranks disagree at step 2 about the masks of 19 of 19 modules, first 'config/bert."
    )


def test_processes_agree_about_what_blocks_cost(two: Runs) -> None:
    first, second = two("timed")
    assert tensors(first)
    assert_equal(tensors(first), tensors(second))


def test_tokens_that_one_process_saw_count_for_all(two: Runs, tmp_path: Path) -> None:
    first, second = two("one sees nothing")
    assert_equal(tensors(first), tensors(second))
    assert_equal(tensors(first), CASES["one sees nothing"](tmp_path))


# -------------------------------------------------------------------------------------------------- FSDP2 and tensor parallelism


def check_sharded(name: str, shards: Runs, folder: Path) -> None:
    """A run in shards against the same alone, or one that went on from a state against one that ran through."""
    first, second = shards(name)
    assert_equal(tensors(first), tensors(second))
    if name.startswith("reloaded"):
        through = tensors(shards(name.replace("reloaded", "sharded"))[0])
        assert_same_run(
            first, {key: value for key, value in through.items() if key.startswith((f"weights {STEPS}", f"state {STEPS}"))}
        )
        return
    alone = CASES[name](folder)
    assert_same_run(first, alone)
    assert first["sparsity"] == second["sparsity"] == alone["sparsity"]
    assert alone["sparsity"][-1][0] > 0.3


@pytest.mark.parametrize("name", FAST)
def test_a_sharded_model_is_pruned_as_a_whole_one(name: str, shards: Runs, tmp_path: Path) -> None:
    check_sharded(name, shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_a_sharded_model_is_pruned_as_a_whole_one_whatever_the_criterion(name: str, more_shards: Runs, tmp_path: Path) -> None:
    check_sharded(name, more_shards, tmp_path)


def test_a_trainer_prunes_a_model_that_was_sharded_as_it_was_loaded(shards: Runs, tmp_path: Path) -> None:
    first, second = shards("trained in shards")
    assert_equal(tensors(first), tensors(second))
    alone = CASES["trained in shards"](tmp_path)
    assert_same_run(first, alone)
    assert_same_logs(first["logs"], alone["logs"])


def test_tensor_parallel_layers_are_pruned_as_whole_ones(shards: Runs, tmp_path: Path) -> None:
    first, second = shards("tensor parallel")
    assert_equal(tensors(first), tensors(second))
    assert_same_run(first, CASES["tensor parallel"](tmp_path))


def test_deepspeed_is_refused() -> None:
    """By the name of its engine, since DeepSpeed itself is not installed where tests run."""
    engine = type("DeepSpeedEngine", (torch.nn.Linear,), {})(4, 4)
    with pytest.raises(ConfigError, match="is trained by DeepSpeed, which does not expose gradients"):
        Pruner(engine, PruningConfig(pattern="1x1"), total_steps=1)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "too early",
            "RuntimeError: 'bert.encoder.layer.0.attention.self.query.weight' is not the parameter it was when the Pruner was ",
        ),
        (
            "adapted",
            "ConfigError: config.target_modules=None: names 'bert.encoder.layer.0.attention.self.query', which has a LoRA",
        ),
        ("family in shards", "ConfigError: target_parameters=[0.95, 0.9]: is a family, and the model is sharded over ranks"),
        ("flat", "ConfigError: model='FullyShardedDataParallel': holds weights as flat parameters"),
        ("tensor parallel", "ConfigError: config.criterion='apoz': reads activations, which tensor parallelism splits"),
    ],
)
def test_what_cannot_be_pruned_is_refused_on_all_ranks(case: str, message: str, shards: Runs) -> None:
    for result in shards(case):
        assert result["error"].startswith(message)
