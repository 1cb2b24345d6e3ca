"""Architectures that no record describes: proposed from what reaches what in them, tried block by block, and proven as a whole."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model import SPECS, ArchitectureSpec, AttentionSpec, Block, FeedForwardSpec, blocks
from ..model.blocks import body, body_prefix, hidden_into, hidden_of, layer_lists
from ..model.config_names import with_names
from ..model.families import INFERRED, recall, remember, why_not
from ..model.flow import Changes, LayerCall, layer_calls
from ..model.propose import COPIES, blocks_of, layer_paths
from ..model.spelled import as_source
from ..model.wrappers import transformers_models
from .prove import ArchitectureError, Outputs, apart, check_config, dtype_for, failing, prove_architecture
from .resize import keep_units
from .snapshot import unchanged
from .stand_in import stand_in
from .verify import sample_batch, tensors_of

logger = logging.getLogger(__name__)

BlockSpec = AttentionSpec | FeedForwardSpec


def infer_architecture(model: PreTrainedModel) -> ArchitectureSpec:
    """Find and prove the spec of a model that no record describes.

    Modules, shapes and one traced pass of a random stand-in propose what the blocks are; names of classes and `model_type` are not
    looked at. What is proposed is tried layer by layer, and what fits is proven: see [`prove_architecture`]. Nothing of this hangs
    on the weights; the model itself, its mode, dtype, device and torch's random state stay as they are.

    It takes a second or two for a tiny model, and for BERT-base one and a half minutes of a core and 2.7 GB. What it finds are
    lists of layers that are alike, with attention of two heads at least and feed-forward blocks, of plain Linear and Conv1D modules
    whose activation is a module, in all arrangements that an [`ArchitectureSpec`] can say. Experts stay as they are.

    Args:
        model: a transformers model, from transformers or of somebody's own.

    Returns:
        The spec, as `register_architecture` takes it.

    Raises:
        ArchitectureError: nothing that fits was found, or it cannot be proven; says in which layer, and which check failed how.
    """
    with apart(), failing(model, "a pass of its stand-in"):
        found = propose_architecture(stand_in(model, dtype_for(model)))
    found = replace(found, model_types=(model.config.model_type,))
    try:
        prove_architecture(model, found)
    except ArchitectureError:
        if not found.pre_norm:
            raise
        found = replace(found, pre_norm=False)  # layers that only add to their input but do not bear to be removed
        prove_architecture(model, found)
    return found


def learn_architecture(model: Any) -> None:
    """Infer and register the specs of the transformers models in a model that no record describes; others stay as they are.

    A spec holds for one class and config: a model of the same family with another is inferred again.

    Raises:
        ValueError: a spec can be neither found nor proven; says where that failed.
    """
    for one in transformers_models(model).values():
        model_type, source = str(one.config.model_type), _described(one)
        if recall(one.config) or (model_type in SPECS and INFERRED.get(model_type, source) == source):
            continue
        SPECS.pop(model_type, None)
        INFERRED.pop(model_type, None)
        started = time.perf_counter()
        try:
            spec = infer_architecture(one)
        except ValueError as error:
            raise ValueError(
                f"hf_prune has no record of model_type={model_type!r}{why_not(model_type)} and could not infer one. {error}. "
                "Describe it in an `hf_prune.model.ArchitectureSpec` and pass that to `hf_prune.model.register_architecture`."
            ) from error
        remember(spec, model_type, source)
        logger.warning(
            "hf_prune has no record of model_type=%r; it inferred this one, proved it in %.0f s, and saves it with what is "
            "condensed:%s\nregister_architecture(%s)",
            model_type,
            time.perf_counter() - started,
            _beside(one, spec),
            as_source(spec),
        )


def _described(model: PreTrainedModel) -> object:
    """What a spec is inferred from: the class of the body, and what the config says of it."""
    plain = (bool, int, float, str, type(None))
    other = r"_.*|.*_token_id|output_.*|use_cache|return_dict|name_or_path|dtype|transformers_version|problem_type|vocab_size"
    said = {name: value for name, value in vars(model.config).items() if isinstance(value, plain) and not re.fullmatch(other, name)}
    return type(body(model)), said


def _beside(model: PreTrainedModel, spec: ArchitectureSpec) -> str:
    """A remark on the linear modules of the layers that the spec says nothing of."""
    found = blocks(model, spec)
    known = {part.name for block in found for part in block.projections}
    layers = tuple(f"{body_prefix(model)}{block.layer}." for block in found)
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(layers)]
    others = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in linear if not any(name.startswith(each) for each in known)})
    return f" (no heads or neurons were found in {', '.join(others)})" if others else ""


def propose_architecture(model: PreTrainedModel) -> ArchitectureSpec:
    """What a stand-in seems to be, each block tried in the layers that have it; not proven.

    Raises:
        ArchitectureError: nothing fits.
    """
    calls = {path: _calls(model, path) for path in layer_paths(model)}
    guesses: dict[str, list[BlockSpec]] = {}
    homes: dict[str, list[LayerCall]] = {}
    for path, found in calls.items():
        members = layer_lists(model, path).values()
        for call in found:
            for some in blocks_of(call, next(layers for layers in members if call.layer in layers)):
                place = _place(some[0])
                homes.setdefault(place, []).append(call)
                guesses.setdefault(place, []).extend(one for one in some if one not in guesses.get(place, []))
    if not guesses:
        lists = ", ".join(calls) or "no list of layers"
        raise ArchitectureError(
            model, lists, "no linear module's input is made by heads or neurons of others, as far as specs can say"
        )
    chosen = [_first_fit(model, place, some, homes[place], list(calls)) for place, some in guesses.items()]
    paths = tuple(path for path, found in calls.items() if any(call in homes[place] for place in homes for call in found))
    spec = ArchitectureSpec(
        model_types=(model.config.model_type,),
        layers=paths,
        attentions=tuple(one for one in chosen if isinstance(one, AttentionSpec)),
        feed_forwards=tuple(one for one in chosen if isinstance(one, FeedForwardSpec)),
    )
    spec = with_names(model, spec)
    try:
        check_config(model, spec)
    except ArchitectureError:  # the width of a head follows from more than the hidden size (MobileBERT)
        spec = replace(spec, heads=())
    if not spec.depths or not all(_only_adds(model, call, spec) for path in paths for call in calls[path]):
        return spec

    def complete(some: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(replace(one, **_on_the_way(model, homes[_place(one)][0], _place(one), spec)) for one in some)

    return replace(spec, pre_norm=True, attentions=complete(spec.attentions), feed_forwards=complete(spec.feed_forwards))


def _calls(model: PreTrainedModel, path: str) -> list[LayerCall]:
    """The calls of a list's layers, one of each structure, in a pass of equal rows."""
    prefix = body_prefix(model)
    first: dict[object, str] = {}
    for name, layers in layer_lists(model, path).items():
        for index, layer in enumerate(layers):
            shapes = tuple((key, tuple(value.shape)) for key, value in layer.named_parameters())
            modules = tuple(key for key, _ in layer.named_modules())
            first.setdefault((shapes, modules), f"{prefix}{name}.{index}")
    one = sample_batch(model, rows=1, tokens=8, shortest=8)
    batch = {name: value.expand(COPIES, *value.shape[1:]).clone() for name, value in one.items()}
    return list(layer_calls(model, first.values(), batch).values())


