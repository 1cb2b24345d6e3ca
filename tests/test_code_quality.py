"""Lint, format, types and the arrows between the rooms (see the contracts in setup.cfg), so that `pytest` covers them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent

CHECKS = {
    "lint": [sys.executable, "-m", "ruff", "check", "."],
    "format": [sys.executable, "-m", "ruff", "format", "--check", "."],
    "types": [sys.executable, "-m", "mypy"],
    "arrows": [str(BIN / "lint-imports")],
}


@pytest.mark.parametrize("name", CHECKS)
def test_code_quality(name: str) -> None:
    result = subprocess.run(CHECKS[name], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_test_imports_another() -> None:
    """What tests share is in modules that are no tests, and found without a change of `sys.path`."""
    faults = []
    for path in (*(ROOT / "tests").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            faults += [f"{path}: imports {name}" for name in names if name is not None and name.startswith("test_")]
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path."):
                faults.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    assert faults == []
