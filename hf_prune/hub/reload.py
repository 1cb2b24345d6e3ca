"""Saving condensed models so that they load like any other; `hooks.py` has what makes transformers do it.

A checkpoint of a condensed model has the sizes of its blocks in `config.json` (format: `condense/resize.py`) and its weights as
usual. It loads in two ways, and what was loaded in either can be saved again:

- after `import hf_prune`, with plain `AutoModel….from_pretrained`;
- without hf_prune, with `trust_remote_code=True`: the checkpoint carries `modeling_hf_prune.py`, written from the library's own
  source together with the spec of the one family, and the `auto_map` that points to it.

A family that transformers does not have has no modelling file: import hf_prune, register its spec, and load it by its own class.
With neither way, transformers refuses the checkpoint because its tensors do not have the stock shapes.
"""

from __future__ import annotations

import ast
import inspect
import os
import pprint
import sys
from collections.abc import Iterator
from pathlib import Path

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from ..architectures import ArchitectureSpec, blocks, spec_for
from ..condense import shrink

#: The modelling file of a checkpoint, without `.py`.
MODELING = "modeling_hf_prune"

_HEADER = '''\
"""A model whose attention and feed-forward blocks differ in size from layer to layer, condensed with hf_prune.

Written by hf_prune, so that `from_pretrained(..., trust_remote_code=True)` loads this checkpoint without it. The classes at the
end are the stock ones of transformers; before their weights are loaded they shrink to the sizes in `config.hf_prune`.
"""

from __future__ import annotations

import difflib
import functools
import reprlib

import torch
import transformers
'''

_MIXIN = '''\
class Condensed:
    """Shrinks a stock model, once its modules are there, to the sizes in its config."""

    def post_init(self) -> None:
        if getattr(self.config, "hf_prune", None) is not None:
            shrink(self, SPEC)
        super().post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers would not translate the parameter names that some families are saved under
'''

_CLASS = "class {name}(Condensed, transformers.{name}): ..."


def write_modeling_file(config: PreTrainedConfig, save_directory: str | os.PathLike[str]) -> None:
    """Write the modelling file of a condensed model into a folder, and point the config's `auto_map` to it.

    The file holds stock classes: none is written for a family that transformers does not have, which is loaded by its own.
    """
    if any(_auto_classes(config.model_type)):
        os.makedirs(save_directory, exist_ok=True)
        Path(save_directory, f"{MODELING}.py").write_text(modeling_source(config.model_type), encoding="utf-8")
        config.auto_map = {**(getattr(config, "auto_map", None) or {}), **auto_map(config)}


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The `auto_map` of a condensed checkpoint: Auto class → class in its modelling file, for every Auto class of the family."""
    architectures = getattr(config, "architectures", None) or []
    chosen = {}
    for auto, names in _auto_classes(config.model_type):
        chosen[auto] = f"{MODELING}.{next((name for name in names if name in architectures), names[0])}"
    return chosen


def _auto_classes(model_type: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each Auto class that serves a family, with the names of the model classes that it may load."""
    for auto, cls in vars(modeling_auto).items():
        mapping = getattr(cls, "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and model_type in mapping._model_mapping:
            names = mapping._model_mapping[model_type]
            yield auto, names if isinstance(names, tuple) else (names,)


def modeling_source(model_type: str) -> str:
    """The self-contained modelling file of a family: the library's own source, its spec, and its model classes."""
    imports: dict[str, set[str]] = {}
    definitions: list[str] = []
    for module in (ArchitectureSpec.__module__, blocks.__module__, shrink.__module__):
        definitions += _definitions(inspect.getsource(sys.modules[module]), imports)
    classes = sorted({name for _, names in _auto_classes(model_type) for name in names})
    parts = [
        _HEADER + "".join(f"from {module} import {', '.join(sorted(names))}\n" for module, names in sorted(imports.items())),
        *definitions,
        "SPEC = " + pprint.pformat(spec_for(model_type), width=120, sort_dicts=False),
        _MIXIN,
        "\n".join(_CLASS.format(name=name) for name in classes if hasattr(transformers, name)),
    ]
    return "\n\n\n".join(part.strip() for part in parts) + "\n"


def _definitions(source: str, imports: dict[str, set[str]]) -> list[str]:
    """What a module of this library defines, each as source text; what it imports from elsewhere is added to `imports`."""
    lines = _with_brief_docstrings(source).splitlines()
    source = "\n".join(lines)
    definitions: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module not in (None, "__future__"):
            imports.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign)) and getattr(node, "name", "") != "find_blocks":
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            definitions.append("\n".join(lines[first - 1 : node.end_lineno]))
    return definitions


def _with_brief_docstrings(source: str) -> str:
    """Source text with the first paragraph alone of every docstring below the module's; the rest is for the library's readers."""
    lines = source.splitlines()
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    for node in sorted(documented, key=lambda node: -node.lineno):
        text, first = ast.get_docstring(node, clean=False), node.body[0]
        if text is not None and "\n\n" in text:
            lines[first.lineno - 1 : first.end_lineno] = [f'{" " * first.col_offset}"""{text.partition(chr(10) * 2)[0]}"""']
    return "\n".join(lines)
