"""A smaller hidden size: the residual stream gets narrower everywhere, from the embeddings to the task head."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..condense.layers import depths
from ..condense.resize import own_sizes
from ..condense.snapshot import all_or_nothing, own_configs
from ..model import ArchitectureSpec, Block, blocks, spec_for
from ..model.blocks import hidden_size_name
from ..model.changeable import check_changeable
from ..model.residual import Member, head_size, members, resized, twin
from ..oneshot.calibration import calibration
from ..oneshot.driver import still
from ..settings.errors import ConfigError
from .basis import Basis, principal, strongest
from .look import Seen, by_weights, importance, look
from .narrow import Plan, narrow, take_over
from .plans import norms, rotation, selection, tied
from .repair import repair

logger = logging.getLogger(__name__)

#: How far the outputs of a model that is only rotated may be from its own, as a share of the largest.
_ROTATED = 1e-3


def shrink_hidden(
    model: PreTrainedModel, size: int, dataloader: Iterable[Any] | None = None, *, rotate: bool = False
) -> PreTrainedModel:
    """Make the hidden size of a model smaller.

    The model computes something else afterwards, so this is a stage between runs of training. The channels that matter least leave
    the embeddings, the norms, everything that reads or writes the residual stream, poolers and task heads; heads, neurons and
    layers stay. With data, what stays makes up for what went as well as linear least squares can (`repair.py`).

    In models whose layers only add to the stream and read it through RMSNorms (Llama, Mistral, Qwen, Gemma, T5), channels that are
    zero everywhere leave without a difference.

    The config says the new size. Where the width of a head follows from it, the config says as many heads of the old width as fit
    into it, and `config.hf_prune` how many each layer really has; where that is the same, and in families with a width of their
    own, the model is an ordinary one, which loads without hf_prune. `config.hf_prune["original"]` has the size before.

    Parameters are new objects, so an optimizer has to be made anew.

    Args:
        model: a transformers model, condensed or not. It is changed in place, all or nothing; meanwhile there are two of it, and
            with `rotate` three.
        size: the new hidden size, smaller than the old one. Where the width of a head follows from it, a multiple of that width;
            Llama's config wants a multiple of the number of heads.
        dataloader: calibration data, batches as the model's forward takes them, of which about 30,000 tokens are used. A channel
            matters by its share of the second moment of what norms give (Minitron, Muralidharan et al. 2024,
            https://arxiv.org/abs/2407.14679, sums their absolute values). By default channels are ranked by the weights along them,
            and nothing is repaired.
        rotate: keep the principal directions of the normalised stream instead of channels. This needs data, and a model whose norms
            are all on the inputs of blocks (pre-norm). With RMSNorm an output head that is tied to the embeddings stays tied; with
            LayerNorm (GPT-2, OPT) it becomes a matrix of its own, whose parameters a warning counts.

    Returns:
        The same model object.

    Raises:
        ConfigError: the model cannot be changed in place (quantized, adapters, sharded, attached to a pruner), a size that it
            cannot have, data that are not what it takes, or a model that `rotate` would change by itself.
        ValueError: the family has no architecture spec.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError("model", type(model).__name__, "must be a transformers PreTrainedModel; pass the one inside.")
    check_changeable(model)
    spec = spec_for(model.config.model_type)
    check_size(model, size)
    pre_norm = bool(depths(model, spec))
    if rotate and dataloader is None:
        raise ConfigError("rotate", True, "needs a dataloader: the principal directions are those of data.")
    if rotate and not pre_norm:
        allowed = (
            f"mixes channels, which the norms between the layers of {type(model).__name__} tell apart (post-norm); cut channels."
        )
        raise ConfigError("rotate", True, allowed)
    found = members(model, spec)
    rows = None if dataloader is None else calibration(model, dataloader, None, 0.0, labels=False, seed=0)
    with still(model):
        seen = None if rows is None else look(model, found, rows, moments=rotate)
        config = _config(model, spec, size)
        if rows is not None and seen is not None and rotate:
            small, plan = _rotated(model, config, found, seen, rows.batches[0])
        else:
            hidden = getattr(model.config, hidden_size_name(model.config))
            parts = list(seen.squares.values()) if seen is not None else []
            parts = parts or by_weights(found, hidden, apart=False)  # norms without weights are not seen
            small, stream = _made(model, config), strongest(importance(parts), size)
            plan = selection(model, small, found, stream, _apart(model, found, seen, size), pre_norm, seen)
        narrow(model, small, found, plan)
        if rows is not None:
            repair(model, small, spec, found, plan, rows, pre_norm=pre_norm)
    stock = twin(model, copy.deepcopy(model.config))
    with all_or_nothing(model):
        own_configs(model)
        take_over(model, small, stock)
        _write_config(model, small.config, spec)
    return model


def check_size(model: PreTrainedModel, size: int) -> None:
    """Raise unless a model can have this hidden size.

    Raises:
        ConfigError: it cannot; names the closest that it can have.
    """
    spec, now = spec_for(model.config.model_type), getattr(model.config, hidden_size_name(model.config), None)
    if now is None:
        raise ConfigError(
            "model", type(model).__name__, "has several towers, each with a hidden size of its own; shrink a tower alone."
        )
    if not spec.attentions:
        raise ConfigError("model", type(model).__name__, "has heads that its record does not describe, which channels would cut.")
    if any(one.scale or one.norm for one in spec.attentions) or any(one.scale or one.norm for one in spec.feed_forwards):
        allowed = "scales or normalises what its blocks add to the hidden states; channels leave models that add it as it is."
        raise ConfigError("model", type(model).__name__, allowed)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < now:
        raise ConfigError("size", size, f"must be a whole number from 1 to {now - 1}; the hidden size is {now}.")
    width = head_size(blocks(model, spec))
    if reason := _refusal(model, spec, size, width):
        ways = (range(size - 1, 0, -1), range(size + 1, now))
        closest = (next((other for other in way if not _refusal(model, spec, other, width)), None) for way in ways)
        near = " and ".join(str(other) for other in closest if other is not None)
        raise ConfigError("size", size, f"{reason}; the closest sizes that {type(model).__name__} can have: {near or 'none'}.")


def _refusal(model: PreTrainedModel, spec: ArchitectureSpec, size: int, width: int | None) -> str:
    """Why a model cannot have a hidden size; `""` if it can."""
    if spec.heads and width is not None and size % width:
        return f"must be a multiple of {width}, the width of a head, which follows from the hidden size"
    try:
        type(model.config).from_dict(resized(model.config, spec, size, width).to_dict())
    except (ValueError, StrictDataclassError) as error:
        return f"is refused by {type(model.config).__name__} ({' '.join(str(error).split())})"
    return ""


def _config(model: PreTrainedModel, spec: ArchitectureSpec, size: int) -> Any:
    """The config of a model with a smaller hidden size, with the sizes of its blocks and the original ones in `hf_prune`."""
    own = blocks(model, spec)
    config = resized(model.config, spec, size, head_size(own))
    try:
        stock = {(block.layer, block.key): block for block in blocks(twin(model, copy.deepcopy(config)), spec)}
    except (RuntimeError, ValueError) as error:
        raise ConfigError("size", size, f"gives no {type(model).__name__} ({' '.join(str(error).split())}).") from None
    entry = copy.deepcopy(getattr(model.config, "hf_prune", None) or {"version": 1, "layers": {}})
    layers: dict[str, dict[str, Any]] = {}
    for block in own:
        other = stock[block.layer, block.key]
        if other.unit_width != block.unit_width:
            allowed = (
                f"would change the width of the heads of {block.layer}; the spec of the family has to say what it follows from."
            )
            raise ConfigError("size", size, allowed)
        if reason := _tied_to_heads(block, other, spec):
            raise ConfigError("size", size, f"cannot be said of {type(model).__name__}: {reason} of {block.layer}.{block.key}.")
        said = entry["layers"].get(block.layer, {}).get(block.key, {})
        if said.keys() - block.sizes.keys() or block.sizes != other.sizes:
            layers.setdefault(block.layer, {})[block.key] = said | block.sizes
    before = {name: getattr(model.config, name) for name in own_sizes(config, spec) if hasattr(model.config, name)}
    changed = {name: value for name, value in before.items() if getattr(config, name) != value}
    config.hf_prune = entry | {"layers": layers, "original": changed | entry.get("original", {})}
    return config


def _tied_to_heads(block: Block, stock: Block, spec: ArchitectureSpec) -> str:
    """What of a block loading would take from a number of heads or neurons that is no longer the block's; `""` if nothing."""
    fewer = [name for name, size in block.sizes.items() if size > stock.sizes[name] and name != "num_attention_heads"]
    if fewer:
        return f"from the hidden size follows {fewer[0]}"
    output = stock.output.layer
    if output.weight.shape[0 if isinstance(output, Conv1D) else 1] != stock.num_units * stock.unit_width:
        return "from the hidden size follows the width of the output projection"
    if spec.heads and block.own_units is not None:
        return "from the number of heads follow the position biases"
    if spec.heads and any(entry.forward for _, _, entry in block.by_head):
        return "from the number of heads follows the width of the norms over all heads"
    return ""


def _made(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of the same class by a config, in evaluation mode, whose weights are still to come."""
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        made: Any = type(model)(copy.deepcopy(config))
    return made.eval()  # type: ignore[no-any-return]


def _apart(model: PreTrainedModel, found: Sequence[Member], seen: Seen | None, size: int) -> Basis | None:
    """The channels of the task head that stay; None where it has none of its own."""
    hidden = getattr(model.config, hidden_size_name(model.config))
    if not any(member.apart for member in found):
        return None
    parts = list(seen.read.values()) if seen is not None and seen.read else by_weights(found, hidden, apart=True)
    return strongest(importance(parts), size)


@torch.no_grad()
def _rotated(
    model: PreTrainedModel, config: Any, found: Sequence[Member], seen: Seen, batch: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, Plan]:
    """A model that is to have the principal directions of another one's stream, and the plan for it.

    Raises:
        ConfigError: the model would be another one by the rotation alone.
    """
    assert seen.moments is not None
    size, whole = getattr(config, hidden_size_name(config)), copy.deepcopy(model.config)
    centred = any(norm.centred for norm in norms(found).values())
    heads = tied(found) if centred else []
    if heads:
        config.tie_word_embeddings = whole.tie_word_embeddings = False

    full = _made(model, whole)
    hidden = len(seen.moments)
    everything = Basis.of_channels(torch.arange(hidden, device=model.device), hidden)
    plan = rotation(model, full, found, principal(seen.moments, hidden, centred), everything, seen)
    narrow(model, full, found, plan)
    few = {name: value[:2] for name, value in batch.items()}
    dense, other = (one(**few, return_dict=True) for one in (model, full))
    name = next(iter(dense))
    wanted = dense[name].double() @ plan.stream.matrix if name == "last_hidden_state" else dense[name].double()
    gap = float((wanted - other[name].double()).abs().max() / wanted.abs().max())
    if not gap <= max(_ROTATED, 30 * torch.finfo(model.dtype).eps):
        allowed = (
            f"changes {type(model).__name__} by {gap:.0%} before anything is cut: something beside norms on the inputs of blocks "
            "tells the channels of its hidden states apart."
        )
        raise ConfigError("rotate", True, allowed)
    del full
    if heads:
        names = ", ".join(head.name for head in heads)
        count = size * sum(head.module.weight.shape[0] for head in heads)
        logger.warning("%s is tied to the embeddings no more, and has %s parameters of its own.", names, f"{count:,}")
    small = _made(model, config)
    directions = principal(seen.moments, size, centred)
    return small, rotation(model, small, found, directions, _apart(model, found, seen, size), seen)


def _write_config(model: PreTrainedModel, config: Any, spec: ArchitectureSpec) -> None:
    """Write what a config says of sizes into every config that a model has: each stack of T5 has one of its own."""
    configs = {id(own): own for module in model.modules() if (own := vars(module).get("config")) is not None}
    for own in configs.values():
        for name in (*own_sizes(config, spec), "tie_word_embeddings"):
            if hasattr(config, name) and (own is model.config or hasattr(own, name)):
                setattr(own, name, getattr(config, name))
    model.config.hf_prune = config.hf_prune
