"""Positions: how long the rows of a model may be."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def longest_row(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have; None where positions have no end, or there are images instead."""
    if model.main_input_name == "pixel_values":
        return None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    padding = padding_of_positions(model)
    return positions - (0 if padding is None else padding + 1)


def padding_of_positions(model: PreTrainedModel) -> int | None:
    """The id of the padding, from behind which RoBERTa counts positions; None where they are counted from zero."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    try:
        tokens = model.get_input_embeddings()
    except NotImplementedError:  # a model of several towers
        tokens = None
    others = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    paddings = [table.padding_idx for table in others if table.num_embeddings == positions and table.padding_idx is not None]
    return max(paddings, default=None)
