"""Removing whole layers without units from a model and its config.

A pre-norm layer without heads and neurons adds a constant to the residual stream. The next layer cannot absorb the constant, since
it normalises its input; the previous feed-forward block can, in its output bias. So a layer can be removed if it adds nothing, or
if a layer before it stays. `hidden_states` then lacks the input of the removed layer; all other entries are unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..model import ArchitectureSpec
from ..model.blocks import at_path, body, layer_lists, set_at_path
from ..settings.errors import ConfigError


def depths(model: nn.Module, spec: ArchitectureSpec) -> dict[str, str]:
    """The lists whose layers can be removed once they do nothing, with the config attribute of their length:
    `{"layers": "num_hidden_layers"}`."""
    config: Any = getattr(model, "config", None)
    if not spec.pre_norm or any(getattr(config, name, value) != value for name, value in spec.pre_norm_when.items()):
        return {}
    return dict(zip(spec.layers, spec.depths))


def layer_counts(spec: ArchitectureSpec) -> dict[str, str]:
    """The config attribute with the length of each list of layers, whether or not removing them preserves the outputs.

    Raises:
        ConfigError: layers share their weights, so none can be removed alone.
    """
    if not spec.depths:
        allowed = f"its layers ({', '.join(spec.layers)}) cannot be counted one by one, so none can be removed."
        raise ConfigError("model_type", ", ".join(spec.model_types), allowed)
    return dict(zip(spec.layers, spec.depths))


def outline(layer: nn.Module) -> dict[str, type]:
    """The structure of a layer: module name → stock class."""
    return {name: getattr(module, "stock_class", type(module)) for name, module in layer.named_modules()}


def removable(constants: Sequence[Tensor | None], outlines: Sequence[object]) -> list[int]:
    """The indices of the layers of a list that can be removed, ascending.

    Args:
        constants: what each layer adds for every input; None for a layer that computes something.
        outlines: the structure of each layer, see [`outline`] and [`can_do_without`].
    """
    gone: list[int] = []
    for index, constant in enumerate(constants):
        more = [*gone, index]
        first = next((other for other in range(len(constants)) if other not in more), None)
        if constant is None or first is None or not can_do_without(outlines, more):
            continue
        if first < index or not constant.any():
            gone = more
    return gone


def can_do_without(outlines: Sequence[object], gone: Collection[int]) -> bool:
    """Whether the stock model that is built of the smaller config takes the layers that stay: its n-th must have the structure
    that the n-th has now. So the first layers of T5 (with the position bias) and of ModernBERT (without a norm) stay."""
    staying = [one for index, one in enumerate(outlines) if index not in gone]
    return staying == list(outlines[: len(staying)])


def remove_layers(model: PreTrainedModel, spec: ArchitectureSpec, removed: dict[str, list[int]]) -> None:
    """Remove layers, renumber the others (caches use `layer_idx`), and update their number in the config.

    Args:
        model: the model; changed in place.
        spec: the spec of its family.
        removed: indices by the path of the list.
    """
    for path, indices in removed.items():
        layers = layer_lists(model, path)[path]
        for index in reversed(indices):
            del layers[index]
        for number, layer in enumerate(layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
        count = layer_counts(spec)[path]
        set_at_path(model.config, count, len(layers))
        config = at_path(model.config, count.rpartition(".")[0])
        own: Any = getattr(owner_of(model, path), "config", config)
        if own is not config:  # each stack of T5 has a copy of its own
            own.num_hidden_layers = len(layers)
        _renumber_stages(config, indices)
        for name in entries_by_layer(config):
            entries = list(enumerate(getattr(config, name)))
            setattr(config, name, [entry for index, entry in entries if index not in indices])
    if removed:
        name_decoder_depth(model.config, spec)


def _renumber_stages(config: Any, removed: Collection[int]) -> None:
    """Let the config of a backbone name the features of the layers that it has."""
    stages = getattr(config, "stage_names", None)
    if stages and len(stages) == config.num_hidden_layers + len(removed) + 1:
        left = [0, *(index + 1 for index in range(len(stages) - 1) if index not in removed)]
        outputs = [left.index(index) for index in config.out_indices if index in left]
        config.stage_names = stages[: len(left)]
        config.set_output_features_output_indices(out_features=None, out_indices=outputs or [len(left) - 1])


def entries_by_layer(config: Any) -> list[str]:
    """The config attributes that are lists with an entry for each layer."""
    return [name for name in ("layer_types", "no_rope_layers") if getattr(config, name, None) is not None]


def name_decoder_depth(config: Any, spec: ArchitectureSpec) -> None:
    """Set the decoder's number of layers under the name that `get_text_config`, and so the cache of `generate`, reads.

    T5 has a different name for it, which is not read, so its cache would have as many layers as the encoder.
    """
    if config.is_encoder_decoder:
        config.decoder_layers = getattr(config, layer_counts(spec)[spec.layers[-1]])


def owner_of(model: PreTrainedModel, path: str) -> nn.Module:
    """The module that holds the list of layers at `path`."""
    owner: nn.Module = body(model).get_submodule(path.rpartition(".")[0])
    return owner


def without_inputs(outputs: dict[str, Tensor], removed: dict[str, list[int]]) -> dict[str, Tensor]:
    """Outputs of a model by their dotted names, without the hidden states before removed layers, the others renumbered."""
    for path, indices in removed.items():
        stack = path.partition(".")[0]
        key = f"{stack}_hidden_states" if any(f".{stack}_hidden_states." in name for name in outputs) else "hidden_states"
        tower = f".{stack}_output." if any(f".{stack}_output." in name for name in outputs) else ""
        renamed = {}
        for name, value in outputs.items():
            start, found, number = name.rpartition(f".{key}.") if tower in name else ("", "", "")
            if found and int(number) in indices:
                continue
            renamed[f"{start}{found}{int(number) - sum(i < int(number) for i in indices)}" if found else name] = value
        outputs = renamed
    return outputs
