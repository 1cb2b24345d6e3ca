"""Which teacher layer each student layer learns from. Layers are counted from 0.

Sources: uniform, TinyBERT (Jiao et al. 2020, https://arxiv.org/abs/1909.10351); last, MiniLM (Wang et al. 2020,
https://arxiv.org/abs/2002.10957); dynamic, CoFi (Xia et al. 2022, https://arxiv.org/abs/2204.00408).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..settings.errors import ConfigError

Pairs = list[tuple[int, int]]


def layer_pairs(layer_map: str | Sequence[Sequence[int]], student: int, teacher: int) -> Pairs:
    """The pairs of student and teacher layers of a layer map, for models of these depths.

    - `"uniform"`: student layer i of n learns from the end of the i-th of n equal parts of the teacher, so last from last.
    - `"last"`: the last layer learns from the last layer, the others from none.
    - `"dynamic"`: as `"uniform"` until `closest_layers` has distances to go by.

    Raises:
        ConfigError: an explicit pair names a layer that does not exist.
    """
    if layer_map == "last":
        return [(student - 1, teacher - 1)]
    if isinstance(layer_map, str):
        return [(layer, -(-(layer + 1) * teacher // student) - 1) for layer in range(student)]
    for one, other in layer_map:
        for role, layer, count in (("student", one, student), ("teacher", other, teacher)):
            if layer >= count:
                raise ConfigError("layer_map", layer_map, f"the {role} has layers 0 to {count - 1}, so no layer {layer}.")
    return [(one, other) for one, other in layer_map]


def closest_layers(distances: Tensor) -> Pairs:
    """The dynamic map: each student layer takes the closest teacher layer not below that of the student layer before it.

    Args:
        distances: `[student layers, teacher layers]`.
    """
    pairs: Pairs = []
    lowest = 0
    for layer, row in enumerate(distances):
        lowest += int(row[lowest:].argmin())
        pairs.append((layer, lowest))
    return pairs
