"""Ends short training runs with SIGKILL, inside a save or anywhere, or with SIGTERM, upon which they save, and resumes each.

    python killed_runs.py FOLDER KILLS SEED SETTING...

Python's profiling hook counts function calls, so a kill can strike between any two calls of a run, and inside a save before any
call that touches a file: while one is open and half written, after the model and before the optimizer, while an older checkpoint is
deleted. Every run is a process of its own, forked from one that has imported everything. What the runs end with is left in
FOLDER/SETTING/results, and one JSON line is printed for each kill.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from helpers import ROWS, SCHEDULED, pruner_of, tiny_bert, trainer_for, with_dropout
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from hf_prune import DistillationTrainer, PruningConfig, last_complete_checkpoint

CONFIGS: dict[str, dict[str, Any]] = {
    "snip_momentum": {"pattern": "4x1", "target_sparsity": 0.7},
    "movement": {"pattern": "1x1", "criterion": "movement"},
    "distillation": {"pattern": "head", "criterion": "taylor"},
    "activations": {"pattern": "neuron", "criterion": "apoz"},
    "family": {"rules": [{"pattern": "head"}, {"pattern": "neuron"}], "target_parameters": [0.9, 0.8]},
}

KINDS = KILLED_SAVING, KILLED, TERMINATED, TERMINATED_AND_KILLED = (
    "killed in a save",
    "killed",
    "terminated",
    "terminated, then killed in a save",
)

#: Evaluated and saved after every second step, and upon SIGTERM; one checkpoint is kept.
SAVING: dict[str, Any] = {
    "save_strategy": "steps",
    "eval_strategy": "steps",
    "save_steps": 2,
    "eval_steps": 2,
    "save_total_limit": 1,
    "enable_jit_checkpoint": True,
    "lr_scheduler_type": "linear",
}

#: The functions that save.
SAVES = {"_save_checkpoint", "save_member"}

#: The built-in functions by which a save touches files.
FILE_CALLS = {
    "open",
    "write",
    "write_record",
    "write_end_of_file",
    "serialize_file",
    "close",
    "mkdir",
    "replace",
    "unlink",
    "rmdir",
}


def trainer(setting: str, folder: Path, fresh: bool) -> Trainer:
    """A resumed run takes nothing from the model or the random state that it is given."""
    kind = Trainer
    if setting == "distillation":
        kind = partial(DistillationTrainer, teacher=tiny_bert(seed=5))
    config = PruningConfig(**CONFIGS[setting], **SCHEDULED)
    model = with_dropout(seed=0 if fresh else os.getpid())
    return trainer_for(folder, config, model, kind, eval_dataset=ROWS[:16], **SAVING)


class Bomb:
    """Sends this process a signal.

    Args:
        kind: `"killed in a save"`: before the `at`-th file call of the `save`-th save. Else before the `at`-th function call of the
            run; and one that was terminated may be killed before the `then`-th file call of the saves that follow.
    """

    def __init__(self, kind: str = "", at: int = 0, save: int = 0, then: int = 0) -> None:
        self.kind, self.at, self.save, self.then = kind, at, save, then
        self.calls = 0
        #: File calls of each save so far.
        self.saves: list[int] = []
        self._saving = False
        self._since = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_name in SAVES and event in ("call", "return"):
            self._saving = event == "call"
            self.saves += [0] * self._saving
        if event not in ("call", "c_call"):
            return
        self.calls += 1
        touches = self._saving and event == "c_call" and argument.__name__ in FILE_CALLS and not isinstance(argument.__self__, str)
        if touches:
            self.saves[-1] += 1
        if self.kind == KILLED_SAVING:
            if touches and (len(self.saves), self.saves[-1]) == (self.save, self.at):
                os.kill(os.getpid(), signal.SIGKILL)
        elif self.calls == self.at:
            os.kill(os.getpid(), signal.SIGKILL if self.kind == KILLED else signal.SIGTERM)
        elif touches and self.calls > self.at:
            self._since += 1
            if self._since == self.then:
                os.kill(os.getpid(), signal.SIGKILL)


def run(setting: str, folder: Path, bomb: Bomb | None = None, results: Path | None = None) -> None:
    """Train, from the last complete checkpoint if there is one, and leave what came of it in `results`."""
    found = last_complete_checkpoint(folder)
    job = trainer(setting, folder, fresh=found is None)
    for callback in job.callback_handler.callbacks:
        if isinstance(callback, JITCheckpointCallback):
            callback.jit_manager.kill_wait = 0
    sys.setprofile(bomb)
    job.train(resume_from_checkpoint=found)
    sys.setprofile(None)
    if results is None:
        return
    results.mkdir(parents=True)
    save_file(job.model.state_dict(), results / "model.safetensors")
    save_file(pruner_of(job).state_dict(), results / "pruner.safetensors")
    for made in [path for path in folder.iterdir() if "parameters" in path.name or path.name == "family.json"]:
        (shutil.copytree if made.is_dir() else shutil.copyfile)(made, results / made.name)
    timed = ("runtime", "per_second", "total_flos", "train_loss")
    history = [*job.state.log_history, job.evaluate()]
    metrics = [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in history]
    (results / "metrics.json").write_text(json.dumps(metrics))
    if bomb is not None:
        (results / "calls.json").write_text(json.dumps({"calls": bomb.calls, "saves": bomb.saves}))


def forked(job: Callable[[], None]) -> int:
    """Run `job` in a child process, silently. Returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            job()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("a run failed")
    return 0


def main(setting: str, folder: Path, kills: int, seed: int) -> None:
    """One uninterrupted run, then a run for each kill, from the start."""
    output, results = folder / "run", folder / "results"
    run(setting, output)  # imports what the first step and the first save import
    shutil.rmtree(output)
    gc.freeze()  # see conftest.py
    forked(partial(run, setting, output, Bomb(), results / "whole"))  # which counts, and sends nothing
    shutil.rmtree(output)
    counted = json.loads((results / "whole" / "calls.json").read_text())
    generator = random.Random(seed)
    for number in range(kills):
        kind = KINDS[number % len(KINDS)]
        save = generator.randrange(len(counted["saves"]))
        within = generator.randint(1, counted["saves"][save])
        call = generator.randint(1, counted["calls"])
        bomb = {
            KILLED_SAVING: Bomb(kind, within, save + 1),
            TERMINATED_AND_KILLED: Bomb(kind, call, then=within),
        }.get(kind, Bomb(kind, call))
        ended = forked(partial(run, setting, output, bomb))
        found = last_complete_checkpoint(output)
        report = {
            "setting": setting,
            "kind": kind,
            "signal": ended,
            "save": bomb.save,
            "call": bomb.at,
            "checkpoints": sorted(
                (path.name for path in output.glob("checkpoint-*")), key=lambda name: int(name.rpartition("-")[2])
            ),
            "resumed_from": found and Path(found).name,
        }
        forked(partial(run, setting, output, None, results / str(number)))
        shutil.rmtree(output)
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, kills, seed, *settings = sys.argv[1:]
    for setting in settings:
        main(setting, Path(folder, setting), int(kills), int(seed))
