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


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_tests_use_what_is_public() -> None:
    """No test reads or calls what the library keeps to itself; what is private to others has other names."""
    own, faults = set(), []
    for path in (ROOT / "hf_prune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr in own and ast.unparse(node.value) != "self":
                faults.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_prune"):
                faults += [f"{path}:{node.lineno}: {alias.name}" for alias in node.names if private(alias.name)]
    assert faults == []
