"""The pictures of the documentation: `python docs/pictures.py` writes them anew into `docs/pictures/`.

Weights, inputs and losses are made up. Masks of patterns come from a `Pruner`, targets from the schedules, levels from a search.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from transformers import BertConfig, BertModel

from hf_prune import Pruner, PruningConfig
from hf_prune.pruning.schedules import SCHEDULES

mpl.use("Agg")
HERE = Path(__file__).parent / "pictures"
BLUE, ORANGE, GREY, LIGHT = "#2a6fbb", "#e07b39", "#8a8f98", "#e8eaee"
#: Readable on a light and on a dark page, and the same bytes each time.
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "svg.hashsalt": "hf_prune",
    "svg.fonttype": "path",
}


def matrix(axes: Any, values: Any, title: str, colours: Any = "Blues", **options: Any) -> None:
    """A matrix, a square a weight."""
    axes.imshow(values, cmap=colours, interpolation="nearest", **options)
    axes.set(title=title, xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def kept(axes: Any, mask: Any, title: str) -> None:
    """Which weights stay: blue."""
    matrix(axes, mask, title, ListedColormap([LIGHT, BLUE]), vmin=0, vmax=1)


def lines(axes: Any, title: str, across: str, up: str) -> None:
    axes.set(title=title, xlabel=across, ylabel=up)


def patterns() -> None:
    """Half of a small layer under every pattern, as a pruner leaves it."""
    logging.getLogger("hf_prune").setLevel(logging.ERROR)  # that a run of one step is short
    shown = {
        "1x1": "query",
        "4x1": "query",
        "4x4": "query",
        "2:4": "query",
        "1xchannel": "query",
        "channelx1": "query",
        "head": "query",
        "neuron": "intermediate",
    }
    _, grid = plt.subplots(2, 4, figsize=(7, 3.9), layout="constrained")
    for axes, (pattern, part) in zip(grid.flat, shown.items(), strict=True):
        torch.manual_seed(1)
        sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 16, "vocab_size": 9}
        model = BertModel(BertConfig(**sizes), add_pooling_layer=False)
        config = PruningConfig(
            pattern=pattern, criterion="magnitude", scope="local", target_sparsity=0.5, max_sparsity_per_module=1.0
        )
        pruner = Pruner(model, config, total_steps=1)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        pruner.observe()
        pruner.step()
        layer = model.encoder.layer[0]
        weight = layer.attention.self.query.weight if part == "query" else layer.intermediate.dense.weight
        kept(axes, (weight != 0).int(), f"{pattern}" + {"head": " (of 4 rows)"}.get(pattern, ""))


def schedules() -> None:
    """The target at each step of a run."""
    _, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
    for name, schedule in SCHEDULES.items():
        if name == "lottery":  # as `exp`
            continue
        steps = np.linspace(0, 1, 101)
        axes.plot(100 * steps, [100 * schedule(step, 0.0, 0.5) for step in steps], label=name)
    lines(axes, "", "% of the steps between warm-up and cool-down", "sparsity in %")
    axes.legend(frameon=False)


def structured_obs() -> None:
    """The error of a layer whose inputs are correlated, when its columns go one after the other."""
    generator = torch.Generator().manual_seed(0)
    columns, rows = 32, 16
    mix = torch.randn(8, columns, generator=generator)
    inputs = torch.randn(512, 8, generator=generator) @ mix + 0.3 * torch.randn(512, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    moment = inputs.T @ inputs / len(inputs)

    def error(changed: torch.Tensor) -> float:
        gap = weight - changed
        return float(((gap @ moment) * gap).sum() / ((weight @ moment) * weight).sum())

    by_size, by_obs, plain = [], [], weight.clone()
    order = weight.norm(dim=0).argsort()
    repaired, left = weight.clone(), list(range(columns))
    for count in range(columns - 1):
        by_size.append(error(plain))
        by_obs.append(error(repaired))
        plain[:, order[count]] = 0
        inverse = torch.linalg.inv(moment[left][:, left] + 1e-4 * torch.eye(len(left)))
        worst = int((repaired[:, left].square().sum(0) / inverse.diagonal()).argmin())
        repaired[:, left] -= repaired[:, left[worst], None] * inverse[worst] / inverse[worst, worst]
        repaired[:, left[worst]] = 0
        left.pop(worst)
    _, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
    axes.plot(by_size, color=GREY, label="smallest first, the others as they were")
    axes.plot(by_obs, color=BLUE, label="OBS: cheapest first, the others adapt")
    lines(axes, "", f"columns that are gone, of {columns}", "error of the output")
    axes.legend(frameon=False)


def sparsegpt() -> None:
    """Columns in order: those before are settled, those after make up for what went."""
    generator = np.random.default_rng(0)
    mask = np.ones((12, 24))
    for start in range(0, 12, 4):
        for row in range(12):
            mask[row, start + generator.permutation(4)[:2]] = 0
    _, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
    kept(axes, np.where(np.arange(24) < 12, mask, 1), "2:4, after 12 of 24 columns")
    shade = np.linspace(0.95, 0.35, 12)
    overlay = np.zeros((12, 24, 4))
    overlay[..., :3] = mpl.colors.to_rgb(ORANGE)
    overlay[:, 12:, 3] = shade
    axes.imshow(overlay, interpolation="nearest")
    axes.plot([11.5, 11.5], [-0.5, 11.5], color="black", linewidth=1)
    axes.text(5.5, 13, "settled", ha="center")
    axes.text(17.5, 13, "corrected, column by column", ha="center", color=ORANGE)
    axes.set_ylim(13.5, -0.5)


def wanda() -> None:
    """|W| × ‖x‖, compared within each row."""
    generator = np.random.default_rng(3)
    weight = np.abs(generator.normal(size=(8, 12)))
    norm = np.exp(generator.normal(size=12))
    score = weight * norm
    by_weight, by_score = (value.argsort(1).argsort(1) >= 6 for value in (weight, score))
    _, grid = plt.subplots(1, 5, figsize=(7.2, 1.9), layout="constrained", width_ratios=[1, 1, 1, 1, 1])
    matrix(grid[0], weight, "|W|")
    matrix(grid[1], np.repeat(norm[None], 8, 0), "‖x‖ of each input", "Oranges")
    matrix(grid[2], score, "|W| · ‖x‖", "Greens")
    kept(grid[3], by_weight, "kept by |W|")
    kept(grid[4], by_score, "kept by Wanda")


def flap() -> None:
    """An input that hardly fluctuates is a constant, which a bias can stand for."""
    generator = np.random.default_rng(0)
    _, grid = plt.subplots(1, 2, figsize=(6, 2.2), layout="constrained", sharey=True)
    for axes, spread, title in ((grid[0], 0.08, "goes: its mean moves to the bias"), (grid[1], 0.7, "stays")):
        values = 1.2 + spread * generator.normal(size=60)
        axes.scatter(range(60), values, s=7, color=BLUE)
        axes.axhline(1.2, color=ORANGE)
        axes.axhline(0, color=GREY, linewidth=0.6)
        lines(axes, title, "tokens", "output of a neuron" if axes is grid[0] else "")
        axes.set_xticks([])


def kprune() -> None:
    """What a unit is worth is the sum of two kinds of knowledge."""
    generator = np.random.default_rng(1)
    predictions, representation = generator.gamma(1.5, size=12), generator.gamma(1.5, size=12)
    order = (predictions + representation).argsort()
    gone = np.arange(12) < 6
    _, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
    for base, values, colour, label in (
        (0, predictions, BLUE, "of predictions"),
        (predictions, representation, ORANGE, "of the block's output"),
    ):
        below = base if isinstance(base, int) else base[order]
        bars = axes.bar(range(12), values[order], bottom=below, color=colour, label=label)
        for bar, faded in zip(bars, gone, strict=True):
            bar.set_alpha(0.35 if faded else 1)
    axes.axvline(5.5, color="black", linewidth=1)
    axes.text(2.5, max(predictions + representation) * 0.8, "go", ha="center")
    lines(axes, "", "heads, the least first", "knowledge lost")
    axes.set_xticks([])
    axes.legend(frameon=False)


def fisher() -> None:
    """How sharply the loss bends when a unit's mask goes from one to zero."""
    mask = np.linspace(0, 1.3, 50)
    _, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
    for curvature, colour, label in ((0.25, BLUE, "a unit that can go"), (1.6, ORANGE, "one that cannot")):
        axes.plot(mask, 0.5 * curvature * (mask - 1) ** 2, color=colour, label=label)
        axes.scatter([0], [0.5 * curvature], color=colour, zorder=3)
    lines(axes, "", "mask of the unit", "rise of the loss")
    axes.legend(frameon=False)


