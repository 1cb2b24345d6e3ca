"""From blocks to heads and neurons: after block pruning by role, restore all weights of every unit that is not dead."""

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
    """Restore all weights of every head and neuron that is not dead; set those of dead ones to zero.

    Movement pruning by role leaves heads with some masked blocks. As in NNI, such a head gets its values in `weights`, and a head
    is removed only if nothing of it is left; [`condense_plan`] defines what is dead.

    Args:
        model: the pruned model; changed in place.
        weights: its parameters without masks, by name.
    """
    dead = {plan.block.name: plan.dead for plan in condense_plan(model).changed}
    model.load_state_dict({**model.state_dict(), **weights})
    for kind in ("head", "neuron"):
        for group in build_groups(Pattern(kind), (), find_blocks(model))[0]:
            if group.name in dead:
                group.apply(~dead[group.name].to(group.device))
