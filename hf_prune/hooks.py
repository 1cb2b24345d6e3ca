"""What `import hf_prune` changes in transformers, so that it loads and saves condensed models; nothing heavy is imported for it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install_reload_hook() -> None:
    """Teach transformers, for this process, to load and to save condensed models; calling it again changes nothing.

    Two methods are wrapped. `PreTrainedModel.post_init` shrinks a model whose config has a `hf_prune` entry, before its weights are
    loaded. `PreTrainedConfig.save_pretrained` writes the modelling file beside such a config: every way to save or push a model
    passes through it, and on one process only. Models and configs without the entry pass through untouched.

    It happens when transformers imports the two classes, which takes seconds and is not done for this.
    """
    when_imported("transformers.modeling_utils", lambda module: _call_first(module.PreTrainedModel, "post_init", _shrink))
    when_imported(
        "transformers.configuration_utils",
        lambda module: _call_first(module.PreTrainedConfig, "save_pretrained", _write_modeling_file),
    )


def _shrink(model: Any) -> None:
    if getattr(model.config, "hf_prune", None) is not None:
        from .architectures import spec_for
        from .condense import shrink

        shrink(model, spec_for(model.config.model_type))


def _write_modeling_file(config: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    if getattr(config, "hf_prune", None) is not None:
        from .hub.reload import write_modeling_file

        write_modeling_file(config, save_directory)


def _call_first(owner: type, name: str, first: Callable[..., None]) -> None:
    """Make the method `owner.name` call `first` with its arguments before it does what it always did."""
    stock = getattr(owner, name)
    if getattr(stock, "calls_first", None) is first:
        return

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        first(self, *args, **kwargs)
        return stock(self, *args, **kwargs)

    method.calls_first = first  # type: ignore[attr-defined]
    setattr(owner, name, method)


def when_imported(name: str, do: Callable[[ModuleType], None]) -> None:
    """Call `do` with the module `name`: now if it is imported already, else right after it is."""
    if name in sys.modules:
        do(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting:
    """A finder for `sys.meta_path`: it finds one module as the others do, and lets something be done with it once it has run."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.do(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
