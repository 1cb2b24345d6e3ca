"""What a Trainer's checkpoint must hold so that a run can go on from it: the pruner's tensors, and a record of all files.

The Trainer writes `trainer_state.json` last. The callback's entry in it records every other file with a fingerprint, so a
checkpoint is complete when that file is whole and all others are those that it records. Only after that the Trainer deletes older
checkpoints.
"""

from __future__ import annotations

import functools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_NAME = "pruner.safetensors"

#: What a run goes on from → the files or folders that hold it, one of which must be there.
_REQUIRED = {
    "model": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*"),
    "optimizer": ("optimizer.*", "optimizer_*"),
    "scheduler": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
}

_PIECES, _PIECE = 64, 4096


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The latest checkpoint in a Trainer's output folder that a run can go on from, or None if there is none.

    A process that dies while it saves leaves half a checkpoint behind, which `resume_from_checkpoint=True` would take. This one
    passes it over:

    ```python
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    ```

    Complete means that model, optimizer, scheduler and random state are there, that each file can be read, and, where a
    `PruningCallback` was at work, that each is the one it recorded.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)):
            numbered.append((int(match[1]), folder))
    return next((str(folder) for _, folder in sorted(numbered, reverse=True) if defect(folder) is None), None)


def defect(folder: Path) -> str | None:
    """Why a run cannot go on from a checkpoint, or None if it can."""
    for content, patterns in _REQUIRED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{folder} holds no {content}."
    for path in sorted(folder.iterdir()):
        try:
            _READERS.get(path.suffix, Path.stat)(path)
        except Exception as error:  # each format has errors of its own
            return f"{path} cannot be read ({error})."
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except OSError:
        return f"{folder} holds no {TRAINER_STATE_NAME}, which is written last."
    for entry in (state.get("stateful_callbacks") or {}).values():
        record = written(entry, state["global_step"])
        if record is not None and (names := changed_files(folder, record)):
            return f"{folder} was not written in one go: {', '.join(names)} changed since."
    return None


def _read_json(path: Path) -> None:
    """The files that an index of shards names must be there."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else ():
        (path.parent / name).stat()


def _read_zip(path: Path) -> None:
    """The list of a zip file's contents is at its end."""
    zipfile.ZipFile(path).close()


def _read_safetensors(path: Path) -> None:
    """The header says how long the file has to be."""
    with safe_open(path, "pt"):
        pass


_READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_zip,
    ".pth": _read_zip,
    ".json": _read_json,
}


# ------------------------------------------------------------------------------------------------------------------- the record


def record_of(folder: Path, step: int) -> dict[str, Any]:
    """What `trainer_state.json` records of a checkpoint whose other files are all written: its step and name → fingerprint.

    The random states of many processes are left out: each process writes its own, when it gets there.
    """
    names = (path.name for path in folder.iterdir() if path.is_file())
    recorded = sorted(name for name in names if name != TRAINER_STATE_NAME and not name.startswith("rng_state_"))
    return {"step": step, "files": {name: fingerprint(folder / name) for name in recorded}}


def written(entry: Any, step: int) -> dict[str, str] | None:
    """The files that a callback's entry in `trainer_state.json` records for this step; None if the callback was not at work."""
    record = entry.get("attributes", {}).get("written") if isinstance(entry, Mapping) else None
    return record["files"] if record and record["step"] == step else None


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The names of recorded files that are not there any more, or are others."""
    return [name for name, value in files.items() if not (folder / name).is_file() or fingerprint(folder / name) != value]


def fingerprint(path: Path) -> str:
    """Size and checksum of 64 pieces of 4 KiB spread over a file: as quick for a large file as for a small one.

    A file cut short differs in size, and one of another step or run in all its pieces.
    """
    size = path.stat().st_size
    checksum = 0
    with path.open("rb") as file:
        for piece in range(_PIECES):
            file.seek(max(size - _PIECE, 0) * piece // (_PIECES - 1))
            checksum = zlib.crc32(file.read(_PIECE), checksum)
            if size <= _PIECE:
                break
    return f"{size}-{checksum:08x}"


# ----------------------------------------------------------------------------------------------------------- the pruner's file


def save_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a pruner's state, all of it or nothing."""
    unfinished = folder / f"{STATE_NAME}.unfinished"
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, unfinished)
    os.replace(unfinished, folder / STATE_NAME)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Read what `save_state` wrote."""
    return load_file(folder / STATE_NAME)


# --------------------------------------------------------------------------------------------------------------------- folders


def folder_being_written(output_dir: Path, step: int, is_hyper_param_search: bool) -> Path:
    """The checkpoint that the Trainer is writing.

    A hyper-parameter search gives each trial a folder in the output folder, whose name callbacks are not told: it is the one that
    was written to last.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not is_hyper_param_search:
        return output_dir / name
    folders = [folder for folder in output_dir.glob(f"*/{name}") if any(folder.iterdir())]
    return max(folders, key=lambda folder: max(path.stat().st_mtime_ns for path in folder.iterdir()), default=output_dir / name)


def remember_folders() -> None:
    """Let a `TrainerState` know, as `folder`, where it was read from; calling it again changes nothing.

    `TrainerState.load_from_json` is wrapped because the Trainer tells its callbacks that a run is resumed, but not from where.
    """
    stock = TrainerState.load_from_json.__func__  # type: ignore[attr-defined]
    if getattr(stock, "remembers_folder", False):
        return

    @functools.wraps(stock)
    def load_from_json(cls: type[TrainerState], json_path: str) -> TrainerState:
        state: TrainerState = stock(cls, json_path)
        state.folder = Path(json_path).parent  # type: ignore[attr-defined]
        return state

    load_from_json.remembers_folder = True  # type: ignore[attr-defined]
    TrainerState.load_from_json = classmethod(load_from_json)  # type: ignore[assignment]
