"""How far what a runtime computes is from what PyTorch computes, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: A model in a runtime: inputs by name to outputs by name.
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

#: By how much of an output's largest value a file in float32 may differ anywhere: what another order of the same sums can do.
EXACT = 1e-4
#: How large, beside the output, the difference of a quantized model may be (root mean squares); more is noise and no model.
QUANTIZED = 0.3


@dataclass(frozen=True)
class Agreement:
    """How a file in its runtime compares with the model in PyTorch.

    Attributes:
        rows: how many they were compared on.
        difference: the largest difference of an output, beside the largest value of that output.
        error: the root mean square of the difference, beside that of the output; of the output where it is largest. In llama.cpp
            the log-probabilities of the likeliest tokens after each row are compared, and both differences are as they are.
        same: the share of predictions (the largest of the logits, of each row or token) that are the same; None without logits.
        bound: what `difference`, or of a quantized model `error`, may be.
        unit: what `difference` and `error` are measured in.
    """

    rows: int
    difference: float
    error: float
    same: float | None
    bound: float
    unit: str = "of the output"


class ExportError(RuntimeError):
    """A model that a runtime or its exporter does not take, or in which it computes something else."""


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn whatever error a library raises inside into one sentence that starts with `what` and ends with its reason."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"{what}: {reason_of(error)}; nothing was written.") from error


def reason_of(error: BaseException) -> str:
    """The first line that says something of the innermost cause of an error, with the next one if it ends in a colon."""
    while (cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1]).rstrip(".;")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@torch.no_grad()
def compare(
    run: Run,
    expected: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    batches: Iterable[Mapping[str, Tensor]],
    quantized: bool | None,
) -> Agreement:
    """Compare a file in its runtime with what is expected of it, output by output, where there is no padding.

    Args:
        run: the file in its runtime.
        expected: the model in PyTorch.
        batches: what they are compared on.
        quantized: whether the file computes with fewer bits; None: anything counts as agreement, and is reported.

    Raises:
        ExportError: an output is missing, of another shape or not finite, or differs by more than the bound.
    """
    squares: dict[str, tuple[float, float]] = {}
    peaks: dict[str, tuple[float, float]] = {}
    rows = same = predictions = 0
    for batch in batches:
        wanted, given = expected(batch), run(batch)
        rows += len(next(iter(batch.values())))
        for name, value in wanted.items():
            value, found = (_attended(one, batch) for one in (value, _matching(name, value, given)))
            _check_finite(name, value, found)
            gap = (found - value.float()).double()
            gap, value = (torch.where(value.isfinite(), one, 0) for one in (gap, value))  # what is finite in neither is alike
            squares[name] = _plus(squares.get(name), float(gap.square().sum()), float(value.double().square().sum()))
            peaks[name] = _most(peaks.get(name), float(gap.abs().max()), float(value.abs().max()))
            if name == "logits" and value.shape[-1] > 1:
                here, there = value.argmax(-1), found.argmax(-1)
                same, predictions = same + int((here == there).sum()), predictions + here.numel()
    agreement = Agreement(
        rows=rows,
        difference=max(gap / max(peak, 1e-30) for gap, peak in peaks.values()),
        error=max((gap / max(size, 1e-30)) ** 0.5 for gap, size in squares.values()),
        same=same / predictions if predictions else None,
        bound=math.inf if quantized is None else QUANTIZED if quantized else EXACT,
    )
    measured = agreement.error if quantized else agreement.difference
    if not measured <= agreement.bound:
        raise ExportError(f"the file computes something else: its outputs differ by {measured:.2e}; allowed: {agreement.bound:g}.")
    return agreement


def _matching(name: str, wanted: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    found = given.get(name)
    if found is None or found.shape != wanted.shape:
        shape = "is missing" if found is None else f"has the shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
        raise ExportError(f"the file computes something else: its {name} {shape}.")
    return found.float()


def _check_finite(name: str, wanted: Tensor, found: Tensor) -> None:
    wrong = int((found.isfinite() != wanted.isfinite()).sum())
    if wrong:
        raise ExportError(
            f"the file computes something else: {wrong} of {wanted.numel()} values of its {name} are not finite, or should not be."
        )


def _attended(output: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """What there is for each token, `[rows, tokens, width]`, without padding, for which any value will do; `[tokens, width]`."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return output[mask.bool()] if mask is not None and output.ndim == 3 and mask.shape == output.shape[:2] else output


def _plus(before: tuple[float, float] | None, *more: float) -> tuple[float, float]:
    first, second = before or (0.0, 0.0)
    return first + more[0], second + more[1]


def _most(before: tuple[float, float] | None, *more: float) -> tuple[float, float]:
    first, second = before or (0.0, 0.0)
    return max(first, more[0]), max(second, more[1])
