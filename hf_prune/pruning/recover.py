"""From blocks to heads and neurons: after pruning by role, a unit of which anything is left gets all its weights back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..condense import condense_plan
from ..model import find_blocks
from ..settings.patterns import Pattern
from .patterns import build_groups


@torch.no_grad()
def recover(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give every head and neuron that is not dead all its weights; what is dead becomes zero as a whole.

    Movement pruning by role leaves heads of which some blocks are masked. As in NNI, such a head stays as it is in `weights`, and
    a head goes when none of it is left; dead is what [`condense_plan`] says.

    Args:
        model: as pruned; changed in place.
        weights: its parameters without masks, by name.
    """
    dead = {plan.block.name: plan.dead for plan in condense_plan(model).changed}
    model.load_state_dict({**model.state_dict(), **weights})
    for kind in ("head", "neuron"):
        for group in build_groups(Pattern(kind), (), find_blocks(model))[0]:
            if group.name in dead:
                group.apply(~dead[group.name].to(group.device))
