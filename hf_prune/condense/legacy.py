"""Checkpoints pruned by older tools: their tensors are smaller than their config says, and transformers 5 refuses them.

transformers 4 removed heads with `prune_heads` and listed them in the config as `pruned_heads`; CoFi (Xia et al. 2022) and others
save smaller tensors and nothing else. Either way the size of each block can be read from the shapes of the tensors.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..model import Block, Projection, find_blocks, spec_for
from ..model.loading import load_whole, readable
from ..settings.errors import ConfigError
from .stock import write_sizes

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def convert_v4_pruned_heads(pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load a transformers 4 checkpoint with `pruned_heads`, or any checkpoint with fewer heads or neurons than its config says.

    The result is like a model from [`condense`]: `save_pretrained` writes a checkpoint that loads with and without hf_prune.

    Args:
        pretrained_model_name_or_path: a folder or a model id.
        kwargs: for `from_pretrained` (`revision`, `dtype`, `token`, …).

    Returns:
        A model of the class that the config names, in evaluation mode. A warning is logged if there was nothing to convert.

    Raises:
        ValueError: the family has no architecture spec, a tensor is smaller in another way (CoFi's hidden sizes), a whole block is
            missing (CoFi then skips its LayerNorm too, which no stock model does), the config does not tell which heads are left
            although the family needs it (T5, MPNet), or the checkpoint lacks a tensor of the model.
    """
    model, changed = converted(pretrained_model_name_or_path, **kwargs)
    if not changed:
        logger.warning("There is nothing to convert: every tensor has the shape that the config says.")
    return model


def converted(pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> tuple[PreTrainedModel, bool]:
    """[`convert_v4_pruned_heads`], and whether there was something to convert."""
    options = {name: kwargs[name] for name in ("revision", "token", "subfolder", "cache_dir", "local_files_only") if name in kwargs}
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **options)
    pruned = _pruned_heads(config.__dict__.pop("pruned_heads", None) or {})
    cls: Any = getattr(transformers, (config.architectures or ["AutoModel"])[0], AutoModel)

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)  # its report of mismatched tensors is what we need
    try:
        with readable(pretrained_model_name_or_path):
            stock, seen = cls.from_pretrained(
                pretrained_model_name_or_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    shapes = {name: tuple(shape) for name, shape, _ in seen["mismatched_keys"]}
    blocks = find_blocks(stock)
    _check_shapes(blocks, shapes, {name: tuple(shape) for name, _, shape in seen["mismatched_keys"]}, set(seen["missing_keys"]))

    layers: dict[str, dict[str, Any]] = {}
    for block in blocks:
        if sizes := _sizes(block, shapes, pruned):
            layers.setdefault(block.layer, {})[block.key] = sizes
    if layers:
        config.hf_prune = {"version": 1, "layers": layers}
    model = load_whole(cls, pretrained_model_name_or_path, config=config, **kwargs)
    if layers:
        write_sizes(model, spec_for(config.model_type))
    return model, bool(layers)


def _pruned_heads(entry: Any) -> dict[int, list[int]]:
    """A config's `pruned_heads`: layer → removed heads.

    Raises:
        ConfigError: it has another form.
    """
    fits = isinstance(entry, dict) and all(str(layer).isdecimal() and isinstance(heads, list) for layer, heads in entry.items())
    if not fits:
        allowed = "must be an object: layer index → removed heads, such as {'0': [1, 3]}."
        raise ConfigError("pruned_heads", entry, allowed)
    return {int(layer): heads for layer, heads in entry.items()}


def _names(parts: Iterable[Projection]) -> set[str]:
    return {f"{part.name}.{name}" for part in parts for name in ("weight", "bias")}


def _check_shapes(blocks: list[Block], shapes: Shapes, stock: Shapes, missing: set[str]) -> None:
    """Check that only heads and neurons differ: rows of a block's input projections, columns of its output projection.

    Raises:
        ValueError: another tensor differs, which the message names.
    """
    inputs = {name for block in blocks for name in _names(block.inputs)}
    outputs = {f"{block.output.name}.weight" for block in blocks}
    conv1d = {f"{part.name}.weight" for block in blocks for part in block.projections if isinstance(part.module, Conv1D)}
    for name, shape in sorted(shapes.items()):
        changed = [axis for axis, (size, own) in enumerate(zip(shape, stock[name])) if size != own]
        allowed = {int(name in conv1d)} if name in inputs else {int(name not in conv1d)} if name in outputs else set()
        if len(shape) != len(stock[name]) or not set(changed) <= allowed:
            raise ValueError(
                f"{name} has the shape {shape} in the checkpoint and {stock[name]} by its config; only heads and neurons may be "
                "fewer. A model with a smaller hidden size needs a config that says so."
            )
    if gone := sorted(missing & (inputs | outputs)):
        raise ValueError(
            f"{gone[0]} is not in the checkpoint: a whole block is missing. Tools that save such models skip the LayerNorm of "
            "the block too, which the stock architecture applies, so there is no equivalent model of that architecture."
        )


def _sizes(block: Block, shapes: Shapes, pruned: dict[int, list[int]]) -> dict[str, Any]:
    """The entry of a block in `config.hf_prune`, empty if it has its stock size."""
    shape = shapes.get(f"{block.output.name}.weight")
    if shape is None:
        return {}
    features, width = shape[0 if isinstance(block.output.module, Conv1D) else 1], block.unit_width
    if features % width:
        raise ValueError(f"{block.output.name}.weight has {features} inputs in the checkpoint; whole heads are {width} wide.")
    units, shared = features // width, shapes.get(f"{block.inputs[-1].name}.weight")
    sizes: dict[str, Any] = dict(zip(block.sizes, (units, block.num_groups if shared is None else shared[0] // width)))
    if block.own_units is not None:
        gone = pruned.get(int(block.layer.rpartition(".")[2]), [])
        sizes["heads"] = [head for head in block.own_units if head not in gone]
        if len(sizes["heads"]) != units:
            raise ValueError(
                f"{block.name} has {units} of {block.num_units} heads in the checkpoint, but config.pruned_heads "
                f"lists {gone!r} for this layer; it must list the removed heads exactly, since heads share a position bias."
            )
    return sizes
