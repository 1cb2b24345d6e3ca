"""Narrower experts: of each, the neurons go that add least to the tokens that the router sends it.

The experts of a layer are one parameter, equally wide for all of them, so each loses its own neurons and all lose equally many.
Masks that grow one by one would not keep to that; therefore neurons of experts leave between two runs, as experts do. What is left
computes exactly what the whole model does with zeros in place of the neurons that went.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..condense.format import EXPERT_NEURONS
from ..condense.snapshot import all_or_nothing, own_configs
from ..model.changeable import check_changeable
from ..model.wrappers import transformers_model
from ..oneshot.calibration import calibration
from ..oneshot.driver import still
from ..oneshot.walk import Rows
from ..settings.errors import ConfigError
from .experts import expert_modules, routing, seen, served_by, write_size
from .outline import cut_to, outline, sized

#: What transformers says of a module of experts to its fast implementations, which read its parameters themselves.
_LAYOUT = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
#: `torch.nn.functional.grouped_mm`, by which transformers computes experts, takes strides of 16 bytes: 8 numbers in half precision.
_MULTIPLE = 8


@torch.no_grad()
def shrink_expert_neurons(
    model: Any, moe_intermediate_size: int, dataloader: Iterable[Any], *, calibration_rows: int | None = None
) -> Any:
    """Remove neurons from every expert, in place, all or nothing.

    Of each expert those stay whose activation, times the weight that the router gives the expert and the norm of what the neuron
    writes, is largest on average over the tokens that the expert serves (REAP, Lasby et al. 2025, https://arxiv.org/abs/2510.13999,
    eq. 9, for a neuron in place of an expert); of an expert that serves none, those that write most. Shared experts lose the same
    share where the config has one width for both.

    The result is an ordinary model of narrower experts; its config says so, and `config.hf_prune["original"]` remembers how wide
    they were.

    Args:
        model: a transformers model whose layers keep their experts in one parameter, see [`shrink_experts`], or what holds one.
        moe_intermediate_size: how many neurons stay in each expert, a multiple of 8, which transformers' fast implementation of
            experts needs in half precision. Configs call it so, or `intermediate_size`.
        dataloader: batches as the model's forward takes them; labels in them are not read.
        calibration_rows: how many rows to take, see [`prune`].

    Returns:
        The same model object. Its parameters are new objects, so an optimizer has to be made anew.

    Raises:
        ConfigError: the model has no experts, or not such; the number or the rows cannot be used. Nothing was changed.
    """
    whole = transformers_model(model)
    check_changeable(whole)
    check_expert_neurons(whole, moe_intermediate_size)
    rows = calibration(whole, dataloader, calibration_rows, 0.0, labels=False, seed=0)
    with still(whole):
        scores = importances(whole, rows)
    now = getattr(whole.config, _narrowed(whole).attribute)
    kept = {name: most(score, moe_intermediate_size * score.shape[-1] // now) for name, score in scores.items()}
    keep_neurons(whole, kept, moe_intermediate_size, rows.batches[0])
    return model


def check_expert_neurons(model: PreTrainedModel, moe_intermediate_size: int) -> None:
    """Raise unless so many neurons can stay in each expert.

    Raises:
        ConfigError: the model has no experts, or keeps them in a way that is not known; experts have not that many neurons.
    """
    now, wanted = getattr(model.config, _narrowed(model).attribute), moe_intermediate_size
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 0 < wanted < now or wanted % _MULTIPLE:
        allowed = f"must be a multiple of {_MULTIPLE} below {now}, the number of neurons that each expert has."
        raise ConfigError("moe_intermediate_size", wanted, allowed)


@torch.no_grad()
def importances(model: PreTrainedModel, rows: Rows) -> dict[str, Tensor]:
    """What each neuron is worth, see [`shrink_expert_neurons`].

    Returns:
        The name of a layer's module of experts → `[experts, neurons]`; that of the down projection of shared experts → `[neurons]`.
        On the CPU, in float64.
    """
    whole = _narrowed(model)
    used: dict[str, Tensor] = {}
    for batch in rows.batches:
        for name, given in seen(model, whole.modules | whole.downs, batch):
            if name in whole.downs:
                here = given[0].double().abs().sum(dim=0).cpu()
            else:
                here = _use(whole.modules[name], *routing(model, given))
            used[name] = used[name] + here if name in used else here
    written = {name: _written(module) for name, module in whole.modules.items()}
    written |= {name: torch.linalg.vector_norm(down.weight, dim=0, dtype=torch.float64) for name, down in whole.downs.items()}
    least = torch.finfo(torch.float64).tiny ** 0.5  # ranks the neurons of an expert that serves nobody by what they write
    return {name: (sums + least) * written[name].cpu() for name, sums in used.items()}


def most(scores: Tensor, number: int) -> Tensor:
    """Which entries of each row are its largest, bool in the shape of the scores, `[…, entries]`; ties: the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)


