"""How much a model's output cares about what its layers give: the Fisher information of their outputs, token by token.

Near the dense model, the divergence of its predictions is KL ≈ ½·E(g·δ)² for a change δ of a layer's output, with g the gradient
of v·z: logits z weighed by a random v whose covariance is their Fisher information. No labels are needed. That is taken apart into
how much a token matters and how much an output does, E(gᵢ²) = (Σᵢ gᵢ²) · (share of output i): one number a token and one an
output, by which errors of different layers can be compared. Tokens that nobody reads (all but the first after a classifier's last
attention) cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..settings.errors import ConfigError
from .layers import Batch
from .walk import Rows

#: How many predicted values are kept to be compared; those of a language model are a vocabulary a token.
_MOST_VALUES = 2**25
#: The share of a token's weight that all tokens have alike: what the model's output does not read today it may tomorrow.
_EVEN = 0.1


@dataclass
class Importance:
    """What an error of a layer's output costs.

    Attributes:
        tokens: for each batch `[rows, tokens]`, Σᵢ gᵢ² of each token.
        outputs: the sum of gᵢ² over all tokens, `[out]`.
    """

    tokens: list[Tensor] = field(default_factory=list)
    outputs: Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass(frozen=True)
class Prediction:
    """What a model says: values of one prediction in each row, and whether they are the logits of a distribution."""

    values: Tensor
    is_distribution: bool


def _predicted(model: nn.Module, batch: Batch) -> list[Prediction]:
    """What a model predicts for a batch, without padding.

    Each output named `logits` or `…_logits` is a distribution over its last axis, or a number where that has a single value. A
    model without any predicts what it returns first.

    Raises:
        ConfigError: there is NaN in it.
    """
    output: Any = model(**batch)
    named = [value for name, value in output.items() if name.endswith("logits") and isinstance(value, Tensor)]
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    found = []
    for values in named or [output[0]]:
        per_token = mask is not None and values.ndim > 2 and values.shape[:-1] == mask.shape
        flat = values[mask.bool()] if mask is not None and per_token else values.flatten(0, -2)
        if bool(torch.isnan(flat).any()):
            raise ConfigError("model", type(model).__name__, "gives NaN on the calibration rows.")
        found.append(Prediction(flat.float(), bool(named) and values.shape[-1] > 1))
    return found


def predictions(model: nn.Module, rows: Rows) -> list[Prediction]:
    """What a model says of the rows that are held out, or of some of the tokens if there are very many."""
    found = []
    with torch.no_grad():
        for batch, held_out in zip(rows.batches, rows.held_out):
            if bool(held_out.any()):
                some = {key: value[held_out] for key, value in batch.items()}
                found += _predicted(model, some)
    size = sum(part.values.numel() for part in found)
    every = -(-size // _MOST_VALUES)
    return [Prediction(part.values[::every].clone(), part.is_distribution) for part in found]


def divergence(model: nn.Module, rows: Rows, before: Sequence[Prediction]) -> float | None:
    """How far a model is from what its [`predictions`] were, see `PruneReport.held_out_error`."""
    total, size = 0.0, 0.0
    for then, now in zip(before, predictions(model, rows)):
        if then.is_distribution:
            old, new = then.values.double().log_softmax(dim=-1), now.values.double().log_softmax(dim=-1)
            total += float(nn.functional.kl_div(new, old, reduction="sum", log_target=True))
            size += len(old)
        else:
            total += float((then.values - now.values).square().sum())
            size += float(then.values.square().sum())
    return total / size if size else None


def fisher_root(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v with E v·vᵀ = diag(p) − p·pᵀ, the Fisher information of logits `[…, classes]`: v = √p∘ε − p·Σ√p∘ε, with random signs ε.

    Labels drawn from p have the same mean (v = label − p), but of all rows of which a model is sure, the few with an unlikely label
    would have all the weight.
    """
    shares = logits.detach().softmax(dim=-1)
    signs = torch.randint(0, 2, logits.shape, generator=generator, device=logits.device) * 2.0 - 1.0
    drawn = shares.sqrt() * signs
    return drawn - shares * drawn.sum(dim=-1, keepdim=True)


