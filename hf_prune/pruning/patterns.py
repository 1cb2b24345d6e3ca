"""What is removed together: the unit groups of a pattern over the modules or blocks it applies to.

Every pattern is a grid of equal blocks over matrices. The rows and columns of a head or neuron are known to its block.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..model import Block, Projection
from ..model.targets import bias_target, computed_part, projection_target, weight_target
from ..model.units import UnitGroup, View
from ..settings.patterns import Pattern


def build_groups(
    pattern: Pattern, modules: Iterable[tuple[str, nn.Module]], blocks: Iterable[Block]
) -> tuple[list[UnitGroup], dict[str, str]]:
    """The unit groups of a pattern over the selected modules or blocks, and what is left out with its reason."""
    groups: list[UnitGroup] = []
    blocks = list(blocks)
    left_out = {block.name: reason for block in blocks if (reason := _obstacle(block))}
    blocks = [block for block in blocks if block.name not in left_out]
    if pattern.kind == "auto":
        groups = [group for block in blocks for group in _role_groups(block)]
    elif pattern.kind == "kv_group":
        groups = [_unit_group(block, block.units_per_group) for block in blocks if block.unit == "head"]
    elif pattern.kind in ("head", "neuron"):
        groups = [_unit_group(block) for block in blocks if block.unit == pattern.kind]
    elif pattern.kind in ("block", "layer"):
        together: dict[str, list[Block]] = {}
        for block in blocks:
            together.setdefault(block.name if pattern.kind == "block" else block.layer, []).append(block)
        groups = [_whole_group(name, members) for name, members in together.items()]
    else:
        for name, module in modules:
            group, reason = _matrix_group(pattern, name, module)
            if group is None:
                left_out[name] = reason
            else:
                groups.append(group)
    return groups, left_out


def _matrix_group(pattern: Pattern, name: str, module: nn.Module) -> tuple[UnitGroup | None, str]:
    """The group of a pattern that divides a single weight, or the reason why it does not fit."""
    target = weight_target(name, module, kernel_first=pattern.kind == "N:M")
    rows, columns = target.shape
    if not rows * columns:
        return None, "condensing left nothing of it"
    if pattern.kind == "N:M":
        assert pattern.n
        assert pattern.m
        if target.inputs % pattern.m:
            return None, f"its {target.inputs} inputs are not divisible by {pattern.m}"
        return UnitGroup(name, (View(target, 1, 1),), n_of_m=(pattern.n, pattern.m)), ""
    height, width = pattern.n or rows, pattern.m or columns
    if rows % height or columns % width:
        return None, f"its shape {rows}x{columns} is not divisible by {height}x{width}"
    biases: tuple[View, ...] = ()
    if pattern.m is None and (bias := bias_target(name, module)) is not None:
        biases = (View(bias, height, 1),)
    return UnitGroup(name, (View(target, height, width),), biases), ""


def _obstacle(block: Block) -> str:
    """Why a block has no units to prune, or an empty string."""
    return computed_part(block) if block.num_units else "condensing left nothing of it"


def _unit_group(block: Block, together: int = 1) -> UnitGroup:
    """The heads or neurons of a block: their rows of its inputs, their columns of its output.

    `together` neighbours form one unit: 1, or as many as share rows. Rows that several units share belong to none of them, so under
    grouped-query attention a head is its rows of the query and its columns of the output projection.
    """
    own, *others = block.inputs
    heights = {own: block.unit_width * together}
    if together == block.units_per_group:
        heights |= dict.fromkeys(others, block.unit_width)
    weights = (*(_row_view(part, height) for part, height in heights.items()), _column_view(block.output, heights[own]))
    return UnitGroup(block.name, weights, tuple(bias for part, height in heights.items() for bias in _biases(part, height)))


def _role_groups(block: Block) -> list[UnitGroup]:
    """A group for each projection, its blocks shaped by role (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838, section 3.2).

    Attention gets square tiles as high as a head, or as long as the matrix if a tile does not divide it; neurons, which are one row
    high, get whole rows and columns. A head is removed by losing its values or its output columns, never its queries or keys alone.
    """
    groups = []
    for role, part in block.roles.items():
        silences = role in block.makers and block.units_per_group == 1
        axis = "columns" if part is block.output else "rows" if silences else ""
        lines = _column_view(part, 1) if part is block.output else _row_view(part, 1)
        view = lines if block.unit_width == 1 else _tile_view(part, block.unit_width)
        biases = _biases(part, 1) if view.height == 1 else ()
        groups.append(UnitGroup(f"{block.name}.{role}", (view,), biases, None, block.name, axis))
    return groups


def _whole_group(name: str, blocks: Iterable[Block]) -> UnitGroup:
    """Blocks that are removed as one unit, with everything they add to the residual stream, including output biases."""
    sizes = [(part, len(part.rows)) for block in blocks for part in block.projections]
    biases = tuple(bias for part, rows in sizes for bias in _biases(part, rows))
    return UnitGroup(name, tuple(_row_view(part, rows) for part, rows in sizes), biases)


def _row_view(part: Projection, height: int) -> View:
    target = projection_target(part)
    return View(target, height, target.shape[1], part.index)


def _column_view(part: Projection, width: int) -> View:
    target = projection_target(part)
    return View(target, target.shape[0], width)


def _tile_view(part: Projection, size: int) -> View:
    target = projection_target(part)
    height, width = (size if length % size == 0 else length for length in (len(part.rows), target.shape[1]))
    return View(target, height, width, part.index)


def _biases(part: Projection, height: int) -> tuple[View, ...]:
    bias = bias_target(part.name, part.module)
    return () if bias is None else (View(bias, height, 1, part.index),)
