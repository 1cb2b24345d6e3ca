"""The notebooks of the documentation run from top to bottom, and say what their text claims."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

nbformat: Any = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def printed(notebook: Any) -> list[str]:
    """What each cell of code gave, its value and what it printed."""
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell) for cell in outputs]


def check(name: str, notebook: Any) -> None:
    """Pruning cost little, and tables are printed once."""
    assert not [out for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "display_data"]
    said = printed(notebook)
    last = [text.strip().splitlines()[-1] for text in said if text.strip()]
    if name == "prune_in_the_trainer":
        dense, pruned, small = (float(line) for line in last if re.fullmatch(r"[01]\.\d+", line))
        assert dense > 0.9
        assert pruned > dense - 0.03
        assert small == pytest.approx(pruned, abs=0.01)
    else:
        dense, pruned, served = (text[text.index("['shutil") :] for text in said if "['shutil" in text)
        assert pruned == served
        assert len(set(ast.literal_eval(dense)) & set(ast.literal_eval(pruned))) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_a_whole_run(path: Path) -> None:
    """In the order of its cells, and without what a run leaves on stderr."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error" or out.get("name") == "stderr"]
    check(path.stem, notebook)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    check(path.stem, notebook)
