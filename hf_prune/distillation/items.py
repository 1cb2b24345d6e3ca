"""The items that each loss is averaged over, derived from the inputs of a micro-batch alone, so known before the forward pass.

| loss | a mean over |
| --- | --- |
| `task`, `logits` | rows, or tokens whose label is not ignored |
| `hidden` | tokens that are no padding, of the decoder where there is one |
| `hidden_layers`, `attention` | tokens that are no padding, of encoder and decoder; each the mean over its mapped layers |
| `simkd` | sequences; where every token has an input of its own, each the mean over its tokens |

The padding of images and sound is not known in advance: there, hidden states count a sequence as one item.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .models import shifts_labels


@dataclass(frozen=True)
class Items:
    """The items of one micro-batch.

    Attributes:
        labelled: bool `[rows]` or `[rows, tokens]`, what has a label that is not ignored.
        tokens: by stack (`layers`, or `encoder` and `decoder`), bool `[sequences, tokens]`, what is no padding; `[rows, 1]` where
            that is not known.
        shifted: whether the logits of a position are compared with the label of the next one.
        problem_type: what the labels are, as in the config of transformers' models; None where the model does not tell.
    """

    labelled: Tensor
    tokens: dict[str, Tensor]
    shifted: bool
    problem_type: str | None

    @property
    def last_tokens(self) -> Tensor:
        """The tokens of the decoder, or of the only stack."""
        return list(self.tokens.values())[-1]

    def counts(self) -> dict[str, Tensor]:
        """The denominator of each loss."""
        labelled, tokens = self.labelled.sum(), torch.stack([tokens.sum() for tokens in self.tokens.values()]).sum()
        return {
            "task": labelled,
            "logits": labelled,
            "hidden": self.last_tokens.sum(),
            "hidden_layers": tokens,
            "attention": tokens,
            "simkd": tokens.new_tensor(len(self.last_tokens)),
        }


def items_of(inputs: Mapping[str, Any], model: PreTrainedModel) -> Items:
    """The items of a micro-batch for a student."""
    # Collators that pack rows into one have shifted the labels themselves.
    shifted = "shift_labels" not in inputs and shifts_labels(model)
    labels, tokens = inputs.get("shift_labels", inputs.get("labels")), _padding_mask(inputs)
    several = torch.is_tensor(labels) and labels.is_floating_point() and labels.dim() > 1 and labels.shape[1] > 1
    labelled = _labelled(inputs, labels, shifted, tokens)
    stacks = {"layers": tokens}
    if model.config.is_encoder_decoder:
        given = inputs.get("decoder_attention_mask")
        targets = labelled if labelled.dim() == 2 else tokens
        stacks = {"encoder": tokens, "decoder": given.bool() if torch.is_tensor(given) else targets}
    named: str | None = model.config.problem_type
    return Items(labelled, stacks, shifted, named or ("multi_label_classification" if several else None))


def _labelled(inputs: Mapping[str, Any], labels: Any, shifted: bool, tokens: Tensor) -> Tensor:
    positions = inputs.get("start_positions")
    if torch.is_tensor(labels) and not labels.is_floating_point():
        return (labels[:, 1:] if shifted else labels) != -100
    if torch.is_tensor(positions):
        return positions.reshape(-1) < tokens.shape[1]  # Models ignore answers beyond the end.
    return torch.ones(len(_first_tensor(inputs)), dtype=torch.bool, device=tokens.device)


def _padding_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Bool `[sequences, tokens]`: which tokens are no padding; `[rows, 1]` for inputs that are no tokens.

    Multiple choice has as many sequences as there are choices.
    """
    tokens = next((inputs[name] for name in ("input_ids", "inputs_embeds") if torch.is_tensor(inputs.get(name))), None)
    if tokens is None:
        first = _first_tensor(inputs)
        return torch.ones(len(first), 1, dtype=torch.bool, device=first.device)
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape
    mask = inputs.get("attention_mask")
    if not (torch.is_tensor(mask) and mask.shape == shape):
        mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
    return mask.reshape(-1, shape[-1]).bool()


def _first_tensor(inputs: Mapping[str, Any]) -> Tensor:
    tensor: Tensor = next(value for value in inputs.values() if torch.is_tensor(value))
    return tensor