def _place(block: BlockSpec) -> str:
    return block.module if isinstance(block, AttentionSpec) else block.up.path


def _first_fit(model: PreTrainedModel, place: str, guesses: list[BlockSpec], homes: list[LayerCall], paths: list[str]) -> BlockSpec:
    """The first guess that can be cut in every layer that has the block.

    Raises:
        ArchitectureError: there is none.
    """
    failure = ""
    for guess in guesses:
        failures = [misfit for call in homes if (misfit := _misfit(model, guess, call, paths))]
        if not failures:
            return guess
        failure = failure or failures[0]
    raise ArchitectureError(model, f"{homes[0].name}.{place}", f"none of {len(guesses)} descriptions fits; the first: {failure}")


def _misfit(model: PreTrainedModel, guess: BlockSpec, call: LayerCall, paths: list[str]) -> str:
    """What goes wrong when units that nobody reads are cut out of one layer: half of them, then all; `""` if nothing does."""
    heads = (guess,) if isinstance(guess, AttentionSpec) else ()
    neurons = (guess,) if isinstance(guess, FeedForwardSpec) else ()
    spec = ArchitectureSpec((), tuple(paths), heads, neurons)
    try:
        (block,) = _blocks(model, call, spec)
        for units, groups in _trials(block):
            gone = torch.ones(block.num_units, dtype=torch.bool).index_fill(0, units, False).nonzero().flatten()
            what = f"without {len(gone)} {block.unit}s the layer returns"
            unheard = {block.output.module: _without(block.features(gone))}
            unseen = {}
            if any(entry.forward for _, _, entry in block.by_head):  # a norm over all heads sees their queries and keys
                left = torch.ones(block.num_groups, dtype=torch.bool).index_fill(0, groups, False).nonzero().flatten()
                for role, parts in (("query", gone), ("key", left)):
                    unseen[block.roles[role].module] = _without(block.roles[role].rows[block.features(parts)])
            wanted = _returned(call, outputs=unseen, inputs=unheard)
            own = None if block.own_units is None else [block.own_units[unit] for unit in units.tolist()]
            with unchanged(model):
                keep_units(block, units, groups, own_heads=own)
                found = _returned(call)
            for name, value in wanted.items():
                if name not in found or _are_probabilities(
                    value
                ):  # what the next layer makes itself; what has an entry for each head
                    continue
                if found[name].shape != value.shape:
                    return f"{what} another shape"
                if not (gap := float((value - found[name]).abs().max())) <= 1e-5:
                    return f"{what} what differs by {gap:.1e}"
    except Exception as error:  # shapes that do not fit, in code of any kind
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""