def keep_neurons(model: PreTrainedModel, kept: Mapping[str, Tensor], number: int, batch: Mapping[str, Tensor]) -> None:
    """Keep some neurons of each expert, in place, all or nothing.

    Args:
        model: the model.
        kept: which stay, under the names and in the shapes of [`importances`], as many in each expert.
        number: how many that is, in an expert that is not shared.
        batch: what the smaller model has to be able to read.
    """
    whole = _narrowed(model)
    shared = {name.rpartition(".")[0]: stays for name, stays in kept.items() if name in whole.downs}

    def of(tensor: str) -> Tensor:
        owner, _, own = tensor.rpartition(".")
        if owner not in whole.modules:
            return shared[owner.rpartition(".")[0]]
        if not own.startswith("gate_up"):
            return kept[owner]
        return kept[owner].repeat(1, 2) if whole.modules[owner].is_concatenated else kept[owner].repeat_interleave(2, dim=1)

    with all_or_nothing(model) as snapshot:
        own_configs(model)
        old = outline(model)
        write_size(model, whole.attribute, number)
        cut_to(model, old, outline(model), of, "entries for neurons of experts, as the config says", snapshot)
        with still(model):
            model(**batch)


@dataclass(frozen=True)
class _Narrowed:
    """What of a model is as wide as its experts.

    Attributes:
        attribute: the attribute of the config that says how many neurons an expert has.
        modules: the layers' modules of experts, by name.
        downs: the down projections of shared experts whose width follows from the same attribute, by name.
    """

    attribute: str
    modules: dict[str, Any]
    downs: dict[str, Any]


def _narrowed(model: PreTrainedModel) -> _Narrowed:
    """See [`_Narrowed`].

    Raises:
        ConfigError: the model has no experts that could be narrower, or something else depends on their width.
    """
    modules, kind, config = expert_modules(model), type(model).__name__, model.config
    old = outline(model)
    for name in EXPERT_NEURONS:
        if name in config.attribute_map or type(getattr(config, name, None)) is not int:
            continue
        differing = sized(old, outline(model, **{name: getattr(config, name) - 1}))
        others = {path: dims for path, dims in differing.items() if path.rpartition(".")[0] not in modules}
        if len(others) < len(differing):
            break
    else:
        raise ConfigError("model", kind, f"has experts whose width is none of {', '.join(EXPERT_NEURONS)} in its config.")
    if unread := [path for path, module in modules.items() if any(not hasattr(module, said) for said in _LAYOUT)]:
        raise ConfigError("model", kind, f"has {unread[0]!r}, which is not of transformers' own layout of experts.")
    projections = [path for path in others if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Linear)]
    downs = [path.rpartition(".")[0] for path in projections if others[path] == [1]]
    blocks = [name.rpartition(".")[0] for name in downs]
    for path in others:
        if path not in projections or blocks.count(path.rpartition(".")[0].rpartition(".")[0]) != 1:
            raise ConfigError("model", kind, f"has {path!r}, as wide as its experts, in no block of neurons.")
    return _Narrowed(name, modules, {name: model.get_submodule(name) for name in downs})


def _use(module: Any, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum over tokens of the weight of each expert times the size of each of its neurons' activations, `[experts, neurons]`."""
    used = torch.zeros(len(module.down_proj), module.down_proj.shape[1 if module.is_transposed else 2], dtype=torch.float64)
    for expert, places, ranks in served_by(chosen):
        sizes = activations(module, expert, tokens[places]).abs() * weights[places, ranks, None].abs()
        used[expert] = sizes.double().sum(dim=0).cpu()
    return used


def activations(module: Any, expert: int, tokens: Tensor) -> Tensor:
    """What the neurons of one expert in a module of experts give for some tokens, `[n, hidden] → [n, neurons]`."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    made = tokens @ (weight if module.is_transposed else weight.T)
    if module.has_bias:
        made = made + getattr(module, f"{name}_bias")[expert]
    found: Tensor = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    return found


def _written(module: Any) -> Tensor:
    """The norm of what each neuron of each expert writes, `[experts, neurons]`."""
    norms: Tensor = torch.linalg.vector_norm(module.down_proj, dim=2 if module.is_transposed else 1, dtype=torch.float64)
    return norms
