"""`hf-prune` in the process of a test."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hf_prune.cli import main


class CommandLine:
    """Runs a command line in this process; keeps what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        self.out, self.err = self.capsys.readouterr()
        assert (ended.value.code or 0) == code, self.out + self.err
        return self.out

    def json(self, *arguments: object) -> dict[str, Any]:
        return json.loads(self(*arguments, "--json"))