def _trials(block: Block) -> Iterator[tuple[Tensor, Tensor]]:
    """Units that stay in a trial, with their groups: half of the groups, one head of each group, none."""
    shares = block.units_per_group
    groups = torch.arange((block.num_groups + 1) // 2)
    yield torch.arange(len(groups) * shares), groups
    if shares > 1:
        yield torch.arange(0, block.num_units, shares), torch.arange(block.num_groups)
    yield torch.arange(0), torch.arange(0)


def _are_probabilities(value: Tensor) -> bool:
    """Whether a tensor may be attention weights."""
    return value.ndim == 4 and bool((value >= 0).all() and torch.allclose(value.sum(-1), torch.ones(()).to(value)))


@torch.no_grad()
def _returned(call: LayerCall, **changes: Changes) -> Outputs:
    """The tensors that a layer returns, with other inputs or outputs of some of its modules."""
    return dict(tensors_of("", call.again(**changes)))


def _without(features: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(-1, features, 0)


@torch.no_grad()
def _only_adds(model: PreTrainedModel, call: LayerCall, spec: ArchitectureSpec) -> bool:
    """Whether a layer returns what it is given if its blocks put out nothing."""
    given, returned = hidden_into(call.args, call.kwargs), hidden_of(call.again(_silent(model, call, spec)))
    return given.shape == returned.shape and bool(torch.allclose(given, returned))


def _silent(model: PreTrainedModel, call: LayerCall, spec: ArchitectureSpec) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """What lets every block of a layer put out zeros."""
    return {block.output.module: torch.zeros_like for block in _blocks(model, call, spec)}


def _blocks(model: PreTrainedModel, call: LayerCall, spec: ArchitectureSpec) -> list[Block]:
    return [block for block in blocks(model, spec) if body_prefix(model) + block.layer == call.name]


@torch.no_grad()
def _on_the_way(model: PreTrainedModel, call: LayerCall, place: str, spec: ArchitectureSpec) -> dict[str, str]:
    """The scale or norm that the result of a block goes through before it is added to the stream, as its spec names it, if any."""
    given = hidden_into(call.args, call.kwargs)
    output = next(block.output.module for block in _blocks(model, call, spec) if block.key == place)
    result = torch.randn(given.shape[-1], generator=torch.Generator().manual_seed(0), dtype=given.dtype)
    returned = hidden_of(call.again(_silent(model, call, spec) | {output: lambda given: result.expand_as(given).clone()}))
    added = (returned - given).flatten(0, -2)[0]
    for name, value in call.layer.named_parameters():
        if value.shape == added.shape and torch.allclose(value * result, added):
            return {"scale": name}
    for name, module in call.layer.named_modules():
        if {value.shape for value in module.parameters()} == {added.shape} and torch.allclose(module(result), added):
            return {"norm": name}
    return {}
