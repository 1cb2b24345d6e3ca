"""The proof of a spec: everything that it says of a model is tried on a stand-in, and must come out as it says.

Two kinds of trials. *What reaches what*: noise at rows of a query, a key, a value or a neuron must change exactly those features
of the output projection's input that the spec calls its own, so units are neither wider nor narrower than it says, nor shifted, and
no role is taken for another. *Cuts*: units, whole blocks and layers are zeroed and removed, and every output and hidden state,
gradient, generated logit and cache, and the model that is saved and loaded, must be what they were.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..model import SPECS, ArchitectureSpec, Block, Projection, blocks
from ..model.blocks import body_prefix, has_bias, hidden_size_name, layer_lists, set_at_path
from ..model.flow import LayerCall, changed_features, layer_calls, noise_at
from ..model.residual import head_size, resized, twin
from ..model.resolve import check_spec
from .cutting import cut
from .format import present_name
from .layers import without_inputs
from .plan import CondensePlan, check_plain, condense_plan
from .stand_in import stand_in
from .stock import write_sizes
from .verify import all_outputs, sample_batch

Outputs = dict[str, Tensor]

#: The largest difference by dtype, relative to the largest value if that is above one. A wrong spec differs by about one; modules
#: that compute in float32 whatever they are given differ by its rounding.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


class ArchitectureError(ValueError):
    """A spec that is not a model's: where it failed, and how."""

    def __init__(self, model: object, where: str, failure: str) -> None:
        super().__init__(f"{type(model).__name__}: {where}: {failure}")
        self.where, self.failure = where, failure


