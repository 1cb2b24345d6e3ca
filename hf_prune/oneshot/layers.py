"""A model run layer by layer: what each layer is called with, and the hidden stream between them.

Layers are called as the model itself calls them: one forward of the whole model records the arguments (masks, positions), and
afterwards a layer needs nothing but the hidden states that the one before it returned. So the stream of a model that is being
pruned costs one forward of each layer, whatever happened before it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Cache

from ..model.blocks import HIDDEN, hidden_into, hidden_of
from ..settings.errors import ConfigError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Stream:
    """The hidden states of all batches between two layers, each `[rows, tokens, hidden]`; in memory, or in a folder.

    Args:
        folder: where they go; by default they stay in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._parts: list[Tensor | Path] = []
        self._folder = None if folder is None else tempfile.TemporaryDirectory(dir=folder)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Tensor:
        part = self._parts[index]
        return load_file(part)["hidden"] if isinstance(part, Path) else part

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes."""
        return sum(part.nbytes for part in self._parts if isinstance(part, Tensor))

    def append(self, hidden: Tensor) -> None:
        """Add the next batch."""
        self._parts.append(self._stored(len(self._parts), hidden))

    def replace(self, index: int, hidden: Tensor) -> None:
        """Put what a batch has become in the place of what it was."""
        self._parts[index] = self._stored(index, hidden)

    def copy(self, folder: str | Path | None = None) -> Stream:
        """Another stream with the same hidden states, which nobody changes in place."""
        other = Stream(folder)
        for index in range(len(self)):
            other.append(self[index])
        return other

    def _stored(self, index: int, hidden: Tensor) -> Tensor | Path:
        if self._folder is None:
            return hidden
        path = Path(self._folder.name, f"{index}.safetensors")
        save_file({"hidden": hidden.contiguous()}, path)
        return path


def run(layer: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden states that a layer makes of others."""
    return hidden_of(layer(hidden, *call.args, **call.kwargs))


@torch.no_grad()
def record(model: nn.Module, batches: Iterable[Batch], layers: Sequence[nn.Module], hidden: Stream) -> list[list[Call]]:
    """Run a model and note how it calls each of its layers.

    Args:
        model: the model.
        batches: what its forward takes.
        layers: layers that follow each other.
        hidden: takes what goes into the first of them.

    Returns:
        For each layer, its calls, one a batch.

    Raises:
        ConfigError: a layer is not called once a batch: layers share weights, or some are skipped.
    """
    calls: list[list[Call]] = [[] for _ in layers]
    handles = []
    for index, layer in enumerate(layers):

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
            others = {key: _uncached(value) for key, value in kwargs.items() if args or key != HIDDEN}
            calls[index].append(Call(tuple(map(_uncached, args[1:])), others))
            if index == 0:
                hidden.append(hidden_into(args, kwargs).detach())

        handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        number = 0
        for batch in batches:
            model(**batch)
            number += 1
    finally:
        for handle in handles:
            handle.remove()
    for layer_calls in calls:
        if len(layer_calls) != number:
            allowed = f"calls one of its layers {len(layer_calls)} times in {number} batches, so that it is no chain of layers."
            raise ConfigError("model", type(model).__name__, allowed)
    return calls


def _uncached(value: Any) -> Any:
    """An argument of a layer, but no cache: a layer is run more than once on the same tokens."""
    return None if isinstance(value, Cache) else value


class Reached(Exception):
    """All that was wanted of a layer is there."""


class Taps:
    """What flows into and out of some modules of a layer, seen while it runs.

    Args:
        inputs: modules whose first input is kept.
        outputs: modules whose output is kept.
        last: the module whose input, or output where that is kept, is the last that is wanted: [`Reached`] is raised there.
    """

    def __init__(self, inputs: Iterable[nn.Module] = (), outputs: Iterable[nn.Module] = (), last: nn.Module | None = None) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        outputs = list(outputs)
        self._last_input = None if last in outputs else last
        self._last_output = last if last in outputs else None
        self._handles = [module.register_forward_pre_hook(self._into) for module in inputs]
        self._handles += [module.register_forward_hook(self._out_of) for module in outputs]

    def _into(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self.inputs[module] = args[0].detach()
        if module is self._last_input:
            raise Reached

    def _out_of(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(found := hidden_of(output), Tensor):
            self.outputs[module] = found.detach()
        if module is self._last_output:
            raise Reached

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
