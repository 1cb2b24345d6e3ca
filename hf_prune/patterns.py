"""What is removed together: from a pattern and the modules or blocks it applies to, the groups of units.

Every pattern is a grid of equal blocks over matrices. Nothing else in the library knows what a head or a neuron is.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .architectures import AttentionBlock, Block, Projection
from .config import Pattern
from .targets import bias_target, weight_target
from .units import UnitGroup, View


def build_groups(
    pattern: Pattern, modules: Iterable[tuple[str, nn.Module]], blocks: Iterable[Block]
) -> tuple[list[UnitGroup], dict[str, str]]:
    """The unit groups of a pattern over the selected modules or blocks, and what is left out with its reason."""
    groups: list[UnitGroup] = []
    left_out: dict[str, str] = {}
    if pattern.kind in ("head", "neuron"):
        for block in blocks:
            if isinstance(block, AttentionBlock) == (pattern.kind == "head"):
                groups.append(_block_group(block))
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
    if pattern.kind == "N:M":
        assert pattern.n
        assert pattern.m
        inputs = columns // target.parameter[0, 0].numel()
        if inputs % pattern.m:
            return None, f"its {inputs} inputs are not divisible by {pattern.m}"
        return UnitGroup(name, (View(target, 1, 1, 0, rows),), cell=(pattern.n, pattern.m)), ""
    height, width = pattern.n or rows, pattern.m or columns
    if rows % height or columns % width:
        return None, f"its shape {rows}x{columns} is not divisible by {height}x{width}"
    biases: tuple[View, ...] = ()
    if pattern.m is None and (bias := bias_target(name, module)) is not None:
        biases = (View(bias, height, 1, 0, rows),)
    return UnitGroup(name, (View(target, height, width, 0, rows),), biases), ""


def _block_group(block: Block) -> UnitGroup:
    """The heads of an attention block, or the neurons of a feed-forward block."""
    if isinstance(block, AttentionBlock):
        size, rows, columns = block.head_size, [block.query, block.key, block.value], block.output
    else:
        size, rows, columns = 1, [p for p in (block.up, block.gate) if p is not None], block.down
    inputs = [View(weight_target(p.name, p.module), size, weight_target(p.name, p.module).shape[1], p.start, p.stop) for p in rows]
    output = weight_target(columns.name, columns.module)
    outputs = View(output, output.shape[0], size, 0, output.shape[0])
    return UnitGroup(block.name, (*inputs, outputs), tuple(_bias_views(rows, size)))


def _whole_group(name: str, blocks: Iterable[Block]) -> UnitGroup:
    """Blocks that go as one unit, with everything they add to the residual stream: output biases too."""
    projections = [projection for block in blocks for projection in block.projections]
    weights: list[View] = []
    biases: list[View] = []
    for projection in projections:
        rows = projection.stop - projection.start
        target = weight_target(projection.name, projection.module)
        weights.append(View(target, rows, target.shape[1], projection.start, projection.stop))
        biases += _bias_views([projection], rows)
    return UnitGroup(name, tuple(weights), tuple(biases))


def _bias_views(projections: Iterable[Projection], size: int) -> Iterable[View]:
    for projection in projections:
        if (bias := bias_target(projection.name, projection.module)) is not None:
            yield View(bias, size, 1, projection.start, projection.stop)
