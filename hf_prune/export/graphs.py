"""What of a model goes into a file of its own, and how the files are run together.

A decoder takes the keys and values of what came before and gives those of what comes next, so that a token costs one token; an
encoder-decoder that writes is two files, so that its encoder runs once. Files, inputs and outputs have optimum's names. Any other
model is one file with the inputs and outputs that it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutput

from .compare import ExportError, Run
from .inputs import any_size, outputs_of

#: What the files are called: of a whole model, and of one that writes what another has read.
MODEL, ENCODER, DECODER = "model", "encoder_model", "decoder_model"
_PAST, _PRESENT = "past_key_values.", "present."
#: Inputs of a file by name, with their shapes; what may have any size in it is no number.
Shapes = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Graph:
    """What is traced.

    Attributes:
        name: of the file.
        module: what computes it: a model, or what has one as its `model`.
        example: its inputs by name, as it is traced with them.
        outputs: names of its outputs.
        feed: what the file is given for a batch of the model's inputs.
        sizes: the dimensions of each input that may have any size, by their names.
        packed: whether `module` takes all inputs as one dictionary.
    """

    name: str
    module: nn.Module
    example: dict[str, Tensor]
    outputs: list[str]
    feed: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    sizes: dict[str, dict[int, str]]
    packed: bool = True

    def options(self) -> dict[str, Any]:
        """What `torch.onnx.export` is told."""
        if self.packed:
            packed = {"kwargs": {"inputs": self.example}, "dynamic_shapes": {"inputs": self.sizes}}
            return {**packed, "input_names": [*self.example], "output_names": self.outputs}
        return {"kwargs": self.example, "dynamic_shapes": self.sizes, "output_names": self.outputs}


def graphs_of(model: Any, batch: dict[str, Tensor]) -> list[Graph]:
    """The graphs of a model, as it is (see `as_exported`); what they are run together by is last.

    Args:
        model: the model.
        batch: the inputs that it takes, of any values, more than one row and token.
    """
    if {"decoder_input_ids", model.main_input_name} <= batch.keys() and model.can_generate():
        return _encoder_and_decoder(model, batch)
    if has_cache(model, batch):
        return [_with_cache(model, batch)]
    return [whole(model, batch)]


def whole(model: Any, batch: dict[str, Tensor]) -> Graph:
    """A model with the inputs and outputs that it has, without a cache."""
    return Graph(MODEL, model, batch, list(outputs_of(model, batch)), dict, any_size(batch), packed=False)


def joined(file: Path, open_file: Callable[[Path], tuple[Run, Shapes]]) -> Run:
    """A file as the model that it was: one with a cache runs in steps, that of a decoder after its encoder beside it.

    Args:
        file: that of the last of [`graphs_of`].
        open_file: opens a file in its runtime.
    """
    run, shapes = open_file(file)
    reader = file.with_name(file.name.replace(DECODER, ENCODER))
    if reader != file:
        return one_after_the_other(open_file(reader)[0], run)
    return in_steps(run, shapes) if any(name.startswith(_PAST) for name in shapes) else run


def check_inputs(shapes: Shapes, batch: Mapping[str, Tensor]) -> None:
    """Raise unless a batch has all inputs of a file."""
    if lacking := [name for name in shapes if name not in batch]:
        raise ExportError(f"the file wants {', '.join(lacking)}, which the batch does not have.")


# ------------------------------------------------------------------------------------------------------------ decoder with a cache


class _WithCache(nn.Module):
    """Keys and values as inputs and outputs, those of each layer with as many heads as it has."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        pairs = [value for name, value in inputs.items() if name.startswith(_PAST)]
        cache = DynamicCache()
        for keys, values in zip(pairs[::2], pairs[1::2]):
            layer: Any = DynamicLayer()  # type: ignore[no-untyped-call]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        others = {name: value for name, value in inputs.items() if not name.startswith(_PAST)}
        logits = self.model(**others, past_key_values=cache, use_cache=True).logits
        return (logits, *_states(cache))


