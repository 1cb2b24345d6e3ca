"""Which blocks an allocation spares, found by trying: a random search over what the loss of each counts.

Scores of blocks are measured one block at a time; how losses add up when many blocks shrink together only the model says. Each try
weighs the blocks anew, allocates, and runs the model with the weights that come out: SPDY (Frantar and Alistarh 2022,
https://arxiv.org/abs/2201.13096, section 3.3), as ZipLM has it for heads and neurons (Kurtić, Frantar and Alistarh 2023,
https://arxiv.org/abs/2302.04089, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

#: The share of the weights that a try draws anew.
_SHARE = 0.1
#: What all weights are at first: as much below the largest as above zero.
_START = 0.5


def search_weights(
    number: int, tries: Iterable[int], loss: Callable[[Tensor], float], generator: torch.Generator
) -> tuple[Tensor, float, float]:
    """The best weights of those that were tried. A try draws a tenth of the best ones anew, from (0, 1].

    Args:
        number: of weights.
        tries: a number for each try; there is one before them, with equal weights.
        loss: of weights `[number]`. One that is not less than the least is of no use, nor is NaN.
        generator: draws, on the CPU.

    Returns:
        The weights, `[number]`; the loss with equal weights; the loss with those.
    """
    best = torch.full((number,), _START)
    first = least = loss(best)
    for _ in tries:
        drawn = torch.randperm(number, generator=generator)[: max(round(_SHARE * number), 1)]
        trial = best.index_copy(0, drawn, 1 - torch.rand(len(drawn), generator=generator))
        if (found := loss(trial)) < least:
            best, least = trial, found
    return best, first, least
