"""The scripts that measure condensing, run for real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import models
import pytest

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_benchmark_condense(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    sizes = ("--layers", "1", "--batch_size", "2", "--tokens", "8", "--repeats", "1")
    printed = run("scripts/benchmarks/benchmark_condense.py", *sizes, "--output", str(output))
    figures = json.loads(output.read_text())
    assert max(figures["largest_difference"].values()) <= 1e-5
    assert figures["cpu_ms"].keys() == {"dense", "condensed", "by hand"}
    assert "by hand" in printed


def test_benchmark_verification(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    choice = ("--models", "bert float32", "--layers", "1", "--repeats", "1")
    assert "bert" in run("scripts/benchmarks/benchmark_verification.py", *choice, "--output", str(output))
    [row] = json.loads(output.read_text())
    assert row["package"] == "now"
    assert 0 < row["extra_verify"] < 1


@pytest.mark.parametrize(
    "families", [("qwen2",), pytest.param(tuple(models.EVERY_FAMILY), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_architecture_matrix(families: tuple[str, ...], tmp_path: Path) -> None:
    output = tmp_path / "matrix.json"
    run("tests/architecture_matrix.py", *families, "--output", str(output))
    rows = json.loads(output.read_text())
    assert rows.keys() == set(families)
    for row in rows.values():
        assert row["saved twice"] is True
        assert row["greedy"] is not False
        assert row["beams"] is not False
        assert row["parameters"][0] < row["parameters"][1]
        assert max(value for value in row.values() if isinstance(value, float)) <= 1e-5
