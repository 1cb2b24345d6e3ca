"""Fewer layers: those go without which the model changes least.

A layer that is gone is not a layer of zeros: in a post-norm model it would still normalise, and a pre-norm one still adds its
biases. So layers leave between two runs, never as masks, and the model is another one until it is trained again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..condense import condense_plan
from ..condense.format import after_condensing
from ..condense.layers import can_do_without, layer_counts, outline, removable, remove_layers
from ..condense.snapshot import all_or_nothing, own_configs, unchanged
from ..model import find_blocks, spec_for
from ..model.blocks import body_prefix, layer_lists
from ..model.changeable import check_changeable
from ..model.targets import projection_target
from ..model.wrappers import transformers_model
from ..oneshot.calibration import calibration
from ..oneshot.driver import still
from ..oneshot.sensitivity import divergence, predictions
from ..oneshot.trials import absences, greedy_absences, probe_of
from ..oneshot.walk import Rows
from ..pruning.statistics import Activations
from ..settings.errors import ConfigError, closest

#: How layers are chosen.
CRITERIA = ("greedy_removal", "removal", "consecutive", "block_influence")


@torch.no_grad()
def shrink_depth(
    model: Any,
    num_layers: int | dict[str, int],
    dataloader: Iterable[Any],
    *,
    criterion: str = "greedy_removal",
    calibration_rows: int | None = None,
) -> Any:
    """Remove layers from a model in place, all or nothing; `config.hf_prune` remembers which.

    The result is an ordinary model of fewer layers. No labels are needed: layers are judged by how far the predictions move from
    those of the whole model.

    Args:
        model: a transformers model, or what holds one.
        num_layers: how many stay; for models with several lists of layers a number by the name of the list, such as
            `{"encoder.block": 4}`, others stay as they are.
        dataloader: batches as the model's forward takes them; labels in them are not read.
        criterion: which go. `"greedy_removal"`: one after the other, each time the one without which the predictions change least
            (SLEB, Song et al. 2024, https://arxiv.org/abs/2402.09025); `"removal"`: those that cost least alone;
            `"consecutive"`: neighbours, those that cost least together (as Gromov et al. 2024, https://arxiv.org/abs/2403.17887,
            by the predictions instead of the angle); `"block_influence"`: those that turn the hidden stream least, in one pass
            (ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853, eq. 1).
        calibration_rows: how many rows to take, see [`prune`]. Every trial runs on the first few of them.

    Returns:
        The same model object.

    Raises:
        ConfigError: the model, a number or the rows cannot be used. Nothing was changed.
    """
    whole = transformers_model(model)
    check_changeable(whole)
    if criterion not in CRITERIA:
        raise ConfigError("criterion", criterion, f"must be one of {', '.join(CRITERIA)}.", closest(criterion, CRITERIA))
    wanted = check_depth(whole, num_layers)
    rows = calibration(whole, dataloader, calibration_rows, 0.0, labels=False, seed=0)
    removed: dict[str, list[int]] = {}
    with all_or_nothing(whole):
        own_configs(whole)
        with still(whole):
            for path, number in wanted.items():
                removed[path] = _chosen(whole, path, len(_layers(whole, path)) - number, rows, criterion)
        _remove(whole, removed)
    return model


@torch.no_grad()
def drop_layers(model: PreTrainedModel) -> list[str]:
    """Remove the layers without living heads, their feed-forward blocks and norms included; `config.hf_prune` remembers which.

    At least one layer of a list stays, and so does one that the stock model builds differently from the layer that would replace
    it (T5's first, with the position bias).

    Returns:
        The names of the removed layers.

    Raises:
        ConfigError: layers share their weights.
    """
    heads: dict[str, int] = {}
    for plan in condense_plan(model).blocks:
        if plan.block.kind == "attention":
            heads[plan.block.layer] = heads.get(plan.block.layer, 0) + len(plan.kept)
    removed: dict[str, list[int]] = {}
    for path in layer_counts(spec_for(model.config.model_type)):
        if layers := _layers(model, path):
            empty = [heads.get(f"{path}.{index}") == 0 for index in range(len(layers))]
            constants = [torch.zeros(()) if gone else None for gone in empty]
            if all(empty):
                constants[0] = None
            removed[path] = removable(constants, [outline(layer) for layer in layers])
    with all_or_nothing(model):
        own_configs(model)
        _remove(model, removed)
    return [f"{path}.{index}" for path, indices in removed.items() for index in indices]


def _remove(model: PreTrainedModel, removed: dict[str, list[int]]) -> None:
    """Remove layers, and note that in the config."""
    removed = {path: indices for path, indices in removed.items() if indices}
    remove_layers(model, spec_for(model.config.model_type), removed)
    if removed:
        model.config.hf_prune = after_condensing(getattr(model.config, "hf_prune", None) or {}, [], removed)


def check_depth(model: PreTrainedModel, num_layers: int | dict[str, int]) -> dict[str, int]:
    """How many layers stay in each list.

    Raises:
        ConfigError: layers share weights; there is no such list; or there are not so many layers that could go.
    """
    counts = {path: len(_layers(model, path)) for path in layer_counts(spec_for(model.config.model_type))}
    counts = {path: count for path, count in counts.items() if count}
    if isinstance(num_layers, dict):
        for path in num_layers:
            if path not in counts:
                allowed = f"is no list of layers; there are {', '.join(counts)}."
                raise ConfigError("num_layers", path, allowed, closest(path, counts))
        wanted = dict(num_layers)
    elif len(counts) > 1:
        allowed = f"must say of which layers: a dictionary with {' and '.join(repr(path) for path in counts)}."
        raise ConfigError("num_layers", num_layers, allowed)
    else:
        wanted = dict.fromkeys(counts, num_layers)
    for path, number in wanted.items():
        outlines = [outline(layer) for layer in _layers(model, path)]
        fewest = max(counts[path] - len(removable([torch.zeros(())] * counts[path], outlines)), 1)
        if isinstance(number, bool) or not isinstance(number, int) or not fewest <= number < counts[path]:
            why = " that take one another's place" if fewest > 1 else ""
            allowed = f"must be a whole number from {fewest} to {counts[path] - 1}: {path} has {counts[path]} layers{why}."
            raise ConfigError("num_layers", number, allowed)
    return wanted


def remove_first(model: PreTrainedModel, wanted: dict[str, int]) -> None:
    """Bring a model that nobody needs to a shape, without a look at what goes. `wanted`: of [`check_depth`]."""
    for path, number in wanted.items():
        outlines = [outline(layer) for layer in _layers(model, path)]
        gone = removable([torch.zeros(())] * len(outlines), outlines)[: len(outlines) - number]
        remove_layers(model, spec_for(model.config.model_type), {path: gone})


def _layers(model: PreTrainedModel, path: str) -> list[nn.Module]:
    return [layer for layers in layer_lists(model, path).values() for layer in layers]


def _chosen(model: PreTrainedModel, path: str, number: int, rows: Rows, criterion: str) -> list[int]:
    """The indices of the layers of a list that go, ascending."""
    layers = _layers(model, path)
    indices, outlines = range(len(layers)), [outline(layer) for layer in layers]
    runs = [range(start, start + number) for start in range(len(layers) - number + 1)]
    probe = probe_of(rows, len(runs if criterion == "consecutive" else layers))
    dense = predictions(model, probe)

    def loss(gone: Collection[int]) -> float:
        if not can_do_without(outlines, gone):
            return math.inf
        with unchanged(model):
            remove_layers(model, spec_for(model.config.model_type), {path: sorted(gone)})
            return divergence(model, probe, dense) or 0.0

    if criterion == "greedy_removal":
        return sorted(greedy_absences(indices, loss, number)[0])
    if criterion == "consecutive":
        least: range = min(runs, key=loss)
        return list(least)
    costs = absences(indices, loss) if criterion == "removal" else dict(enumerate(_influences(model, path, rows)))
    gone: list[int] = []
    for index in sorted(indices, key=lambda index: costs[index]):
        if len(gone) < number and can_do_without(outlines, [*gone, index]):
            gone.append(index)
    return sorted(gone)


def _influences(model: PreTrainedModel, path: str, rows: Rows) -> list[float]:
    """1 − the mean cosine of what goes into each layer of a list and what comes out, over tokens."""
    some = projection_target(find_blocks(model)[0].output)
    names = [
        f"{body_prefix(model)}{name}.{index}" for name, layers in layer_lists(model, path).items() for index in range(len(layers))
    ]
    targets = [replace(some, name=name, module_name=name) for name in names]
    seen = Activations(model, {"cosines": targets})
    try:
        with seen.calibrating():
            for batch in rows.batches:
                model(**batch)
    finally:
        seen.detach()
    return [1 - float(seen.mean("cosines", target)) for target in targets]
