"""What calibration data, or without any the weights, say of the channels of a model's residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model.blocks import hidden_into, hidden_size_name
from ..model.residual import Member
from ..oneshot.walk import Rows
from ..settings.errors import ConfigError
from .narrow import Norm, matrix, wide


@dataclass
class Seen:
    """What data show of the stream. All sums are over tokens, padding aside, in float64.

    Attributes:
        squares: name of a norm → Σ y² of what it gives, `[hidden]`.
        plain_squares: the same before scale and bias.
        moments: Σ x·xᵀ over all norms of what they give before scale and bias, `[hidden, hidden]`; None if nobody asked.
        read: name of a module that reads channels of a task head → Σ x²·‖w‖² for the columns w of its weight, `[hidden]`.
        norm_of: name of a module that reads the stream → the name of the norm whose output it is given; `""` if there is none.
    """

    squares: dict[str, Tensor] = field(default_factory=dict)
    plain_squares: dict[str, Tensor] = field(default_factory=dict)
    moments: Tensor | None = None
    read: dict[str, Tensor] = field(default_factory=dict)
    norm_of: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def look(model: PreTrainedModel, members: Sequence[Member], rows: Rows, moments: bool) -> Seen:
    """Run a model on data once.

    Args:
        model: the model, in evaluation mode.
        members: what reads, writes or scales its stream.
        rows: the data.
        moments: whether `moments` are wanted.

    Raises:
        ConfigError: activations are not finite.
    """
    hidden = getattr(model.config, hidden_size_name(model.config))
    seen = Seen(moments=torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device) if moments else None)
    outputs: dict[str, Tensor] = {}  # of the first batch, kept so that no other tensor gets their memory
    number = 0  # of the batch

    def of_norm(member: Member) -> Callable[..., None]:
        norm = Norm.of(member.module)

        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            inputs = hidden_into(args, kwargs)
            there = rows.tokens(number, inputs.shape[:-1])[0]
            plain = norm.normalised(wide(inputs[there]))
            _add(seen.squares, member.name, output[there].double().square().sum(dim=0))
            _add(seen.plain_squares, member.name, plain.double().square().sum(dim=0))
            if seen.moments is not None:
                seen.moments += plain.T @ plain
            if number == 0:
                outputs[member.name] = output

        return note

    def of_reader(member: Member) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs = hidden_into(args, kwargs)
            if "in" in member.apart:
                columns = matrix(module).double().square().sum(dim=0)
                _add(seen.read, member.name, inputs.double().square().flatten(0, -2).sum(dim=0) * columns)
            elif number == 0:
                same = [name for name, output in outputs.items() if _share_memory(output, inputs)]
                # A task head may pick tokens, or scale them, before it reads the last norm.
                others = [] if member.layer else list(outputs)
                seen.norm_of[member.name] = (["", *others, *same])[-1]

        return note

    with ExitStack() as hooks:
        for member in members:
            if member.kind == "norm" and not member.apart:
                hooks.callback(member.module.register_forward_hook(of_norm(member), with_kwargs=True).remove)
            elif member.kind == "linear" and member.reads:
                hooks.callback(member.module.register_forward_pre_hook(of_reader(member), with_kwargs=True).remove)
        for number, batch in enumerate(rows.batches):  # noqa: B007 (the hooks read it)
            model(**batch)
    if not all(bool(value.isfinite().all()) for value in (*seen.squares.values(), *seen.read.values())):
        raise ConfigError("dataloader", f"{rows.number} rows", f"give {type(model).__name__} activations that are not finite.")
    return seen


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def by_weights(members: Sequence[Member], hidden: int, apart: bool) -> list[Tensor]:
    """Σ w² over the weights along each channel, `[hidden]`, matrix by matrix: of the stream, or of task heads (`apart`)."""
    found = []
    for member in members:
        for key, axes in member.axes.items():
            for dim, copies in axes.items():
                weight = member.module.get_parameter(key).detach().double()
                if weight.ndim > 1 and (member.side(key, dim) in member.apart) == apart:
                    channels = weight.square().movedim(dim, -1).unflatten(-1, (copies, hidden))
                    found.append(channels.flatten(0, -2).sum(dim=0))
    return found


def importance(parts: Sequence[Tensor]) -> Tensor:
    """How much each channel matters, `[hidden]`: its shares of some sums, each `[hidden]`, added up."""
    return torch.stack([part / part.sum().clamp_min(torch.finfo(torch.float64).tiny) for part in parts]).sum(dim=0)
