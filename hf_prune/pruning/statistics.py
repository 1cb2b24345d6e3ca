"""Statistics of a model's layers: current weights and gradients, and sums of activations over tokens.

Criteria and updates name the statistics that they read; they are collected only here, in training and in calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.hooks import RemovableHandle

from ..model.blocks import base_layer, hidden_into, hidden_of
from ..model.sharding import rank, summed
from ..model.targets import Target, named_layers
from ..model.wrappers import transformers_models


def weight(target: Target) -> Tensor:
    """The weight as `[out, in]`; under LoRA the merged one."""
    return target.weight()


def gradient(target: Target) -> Tensor:
    """The gradient as `[out, in]`; see [`Target.gradient`]."""
    return target.gradient()


@dataclass(frozen=True)
class Statistic:
    """A sum over tokens of a function of a layer's inputs and outputs.

    Attributes:
        shape: target → shape of the sum.
        of: the contribution of a batch, a function of inputs, `[tokens, in]`, and outputs, `[tokens, out]`, in float32.
        every_step: whether it is collected at each step. Statistics as large as a weight are collected only within [`WINDOW`] steps
            before a mask update, so that most checkpoints do not contain them.
    """

    shape: Callable[[Target], tuple[int, ...]]
    of: Callable[[Tensor, Tensor], Tensor]
    every_step: bool = True


#: Optimizer steps before a mask update in which large statistics are collected.
WINDOW = 16

#: Name → statistic. `second_moments` is Σ x·xᵀ over tokens, `[in, in]`; `cosines` are of what goes into a module and what it gives.
STATISTICS: dict[str, Statistic] = {
    "positive_outputs": Statistic(lambda target: (target.shape[0],), lambda inputs, outputs: (outputs > 0).float().sum(dim=0)),
    "absolute_outputs": Statistic(lambda target: (target.shape[0],), lambda inputs, outputs: outputs.abs().sum(dim=0)),
    "inputs": Statistic(lambda target: (target.inputs,), lambda inputs, outputs: inputs.sum(dim=0)),
    "squared_inputs": Statistic(lambda target: (target.inputs,), lambda inputs, outputs: inputs.square().sum(dim=0)),
    "cosines": Statistic(lambda target: (), lambda inputs, outputs: cosine_similarity(inputs, outputs, dim=-1).sum()),
    "second_moments": Statistic(
        lambda target: (target.inputs, target.inputs), lambda inputs, outputs: inputs.T @ inputs, every_step=False
    ),
}


class Activations:
    """Statistics of activations, collected by forward hooks.

    Padding does not count; evaluation and the recomputation of gradient checkpointing are ignored. Sums are over the tokens that
    this process has seen since the last reset. Reading a mean or the state sums them over processes, so that each token counts
    once; this is collective, so all processes have to do it.

    Args:
        model: the model.
        wanted: name of a statistic → the weights whose layers are observed.
    """

    def __init__(self, model: nn.Module, wanted: Mapping[str, Iterable[Target]]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens_seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._calibrating = self._large = False
        #: The outermost model whose forward pass is running, if that pass counts.
        self._forward_of: nn.Module | None = None
        self._tokens: Tensor | None = None
        by_module: dict[str, list[tuple[str, Target]]] = {}
        for name, targets in wanted.items():
            for target in {target.name: target for target in targets}.values():
                by_module.setdefault(target.module_name, []).append((name, target))
        if by_module:
            for one in {model, *transformers_models(model).values()}:  # a wrapper's own layers run outside, masks are given inside
                self._handles.append(one.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
                self._handles.append(one.register_forward_hook(self._forward_ends))
            for module_name, module in named_layers(model):
                for name, target in by_module.get(module_name, ()):
                    key, device = f"{name}/{target.name}", target.parameter.device
                    self._sums[key] = torch.zeros(STATISTICS[name].shape(target), device=device)
                    self._tokens_seen[key] = torch.zeros((), device=device)
                    self._handles.append(module.register_forward_hook(self._hook(name, key), with_kwargs=True))
        self._kept = self._snapshot()

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """A context in which forward passes count in training and evaluation mode, and large statistics are collected."""
        before = self._calibrating, self._large
        self._calibrating = self._large = True
        try:
            yield
        finally:
            self._calibrating, self._large = before
            self.keep()

    def mean(self, name: str, target: Target) -> Tensor:
        """The mean of a statistic over all tokens seen, on all processes, in the statistic's shape.

        Raises:
            RuntimeError: no token was seen.
        """
        key = f"{name}/{target.name}"
        tokens = summed(self._tokens_seen[key])
        if not tokens:
            raise RuntimeError(
                f"{target.name!r} has seen no training batch since the last update, so it has no {name.replace('_', ' ')}; "
                "run batches in training mode, or inside `calibrating()`."
            )
        return summed(self._sums[key]) / tokens

    @property
    def is_large(self) -> bool:
        """Whether some statistic is not collected at every step."""
        return any(not STATISTICS[key.partition("/")[0]].every_step for key in self._sums)

    def next_update_in(self, steps: int) -> None:
        """Announce the number of steps to the next mask update: large statistics are collected shortly before it."""
        self._large = self._calibrating or 0 < steps <= WINDOW

    def keep(self) -> None:
        """Accept what was seen since the last step: the optimizer takes its step."""
        self._kept = self._snapshot()

    def discard(self) -> None:
        """Discard what was seen since the last step: the optimizer skips its step."""
        self._sums, self._tokens_seen = dict(self._kept[0]), dict(self._kept[1])

    def reset(self) -> None:
        """Start again from zero, after a mask update."""
        self._sums = {key: torch.zeros_like(value) for key, value in self._sums.items()}
        self._tokens_seen = {key: torch.zeros_like(value) for key, value in self._tokens_seen.items()}
        self.keep()

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def leave(self, model: nn.Module) -> None:
        """Remove the hooks that a copy of the model was given with it."""
        for module in model.modules():
            for handle in self._handles:
                module._forward_hooks.pop(handle.id, None)
                module._forward_pre_hooks.pop(handle.id, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and numbers of tokens over all processes; statistics without tokens are left out."""
        tokens = {key: summed(value) for key, value in self._tokens_seen.items()}
        seen = [key for key, value in tokens.items() if value]
        return {f"{key}/sum": summed(self._sums[key]) for key in seen} | {f"{key}/tokens": tokens[key] for key in seen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from the sums over all processes, which the first process takes over."""
        self.reset()
        for key in self._sums:
            if f"{key}/sum" in state and rank() == 0:
                self._sums[key], self._tokens_seen[key] = state[f"{key}/sum"], state[f"{key}/tokens"]
        self.keep()

    def _snapshot(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self._sums), dict(self._tokens_seen)

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not (model.training or self._calibrating):
            self._forward_of = None
        elif self._forward_of is None:
            self._forward_of = model
        mask = kwargs.get("attention_mask")
        self._tokens = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        # What runs later is the recomputation of checkpointed layers during backward.
        if model is self._forward_of:
            self._forward_of = None

    def _hook(self, name: str, key: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        statistic = STATISTICS[name]

        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Any) -> None:
            if self._forward_of is None or not (statistic.every_step or self._large):
                return
            channels = 1 if isinstance(base_layer(module), (nn.Conv1d, nn.Conv2d)) else -1
            inputs, outputs = (part.detach().movedim(channels, -1) for part in (hidden_into(args, kwargs), hidden_of(output)))
            tokens = self._tokens
            if tokens is not None and inputs.shape[:-1] == tokens.shape:
                inputs, outputs = inputs[tokens], outputs[tokens]
            inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
            with torch.autocast(inputs.device.type, enabled=False):  # which would round products of moments to half precision
                # Not in place: the sums kept before this step must not change.
                self._sums[key] = self._sums[key] + statistic.of(inputs, outputs)
            self._tokens_seen[key] = self._tokens_seen[key] + len(outputs)

        return hook
