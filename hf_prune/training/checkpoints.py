"""What a checkpoint needs for a run to resume from it: the pruner's tensors, and a record of all files.

The Trainer writes `trainer_state.json` last. The callback's entry in it records every other file with its checksum, so a
checkpoint is complete if that file is intact and all others match the record. Only then does the Trainer delete older checkpoints.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

STATE_NAME = "pruner.safetensors"

#: What a run needs to resume → the files or folders that hold it, at least one of which must exist.
_REQUIRED = {
    "model": ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*"),
    "optimizer": ("optimizer.*", "optimizer_*"),
    "scheduler": ("scheduler.pt",),
    "random state": ("rng_state*.pth",),
}

#: Files that are in a checkpoint's folder while it is written but are not recorded.
_UNRECORDED = {TRAINER_STATE_NAME, "checkpoint-is-incomplete.txt"}


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The latest checkpoint in a Trainer's output folder that a run can resume from, or None.

    A process that dies while saving leaves an incomplete checkpoint, which `resume_from_checkpoint=True` would take. This function
    skips it, with a warning that says why:

    ```python
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
    ```

    Complete means that model, optimizer, scheduler and random states exist and that, if the run had a `PruningCallback`, each file
    has the checksum that the callback recorded. Other runs record none: then every file must be readable, and files written by
    torch must match the checksums stored in them; a safetensors file stores none, so only its size is checked. The checkpoint is
    read once: about 0.75 s per GiB on one core, plus disk time.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if folder.is_dir() and (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", folder.name)):
            numbered.append((int(match[1]), folder))
    for _, folder in sorted(numbered, reverse=True):
        if (reason := defect(folder)) is None:
            return str(folder)
        logger.warning("Skipped a checkpoint: %s", reason)
    return None


def defect(folder: Path) -> str | None:
    """Why a run cannot resume from a checkpoint, or None if it can."""
    for content, patterns in _REQUIRED.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"{folder} has no {content}."
    path = folder / TRAINER_STATE_NAME
    if not path.is_file():
        return f"{folder} has no {TRAINER_STATE_NAME}, which is written last."
    try:
        state = _trainer_state(path)
        entries: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        records = [written(entry, state.global_step) for entry in entries.values()]
        recorded: dict[str, str] = {name: value for record in records if record is not None for name, value in record.items()}
        if recorded:
            changed = changed_files(folder, recorded)
            return f"{folder} was changed after it was written: {', '.join(changed)}." if changed else None
        if missing := _missing_random_states(folder):
            return f"{folder} has no {', '.join(missing)}: not all processes have written their random states."
        for path in _files(folder):
            _READERS.get(path.suffix, Path.stat)(path)
    except Exception as error:  # each file format raises its own errors
        return f"{path} cannot be read ({error})."
    return None


def _files(folder: Path) -> list[Path]:
    """The files of a checkpoint, without hidden ones, which file systems leave there."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    return [path for name, path in paths.items() if path.is_file() and not any(part.startswith(".") for part in name.parts)]


def _missing_random_states(folder: Path) -> list[str]:
    """The random states that are missing: each process writes its own; on a disk that nodes do not share, those of one node."""
    found = [re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in folder.glob("rng_state_*.pth")]
    ranks = {int(match[1]) for match in found if match}
    expected = range(min(ranks), max(1, *ranks) + 1) if ranks else ()
    return [f"rng_state_{rank}.pth" for rank in expected if rank not in ranks]


def _trainer_state(path: Path) -> TrainerState:
    """The contents of `trainer_state.json`.

    Raises:
        TypeError: a field has a type that the Trainer does not write.
    """
    state: TrainerState = TrainerState.load_from_json(str(path))
    for name, hint in (get_type_hints(TrainerState) | {"stateful_callbacks": dict}).items():
        value = getattr(state, name)
        hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kinds = {get_origin(kind) or kind for kind in hints}
        if kinds & {int, float} and name != "global_step":
            kinds |= {int, float}
        if type(value) not in kinds:
            raise TypeError(f"{name} is {value!r}")
    return state


def _read_json(path: Path) -> None:
    """The files that an index of shards names must exist."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for name in set(content.get("weight_map", {}).values()) if path.name.endswith(".index.json") else ():
        (path.parent / name).stat()


def _read_zip(path: Path) -> None:
    """A zip file lists its contents at its end, with their checksums."""
    with zipfile.ZipFile(path) as file:
        if broken := file.testzip():
            raise zipfile.BadZipFile(f"{broken} has another checksum")


def _read_safetensors(path: Path) -> None:
    """The header holds the length of the file."""
    with safe_open(path, "pt"):
        pass


_READERS: dict[str, Callable[[Path], object]] = {
    ".safetensors": _read_safetensors,
    ".bin": _read_zip,
    ".pt": _read_zip,
    ".pth": _read_zip,
    ".json": _read_json,
}


# ------------------------------------------------------------------------------------------------------------------- the record


def record_of(folder: Path, step: int) -> dict[str, Any]:
    """What `trainer_state.json` records about a checkpoint once all its other files are written: its step and name → checksum."""
    names = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    return {"step": step, "crc32": {name: checksum(path) for name, path in names.items() if name not in _UNRECORDED}}


def written(entry: Any, step: int) -> dict[str, str] | None:
    """The files that a callback's entry in `trainer_state.json` records for this step; None if there are none."""
    attributes = entry.get("attributes") if isinstance(entry, Mapping) else None
    record = attributes.get("written") if isinstance(attributes, Mapping) else None
    files = record.get("crc32") if isinstance(record, Mapping) and record.get("step") == step else None
    return files if isinstance(files, dict) else None


def changed_files(folder: Path, files: Mapping[str, str]) -> list[str]:
    """The names of recorded files that are missing or have changed."""
    return [name for name, value in files.items() if not (folder / name).is_file() or checksum(folder / name) != value]


def checksum(path: Path) -> str:
    """The CRC-32 of a file, in hexadecimal: 0.75 s per GiB on one core, against 6 s that safetensors and torch took to write it."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


# ----------------------------------------------------------------------------------------------------------- the pruner's file


def save_state(state: Mapping[str, Tensor], folder: Path) -> None:
    """Write a pruner's state, all or nothing."""
    unfinished = folder / f"{STATE_NAME}.unfinished"
    save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, unfinished)
    os.replace(unfinished, folder / STATE_NAME)


def load_state(folder: Path) -> dict[str, Tensor]:
    """Read what `save_state` wrote."""
    return load_file(folder / STATE_NAME)


# --------------------------------------------------------------------------------------------------------------------- folders


def folder_being_written(output_dir: Path, step: int, is_hyper_param_search: bool) -> Path:
    """The checkpoint that the Trainer is writing.

    A hyperparameter search gives each trial a subfolder of the output folder, whose name callbacks do not know: it is the one that
    was written to last.
    """
    name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
    if not is_hyper_param_search:
        return output_dir / name
    folders = [folder for folder in (*output_dir.glob(name), *output_dir.glob(f"*/{name}")) if any(folder.iterdir())]
    return max(folders, key=lambda folder: max(path.stat().st_mtime_ns for path in folder.iterdir()), default=output_dir / name)