def gradients() -> None:
    """What four criteria think of one layer."""
    generator = torch.Generator().manual_seed(0)
    weight, first = (torch.randn(10, 14, generator=generator) for _ in range(2))
    history = [first + 0.8 * torch.randn(10, 14, generator=generator) for _ in range(8)]
    smooth = sum((0.9 ** (7 - step)) * (weight * gradient).abs() for step, gradient in enumerate(history))
    scores = {
        "gradient: |g|": history[-1].abs(),
        "snip: |w·g|": (weight * history[-1]).abs(),
        "snip_momentum": smooth,
        "taylor: Σ (w·g)²": sum((weight * gradient).square() for gradient in history),
    }
    _, grid = plt.subplots(2, 4, figsize=(7, 2.9), layout="constrained")
    for place, (name, score) in enumerate(scores.items()):
        matrix(grid[0, place], score, name)
        kept(grid[1, place], score >= score.flatten().median(), "kept" if not place else "")


def movement() -> None:
    """Magnitude keeps what is far from zero; movement what goes away from it."""
    generator = np.random.default_rng(0)
    before = generator.normal(size=220)
    after = before + 0.45 * generator.normal(size=220)
    _, grid = plt.subplots(1, 2, figsize=(6, 2.8), layout="constrained", sharey=True)
    grows = (after - before) * before
    rules = {"magnitude keeps": np.abs(after), "movement keeps": grows}
    for axes, (title, score) in zip(grid, rules.items(), strict=True):
        stays = score >= np.median(score)
        axes.scatter(before[~stays], after[~stays], s=7, color=LIGHT, edgecolor=GREY, linewidth=0.4)
        axes.scatter(before[stays], after[stays], s=7, color=BLUE)
        lines(axes, title, "weight before fine-tuning", "after it" if axes is grid[0] else "")


