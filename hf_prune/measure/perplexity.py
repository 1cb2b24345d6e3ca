"""Perplexity of a causal language model on one long text.

Papers on pruning and quantization (GPTQ, SparseGPT, Wanda) take windows beside each other; transformers documents windows that
overlap, so that every token has some context (https://huggingface.co/docs/transformers/perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..settings.errors import ConfigError
from .tables import as_text


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text. Prints as a table.

    Attributes:
        loss: mean of -log p over the tokens that are predicted, in nats.
        predicted: how many these are.
        tokens: how many the text has.
        windows, length, stride: how it was cut.
    """

    loss: float
    predicted: int
    tokens: int
    windows: int
    length: int
    stride: int

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"perplexity": self.perplexity, **asdict(self)}

    def __rich__(self) -> Table:
        table = Table("", "", title=f"perplexity {self.perplexity:.4f}", show_header=False)
        table.add_row("loss", f"{self.loss:.6f} nats a token")
        table.add_row("tokens predicted", f"{self.predicted:,} of {self.tokens:,}")
        table.add_row("windows", f"{self.windows:,} of {self.length:,} tokens, every {self.stride:,}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    length: int,
    stride: int | None = None,
    track: Callable[[range], Iterable[int]] = iter,
) -> Perplexity:
    """Measure the perplexity of a text, window by window.

    A window predicts each of its tokens but the first from those before it in the window, and counts those that no window before it
    has counted: all but the first where windows lie beside each other, the last `stride` where they overlap. What does not fill a
    window at the end is left out, as it is in the papers.

    Args:
        model: a causal language model; its mode stays as it is.
        tokens: ids of the whole text, `[tokens]`.
        length: tokens of a window.
        stride: tokens from the start of a window to that of the next, at most `length`, which is the default.
        track: wraps the windows, to show progress.

    Raises:
        ConfigError: it is no causal language model, a setting cannot be used, the text is shorter than a window, or a loss is not
            finite.
    """
    stride = length if stride is None else stride
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ConfigError("model", type(model).__name__, "is no causal language model, so it has no perplexity.")
    if length < 2:
        raise ConfigError("length", length, "must be at least 2: a token is predicted from those before it.")
    if not 1 <= stride <= length:
        raise ConfigError("stride", stride, f"must be from 1 to length={length}, else some tokens would be in no window.")
    if len(tokens) < length:
        raise ConfigError("length", length, f"must be at most {len(tokens)}, the tokens of the text.")
    training, number = model.training, (len(tokens) - length) // stride + 1
    total, predicted = 0.0, 0
    model.eval()  # type: ignore[no-untyped-call]
    try:
        for index in track(range(number)):
            window = tokens[index * stride : index * stride + length].to(model.device)
            first = max(length - stride, 1) if index else 1
            logits = model(input_ids=window[None], use_cache=False).logits[0, first - 1 : -1]
            total += float(cross_entropy(logits.float(), window[first:], reduction="none").double().sum())
            predicted += length - first
    finally:
        model.train(training)
    if not math.isfinite(total):
        raise ConfigError("model", type(model).__name__, "gives NaN or infinity on this text.")
    return Perplexity(total / predicted, predicted, len(tokens), number, length, stride)
