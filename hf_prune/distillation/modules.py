"""What is learned beside the student: projections of its hidden states to the teacher's width.

They are trained with the student and saved in checkpoints, but no part of it: the saved student is a plain model.
"""

from __future__ import annotations

from torch import Tensor, nn


class Projections(nn.ModuleDict):
    """A linear map without bias for each loss that compares hidden states of different widths, shared by the layers of a stack.

    Args:
        widths: student's and teacher's width, by the name of the loss. Equal widths need no map.
    """

    def __init__(self, widths: dict[str, tuple[int, int]]) -> None:
        super().__init__({name: nn.Linear(*pair, bias=False) for name, pair in widths.items() if pair[0] != pair[1]})

    def forward(self, states: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """Map the hidden states of each loss."""
        return {name: [self[name](each) for each in given] if name in self else given for name, given in states.items()}
