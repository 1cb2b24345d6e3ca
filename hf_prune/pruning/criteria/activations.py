"""Criteria that read what flows through a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...model.blocks import base_layer
from ...model.sharding import rank, summed
from ...model.targets import Target, named_layers
from ...model.units import UnitGroup, View
from ...model.wrappers import transformers_models
from ...settings.config import PruningConfig
from .base import Criterion, weight

# -------------------------------------------------------------------------------------------------------------- activations


class ActivationCriterion(Criterion):
    """Base of criteria that read what flows through a layer while the model trains.

    Padding does not count, evaluation and the recomputation of gradient checkpointing are ignored. `state` holds, by weight,
    sums over the tokens that this process has seen since the last update, and last their number: `[channels + 1]`. They are summed
    over processes, so that each token counts once, when scores or `state_dict` are asked for, which all have to do together.
    """

    def __init__(self, settings: PruningConfig) -> None:
        super().__init__(settings)
        #: The state as of the last optimizer step that was not skipped.
        self._observed: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        #: The outermost model in whose forward this is, while it trains.
        self._forward_of: nn.Module | None = None
        self._tokens: Tensor | None = None

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """What a batch of tokens adds. `inputs`: `[tokens, in]`, `outputs`: `[tokens, out]`. Returns a vector."""
        raise NotImplementedError

    def channels(self, target: Target) -> int:
        """The length of that vector."""
        return target.shape[0]

    def views(self, group: UnitGroup) -> tuple[View, ...]:
        """The views whose layers are watched: those that own output rows."""
        return tuple(view for view in group.weights if view.owns_rows)

    def attach(self, model: nn.Module, groups: Iterable[UnitGroup]) -> None:
        for one in {model, *transformers_models(model).values()}:  # a wrapper's own layers run outside, masks are given inside
            self._handles.append(one.register_forward_pre_hook(self._forward_begins, with_kwargs=True))
            self._handles.append(one.register_forward_hook(self._forward_ends))
        targets = {view.target.module_name: view.target for group in groups for view in self.views(group)}
        for name, module in named_layers(model):
            if (target := targets.get(name)) is not None:
                self.state[target.name] = torch.zeros(self.channels(target) + 1, device=target.parameter.device)
                self._handles.append(module.register_forward_hook(self._hook(target.name)))
        self._observed = dict(self.state)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def observe(self, group: UnitGroup) -> None:
        self._observed = dict(self.state)

    def discard(self) -> None:
        self.state = dict(self._observed)

    def updated(self) -> None:
        self.state = {name: torch.zeros_like(sums) for name, sums in self.state.items()}
        self._observed = dict(self.state)

    def merged(self, name: str) -> Tensor:
        """The mean over all tokens seen, on all processes."""
        sums = summed(self.state[name])
        if not sums[-1]:
            raise RuntimeError(f"{name!r} has seen no training batch since the last update, so it has no activation score.")
        return sums[:-1] / sums[-1]

    def state_dict(self) -> dict[str, Tensor]:
        """The sums over all processes."""
        return {name: summed(sums) for name, sums in self.state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from the sums over all processes: the first one takes them."""
        self.state = {name: sums if rank() == 0 else torch.zeros_like(sums) for name, sums in state.items()}
        self._observed = dict(self.state)

    def _forward_begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training:
            self._forward_of = None
        elif self._forward_of is None:
            self._forward_of = model
        mask = kwargs.get("attention_mask")
        self._tokens = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _forward_ends(self, model: nn.Module, args: Any, output: Any) -> None:
        # What runs later is the recomputation of checkpointed layers during backward.
        if model is self._forward_of:
            self._forward_of = None

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._forward_of is None:
                return
            channels = 1 if isinstance(base_layer(module), (nn.Conv1d, nn.Conv2d)) else -1
            inputs, outputs = args[0].detach().movedim(channels, -1), output.detach().movedim(channels, -1)
            tokens = self._tokens
            if tokens is not None and inputs.shape[:-1] == tokens.shape:
                inputs, outputs = inputs[tokens], outputs[tokens]
            inputs, outputs = inputs.flatten(0, -2).float(), outputs.flatten(0, -2).float()
            self.state[name] = self.state[name] + torch.cat([self.statistic(inputs, outputs), outputs.new_tensor([len(outputs)])])

        return hook


class APoZ(ActivationCriterion):
    """1 − the average share of zeros in an output: how often it is positive, so a ReLU would let it pass (Hu et al. 2016,
    https://arxiv.org/abs/1607.03250, eq. 1)."""

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return (outputs > 0).float().sum(dim=0)

    def scores(self, group: UnitGroup) -> Tensor:
        return group.reduce(lambda target: self.merged(target.name)[:, None], self.reduction, self.views(group))


class MeanActivation(APoZ):
    """The mean absolute activation of an output (after Molchanov et al. 2017, https://arxiv.org/abs/1611.06440)."""

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return outputs.abs().sum(dim=0)


class Wanda(ActivationCriterion):
    """|w|·‖x‖₂, with ‖x‖₂ over the tokens of an input (Sun et al. 2024, https://arxiv.org/abs/2306.11695, eq. 1)."""

    def views(self, group: UnitGroup) -> tuple[View, ...]:
        return group.weights

    def channels(self, target: Target) -> int:
        return target.inputs

    def statistic(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return inputs.square().sum(dim=0)

    def scores(self, group: UnitGroup) -> Tensor:
        def elements(target: Target) -> Tensor:
            matrix, norms = weight(target).abs(), self.merged(target.name).sqrt()
            repeats = matrix.shape[1] // norms.numel()
            # A convolution's columns are inputs times kernel positions.
            return matrix * (norms.repeat(repeats) if target.kernel_first else norms.repeat_interleave(repeats))

        return self.reduce(group, elements)