def has_cache(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether a model writes with a cache of keys and values, `[batch, heads, past, width]`, for each layer."""
    accepted = inspect.signature(model.forward).parameters
    if not {*batch} <= {"input_ids", "attention_mask"} or "past_key_values" not in accepted or not model.can_generate():
        return False
    tokens = batch["input_ids"].shape[1]
    return bool(
        (pairs := _states(_filled(model, batch)))
        and all(states is not None and states.ndim == 4 and states.shape[2] == tokens for states in pairs)
    )


def _filled(model: Any, batch: Mapping[str, Tensor]) -> DynamicCache:
    cache = DynamicCache()
    model(**batch, past_key_values=cache, use_cache=True)
    return cache


def _states(cache: DynamicCache) -> list[Any]:
    return [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]


def _with_cache(model: Any, batch: Mapping[str, Tensor]) -> Graph:
    tokens = batch["input_ids"].shape[1]
    past = tokens // 3
    positions = torch.arange(tokens).expand(len(batch["input_ids"]), -1)
    example = {"input_ids": batch["input_ids"][:, past:].clone(), "attention_mask": torch.ones_like(batch["input_ids"])}
    if _counts_padding(model, batch, positions):
        example["position_ids"] = positions[:, past:].clone()
    states = _states(_filled(model, {"input_ids": batch["input_ids"][:, :past]}))
    names = [f"{number}.{name}" for number in range(len(states) // 2) for name in ("key", "value")]
    example |= {_PAST + name: value for name, value in zip(names, states)}

    def feed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return next_inputs({name: tuple(value.shape) for name, value in example.items()}, batch, {}, 0, batch["input_ids"].shape[1])

    sizes = any_size(example) | {"attention_mask": {0: "batch", 1: "past_sequence_length"}}
    return Graph(MODEL, _WithCache(model), example, ["logits", *(_PRESENT + name for name in names)], feed, sizes)


def _counts_padding(model: Any, batch: Mapping[str, Tensor], positions: Tensor) -> bool:
    """Whether a model numbers tokens from the left, padding too, so that rows padded there need positions of their own; others find
    them by the mask."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    return torch.allclose(model(**batch).logits, model(**batch, position_ids=positions).logits)


def next_inputs(
    shapes: Shapes, batch: Mapping[str, Tensor], past: Mapping[str, Tensor], start: int, stop: int
) -> dict[str, Tensor]:
    """What a decoder is given for some tokens of a batch.

    Args:
        shapes: its inputs, with the heads and widths of its keys and values.
        batch: right-padded rows.
        past: what it gave for the tokens before, by the names of its outputs; nothing at the start.
        start, stop: which tokens.
    """
    ids = batch["input_ids"]
    rows = len(ids)
    made = {
        "input_ids": ids[:, start:stop],
        "attention_mask": batch.get("attention_mask", torch.ones_like(ids))[:, :stop],
        "position_ids": torch.arange(start, stop).expand(rows, -1),
    }
    for name, (_, heads, _, width) in ((name, shape) for name, shape in shapes.items() if name.startswith(_PAST)):
        made[name] = past[name.replace(_PAST, _PRESENT)] if past else torch.zeros(rows, heads, 0, width)
    return {name: made[name].contiguous() for name in shapes}


def in_steps(run: Run, shapes: Shapes) -> Run:
    """A decoder with a cache as if it had none: run on the first half of the tokens, on most others, and on the last."""

    def in_all(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tokens = batch["input_ids"].shape[1]
        logits: list[Tensor] = []
        given: dict[str, Tensor] = {}
        ends = sorted({tokens // 2, tokens - 1, tokens} - {0})
        for start, stop in zip([0, *ends], ends):
            given = run(next_inputs(shapes, batch, given, start, stop))
            logits.append(given["logits"])
        return {"logits": torch.cat(logits, 1)}

    return in_all


# ------------------------------------------------------------------------------------------------------------- encoder and decoder


class _Encoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.get_encoder()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        states: Tensor = self.model(**inputs)[0]
        return states


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        states = BaseModelOutput(last_hidden_state=inputs["encoder_hidden_states"])
        masks = {"attention_mask": inputs["encoder_attention_mask"]} if "encoder_attention_mask" in inputs else {}
        logits: Tensor = self.model(decoder_input_ids=inputs["input_ids"], encoder_outputs=states, **masks).logits
        return logits


def _encoder_and_decoder(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[Graph]:
    encoder = _Encoder(model)

    def read(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in (model.main_input_name, "attention_mask") if name in batch}

    def write(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return decoder_inputs(batch, encoder(read(batch)))

    inputs = read(batch), write(batch)
    return [
        Graph(ENCODER, encoder, inputs[0], ["last_hidden_state"], read, any_size(inputs[0])),
        Graph(DECODER, _Decoder(model), inputs[1], ["logits"], write, any_size(inputs[1])),
    ]


def decoder_inputs(batch: Mapping[str, Tensor], states: Tensor) -> dict[str, Tensor]:
    """What the file of a decoder is given: what it has written, what the encoder made of what it read, and that one's mask."""
    made = {"input_ids": batch["decoder_input_ids"]}
    if "input_ids" in batch and "attention_mask" in batch:  # otherwise the mask is of samples, and no decoder's business
        made["encoder_attention_mask"] = batch["attention_mask"]
    return {**made, "encoder_hidden_states": states}


def one_after_the_other(encoder: Run, decoder: Run) -> Run:
    """An encoder-decoder of two files."""

    def run(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        states = encoder(batch)["last_hidden_state"]
        return {**decoder(decoder_inputs(batch, states)), "encoder_last_hidden_state": states}

    return run
