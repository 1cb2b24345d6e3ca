"""Verifying that the smaller model is equal: all of its outputs, on a batch that exercises every kind of input.

The model is computed as a whole, because blocks alone do not show the order of layers, residuals and the sizes that modules assume;
weights are widened to float64 as they are read (`wide.py`), so that no second model is in memory.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..model.positions import longest_row
from .layers import without_inputs
from .snapshot import unchanged
from .stock import describes
from .wide import widen

logger = logging.getLogger(__name__)

Outputs = dict[str, Tensor]
Value = TypeVar("Value")


def implementations(model: PreTrainedModel) -> tuple[str, ...]:
    """The attention implementations of a model that give the same results on any device."""
    return ("eager", "sdpa") if model._supports_sdpa else ("eager",)


@dataclass(frozen=True, eq=False)
class Observation:
    """What of a model must not change.

    Attributes:
        outputs: every floating-point output in evaluation mode, hidden states included, eager and sdpa, on `sample_batch`.
        wide: whether they were computed in float64.
        dtypes: the dtypes of the outputs of the model as it is (in float64, parameters of any dtypes get along); None if it cannot
            be computed so.
        described: whether its config says the sizes of its blocks, as loading needs; None if that cannot be found out.
    """

    outputs: Outputs
    wide: bool
    dtypes: frozenset[torch.dtype] | None
    described: bool | None


def observe(model: PreTrainedModel, before: Observation | None = None) -> Observation:
    """Compute a model in float64, so that what differs is the model and not the order of its sums.

    A trained model has activations whose rounding in float32 alone exceeds 1e-5. If float64 is impossible (a kernel without it, as
    GPT-2's with `reorder_and_upcast_attn`; a device without memory left), or gives values that are not finite (a softmax in
    float32, where the mask of a query that attends to nothing becomes −inf), the model's own dtype is used, with a warning that
    gives the tolerance. The model is left unchanged, without the hooks by which transformers records hidden states.

    Args:
        model: the model.
        before: of the masked model, for the condensed one: what was possible there is so here, or raises.
    """
    if before is None:
        dtypes = _if_possible(_own_dtypes, model, "The dtype of the outputs")
        described = _if_possible(describes, model, "What the config says of the sizes")
    else:
        dtypes = None if before.dtypes is None else _own_dtypes(model)
        described = None if before.described is None else describes(model)
    outputs, reason = _in_float64(model) if before is None or before.wide else (None, "")
    wide = outputs is not None
    if outputs is None:
        outputs = all_outputs(model)
    if reason:
        logger.warning(
            "%s cannot be computed in float64 (%s), so it is verified in %s: "
            "differences up to %.0e of an output count as rounding.",
            type(model).__name__,
            reason,
            str(model.dtype).removeprefix("torch."),
            max((tolerance(value, model.dtype) for value in outputs.values()), default=0.0),
        )
    return Observation(outputs, wide, dtypes, described)


def _if_possible(check: Callable[[PreTrainedModel], Value], model: PreTrainedModel, what: str) -> Value | None:
    """What a check of the masked model gives; or None and a warning, if `what` it finds out cannot be found out."""
    with unchanged(model):  # also if what the check itself puts back is not put back
        try:
            return check(model)
        except Exception as error:  # a kernel that its dtype lacks, a class of somebody's own that wants more than a config
            logger.warning("%s is not verified: %s raises %s", what, type(model).__name__, _first_line(error))
            return None


def _in_float64(model: PreTrainedModel) -> tuple[Outputs | None, str]:
    """A model's outputs in float64, where the device has it; or None and the reason."""
    with unchanged(model):
        try:
            if model.device.type != "mps":
                widen(model)
            seen = _outputs(model)
        except Exception as error:  # if it is no matter of float64, the model as it is raises it, too
            return None, _first_line(error)
        finite = all(bool(value.isfinite().all()) for value in seen.values())
        return (seen, "") if finite else (None, "it gives values that are not finite")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


@torch.no_grad()
def _own_dtypes(model: PreTrainedModel) -> frozenset[torch.dtype]:
    """The dtypes of what a model puts out for a short batch, in evaluation mode and otherwise as it is."""
    with unchanged(model):
        model.train(False)
        outputs = model(**sample_batch(model, rows=2, tokens=4), output_hidden_states=True, return_dict=True)
        return frozenset(value.dtype for _, value in tensors_of("", dict(outputs)))


