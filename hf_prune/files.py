"""Files and folders: written all or nothing, and read with errors that name them."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

#: What comes after a folder's name: of the lock that the process which writes it holds until it ends, however it ends; and of
#: where the folder lies that is being replaced.
_LOCK, _REPLACED = ".lock", ".replaced"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, atomically: a process that dies meanwhile leaves the old file."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file does not hold one; names the file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
        raise ValueError(f"{path} is not valid JSON ({error}); fix it or delete it.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds {type(found).__name__}; fix it or delete it.")
    return found


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Check that a folder to be written does not exist yet, or is empty.

    Raises:
        ValueError: the path exists and is not an empty folder.
    """
    folder = Path(path)
    if folder.is_dir():
        if any(folder.iterdir()):
            raise ValueError(f"OUT={folder}: is not empty; give a new folder.")
    elif folder.exists() or folder.is_symlink():
        raise ValueError(f"OUT={folder}: is a file; give a new folder.")


def check_new_file(path: str | os.PathLike[str]) -> None:
    """Check that a file to be written does not exist yet.

    Raises:
        ValueError: the path exists.
    """
    if os.path.lexists(path):
        raise ValueError(f"OUT={os.fspath(path)}: exists; give a new file.")


@contextmanager
def new_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the body is done; if the body raises, nothing is changed.

    It lies in a hidden folder beside, `.NAME-….unfinished`. What a process that was killed has left there, the next one to write
    the same folder removes.

    Args:
        path: the folder.
        replace: replace an existing folder.

    Raises:
        ValueError: see [`check_new_folder`]; with `replace`, an existing folder is allowed.
    """
    target = Path(path).resolve()
    _remove_left_over(target)
    if not (replace and Path(path).is_dir()):
        check_new_folder(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}-", suffix=".unfinished", dir=target.parent) as beside,
        FileLock(Path(beside, target.name + _LOCK)),
    ):
        unfinished = Path(beside, target.name)
        unfinished.mkdir()
        yield unfinished
        if replace and target.is_dir():
            os.replace(target, Path(beside, target.name + _REPLACED))
        os.replace(unfinished, target)


def _remove_left_over(target: Path) -> None:
    """Remove what killed processes have left that wrote a folder; put back what one of them was about to replace."""
    for lock in target.parent.glob(f".{glob.escape(target.name)}-*.unfinished/{glob.escape(target.name + _LOCK)}"):
        try:
            with FileLock(lock, timeout=0):
                replaced = lock.with_name(target.name + _REPLACED)
                if replaced.is_dir() and not target.exists():
                    os.replace(replaced, target)
        except (Timeout, FileNotFoundError):  # somebody is still writing, or has just ended
            continue
        shutil.rmtree(lock.parent, ignore_errors=True)
