"""Saving condensed models so that they load like any other; `hooks.py` has what makes transformers do it.

A checkpoint of a condensed model has the sizes of its blocks in `config.json` (see `condense/format.py`) and its weights as
usual. It loads in two ways, and what was loaded in either can be saved again:

- after `import hf_prune`, with plain `AutoModel….from_pretrained`;
- without hf_prune, with `trust_remote_code=True`: the checkpoint carries `modeling_hf_prune.py`, written from the library's own
  source together with the spec of the one family, and the `auto_map` that points to it.

A family that transformers does not have has no modelling file: import hf_prune, register its spec, and load it by its own class.
With neither way, transformers refuses the checkpoint and quotes what it needs (`condense/refusal.py`). A model that has the sizes
its config says, because all layers agree, is an ordinary one (`condense/stock.py`): nothing of this is written for it.
"""

from __future__ import annotations

import ast
import inspect
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from ..compat import auto_classes
from ..condense import needs_hf_prune, shrink
from ..condense.format import read_sizes
from ..condense.forwards import NoHeads
from ..condense.refusal import NEEDED, NEEDED_OR_REMOTE, accept, refuse_stock_code
from ..files import write_text
from ..model import ArchitectureSpec, blocks, spec_for
from ..model.families import carry
from ..model.spelled import as_source

logger = logging.getLogger(__name__)

#: The modelling file of a checkpoint, without `.py`.
MODELING = "modeling_hf_prune"

_HEADER = '''\
"""A model whose attention and feed-forward blocks differ in size from layer to layer, condensed with hf_prune.

Written by hf_prune, so that `from_pretrained(..., trust_remote_code=True)` loads this checkpoint without it. The classes at the
end are the stock ones of transformers; before their weights are loaded they shrink to the sizes in `config.hf_prune`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import os
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
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, **kwargs):
        if not isinstance(config, transformers.PreTrainedConfig):
            names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            hub = {name: kwargs.pop(name) for name in names if name in kwargs}
            source = pretrained_model_name_or_path if config is None else config
            config, kwargs = cls.config_class.from_pretrained(source, return_unused_kwargs=True, **hub, **kwargs)
            kwargs |= hub
        accept(vars(config))
        return super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            refuse_stock_code(os.path.join(save_directory, "config.json"), NEEDED_OR_REMOTE)

    def _upload_modified_files(self, working_dir, *args, **kwargs):  # `save_pretrained` does this in its end, if at all
        refuse_stock_code(os.path.join(working_dir, "config.json"), NEEDED_OR_REMOTE)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # else transformers would not translate the parameter names that some families are saved under
'''

_CLASS = "class {name}(Condensed, transformers.{name}): ..."


def write_modeling_file(config: PreTrainedConfig, save_directory: str | os.PathLike[str]) -> None:
    """Write the modelling file of a condensed model into a folder, and let the config's `auto_map` name it and no code besides.

    The file holds stock classes: none is written for a family that transformers does not have, which is loaded by its own, and none
    for a model that stock code loads.
    """
    carry(config)
    carried = needs_hf_prune(config) and any(auto_classes(config.model_type))
    if carried:
        os.makedirs(save_directory, exist_ok=True)
        write_text(Path(save_directory, f"{MODELING}.py"), modeling_source(config.model_type))
    _name_code(config, auto_map(config) if carried else None)


def _name_code(config: Any, own: dict[str, str] | None) -> None:
    """Let a config name the modelling file by this `auto_map` and no code besides; None: anything but the modelling file.

    Whoever trusts the file for what hf_prune says of it must not run someone else's code thereby.
    """
    earlier = vars(config).pop("auto_map", None) or {}
    others = {name: code for name, code in earlier.items() if not str(code).startswith(f"{MODELING}.")}
    if own is None:
        if others:
            config.auto_map = others
        return
    config.auto_map = own
    others |= vars(config).pop("custom_pipelines", None) or {}
    for name, code in others.items():
        logger.warning(
            "config.json no longer names the code %r for %s: a condensed model is loaded with trust_remote_code=True, "
            "which would run that as well.",
            code,
            name,
        )


def refuse_others(config: PreTrainedConfig, file: str | os.PathLike[str]) -> None:
    """Make the `config.json` of a model that needs hf_prune turn away code that would load it wrongly."""
    if needs_hf_prune(config):
        refuse_stock_code(file, NEEDED_OR_REMOTE if any(auto_classes(config.model_type)) else NEEDED)


def auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """The `auto_map` of a condensed checkpoint: Auto class → class in its modelling file, for every Auto class of the family."""
    architectures = getattr(config, "architectures", None) or []
    chosen = {}
    for auto, names in auto_classes(config.model_type):
        chosen[auto] = f"{MODELING}.{next((name for name in names if name in architectures), names[0])}"
    return chosen


def modeling_source(model_type: str) -> str:
    """The self-contained modelling file of a family: what loading needs of the library's source, its spec, its model classes."""
    imports: dict[str, str] = {}
    known: dict[str, str] = {}
    for part in (ArchitectureSpec, blocks, read_sizes, NoHeads, shrink, accept):
        known |= _definitions(inspect.getsource(sys.modules[part.__module__]), imports)
    spec = "SPEC = " + as_source(spec_for(model_type))
    definitions = _needed(spec + _MIXIN, known)
    imported: dict[str, list[str]] = {}
    for name in sorted(imports.keys() & set(re.findall(r"\w+", "\n".join(definitions)))):
        imported.setdefault(imports[name], []).append(name)
    classes = sorted({name for _, names in auto_classes(model_type) for name in names})
    parts = [
        _HEADER + "".join(f"from {module} import {', '.join(names)}\n" for module, names in sorted(imported.items())),
        *definitions,
        spec,
        _MIXIN,
        "\n".join(_CLASS.format(name=name) for name in classes if hasattr(transformers, name)),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _needed(source: str, known: dict[str, str]) -> list[str]:
    """The definitions, of those `known` by name, that source text makes use of, directly or by each other."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        names = set(re.findall(r"\w+", waiting.pop())) & known.keys() - found
        found |= names
        waiting += [known[name] for name in names]
    return [text for name, text in known.items() if name in found]


def _definitions(source: str, imports: dict[str, str]) -> dict[str, str]:
    """What a module of this library defines, as source text by name; from where it imports what is added to `imports`."""
    lines = _with_brief_docstrings(source).splitlines()
    source = "\n".join(lines)
    definitions: dict[str, str] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module not in (None, "__future__"):
            imports.update({alias.name: str(node.module) for alias in node.names})
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.Assign)):
            names = [node.name] if not isinstance(node, ast.Assign) else [ast.unparse(target) for target in node.targets]
            first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
            definitions[names[0]] = "\n".join(lines[first - 1 : node.end_lineno])
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