def all_outputs(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Outputs:
    """Every floating-point output of a model in evaluation mode, hidden states included, eager and sdpa; by default on
    `sample_batch`."""
    with unchanged(model):
        return _outputs(model, batch)


@torch.no_grad()
def _outputs(model: PreTrainedModel, batch: dict[str, Tensor] | None = None) -> Outputs:
    """What a model puts out in evaluation mode. It stays in that mode, with the last attention implementation."""
    seen: Outputs = {}
    model.train(False)
    if batch is None:
        batch = sample_batch(model, tokens=8)  # enough to tell positions and padding apart; the time goes up with the tokens
    for implementation in implementations(model):
        model.set_attn_implementation(implementation)
        outputs = model(**batch, output_hidden_states=True, return_dict=True)
        seen.update(tensors_of(implementation, dict(outputs)))
    return seen


def compare(before: Observation, after: Observation, dtype: torch.dtype, removed: dict[str, list[int]]) -> None:
    """Check that a model with weights of `dtype` is what it was, and that its outputs agree to within `tolerance`.

    Args:
        before: of the masked model.
        after: of the condensed one.
        dtype: of the weights.
        removed: the layers that went: what they were given is an output no more.

    Raises:
        RuntimeError: they do not; names the output with the largest difference.
    """
    restored = "The model was restored."
    wanted = without_inputs(before.outputs, removed)
    gaps = {name: float((value.double() - after.outputs[name].double()).abs().max()) for name, value in wanted.items()}
    # `not <=` rather than `>`: a gap that is not a number is a difference too
    wrong = {name: gap for name, gap in gaps.items() if not gap <= tolerance(wanted[name], dtype)}
    if wrong:
        name = max(wrong, key=lambda name: wrong[name])
        computed = str(wanted[name].dtype).removeprefix("torch.")
        raise RuntimeError(
            f"the condensed model differs from the masked one by {wrong[name]:.2e} in {name}, computed in {computed}; "
            f"allowed: {tolerance(wanted[name], dtype):.2e}. {restored}"
        )
    if after.dtypes != before.dtypes:
        found = ", ".join(sorted(map(str, after.dtypes or ())))
        raise RuntimeError(f"the condensed model computes in {found} what the masked one did not. {restored}")
    if before.described and not after.described:
        raise RuntimeError(f"the config of the condensed model says other sizes than it has. {restored}")


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
        tokens: length of the first row, but no more than the model has positions for; lengths decrease evenly from row to row.
        shortest: length of the last row. Images and audio have fixed sizes.
    """
    config = model.config
    classifies = type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()
    if classifies and config.get_text_config().pad_token_id is None:
        rows = 1  # a decoder finds the last token of each row by the padding
    generator = torch.Generator().manual_seed(0)
    text, vision = (getattr(config, f"{kind}_config", config) for kind in ("text", "vision"))
    padding, end = (getattr(text, f"{name}_token_id", None) for name in ("pad", "eos"))
    timm = getattr(config, "pretrained_cfg", None)  # what timm says of a model in a wrapper
    image = getattr(config, "image_token_id", None)  # stands in a text where an image is read
    tokens = min(tokens, longest_row(model) or tokens)
    lengths = torch.linspace(tokens, min(shortest, tokens), rows).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()

    def ids() -> Tensor:
        # any tokens but padding, from whose place RoBERTa counts positions, and one that ends the row, as BART's classifier wants
        ends = [end] if isinstance(end, int) else end or []
        usable = torch.ones(text.vocab_size, dtype=torch.bool)
        special = (*ends, padding or 0, padding or 0 if image is None else image)
        usable[[token for token in special if 0 <= token < text.vocab_size]] = False
        choices = usable.nonzero().flatten()
        drawn = choices[torch.randint(len(choices), (rows, tokens), generator=generator)]
        if config.is_encoder_decoder and ends:
            drawn[torch.arange(rows), lengths - 1] = ends[0]
        return torch.where(mask.bool(), drawn, padding or 0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator).to(model.dtype)

    def images() -> Tensor:
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        channels, *sizes = (
            timm["input_size"] if timm else (vision.num_channels, *_height_and_width(getattr(vision, "image_size", 64)))
        )
        return noise(*frames, channels, *sizes)

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": ids,
        "attention_mask": lambda: mask,
        "token_type_ids": lambda: torch.randint(config.type_vocab_size, (rows, tokens), generator=generator),
        "decoder_input_ids": ids,
        "global_attention_mask": lambda: (torch.arange(tokens) == 0).long().repeat(rows, 1),
    }
    if vision is not config and image is None:  # a tower for texts, one for images
        makers["pixel_values"] = images
    if model.main_input_name == "pixel_values":  # by the noise a masked autoencoder chooses what it does not see
        patches = math.prod(_height_and_width(getattr(vision, "image_size", 0))) // getattr(vision, "patch_size", 1) ** 2
        makers = {"pixel_values": images, "noise": lambda: torch.rand(rows, patches, generator=generator).to(model.dtype)}
    elif model.main_input_name == "input_features":
        channels = getattr(config, "input_feat_per_channel", 0)
        shape = (20, channels) if channels else (config.num_mel_bins, 2 * config.max_source_positions)
        makers = {"input_features": lambda: noise(*shape), "decoder_input_ids": ids}
    elif model.main_input_name == "input_values" and hasattr(config, "num_mel_bins") and not hasattr(config, "conv_stride"):
        makers = {"input_values": lambda: noise(config.max_length, config.num_mel_bins)}  # a spectrogram
    elif model.main_input_name == "input_values":  # sound
        samples = 20 * math.prod(config.conv_stride)
        heard = (torch.arange(samples) < torch.linspace(samples, samples // 2, rows)[:, None]).long()
        makers = {"input_values": lambda: noise(samples), "attention_mask": lambda: heard, "decoder_input_ids": ids}
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


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the floating-point tensors in nested outputs with their dotted names; caches and the like are skipped."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield name, value.detach()  # `enable_input_require_grads` makes the embedding's output a leaf, even under `no_grad`
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(f"{name}.{key}", part)
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors_of(f"{name}.{index}", part)
