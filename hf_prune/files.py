"""Writing files and folders: whole, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; a process that dies meanwhile leaves the file as it was."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Check that nothing lies where a folder is to be written.

    Raises:
        ValueError: something does, and it is not an empty folder.
    """
    folder = Path(path)
    if folder.is_dir():
        if any(folder.iterdir()):
            raise ValueError(f"OUT={folder}: is not empty; give a new folder.")
    elif folder.exists() or folder.is_symlink():
        raise ValueError(f"OUT={folder}: is a file; give a new folder.")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the body is done; if the body raises, nothing is there.

    Raises:
        ValueError: see [`check_new_folder`].
    """
    check_new_folder(path)
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as beside:
        unfinished = Path(beside, target.name)
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, target)