def prove_architecture(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Prove that a spec describes a model, without touching the model.

    A spec passes only if every unit that it names is one: with random weights, biases and norms, what it calls a head or a neuron
    can be removed in every layer, unevenly, and nothing else changes. Specs that are equal by symmetry (query and key swapped where
    no heads share keys) pass alike.

    The cost is a model of the same size in float64 on the CPU, some eighty passes of a short batch, and three saved checkpoints in
    the temporary folder: a second for a tiny model, one minute of a core for BERT-base.

    Args:
        model: a transformers model, in any dtype and on any device.
        spec: what is said of it.

    Raises:
        ArchitectureError: names the layer, the check that failed, and the difference.
        ValueError: the model has not what the spec names.
    """
    with apart(), registered(spec, model.config.model_type):
        check_spec(model, spec)
        dtype = dtype_for(model)
        with failing(model, "its sizes in the config"):
            check_config(model, spec)
        with failing(model, "what reaches what"):
            check_flow(stand_in(model, dtype), spec)
        for name, zero in CUTS.items():
            with failing(model, name):
                check_cut(stand_in(model, dtype), spec, name, zero)


@contextmanager
def apart() -> Iterator[None]:
    """For models that are not the user's: transformers says nothing of them, gradients are on, torch's random state stays."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def failing(model: object, where: str) -> Iterator[None]:
    """Let whatever a wrong spec makes anybody's code raise, such as shapes that do not fit, say where that was."""
    try:
        yield
    except ArchitectureError:
        raise
    except Exception as error:
        raise ArchitectureError(model, where, f"{type(error).__name__}: {error}".partition("\n")[0]) from error


def dtype_for(model: PreTrainedModel) -> torch.dtype:
    """float64, if a model can be computed in it (see `verify.observe` for those that cannot), else float32."""
    try:
        seen = all_outputs(stand_in(model))
    except RuntimeError:
        return torch.float32
    return torch.float64 if all(bool(value.isfinite().all()) for value in seen.values()) else torch.float32


@contextmanager
def registered(spec: ArchitectureSpec, model_type: str) -> Iterator[None]:
    """Let a spec be that of a family for a while."""
    before = SPECS.get(model_type)
    SPECS[model_type] = spec
    try:
        yield
    finally:
        SPECS.pop(model_type)
        if before is not None:
            SPECS[model_type] = before


def check_config(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Check that the config attributes that the spec names make the blocks that it says, where the family takes other values."""
    found = blocks(model, spec)
    width = head_size(found)
    size = getattr(model.config, hidden_size_name(model.config), None)  # several towers have several
    if spec.heads and width is not None and size is not None:
        wide = blocks(twin(model, resized(model.config, spec, 2 * size, width)), spec)
        for block, other in zip(found, wide):
            if block.kind == "attention" and block.num_units * width == size and other.unit_width != width:
                _refuse_size(model, block, f"heads of width {other.unit_width} at twice the hidden size, by {spec.heads}")
    for path, widths in zip(spec.layers, spec.widths):
        own = [place for place, block in enumerate(found) if block.layer.rpartition(".")[0] in layer_lists(model, path)]
        smaller = copy.deepcopy(model.config)
        halves = {name: max(found[place].sizes[name] // 2, 1) for place in own for name in found[place].sizes if name in widths}
        for name, half in (halves | ({"head_dim": width} if "head_dim" in widths else {})).items():
            set_at_path(smaller, widths[name], half)
        try:
            narrow = blocks(twin(model, smaller), spec)
        except Exception:  # a family may want its heads to fill the hidden size, or to be two at least
            continue
        for place in own:
            wrong = [name for name, half in narrow[place].sizes.items() if name in halves and half != halves[name]]
            if wrong:
                now = f"{wrong[0]} {narrow[place].sizes[wrong[0]]}, not {halves[wrong[0]]}, by {widths[wrong[0]]!r} of the config"
                _refuse_size(model, found[place], now)


def _refuse_size(model: PreTrainedModel, block: Block, has: str) -> None:
    raise ArchitectureError(model, f"{block.layer}.{block.key}", f"has {has}")


# ------------------------------------------------------------------------------------------------------------ what reaches what


def check_flow(model: PreTrainedModel, spec: ArchitectureSpec) -> None:
    """Check that rows of every input of every block reach the features of their units and no others."""
    found = blocks(model, spec)
    for part in {part.layer: part for block in found for part in block.projections}.values():
        check_plain(part)
    names = dict.fromkeys(body_prefix(model) + block.layer for block in found)
    calls = layer_calls(model, names, sample_batch(model, rows=2, tokens=8))
    for number, block in enumerate(found):
        call = calls.get(body_prefix(model) + block.layer)
        if call is None:
            raise ArchitectureError(model, block.layer, "is not called in a pass of the model")
        if unseen := _unseen(call, block):
            raise ArchitectureError(
                model,
                f"{block.layer}.{block.key}",
                f"{unseen[0]} is not called in a pass of the model, so it may read or make heads",
            )
        for role, part in zip(block.roles, block.inputs):
            extra = part.part in getattr(block.spec, "extra", ())
            if not extra or call.inputs_of([part.module]) != [None]:  # LUKE's of entities, in a batch of words
                _check_reach(model, call, block, role, part, seed=number)


def _unseen(call: LayerCall, block: Block) -> list[str]:
    """The linear modules of an attention module that the spec does not name and the pass does not call."""
    known = {part.layer for part in block.projections}
    inside = block.module.named_modules() if block.module is not None else ()
    others = {module: name for name, module in inside if isinstance(module, (nn.Linear, Conv1D)) and module not in known}
    return [name for (module, name), given in zip(others.items(), call.inputs_of(list(others))) if given is None]


def _check_reach(model: PreTrainedModel, call: LayerCall, block: Block, role: str, part: Projection, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = block.num_units if part is block.inputs[0] else block.num_groups
    each = block.num_units // shares
    some = torch.randperm(shares, generator=generator)[: (shares + 1) // 2].sort().values
    inner = torch.randint(block.unit_width, (len(some),), generator=generator)
    rows, where = part.rows[some * block.unit_width + inner], f"{block.layer}.{block.key}"
    (before,) = call.inputs_of([block.output.module])
    reached = torch.zeros(block.num_units, block.unit_width, dtype=torch.bool)
    for size in (1.0, 30.0):  # a neuron that is never active is with more noise
        (after,) = call.inputs_of([block.output.module], {part.module: noise_at(rows, size)})
        if before is None or after is None:
            raise ArchitectureError(model, where, f"{block.output.name} is not called in a pass of the model")
        reached |= changed_features(before, after).view_as(reached)
    units = (some[:, None] * each + torch.arange(each)).flatten()
    whole = torch.zeros(block.num_units, block.unit_width, dtype=torch.bool)
    whole[units] = True
    own = torch.zeros_like(whole)
    own[units, inner.repeat_interleave(each)] = True
    if any(entry.forward for _, _, entry in block.by_head) and role not in block.makers:
        reached &= whole  # a norm over all heads carries queries and keys to every head
    if not (reached.equal(whole) or (role in block.makers and reached.equal(own))):
        units_reached = reached.any(1).nonzero().flatten().tolist()
        raise ArchitectureError(
            model,
            where,
            f"noise in the {role} rows of {_listed(block.unit, units.tolist())} changes {int(reached.sum())} features of "
            f"{_listed(block.unit, units_reached)} in the input of {block.output.name}, not the {int(whole.sum())} of these",
        )


def _listed(unit: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
    return f"{unit}s {shown}" if numbers else f"no {unit}"


# ------------------------------------------------------------------------------------------------------------------------ cuts


def _unevenly(found: list[Block]) -> None:
    """About half of the heads and neurons of every block, different ones, by what makes them or by what reads them."""
    generator = torch.Generator().manual_seed(0)
    for block in found:
        groups = torch.rand(block.num_groups, generator=generator) < 0.5
        groups[torch.randint(block.num_groups, (1,), generator=generator)] = False
        silent = groups & (torch.rand(block.num_groups, generator=generator) < 0.5)
        unread = groups.repeat_interleave(block.units_per_group)
        if block.units_per_group > 1:
            unread |= torch.rand(block.num_units, generator=generator) < 0.3
        elif not groups.any():
            unread[torch.randint(block.num_units, (1,), generator=generator)] = block.num_units > 1
        zero_makers(block, silent.nonzero().flatten())
        zero_readers(block, (unread & ~silent.repeat_interleave(block.units_per_group)).nonzero().flatten())


def _whole_blocks(found: list[Block]) -> None:
    """All units of one layer of each list; in the others all heads and all neurons by turns."""
    lists: dict[str, list[str]] = {}
    for layer in dict.fromkeys(block.layer for block in found):
        lists.setdefault(layer.rpartition(".")[0], []).append(layer)
    for members in lists.values():
        emptied = members.pop(len(members) // 2)
        for block in found:
            if block.layer == emptied:
                zero_makers(block, torch.arange(block.num_groups))
            elif block.layer in members and members.index(block.layer) % 2 == (block.kind == "feed_forward"):
                zero_readers(block, torch.arange(block.num_units))


def _alike(found: list[Block]) -> None:
    """The second half of the groups of heads, and of the neurons, of every block."""
    for block in found:
        zero_readers(block, torch.arange((block.num_groups + 1) // 2 * block.units_per_group, block.num_units))


#: What is zeroed in each trial, by what it is called in errors.
CUTS: dict[str, Callable[[list[Block]], None]] = {
    "units removed unevenly": _unevenly,
    "whole blocks removed": _whole_blocks,
    "the same units removed in every layer": _alike,
}


def rows_of(layer: Any) -> Tensor:
    """A projection's weight as `[out, in]`, a view."""
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


def zero_makers(block: Block, groups: Tensor) -> None:
    """Zero the rows of the value, or of both factors of a neuron, of some groups; their biases stay."""
    for part in block.makers.values():
        rows_of(part.layer)[part.rows[block.features(groups)]] = 0
    shares = block.units_per_group
    _hide_from_norms(block, (groups[:, None] * shares + torch.arange(shares)).flatten())


def zero_readers(block: Block, units: Tensor) -> None:
    """Zero the output projection's columns of some units."""
    rows_of(block.output.layer)[:, block.features(units)] = 0
    _hide_from_norms(block, units)


def _hide_from_norms(block: Block, units: Tensor) -> None:
    """Zero the queries of some heads, and the keys that only these share, if a norm over all heads would see them."""
    if not any(entry.forward for _, _, entry in block.by_head):
        return
    staying = torch.ones(block.num_units, dtype=torch.bool).index_fill(0, units, False)
    unshared = (~staying.view(block.num_groups, -1).any(1)).nonzero().flatten()
    for role, gone in (("query", units), ("key", unshared)):
        part = block.roles[role]
        rows = part.rows[block.features(gone)]
        rows_of(part.layer)[rows] = 0
        if has_bias(part.layer):
            part.layer.bias.detach()[rows] = 0


def check_cut(model: PreTrainedModel, spec: ArchitectureSpec, name: str, zero: Callable[[list[Block]], None]) -> None:
    """Check that a model computes the same when what is `zero`ed in it is cut out of it, and when that was saved and loaded.

    The model is a stand-in, and is used up.
    """
    zero(blocks(model, spec))
    before, size = _observed(model), model.num_parameters()
    plan = condense_plan(model)
    if not plan.changed:
        raise ArchitectureError(model, name, "nothing of what was zeroed can be removed")
    gradients = _gradients(model)
    cut(model, plan)
    _check_sizes(model, spec, plan, name, size)
    before = without_inputs(before, plan.removed)
    _compare(model, name, before, _observed(model, before))
    _compare(model, f"{name}, gradients", _kept(gradients, plan, model), _gradients(model))
    write_sizes(model, spec)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded: Any = type(model).from_pretrained(folder, dtype=model.dtype)
    _compare(model, f"{name}, saved and loaded", before, _observed(loaded, before))


def _check_sizes(model: PreTrainedModel, spec: ArchitectureSpec, plan: CondensePlan, name: str, size: int) -> None:
    """Check that what was removed from a model of this `size` is what the plan says."""
    gone = size - model.num_parameters()
    if gone != plan.parameters:
        raise ArchitectureError(model, name, f"{gone:,} parameters went, and {plan.parameters:,} should have")
    staying = [one for one in plan.blocks if _name_after(one.block.layer, model)]
    for one, block in zip(staying, blocks(model, spec), strict=True):
        wanted = len(one.kept), len(one.groups)
        if (block.num_units, block.num_groups) != wanted:
            found = f"{block.num_units} {block.unit}s in {block.num_groups} groups, not {wanted[0]} in {wanted[1]}"
            raise ArchitectureError(model, f"{block.layer}.{block.key}, {name}", f"is left with {found}")


def _name_after(layer: str, model: Any) -> str | None:
    """The name of a layer of the stand-in after its cut; None if it is gone."""
    return present_name(model.config.hf_prune, layer)


# -------------------------------------------------------------------------------------------------------- what must not change


def _observed(model: PreTrainedModel, like: Outputs | None = None) -> Outputs:
    """Every output and hidden state, eager and sdpa, and what is generated with a cache, if the model can.

    Args:
        model: the model.
        like: what was seen of another that must do what this one does.
    """
    torch.manual_seed(0)  # for those that mask at random
    seen = all_outputs(model)
    try:
        return seen | _generated(model)
    except Exception:  # a model that wants more than its main input, or another length
        if like is not None and like.keys() != seen.keys():
            raise
        return seen


@torch.no_grad()
def _generated(model: Any) -> Outputs:
    """The logits of four new tokens, greedily and by beams; of a model without a head the rest of a row that was begun."""
    inputs = {model.main_input_name: sample_batch(model, rows=2, tokens=6, shortest=6)[model.main_input_name]}
    if model.can_generate():
        settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
        made = [model.generate(**inputs, **settings, num_beams=beams, return_dict_in_generate=True) for beams in (1, 2)]
        return {f"generated.{number}": torch.stack(one.logits) for number, one in enumerate(made)}
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder or not hasattr(model.config, "use_cache"):
        return {}
    start, rest = torch.split(inputs["input_ids"], 4, dim=1)
    begun = model(start, use_cache=True)
    if getattr(begun, "past_key_values", None) is None:
        return {}
    return {"continued": model(rest, past_key_values=begun.past_key_values, use_cache=True)[0]}


def _gradients(model: PreTrainedModel) -> Outputs:
    """The gradients of a random mixture of the outputs, weights of projections as `[out, in]`."""
    model.zero_grad()
    model.set_attn_implementation("eager")
    torch.manual_seed(0)
    outputs = model(**sample_batch(model, rows=2, tokens=8), return_dict=True)
    generator = torch.Generator().manual_seed(0)
    mixture = [
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum()
        for value in outputs.values()
        if isinstance(value, Tensor) and value.requires_grad
    ]
    torch.stack(mixture).sum().backward()  # type: ignore[no-untyped-call]
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: gradient.T if name in turned else gradient for name, gradient in found.items()}


def _kept(gradients: Outputs, plan: CondensePlan, model: PreTrainedModel) -> Outputs:
    """Of the gradients of the masked model those that the condensed one has: of rows and columns that stay, by their names now.

    Copies of one key and value head share its gradient, so theirs are left out.
    """
    kept, prefix = dict(gradients), body_prefix(model)
    for one in plan.blocks:
        for _, _, entry in one.block.by_head:
            left, number = (one.kept, one.block.num_units) if entry.role == "query" else (one.groups, one.block.num_groups)
            gradient = kept.pop(f"{prefix}{one.block.layer}.{entry.path}", None)
            if gradient is not None and len(left):
                each = gradient.shape[entry.dim] // number
                index = (left[:, None] * each + torch.arange(each)).flatten()
                kept[f"{prefix}{one.block.layer}.{entry.path}"] = gradient.index_select(entry.dim, index)
        if plan.removed and one.block.spec.scale:  # it scales the constants of removed layers, too
            kept.pop(f"{prefix}{one.block.layer}.{one.block.spec.scale}", None)
        for part, rows in one.block.outputs_of(one.kept, one.groups):
            for name in (f"{part.name}.weight", f"{part.name}.bias"):
                if name in kept and len(set(rows.tolist())) == len(rows):
                    kept[name] = gradients[name][rows]
                else:
                    kept.pop(name, None)
        if (name := f"{one.block.output.name}.weight") in kept:
            kept[name] = gradients[name][:, one.block.features(one.kept)]
    for layer in {one.block.layer for one in plan.blocks}:
        after = _name_after(layer, model)
        if after != layer:
            own = [name for name in kept if name.startswith(f"{prefix}{layer}.")]
            moved = {name.replace(layer, str(after), 1): kept.pop(name) for name in own}
            kept |= moved if after is not None else {}
    return kept


def _compare(model: PreTrainedModel, name: str, wanted: Outputs, found: Outputs) -> None:
    """Check that what is wanted is found, to within `TOLERANCE`; what is not there is zero (a gradient that nothing sends)."""
    for key, value in wanted.items():
        other = found.get(key, torch.zeros_like(value))
        if value.shape != other.shape:
            raise ArchitectureError(model, name, f"{key} is {list(other.shape)}, not {list(value.shape)}")
        gap, largest = (float(each.abs().max()) if each.numel() else 0.0 for each in (value - other, value))
        if not gap <= TOLERANCE[value.dtype] * max(1.0, largest):
            raise ArchitectureError(model, name, f"{key} differs by {gap:.1e}")
