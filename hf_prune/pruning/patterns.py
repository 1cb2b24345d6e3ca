"""What is removed together: from a pattern and the modules or blocks it applies to, the groups of units.

Every pattern is a grid of equal blocks over matrices. Nothing else in the library knows what a head or a neuron is.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..model import AttentionBlock, Block, FeedForwardBlock, Projection
from ..model.blocks import computed_part
from ..model.targets import Target, bias_target, weight_target
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
    if pattern.kind == "neuron":
        groups = [_neuron_group(block) for block in blocks if isinstance(block, FeedForwardBlock)]
    elif pattern.kind == "auto":
        groups = [group for block in blocks for group in _role_groups(block)]
    elif pattern.kind in ("head", "kv_group"):
        groups = [_head_group(block, pattern.kind == "kv_group") for block in blocks if isinstance(block, AttentionBlock)]
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
        return UnitGroup(name, (View(target, 1, 1, 0, rows),), n_of_m=(pattern.n, pattern.m)), ""
    height, width = pattern.n or rows, pattern.m or columns
    if rows % height or columns % width:
        return None, f"its shape {rows}x{columns} is not divisible by {height}x{width}"
    biases: tuple[View, ...] = ()
    if pattern.m is None and (bias := bias_target(name, module)) is not None:
        biases = (View(bias, height, 1, 0, rows),)
    return UnitGroup(name, (View(target, height, width, 0, rows),), biases), ""


def _obstacle(block: Block) -> str:
    """Why a block has no units to prune, or an empty string."""
    if not (block.num_heads if isinstance(block, AttentionBlock) else block.num_neurons):
        return "condensing left nothing of it"
    return computed_part(block.projections)


def _neuron_group(block: FeedForwardBlock) -> UnitGroup:
    """The neurons of a feed-forward block: their rows of up and gate, their column of down."""
    rows = [part for part in (block.up, block.gate) if part is not None]
    weights = (*(_row_view(part, 1) for part in rows), _column_view(block.down, 1))
    return UnitGroup(block.name, weights, tuple(bias for part in rows for bias in _biases(part, 1)))


def _head_group(block: AttentionBlock, whole_groups: bool) -> UnitGroup:
    """The heads of an attention block, or its key and value heads with all the query heads that share them.

    A key and value head that several query heads share belongs to none of them alone, so that a unit of the pattern `head` is then
    the rows of the query and the columns of the output projection.
    """
    per_group = block.heads_per_group if whole_groups else 1
    sizes = {block.query: block.head_size * per_group}
    if whole_groups or block.heads_per_group == 1:
        sizes |= {block.key: block.head_size, block.value: block.head_size}
    weights = (*(_row_view(part, size) for part, size in sizes.items()), _column_view(block.output, sizes[block.query]))
    return UnitGroup(block.name, weights, tuple(bias for part, size in sizes.items() for bias in _biases(part, size)))


def _role_groups(block: Block) -> list[UnitGroup]:
    """A group for each projection, its blocks shaped by role (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838, section 3.2).

    Attention: square tiles as high as a head, or as long as the matrix where a tile does not divide it. Feed-forward: rows and
    columns. A head goes with its values or with its columns of the output, never with its queries or keys alone.
    """
    if isinstance(block, FeedForwardBlock):
        rows = {name: part for name, part in (("up", block.up), ("gate", block.gate)) if part is not None}
        return [
            *(
                UnitGroup(f"{block.name}.{name}", (_row_view(part, 1),), _biases(part, 1), None, block.name, "rows")
                for name, part in rows.items()
            ),
            UnitGroup(f"{block.name}.down", (_column_view(block.down, 1),), (), None, block.name, "columns"),
        ]
    size, shared = block.head_size, block.heads_per_group > 1
    roles = {"query": block.query, "key": block.key, "value": block.value, "output": block.output}
    axes = {"value": "" if shared else "rows", "output": "columns"}
    return [
        UnitGroup(f"{block.name}.{role}", (_tile_view(part, size),), (), None, block.name, axes.get(role, ""))
        for role, part in roles.items()
    ]


def _whole_group(name: str, blocks: Iterable[Block]) -> UnitGroup:
    """Blocks that go as one unit, with everything they add to the residual stream: output biases too."""
    sizes = [(part, part.stop - part.start) for block in blocks for part in block.projections]
    biases = tuple(bias for part, rows in sizes for bias in _biases(part, rows))
    return UnitGroup(name, tuple(_row_view(part, rows) for part, rows in sizes), biases)


def _row_view(part: Projection, height: int) -> View:
    target = weight_target(part.name, part.module)
    return View(target, height, target.shape[1], part.start, part.stop)


def _column_view(part: Projection, width: int) -> View:
    target = weight_target(part.name, part.module)
    return View(target, target.shape[0], width, 0, target.shape[0])


def _tile_view(part: Projection, size: int) -> View:
    target = weight_target(part.name, part.module)
    height, width = (size if length % size == 0 else length for length in (part.stop - part.start, target.shape[1]))
    return View(target, height, width, part.start, part.stop)


def _biases(part: Projection, height: int) -> tuple[View, ...]:
    return () if part.module.bias is None else (_bias_view(part, height),)


def _bias_view(part: Projection, height: int) -> View:
    return View(Target(f"{part.name}.bias", part.name, part.module.get_parameter("bias")), height, 1, part.start, part.stop)
