"""Every patch that the library applies to transformers, and every private name that it reads, each with its reason.

A patch wraps a method: [`wrap`] puts a function around it, once. Patches that concern pruning are applied by the modules that own
the subject: loading and saving of condensed models in `hooks.py`, training and logs in `training/callback.py`, cards in
`hub/callback.py`. The ones below are independent of it. `tests/test_compat.py` tells for each when it can be removed; its tests are
among those that run with the oldest and the newest libraries that are supported (docs/versions.md). Each patch here, and those that
they look at elsewhere, was needed in all releases that were tried: transformers 5.0 to 5.23.
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
    """Replace the method (or class method) `owner.name` by a call of `around` with it and its arguments; idempotent."""
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
    """Call `do` with the module `name`: now if it is already imported, else right after its import."""
    if name in sys.modules:
        do(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Waiting(name, do))


class _Waiting:
    """A finder for `sys.meta_path` that finds one module as the others do and calls a function after the module was executed."""

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
    """Record in `TrainerState.folder` where a state was read from: callbacks see that a run is resumed, but not from where.

    Needed in transformers 5.0 to 5.23.
    """
    from transformers import TrainerState

    wrap(TrainerState, "load_from_json", _remembering)


def _remembering(stock: Callable[..., Any], cls: type, json_path: str) -> Any:
    state = stock(cls, json_path)
    state.folder = Path(json_path).parent
    return state


#: Event of `JITCheckpointCallback` → whether a run resumed from a checkpoint saved there equals the uninterrupted one.
_EXACT: dict[str, Callable[[Any, Any], bool]] = {
    "on_epoch_begin": lambda state, control: True,
    "on_step_begin": lambda state, control: float(state.epoch) % 1 > 0,  # shuffling a new epoch has drawn random numbers
    "on_pre_optimizer_step": lambda state, control: False,  # so has the forward pass
    "on_step_end": lambda state, control: False,  # an evaluation that is due will draw some
    "on_epoch_end": lambda state, control: bool(control.should_training_stop),  # likewise, unless no step follows
}


def save_between_steps() -> None:
    """Make `enable_jit_checkpoint` save between two steps only, if a callback reports by `between_steps` when that is.

    `JITCheckpointCallback` saves at its next event after the signal, even in the middle of a step: with weights from before the
    step and random states from after it, or before an evaluation that the resumed run will not repeat. Its events are wrapped to
    wait for one at which nothing is half done, which comes within two steps. Needed in transformers 5.0 to 5.23.
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
            # Writing the same checkpoint again could leave none, if the process is killed meanwhile.
            self.jit_manager.is_checkpoint_requested = False
            control.should_training_stop = True
        save(self, args, state, control, **kwargs)


def auto_classes(model_type: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each Auto class that supports a family, with the names of the model classes that it may load.

    `_model_mapping` is private; the public way would import every model class of the family. Needed in
    transformers 5.0 to 5.23.
    """
    from transformers.models.auto import modeling_auto

    for auto, cls in vars(modeling_auto).items():
        mapping = getattr(cls, "_model_mapping", None)
        if auto.startswith("AutoModel") and mapping is not None and model_type in mapping._model_mapping:
            names = mapping._model_mapping[model_type]
            yield auto, names if isinstance(names, tuple) else (names,)


def without_peft(model: Any) -> Any:
    """The transformers model in a `PeftModel`, including its adapters; any other model unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def leave_mixed_precision(model: Any) -> None:
    """Take off what accelerate puts around a model's forward for mixed precision: autocast, and outputs in float32.

    accelerate's `extract_model_from_parallel(keep_fp32_wrapper=False)` takes off more: it compares functions with the method that
    it kept, finds none equal, and ends at the forward without transformers' own decorators.
    """
    if (forward := vars(model).pop("_original_forward", None)) is not None:
        model.forward = forward
