"""A checkpoint whose `config.json` says the sizes of each layer in transformers' own `per_layer_config`, too.

transformers 5 knows the field and checks it, but most of its models do not build their layers by it; vLLM's Transformers backend
reads the numbers of heads from it and builds the layers by the modelling file. The weights load as ever: with hf_prune, or by the
modelling file. Readers of the field want a head in each layer, so one without has a head of zeros here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..condense import needs_hf_prune
from ..files import read_object, write_text
from ..measure.running import as_exported
from ..model import find_blocks
from ..model.loading import load_model
from ..settings.errors import ConfigError
from .compare import Run
from .inputs import outputs_of

FILE = "config.json"


def check_model(model: PreTrainedModel) -> None:
    """Raise unless the sizes of a model's layers can be said by number of the layer.

    Raises:
        ConfigError: they are equal, so that the config says them already; or a number of a layer does not say which is meant, or
            its config does not say how wide a head is.
    """
    name, config = type(model).__name__, model.config
    if not needs_hf_prune(config):
        raise ConfigError("model", name, "is an ordinary model: its config says its sizes, and whatever knows the family takes it.")
    found = find_blocks(model)
    lists = {block.layer.rpartition(".")[0] for block in found}
    if len(lists) > 1 or len({(block.layer, block.unit) for block in found}) < len(found):
        raise ConfigError(
            "model", name, f"has layers in {', '.join(sorted(lists))}; per_layer_config has one number for each layer."
        )
    heads = {block.num_units for block in found if block.unit == "head"}
    if getattr(config, "head_dim", None) is None and heads != {config.num_attention_heads}:
        allowed = (
            f"has layers with fewer heads, and {type(config).__name__} has no head_dim: readers would take them for wider ones."
        )
        raise ConfigError("model", name, allowed)


def write(model: Any, config: Any, folder: Path) -> None:
    """Write a checkpoint into a folder.

    Args:
        model: the model.
        config: its config, as it is to be saved.
        folder: the folder.
    """
    made = with_heads(model, config)
    made.save_pretrained(folder)
    said = read_object(folder / FILE)
    said |= {"per_layer_config": per_layer_config(made), "allow_global_per_layer_attribute_access": True}
    write_text(folder / FILE, json.dumps(said, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def with_heads(model: Any, config: Any) -> Any:
    """A copy of a model in which each layer has a head, of zeros where there was none."""
    config = copy.deepcopy(config)
    for parts in config.hf_prune["layers"].values():
        for sizes in parts.values():
            sizes |= {name: max(sizes[name], 1) for name in ("num_attention_heads", "num_key_value_heads") if name in sizes}
    made = type(model)(config).to(model.dtype).eval()
    state = made.state_dict()
    for name, tensor in model.state_dict().items():
        state[name].zero_()
        state[name][tuple(slice(size) for size in tensor.shape)] = tensor
    if made.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    return made


def per_layer_config(model: Any) -> dict[str, dict[str, int]]:
    """The sizes in which layers differ from the config: number of the layer → field → size."""
    config, found = model.config, dict[str, dict[str, int]]()
    for block in find_blocks(model):
        sizes = {config.attribute_map.get(name, name): size for name, size in block.sizes.items()}
        other = {name: size for name, size in sizes.items() if getattr(config, name) != size}
        if other:
            found.setdefault(block.layer.rpartition(".")[2], {}).update(other)
    return found


def open_folder(folder: Path) -> Run:
    """The checkpoint, loaded by hf_prune."""
    model = load_model(folder)

    def run(batch: Any) -> Any:
        with as_exported(model) as plain:
            return outputs_of(plain, batch)

    return run
