"""What `import hf_prune` does: its names come when they are used, and condensed models load whatever is imported first."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from card_cases import halved

import hf_prune


def run(code: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_each_public_name_is_there_and_known_to_type_checkers() -> None:
    tree = ast.parse(Path(hf_prune.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {(alias.name, node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == set(hf_prune._HOME.items())
    assert {name for name, _ in typed} == set(hf_prune.__all__) <= set(dir(hf_prune))
    for name in hf_prune.__all__:
        assert getattr(hf_prune, name).__name__ == name
    with pytest.raises(AttributeError, match="prun"):
        _ = hf_prune.prun


def test_import_is_light() -> None:
    heavy = run("import sys, hf_prune; print(*sorted({'torch', 'transformers', 'datasets', 'rich'} & sys.modules.keys()))")
    assert heavy == ""


def test_condense_is_the_function_after_its_module_was_imported() -> None:
    assert run("import hf_prune.condense.plan; from hf_prune import condense; print(condense.__name__)") == "condense"


def test_condensed_models_load_and_save_when_transformers_comes_later(tmp_path: Path) -> None:
    hf_prune.condense(halved(how="out")).save_pretrained(tmp_path / "small")
    code = """
import sys
import hf_prune
assert "transformers" not in sys.modules
import importlib.util
importlib.util.find_spec("transformers.modeling_utils")  # asking where it is must not use the hook up
from transformers.models.bert import modeling_bert
model = modeling_bert.BertForSequenceClassification.from_pretrained(sys.argv[1])
model.save_pretrained(sys.argv[2])
print(model.bert.encoder.layer[0].intermediate.dense.out_features)
"""
    assert run(code, tmp_path / "small", tmp_path / "again") == "37"
    assert (tmp_path / "again" / "modeling_hf_prune.py").is_file()