def magnitude() -> None:
    """The smallest weights go."""
    values = np.random.default_rng(0).normal(size=20000)
    limit = np.quantile(np.abs(values), 0.5)
    _, axes = plt.subplots(figsize=(5, 2.3), layout="constrained")
    _, edges, bars = axes.hist(values, bins=np.arange(-20, 21) * limit / 4, color=BLUE)
    for left, bar in zip(edges, bars, strict=False):
        if -limit - 1e-6 <= left < limit - 1e-6:
            bar.set_facecolor(LIGHT)
    for side in (-limit, limit):
        axes.axvline(side, color=ORANGE, linewidth=1)
    lines(axes, "half of the weights go", "weight", "how many")
    axes.set_yticks([])


def budgets() -> None:
    """Each block has a level; together they meet the budget with the least loss."""
    levels, budget = np.linspace(0, 1, 9), 2.0
    losses = [(np.exp(steepness * levels) - 1) / 20 for steepness in (1.5, 2.3, 3.1, 3.9)]
    _, grid = plt.subplots(1, 2, figsize=(6.6, 2.6), layout="constrained")
    choices = [choice for choice in itertools.product(range(9), repeat=4) if sum(1 - levels[list(choice)]) <= budget]
    taken = min(choices, key=lambda choice: sum(loss[level] for loss, level in zip(losses, choice, strict=True)))
    start, colours = 0.0, [plt.get_cmap("Blues")(0.4 + 0.18 * place) for place in range(4)]
    for place, (loss, level) in enumerate(zip(losses, taken, strict=True)):
        grid[0].plot(100 * levels, loss, color=colours[place], label=f"block {place + 1}")
        grid[0].scatter([100 * levels[level]], [loss[level]], color=ORANGE, zorder=3)
        grid[1].barh(["dense"], [1], left=place, color=LIGHT, edgecolor="white")
        grid[1].barh(["pruned"], [1 - levels[level]], left=start, color=colours[place], edgecolor="white")
        start += 1 - levels[level]
    lines(grid[0], "the level that each block gets", "% of a block that is gone", "loss")
    grid[0].legend(frameon=False)
    grid[1].axvline(budget, color=ORANGE)
    lines(grid[1], "what is left of them meets the budget", "milliseconds, parameters, FLOPs or bytes", "")
    grid[1].set_xticks([])


def whole_model() -> None:
    """What can leave a model besides heads and neurons."""
    _, grid = plt.subplots(1, 4, figsize=(7.2, 2.5), layout="constrained")
    everything = np.ones((12, 12))
    layers, channels, tokens, experts = (everything.copy() for _ in range(4))
    layers[[2, 3, 8, 9]] = 0
    channels[:, [1, 4, 5, 10]] = 0
    tokens[[1, 2, 5, 7, 10, 11]] = 0
    experts[:, 8:] = 0
    parts = {
        "layers": (layers, "layers of the model", "channels"),
        "hidden size": (channels, "layers", "hidden channels"),
        "vocabulary": (tokens, "tokens", "channels of the embedding"),
        "experts": (experts, "neurons", "experts of a layer"),
    }
    for axes, (name, (mask, up, across)) in zip(grid, parts.items(), strict=True):
        kept(axes, mask, name)
        axes.set(xlabel=across, ylabel=up)


PICTURES: tuple[Callable[[], None], ...] = (
    patterns,
    schedules,
    structured_obs,
    sparsegpt,
    wanda,
    flap,
    kprune,
    fisher,
    gradients,
    movement,
    magnitude,
    budgets,
    whole_model,
)


def main() -> None:
    """Write every picture."""
    HERE.mkdir(exist_ok=True)
    for draw in PICTURES:
        with mpl.rc_context(STYLE):
            draw()
            plt.savefig(HERE / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close("all")


if __name__ == "__main__":
    main()
