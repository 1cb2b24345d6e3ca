"""llama.cpp with a file, in a process of its own: what it does upon a file that it does not like, it does not do to ours."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .compare import ExportError

#: What the lines begin with in which the process says where it listens, or why it does not.
_LISTENS, _FAILED = "listens at ", "failed: "
#: Seconds that an answer may take, on a machine that is busy with other things, too.
_PATIENCE = 600
_SERVER = Path(__file__).with_name("llama_server.py")


@contextmanager
def serving(file: Path, context: int) -> Iterator[str]:
    """Inside, llama.cpp serves a file.

    Args:
        file: a GGUF file.
        context: how many tokens a row may have.

    Returns:
        Its address, for [`ask`].

    Raises:
        ExportError: it does not load the file.
    """
    # as many threads as PyTorch has: llama.cpp's wait for one another, which takes minutes where others have the processor
    arguments = [str(file), str(context), str(torch.get_num_threads())]
    command = [sys.executable, "-c", _SERVER.read_text(encoding="utf-8"), *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        said = next((line.strip() for line in process.stdout if line.startswith((_LISTENS, _FAILED))), "")
        if not said.startswith(_LISTENS):
            reason = said.removeprefix(_FAILED) or f"it ended with {process.wait()}"
            raise ExportError(f"llama.cpp does not load the file: {reason}; nothing was written.")
        yield said.removeprefix(_LISTENS)
    finally:
        process.kill()
        process.communicate()


def ask(address: str, path: str, request: Mapping[str, Any]) -> Any:
    """What llama.cpp's server answers to a request."""
    body = json.dumps(request).encode()
    asked = urllib.request.Request(address + path, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked, timeout=_PATIENCE) as answer:
        return json.load(answer)
