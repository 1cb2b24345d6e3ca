"""Fewer experts: those go that add least to the tokens that the router sends them.

A router row of zeros is not an expert that is gone: its logit is 0, not -∞, so it would still be chosen. Therefore experts leave
between two runs, never as masks. What is left computes exactly what the whole model would if the logits of those that went were -∞.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..condense.format import EXPERTS
from ..condense.snapshot import all_or_nothing, configs_of, own_configs
from ..model.changeable import check_changeable
from ..model.wrappers import transformers_model
from ..oneshot.calibration import calibration
from ..oneshot.driver import still
from ..oneshot.walk import Rows
from ..settings.errors import ConfigError, closest
from .outline import cut_to, outline, sized, tensors

#: How experts are chosen.
CRITERIA = ("reap", "frequency")
#: How many tensors transformers' modules of experts take: tokens `[n, hidden]`, the experts of each `[n, k]`, and their weights
#: `[n, k]`.
_TAKEN = 3


@torch.no_grad()
def shrink_experts(
    model: Any, num_experts: int, dataloader: Iterable[Any], *, criterion: str = "reap", calibration_rows: int | None = None
) -> Any:
    """Remove experts from every layer that has some, in place, all or nothing.

    The result is an ordinary model of fewer experts, of which the router chooses as many for each token as before; its config says
    so, and `config.hf_prune["original"]` remembers how many there were.

    Args:
        model: a transformers model whose layers keep their experts in one parameter (Mixtral, OLMoE, Qwen-MoE, DeepSeek, GPT-OSS,
            …), or what holds one.
        num_experts: how many stay in each layer, at least as many as the router chooses; shared experts stay in any case.
        dataloader: batches as the model's forward takes them; labels in them are not read.
        criterion: which stay. `"reap"`: those whose output, times the weight that the router gives it, is largest on average over
            the tokens that they serve (Lasby et al. 2025, https://arxiv.org/abs/2510.13999, eq. 9); `"frequency"`: those that serve
            most tokens.
        calibration_rows: how many rows to take, see [`prune`].

    Returns:
        The same model object. Its parameters are new objects, so an optimizer has to be made anew.

    Raises:
        ConfigError: the model has no experts, or not such; the number or the rows cannot be used. Nothing was changed.
    """
    whole = transformers_model(model)
    check_changeable(whole)
    if criterion not in CRITERIA:
        raise ConfigError("criterion", criterion, f"must be one of {', '.join(CRITERIA)}.", closest(criterion, CRITERIA))
    check_experts(whole, num_experts)
    rows = calibration(whole, dataloader, calibration_rows, 0.0, labels=False, seed=0)
    groups = getattr(whole.config, "n_group", None) or 1
    with still(whole):
        kept = {name: largest(scores, num_experts, groups) for name, scores in contributions(whole, rows, criterion).items()}
    keep_experts(whole, kept, rows.batches[0])
    return model


def check_experts(model: PreTrainedModel, num_experts: int) -> None:
    """Raise unless so many experts can stay in each layer.

    Raises:
        ConfigError: the model has no experts, or keeps them in a way that is not known; the router has too few to choose from.
    """
    expert_modules(model)
    name, config = _number(model), model.config
    now, chosen = getattr(config, name), getattr(config, "num_experts_per_tok", None) or 1
    groups, open_groups = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    fewest = chosen if groups == 1 else max(2 * groups, groups * -(-chosen // open_groups))
    if isinstance(num_experts, bool) or not isinstance(num_experts, int) or not fewest <= num_experts < now or num_experts % groups:
        parts = f", divisible by {groups}, the groups that the router chooses from" if groups > 1 else ""
        allowed = f"must be a whole number from {fewest} to {now - 1}{parts}: of {now}, {chosen} are chosen for each token."
        raise ConfigError("num_experts", num_experts, allowed)


@torch.no_grad()
def contributions(model: PreTrainedModel, rows: Rows, criterion: str) -> dict[str, Tensor]:
    """What each expert is worth: the name of the module of a layer's experts → `[experts]`, on the CPU. See [`shrink_experts`]."""
    modules = expert_modules(model)
    number = getattr(model.config, _number(model))
    sums = {name: torch.zeros(number, dtype=torch.float64) for name in modules}
    served = {name: torch.zeros(number, dtype=torch.float64) for name in modules}
    for batch in rows.batches:
        for name, given in seen(model, modules, batch):
            tokens, chosen, weights = routing(model, given)
            for expert, place, rank in served_by(chosen):
                served[name][expert] += len(place)
                if criterion == "reap":
                    alone = torch.full((len(place), 1), expert, device=chosen.device)
                    outputs = modules[name].forward(tokens[place], alone, torch.ones_like(alone, dtype=weights.dtype))
                    sizes = outputs.double().norm(dim=-1) * weights[place, rank].double().abs()
                    sums[name][expert] += float(sizes.sum())
    if criterion == "frequency":
        return served
    return {name: total / served[name].clamp(min=1) for name, total in sums.items()}


def largest(scores: Tensor, number: int, groups: int = 1) -> Tensor:
    """The indices of the largest scores, ascending, the same number of each of some groups of neighbours; ties: the first.

    Args:
        scores: `[experts]`.
        number: how many, a multiple of `groups`.
        groups: how many groups there are.
    """
    parts = scores.view(groups, -1)
    order = parts.argsort(dim=1, descending=True, stable=True)[:, : number // groups].sort(dim=1).values
    return (order + torch.arange(groups)[:, None] * parts.shape[1]).flatten()


def keep_experts(model: PreTrainedModel, kept: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> None:
    """Keep some experts of each layer, in place, all or nothing.

    Args:
        model: the model.
        kept: the name of the module of a layer's experts → the indices of those that stay, ascending, equally many in each layer.
        batch: what the smaller model has to be able to read.
    """
    name, modules = _number(model), expert_modules(model)
    before, (number,) = getattr(model.config, name), {len(indices) for indices in kept.values()}
    parents = {path.rpartition(".")[0]: torch.zeros(before, dtype=torch.bool).index_fill(0, kept[path], True) for path in modules}

    def of_layer(tensor: str) -> Tensor:
        return next(stays for parent, stays in parents.items() if tensor.startswith(f"{parent}."))

    with all_or_nothing(model) as snapshot:
        own_configs(model)
        old = outline(model)
        write_size(model, name, number)
        cut_to(model, old, outline(model), of_layer, "experts, as the config says", snapshot)
        with still(model):
            model(**batch)


def write_size(model: PreTrainedModel, name: str, number: int) -> None:
    """Write a number into all of a model's configs that have it, and the one before into `config.hf_prune`."""
    entry = getattr(model.config, "hf_prune", None) or {"version": 1, "layers": {}}
    model.config.hf_prune = entry | {"original": {name: getattr(model.config, name)} | entry.get("original", {})}
    for config in configs_of(model):
        if hasattr(config, name):
            setattr(config, name, number)


def _number(model: PreTrainedModel) -> str:
    """The attribute of a model's config that says how many experts a layer has."""
    config = model.config
    own = [name for name in EXPERTS if name not in config.attribute_map and type(getattr(config, name, None)) is int]
    if not own:
        raise ConfigError("model", type(model).__name__, f"has no experts: none of {', '.join(EXPERTS)} is in its config.")
    return own[0]


def expert_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of experts, by name: those with parameters of an entry for every expert, and of matrices.

    Raises:
        ConfigError: there are none, each expert is a module, or something else depends on their number.
    """
    name, kind = _number(model), type(model).__name__
    number = getattr(model.config, name)
    old, new = outline(model), outline(model, **{name: number - 1})
    if tensors(old).keys() != tensors(new).keys():
        raise ConfigError("model", kind, "keeps each expert in a module of its own; those in one parameter can leave it.")
    shapes, differing = tensors(old), sized(old, new)
    names = dict.fromkeys(path.rpartition(".")[0] for path in differing if shapes[path].dim() > 2)
    if not names:
        raise ConfigError("model", kind, f"has no parameter with an entry for each of the {number} experts of its config.")
    parents = tuple(f"{path.rpartition('.')[0]}." for path in names)
    for path in differing:
        if not path.startswith(parents):
            raise ConfigError("model", kind, f"has {path!r} with an entry for each expert, which is in no block of experts.")
    return {path: model.get_submodule(path) for path in names}


def seen(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], batch: Mapping[str, Tensor]
) -> list[tuple[str, tuple[Tensor, ...]]]:
    """What some modules are given for a batch, padding aside: the name of each, and its tensors, `[n, …]`."""
    found: list[tuple[str, tuple[Tensor, ...]]] = []
    mask = batch.get("attention_mask")

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value.flatten(0, -2) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        read = slice(None) if mask is None or mask.numel() != len(given[0]) else mask.flatten().bool()
        found.append((name, tuple(value[read] for value in given)))

    with _listening(modules, note):
        model(**batch)
    return found


def routing(model: PreTrainedModel, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What a module of experts is given: tokens `[n, hidden]`, the experts of each `[n, k]`, and their weights `[n, k]`.

    Raises:
        ConfigError: it takes something else.
    """
    if len(given) != _TAKEN:
        allowed = f"gives its experts {len(given)} tensors; known are three: tokens, the experts of each, and their weights."
        raise ConfigError("model", type(model).__name__, allowed)
    tokens, chosen, weights = given
    return tokens, chosen, weights


def served_by(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that serves a token, with the places of its tokens and its ranks there; `chosen`: `[n, k]`."""
    for expert in sorted(set(chosen.flatten().tolist())):
        places, ranks = (chosen == expert).nonzero(as_tuple=True)
        yield expert, places, ranks


@contextmanager
def _listening(modules: Mapping[str, nn.Module], note: Callable[[str, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call `note(name, args, kwargs)` before each forward of some modules."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs, name=name: note(name, args, kwargs), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
