"""What a model is traced and compared with: ragged batches of several shapes, and its outputs by name."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping

from torch import Tensor
from transformers import PreTrainedModel

from ..condense import sample_batch
from ..settings.errors import ConfigError

#: Rows and tokens of the batches that a file is compared on; it is traced with the first.
SHAPES = ((3, 16), (2, 9), (4, 5))
#: What the dimensions of an input are called that may have any size, where they are not batch and sequence.
_DIMENSIONS: dict[str, tuple[str | None, ...]] = {
    "past_key_values": ("batch", None, "past", None),
    "pixel_values": ("batch",),
    "input_features": ("batch",),
    "input_values": ("batch", "samples"),
    "decoder_input_ids": ("batch", "decoder_sequence"),
    "encoder_hidden_states": ("batch", "encoder_sequence"),
    "encoder_attention_mask": ("batch", "encoder_sequence"),
}


def example_batches(model: PreTrainedModel, given: Collection[str] | None = None) -> list[dict[str, Tensor]]:
    """Ragged, right-padded batches of random inputs, one of each of `SHAPES`; a decoder's rows are shorter than an encoder's.

    Args:
        model: what takes them.
        given: what its tokenizer gives; without segments among that, the batches have none, either.
    """
    batches = [_example(model, rows, tokens) for rows, tokens in SHAPES]
    for batch in batches:
        if given is not None and "token_type_ids" not in given:
            batch.pop("token_type_ids", None)
    return batches


def _example(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Tensor]:
    batch = sample_batch(model, rows, tokens)
    if "decoder_input_ids" in batch and "input_ids" in batch:
        batch["decoder_input_ids"] = batch["decoder_input_ids"][:, : tokens - 2]
    if "input_ids" in batch and batch["input_ids"].ndim == 3:  # questions, choices, tokens: more than one question
        batch = {name: value.repeat(2, 1, 1) for name, value in batch.items()}
    return {name: value.clone() for name, value in batch.items()}  # no tensor stands under two names


def any_size(batch: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """The dimensions of each input that may have any size: input → dimension → its name. One of size 1 stays of size 1."""
    return {
        name: {place: word for place, word in enumerate(_dimensions(name, value)) if word and value.shape[place] > 1}
        for name, value in batch.items()
    }


def _dimensions(name: str, value: Tensor) -> tuple[str | None, ...]:
    return _DIMENSIONS.get(name.partition(".")[0]) or (
        ("batch", "choices", "sequence") if value.ndim == 3 else ("batch", "sequence")
    )


def check_finite(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Raise unless what a model gives for some batches is finite.

    Raises:
        ConfigError: it is not; names the output.
    """
    for batch in batches:
        for name, value in outputs_of(model, batch).items():
            if not bool(value.isfinite().all()):
                raise ConfigError(
                    "model", type(model).__name__, f"gives NaN or infinity in {name}; no file can be compared with that."
                )


def outputs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model puts out: name → tensor, caches and the like aside."""
    accepted = inspect.signature(model.forward).parameters
    given = {name: value.to(model.device) for name, value in batch.items() if name in accepted}
    return {name: value.cpu() for name, value in model(**given).items() if isinstance(value, Tensor)}
