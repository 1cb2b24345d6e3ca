"""Ends exports with SIGKILL, at touches of files and at moments between, each where the one before left off; the last one is whole.

    python killed_exports.py MODEL FOLDER FORMAT

Every export is a process of its own, forked from one that has imported everything. It kills itself from an audit hook right before
it opens, makes, moves or removes something below FOLDER, or is killed by its parent after a share of the time that a whole one
takes. One JSON line is printed for each: the moment, the exit status, and what then lies in FOLDER.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers import AutoModelForSequenceClassification

from hf_prune import export_model

#: How many of the touches strike, evenly spread, and at which shares of the time.
TOUCHES, SHARES = 5, (0.3, 0.6)
#: What Python says before it touches a file.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "shutil.rmtree"}


def touches(folder: Path, strike: Callable[[int], None]) -> None:
    """Call a function before each touch of something below a folder, with its number."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]):
            seen += 1
            strike(seen)

    sys.addaudithook(hook)


def ended(work: Callable[[], None], after: float | None = None) -> int:
    """Do work in a forked process, and kill it after some seconds; its exit status, negative for a signal."""
    process = os.fork()
    if not process:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def names(folder: Path) -> list[str]:
    """The files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def main(source: str, home: str, format: str) -> None:
    """Count the touches and the seconds of an export, then strike."""
    folder = Path(home)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()

    def export() -> None:
        export_model(model, source, folder / "out", format)

    def killed_at(moment: int) -> None:
        touches(folder, lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == moment else None)
        export()

    def counted() -> None:
        numbers: list[int] = []
        touches(folder, numbers.append)
        export()
        (folder.parent / "touches").write_text(str(len(numbers)))

    started = time.perf_counter()
    assert ended(counted) == 0
    seconds, total = time.perf_counter() - started, int((folder.parent / "touches").read_text())
    shutil.rmtree(folder / "out")
    moments = sorted({1 + place * (total - 1) // (TOUCHES - 1) for place in range(TOUCHES)})
    kills: list[tuple[str, Callable[[], int]]] = [
        *((f"touch {moment} of {total}", lambda moment=moment: ended(lambda: killed_at(moment))) for moment in moments),
        *((f"{share:.0%} of the time", lambda share=share: ended(export, share * seconds)) for share in SHARES),
    ]
    for name, kill in [*kills, ("never", lambda: ended(export))]:
        print(json.dumps({"moment": name, "status": kill(), "left": names(folder)}), flush=True)
        if (folder / "out").exists() and name != "never":  # killed when all was done
            shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main(*sys.argv[1:])