def probe(model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """A number whose squared gradient is, on the mean over what is drawn, the curvature of the KL divergence of all predictions.

    It is the sum of v·z over all logits z, see [`fisher_root`]; values that are no logits have normal errors.
    """
    total = torch.zeros(())
    for prediction in _predicted(model, batch):
        values = prediction.values
        if prediction.is_distribution:
            drawn = fisher_root(values, generator)
        else:
            drawn = torch.randn(values.shape, generator=generator, device=values.device)
        total = total.to(values.device) + (values * drawn).sum()
    return total


def importance(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    generator: torch.Generator,
    recomputed: Iterable[nn.Module] = (),
) -> dict[str, Importance]:
    """The importance of what some layers give, by name; one backward of each batch.

    Args:
        model: the dense model; its gradients are left as they were.
        batches: what its forward takes.
        layers: the layers, by name.
        generator: draws the labels.
        recomputed: modules that run again when the backward is there; until then nothing but their inputs is kept. Gradients reach
            what is before them through tensors alone that are arguments of theirs.
    """
    found = {name: Importance() for name in layers}
    shapes: dict[str, torch.Size] = {}
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        shapes[name] = output.shape
        if torch.is_grad_enabled():  # else it is run again
            reached = output if output.requires_grad else output.requires_grad_()  # nothing before a frozen layer has a gradient
            reached.register_hook(partial(seen.__setitem__, name))  # type: ignore[no-untyped-call]

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    with ExitStack() as stack, torch.enable_grad():
        for handle in handles:
            stack.callback(handle.remove)
        for parameter in trained:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for module in recomputed:
            own = {name: value for name, value in vars(module).items() if name == "forward"}  # as accelerate's hooks put there
            stack.callback(vars(module).update, own)
            stack.callback(vars(module).pop, "forward")
            module.forward = partial(_recomputed, module.forward)
        for batch in batches:
            probe(model, batch, generator).backward()  # type: ignore[no-untyped-call]
            for name, importance in found.items():
                # What no prediction reads, such as the pooler of a bare encoder, has a gradient of zero.
                gradient = seen.pop(name, torch.zeros((), device=generator.device).expand(shapes[name]))
                squares = gradient.float().square()
                importance.tokens.append(squares.sum(dim=-1))
                importance.outputs = importance.outputs + squares.flatten(0, -2).sum(dim=0).double()
    return found


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the forward of a module so that it runs again in the backward, as gradient checkpointing does, in evaluation mode too.

    Named tensors are handed over as inputs: gradients flow through them as well.
    """
    names = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    others = {name: value for name, value in kwargs.items() if name not in names}
    inputs = [*args, *(kwargs[name] for name in names)]
    if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        inputs[0] = inputs[0].detach().requires_grad_()  # the hidden states

    def again(*inputs: Any) -> Any:
        return forward(*inputs[: len(args)], **dict(zip(names, inputs[len(args) :])), **others)

    return checkpoint(again, *inputs, use_reentrant=True, preserve_rng_state=False)


def token_weights(tokens: Sequence[Tensor]) -> list[Tensor]:
    """How much tokens count where weights are solved for: their importance, evened out.

    A model is unsure of few rows, and their tokens have nearly all the importance. A fit with unequal weights a is as uncertain as
    one to (Σa)²/Σa² tokens of equal weight (Kish 1965), so importance is mixed with its mean until that is half of the tokens
    that matter at all.

    Args:
        tokens: of each batch `[rows, tokens]`, see [`Importance`].
    """
    number = sum(int((part > 0).sum()) for part in tokens) or 1
    mean = sum(float(part.sum()) for part in tokens) / number
    squares = sum(float(part.double().square().sum()) for part in tokens) / number
    variance = squares / mean**2 - 1 if mean > 0 else 0.0
    own = 1 / max(variance, 1.0) ** 0.5
    evened = (own * part + (1 - own) * mean * (part > 0) for part in tokens)
    return [part * (1 - _EVEN) + mean * _EVEN for part in evened]
