"""Plots for a card: what was kept, the history, the metric against latency or over a family. They need matplotlib (`plot`)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .sparsity import BlockSize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#2a6fb0", "#c8591a", "#8a8a8a"


def plot_kept(blocks: Sequence[BlockSize]) -> Figure:
    """A map of the heads and neurons that are left: a row a layer, a column a kind of block, dark where much was kept.

    Args:
        blocks: see [`original_blocks`].

    Raises:
        ValueError: there are none.
    """
    if not blocks:
        raise ValueError("blocks=(): the family of the model has no architecture spec, so its heads and neurons are not known.")
    stacks: dict[str, dict[int, dict[str, BlockSize]]] = {}
    for block in blocks:
        # the first number in a name is that of the layer
        path, number, part = re.split(r"\.(\d+)\.", block.name, maxsplit=1)
        stacks.setdefault(path, {}).setdefault(int(number), {})[f"{part}\n{block.kind}"] = block
    depth = max(len(layers) for layers in stacks.values())
    widths = [len({part for layer in layers.values() for part in layer}) for layers in stacks.values()]
    figure = _figure(2.0 + 1.9 * sum(widths), 1.6 + 0.34 * depth)
    for axes, (path, layers) in zip(figure.subplots(1, len(stacks), squeeze=False, width_ratios=widths)[0], stacks.items()):
        parts = list(dict.fromkeys(part for layer in layers.values() for part in layer))
        shares = [
            [layer[part].alive / max(layer[part].units, 1) if part in layer else float("nan") for part in parts]
            for layer in layers.values()
        ]
        axes.pcolormesh(shares, vmin=0, vmax=1, cmap="Blues", edgecolors="white", linewidth=1.5)
        axes.invert_yaxis()
        for row, layer in enumerate(layers.values()):
            for column, part in enumerate(parts):
                if part in layer:
                    block = layer[part]
                    colour = "white" if shares[row][column] > 0.55 else "black"
                    text = f"{block.alive:,} of {block.units:,}"
                    axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks([column + 0.5 for column in range(len(parts))], parts, fontsize=8)
        axes.set_yticks([row + 0.5 for row in range(len(layers))], [str(number) for number in layers], fontsize=8)
        axes.set_ylabel("layer")
        axes.set_title(path, fontsize=9)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    figure.suptitle("Heads and neurons kept", fontsize=11)
    return figure


def plot_history(history: Sequence[Mapping[str, float]], metric: str | None = None) -> Figure:
    """Sparsity, and below it the metric, over the optimizer steps.

    Args:
        history: entries with `step` and any of `sparsity`, `reached_sparsity`, `target_sparsity` and the metric.
        metric: the metric's key.
    """
    names = [["target_sparsity", "reached_sparsity", "sparsity"], *([[metric]] if metric else [])]
    figure = _figure(6.4, 1.2 + 1.9 * len(names))
    rows = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    styles = {"target_sparsity": (_GREY, "--", "."), "reached_sparsity": (_GREY, "-", "."), "sparsity": (_BLUE, "-", ".")}
    for axes, keys in zip(rows, names):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            colour, line, marker = styles.get(key, (_ORANGE, "-", "o"))
            axes.plot(*zip(*points) if points else ((), ()), line, color=colour, marker=marker, label=key.replace("_", " "))
        axes.set_ylabel(keys[-1])
        axes.grid(alpha=0.3)
    rows[0].margins(y=0.08)
    rows[0].set_ylim(bottom=0)
    rows[0].legend(frameon=False, loc="lower right")
    rows[-1].set_xlabel("optimizer step")
    figure.suptitle("Pruning over the run", fontsize=11)
    return figure


def plot_latency(points: Mapping[str, tuple[float, float]], metric: str) -> Figure:
    """The metric against the latency of some models.

    Args:
        points: name → milliseconds, metric.
        metric: its name.
    """
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    for index, (name, (milliseconds, value)) in enumerate(points.items()):
        axes.scatter(milliseconds, value, color=_GREY if index == 0 else _BLUE, s=60, zorder=3)
        axes.annotate(name, (milliseconds, value), xytext=(8, 6), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.25 * max(milliseconds for milliseconds, _ in points.values()))
    axes.margins(y=0.4)
    axes.set_xlabel("milliseconds a batch")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    figure.suptitle("Metric against latency", fontsize=11)
    return figure


#: What a family differs in → how its axis is called.
_AXES = {"speedup": "times as fast as the dense model", "flops": "operations of a row"}


def plot_family(points: Mapping[str, tuple[float, float]], metric: str, cost: str) -> Figure:
    """The metric against speed or size over the models that one run made.

    Args:
        points: name → what the model has of the cost, metric. One named `dense` is what they came from.
        metric: its name.
        cost: `speedup`, `parameters`, `flops` or `bytes`.
    """
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    places = sorted(points.values())
    axes.plot([x for x, _ in places], [y for _, y in places], color=_BLUE, alpha=0.4, zorder=2)
    for name, (x, y) in points.items():
        axes.scatter(x, y, color=_GREY if name == "dense" else _BLUE, s=50, zorder=3)
        axes.annotate(name, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel(_AXES.get(cost, cost))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    figure.suptitle(f"{metric} against {cost}", fontsize=11)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # an optional dependency

    return Figure(figsize=(width, height), dpi=120, layout="constrained")
