"""Positions: how long the rows of a model may be."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def longest_row(model: PreTrainedModel) -> int | None:
    """How many tokens a row may have; None where positions have no end."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    others = (
        module for module in model.modules() if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    )
    # RoBERTa counts positions from behind that of the padding.
    paddings = [table.padding_idx for table in others if table.num_embeddings == positions and table.padding_idx is not None]
    return positions - max((padding + 1 for padding in paddings), default=0)
