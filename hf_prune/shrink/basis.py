"""Which directions of the residual stream stay: some of its channels, or the principal ones after a rotation.

A stream x of `hidden` channels becomes c·Sᵀx of `size` channels, with c = √(size/hidden): then, if what goes is zero, every norm
divides by what it divided by before, epsilon included. S is a choice of columns of the identity, or has orthonormal columns:
RMSNorm without its scale commutes with rotations (SliceGPT, Ashkboos et al. 2024, https://arxiv.org/abs/2401.15024, theorem 1).
With one S for all layers the architecture stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """The directions that stay.

    Attributes:
        matrix: S, `[hidden, size]`, float64.
        kept: the channels that stay, ascending, `[size]`, if S chooses channels; else None.
    """

    matrix: Tensor
    kept: Tensor | None = None

    @classmethod
    def of_channels(cls, kept: Tensor, hidden: int) -> Basis:
        """The choice of some channels, `[size]`, of `hidden`."""
        return cls(torch.eye(hidden, dtype=torch.float64, device=kept.device)[:, kept], kept)

    def along(self, tensor: Tensor, dim: int, copies: int = 1) -> Tensor:
        """Sᵀ applied to a tensor along a dimension on which so many `copies` of the stream are side by side."""
        hidden, size = self.matrix.shape
        if self.kept is not None:
            index = (torch.arange(copies, device=self.kept.device)[:, None] * hidden + self.kept).flatten()
            return tensor.index_select(dim, index.to(tensor.device))
        last = tensor.movedim(dim, -1)
        parts = last.reshape(*last.shape[:-1], copies, hidden) @ self.matrix.to(tensor)
        return parts.reshape(*last.shape[:-1], copies * size).movedim(-1, dim)


def strongest(scores: Tensor, size: int) -> Basis:
    """The channels with the highest scores, `[hidden]`."""
    return Basis.of_channels(scores.topk(size).indices.sort().values, len(scores))


def principal(moments: Tensor, size: int, centred: bool) -> Basis:
    """The directions with the largest second moments.

    Args:
        moments: Σ x·xᵀ, `[hidden, hidden]`, float64.
        size: how many directions stay.
        centred: whether norms subtract the mean (LayerNorm), which has to stay what it is, zero: S then takes the direction of all
            ones to nothing, and gives nothing in that direction. Its rank is one less.
    """
    hidden = len(moments)
    if not centred:
        return Basis(torch.linalg.eigh(moments).eigenvectors[:, -size:].flip(1).contiguous())
    across = _across_ones(hidden).to(moments)
    inside = torch.linalg.eigh(across.T @ moments @ across).eigenvectors[:, hidden - size :].flip(1)
    return Basis(across @ inside @ _across_ones(size).to(moments).T)


def _across_ones(size: int) -> Tensor:
    """An orthonormal basis of what is orthogonal to all ones, `[size, size - 1]`, float64."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1
    basis: Tensor = torch.linalg.qr(start).Q
    return basis[:, 1:]


def with_scale(basis: Basis, scale: Tensor) -> tuple[Basis, Tensor]:
    """Another basis of the same directions, in which a scale of all channels is a scale of the new ones.

    An output head E that is tied to the embeddings leaves no place for the scale g of the norm before it but that norm. So S is
    turned within its span until Sᵀ·diag(g)·S = diag(h), and the norm has the scale h. With all directions that is the identity:
    what is left out, and nothing else, makes a difference.

    Args:
        basis: the directions.
        scale: g, `[hidden]`.

    Returns:
        S and h, `[size]`.
    """
    inside = basis.matrix.T @ (scale.to(basis.matrix)[:, None] * basis.matrix)
    values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
    return Basis(basis.matrix @ vectors), values
