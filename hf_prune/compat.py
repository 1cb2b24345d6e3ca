"""Every patch that the library makes in transformers, and every private name of it that it reads, each with its reason.

A patch wraps a method: [`wrap`] puts a function around it, once. Those that are about pruning are made where that is known: loading
and saving of condensed models in `hooks.py`, logs in `training/callback.py`, cards in `hub/callback.py`. Those below know nothing
of it. `tests/test_compat.py` says of each when it can go.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let the method (or class method) `owner.name` be called by `around`, which is given it and its arguments; once."""
    found = inspect.getattr_static(owner, name)
    stock = getattr(found, "__func__", found)  # the function of a class method
    if getattr(stock, "around", None) is around:
        return

    @functools.wraps(stock)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(stock, *args, **kwargs)

    method.around = around  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


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


def remember_folders() -> None:
    """Let a `TrainerState` know, as `folder`, where it was read from: callbacks learn that a run is resumed, but not from where."""
    from transformers import TrainerState

    wrap(TrainerState, "load_from_json", _remembering)


def _remembering(stock: Callable[..., Any], cls: type, json_path: str) -> Any:
    state = stock(cls, json_path)
    state.folder = Path(json_path).parent
    return state


#: Event of `JITCheckpointCallback` → whether a run that is resumed from what is saved there is the one that went on.
_EXACT: dict[str, Callable[[Any, Any], bool]] = {
    "on_epoch_begin": lambda state, control: True,
    "on_step_begin": lambda state, control: float(state.epoch) % 1 > 0,  # a new epoch's order of rows has used random numbers
    "on_pre_optimizer_step": lambda state, control: False,  # so has the forward pass
    "on_step_end": lambda state, control: False,  # an evaluation that is due will do so
    "on_epoch_end": lambda state, control: bool(control.should_training_stop),  # likewise, unless no step follows
}


def save_between_steps() -> None:
    """Let `enable_jit_checkpoint` save between two steps, where a callback can tell by `between_steps` when that is.

    `JITCheckpointCallback` saves at the next of its events when it is asked to, wherever in a step that is: with weights from
    before the step and random numbers from later, or before an evaluation that the resumed run will not repeat. Its events are
    wrapped to wait for one where nothing is half done, which comes within two steps.
    """
    from transformers.trainer_jit_checkpoint import JITCheckpointCallback

    if hasattr(JITCheckpointCallback.on_step_begin, "around"):
        return
    save = JITCheckpointCallback.on_step_begin
    for event, exact in _EXACT.items():
        wrap(JITCheckpointCallback, event, functools.partial(_saving_between_steps, save, exact))


def _saving_between_steps(
    save: Callable[..., None],
    exact: Callable[[Any, Any], bool],
    stock: Callable[..., None],
    self: Any,
    args: Any,
    state: Any,
    control: Any,
    **kwargs: Any,
) -> None:
    pruned = [callback for callback in self.trainer.callback_handler.callbacks if hasattr(callback, "between_steps")]
    if not pruned:
        stock(self, args, state, control, **kwargs)
    elif exact(state, control) and all(callback.between_steps for callback in pruned):
        requested = self.jit_manager and self.jit_manager.is_checkpoint_requested
        if requested and pruned[0].written.get("step") == state.global_step:
            # A process that is killed while it writes a checkpoint once more would leave none.
            self.jit_manager.is_checkpoint_requested = False
            control.should_training_stop = True
        save(self, args, state, control, **kwargs)


def auto_classes(model_type: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each Auto class that serves a family, with the names of the model classes that it may load.

    `_model_mapping` is private; the public way imports every model class of the family's, and of no other use.
    """
    from transformers.models.auto import modeling_auto

    for auto, cls in vars(modeling_auto).items():
        mapping = getattr(cls, "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and model_type in mapping._model_mapping:
            names = mapping._model_mapping[model_type]
            yield auto, names if isinstance(names, tuple) else (names,)


def without_peft(model: Any) -> Any:
    """The transformers model in a `PeftModel`, adapters and all; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
