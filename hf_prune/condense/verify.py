"""Verifying that the smaller model is equal: all of its outputs, on a batch that exercises every kind of input."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from .snapshot import unchanged

logger = logging.getLogger(__name__)

Outputs = dict[str, Tensor]


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention implementations of a model that give the same results on any device."""
    return ("eager", "sdpa") if model._supports_sdpa else ("eager",)


def observe(model: PreTrainedModel, wide: bool = True) -> tuple[Outputs, bool]:
    """Every floating-point output of a model in evaluation mode, hidden states included, eager and sdpa, on `sample_batch`.

    If `wide`, they are computed in float64, so that differences come from the model and not from the order of summation: a trained
    model has activations whose rounding in float32 alone exceeds 1e-5. If that is impossible (a kernel without float64, as GPT-2's
    with `reorder_and_upcast_attn`; a model too large for the device's memory), or gives values that are not finite (a softmax in
    float32, where the mask of a query that attends to nothing becomes −inf), the model's own dtype is used, with a warning that
    gives the tolerance. The model is left unchanged, without the hooks by which transformers records hidden states.

    Returns:
        The outputs, and whether they were computed in float64.
    """
    if not wide:
        return _observe(model), False
    try:
        seen = _observe(model, wide=True)
    except Exception as error:  # if float64 is not the cause, the same error is raised again below
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        if all(bool(value.isfinite().all()) for value in seen.values()):
            return seen, True
        reason = "it gives values that are not finite"
    seen, dtype = _observe(model), str(model.dtype).removeprefix("torch.")
    allowed = max((tolerance(value, model.dtype) for value in seen.values()), default=0.0)
    logger.warning(
        "%s cannot be computed in float64 (%s), so it is verified in %s: differences up to %.0e of an output count as rounding.",
        type(model).__name__,
        reason,
        dtype,
        allowed,
    )
    return seen, False


@torch.no_grad()
def _observe(model: PreTrainedModel, wide: bool = False) -> Outputs:
    """The outputs of a model, if `wide` in float64 where the device supports it."""
    seen: Outputs = {}
    with unchanged(model):
        model.train(False)
        if wide and model.device.type != "mps":
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.double()
        batch = sample_batch(model)
        for implementation in implementations(model):
            model.set_attn_implementation(implementation)
            outputs = model(**batch, output_hidden_states=True, return_dict=True)
            seen.update(_tensors(implementation, dict(outputs)))
    return seen


def compare(before: Outputs, after: Outputs, dtype: torch.dtype) -> None:
    """Check that the outputs of a model with weights of `dtype` agree to within `tolerance`.

    Raises:
        RuntimeError: they do not; names the output with the largest difference.
    """
    gaps = {name: float((value.double() - after[name].double()).abs().max()) for name, value in before.items()}
    # `not <=` rather than `>`, so that NaN counts as a difference
    wrong = {name: gap for name, gap in gaps.items() if not gap <= tolerance(before[name], dtype)}
    if wrong:
        name = max(wrong, key=lambda name: wrong[name])
        computed = str(before[name].dtype).removeprefix("torch.")
        raise RuntimeError(
            f"the condensed model differs from the masked one by {wrong[name]:.2e} in {name}, computed in {computed}; "
            f"allowed: {tolerance(before[name], dtype):.2e}. The model was restored."
        )


def tolerance(reference: Tensor, dtype: torch.dtype) -> float:
    """The largest difference due to rounding: 1e-5, or eight units in the last place of the largest value if that is more.

    That is 1e-5 in float32 for values up to ten; about 0.06 in bfloat16 and 0.008 in float16 for values around one, because a
    folded bias is rounded to the dtype of the weights.
    """
    return max(1e-5, 8 * torch.finfo(dtype).eps * float(reference.abs().max()))


def sample_batch(model: PreTrainedModel, rows: int = 3, tokens: int = 16, shortest: int = 2) -> dict[str, Tensor]:
    """A ragged, right-padded batch of random inputs, the same on every call, for the arguments that the model's `forward` names.

    Args:
        model: the model; its `forward` and config determine the inputs.
        rows: number of rows.
        tokens: length of the first row, at most half of the model's positions; lengths decrease evenly from row to row.
        shortest: length of the last row. Images and audio have fixed sizes.
    """
    config = model.config
    classifies = type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    if classifies and config.get_text_config().pad_token_id is None:
        rows = 1  # a decoder finds the last token of each row by the padding
    generator = torch.Generator().manual_seed(0)
    padding, end = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos"))
    tokens = min(tokens, (getattr(config, "max_position_embeddings", None) or 2 * tokens) // 2)
    lengths = torch.linspace(tokens, min(shortest, tokens), rows).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()

    def ids() -> Tensor:
        # any tokens but padding, from whose place RoBERTa counts positions, and one that ends the row, as BART's classifier wants
        ends = [end] if isinstance(end, int) else end or []
        usable = torch.ones(config.vocab_size, dtype=torch.bool)
        usable[[token for token in (*ends, padding or 0) if 0 <= token < config.vocab_size]] = False
        choices = usable.nonzero().flatten()
        drawn = choices[torch.randint(len(choices), (rows, tokens), generator=generator)]
        if config.is_encoder_decoder and ends:
            drawn[torch.arange(rows), lengths - 1] = ends[0]
        return torch.where(mask.bool(), drawn, padding or 0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(model.dtype)

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": ids,
        "attention_mask": lambda: mask,
        "token_type_ids": lambda: torch.randint(config.type_vocab_size, (rows, tokens), generator=generator),
        "decoder_input_ids": ids,
    }
    if model.main_input_name == "pixel_values":
        makers = {"pixel_values": lambda: noise(config.num_channels, *_height_and_width(config.image_size))}
    elif model.main_input_name == "input_features":
        frames = 2 * config.max_source_positions
        makers = {"input_features": lambda: noise(config.num_mel_bins, frames), "decoder_input_ids": ids}
    elif model.main_input_name == "input_values":
        samples = 20 * math.prod(config.conv_stride)
        mask = (torch.arange(samples) < torch.linspace(samples, samples // 2, rows)[:, None]).long()
        makers = {"input_values": lambda: noise(samples), "attention_mask": lambda: mask}
    if getattr(config, "add_cross_attention", False):
        makers["encoder_hidden_states"] = lambda: noise(tokens, config.hidden_size)
        makers["encoder_attention_mask"] = lambda: mask.flip(0)
    if not getattr(config, "type_vocab_size", 0):
        makers.pop("token_type_ids", None)
    accepted = inspect.signature(model.forward).parameters
    batch = {name: make().to(model.device) for name, make in makers.items() if name in accepted}
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        batch = {name: value[None] for name, value in batch.items()}  # one question, each row a choice
    return batch


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in nested outputs with their dotted names; caches and the like are skipped."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value.detach()  # `enable_input_require_grads` makes the embedding's output a leaf, even under `no_grad`
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _tensors(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}.{index}", part)
