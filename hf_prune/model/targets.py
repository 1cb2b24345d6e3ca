"""The weights of a model: which of them count, which can be pruned (seen as `[out, in]` matrices), and which a rule names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from ..settings.errors import ConfigError, closest
from . import SPECS, ArchitectureSpec
from .blocks import Block, Projection, active_copy, base_layer, body_prefix, is_adapted
from .lora import Adapter, adapter_of
from .passes import keep_
from .sharding import placed_like, whole
from .wrappers import bare_model, contents, listed, transformers_models

#: Layer types whose weights can be pruned. GPT-2's Conv1D stores `[in, out]`; convolutions are flattened to `[out, in·kernel]`.
PRUNABLE = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d)

ModuleNames = str | list[str] | None


def computed(layer: nn.Module) -> str:
    """A message if a layer's weight or bias is not a parameter but computed from others; `""` if neither is.

    `torch.nn.utils.parametrize`, `torch.nn.utils.prune` and weight norm, which wav2vec2 uses, do that. Zeros written into such a
    tensor are lost in the next forward pass.
    """
    for name in ("weight", "bias"):
        if name not in layer._parameters and getattr(layer, name, None) is not None:
            sources = [key for key, _ in layer.named_parameters() if any(step.startswith(name) for step in key.split("."))]
            return f"its {name} is not a parameter but computed from {', '.join(sources)}"
    return ""


def computed_part(block: Block) -> str:
    """A message if a projection of a block has a weight or bias that is [`computed`]; `""` if none has."""
    found = ((part.name, computed(part.layer)) for part in block.projections)
    return next((f"of {name}: {reason}" for name, reason in found if reason), "")


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter seen as a matrix: a weight as `[out, in]`, a bias as `[out, 1]`.

    Attributes:
        name: the parameter's name in the model, without PEFT's additions.
        module_name: the name of its module.
        parameter: the parameter itself; under LoRA that of the base layer.
        transposed: the parameter is stored `[in, out]`.
        kernel_first: a convolution is flattened to `[out, kernel·in]` instead of `[out, in·kernel]`, so that neighbouring columns
            are neighbouring inputs.
        adapter: the LoRA adapter of the parameter, if any.
    """

    name: str
    module_name: str
    parameter: nn.Parameter
    transposed: bool = False
    kernel_first: bool = False
    adapter: Adapter | None = None

    def value(self) -> Tensor:
        """The parameter, or under LoRA the merged weight, in the parameter's shape."""
        return self.parameter.detach() if self.adapter is None else self.adapter.merged()

    def weight(self) -> Tensor:
        """`value()` as `[out, in]`."""
        return self.matrix(self.value())

    def gradient(self) -> Tensor:
        """Its gradient as `[out, in]`: an estimate under LoRA if the parameter is frozen; zero if it did not affect the loss."""
        if self.adapter is not None and not self.parameter.requires_grad:
            return self.matrix(self.adapter.gradient())
        gradient = self.parameter.grad
        return self.matrix(torch.zeros_like(self.parameter) if gradient is None else gradient)

    @property
    def requires_grad(self) -> bool:
        """Whether training changes it."""
        return self.parameter.requires_grad or (self.adapter is not None and self.adapter.requires_grad)

    @torch.no_grad()
    def mask(self, kept: Tensor, part: Callable[[Tensor], Tensor], adapted: bool, gradients: bool = False) -> None:
        """Zero the value, or the parameter's gradient, in place where `kept` is False.

        Args:
            kept: bool, of a shape that broadcasts to that of the part.
            part: from a tensor of the parameter's shape to a view of the part to mask.
            adapted: whether the adapter contributes to that part.
            gradients: mask the gradient instead of the value.
        """
        tensor = self.parameter.grad if gradients else self.parameter
        if tensor is None:
            return
        keep_(part(tensor), kept)
        if self.adapter is not None and adapted and not gradients:
            part(tensor).sub_(part(self.adapter.delta()).mul_(~kept))

    def matrix(self, tensor: Tensor) -> Tensor:
        """`tensor`, which has the parameter's shape, as `[out, in]`; a view unless `kernel_first` or gathered from its shards."""
        tensor = whole(tensor)
        if self.transposed:
            return tensor.T
        return (tensor.movedim(1, -1) if self.kernel_first else tensor).reshape(tensor.shape[0], math.prod(tensor.shape[1:]))

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """An `[out, in]` matrix in the parameter's shape; a view, or this rank's part where the parameter is sharded."""
        rows, inputs, *kernel = (*self.parameter.shape, 1)[: max(self.parameter.ndim, 2)]
        if self.transposed:
            tensor = matrix.T
        elif self.kernel_first:
            tensor = matrix.reshape(rows, *kernel, inputs).movedim(-1, 1)
        else:
            tensor = matrix.reshape(self.parameter.shape)
        return placed_like(tensor, self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        first = self.parameter.shape[0]
        rest = math.prod(self.parameter.shape[1:])
        return (rest, first) if self.transposed else (first, rest)

    @property
    def inputs(self) -> int:
        """Inputs of the layer: columns, without the positions of a convolution's kernel."""
        return self.shape[1] // math.prod(self.parameter.shape[2:])


def weight_target(name: str, module: nn.Module, kernel_first: bool = False) -> Target:
    """The weight of a layer.

    Raises:
        ValueError: the layer has an adapter other than a plain LoRA one.
    """
    return _weight_target(name, module, base_layer(module), kernel_first)


def projection_target(part: Projection) -> Target:
    """The weight of a projection's module.

    Raises:
        ValueError: the module has an adapter other than a plain LoRA one.
    """
    return _weight_target(part.name, part.module, part.layer)


def _weight_target(name: str, module: nn.Module, layer: Any, kernel_first: bool = False) -> Target:
    transposed, adapter = isinstance(layer, Conv1D), None if module is layer else adapter_of(name, module, layer)
    return Target(f"{name}.weight", name, layer.weight, transposed, kernel_first and layer.weight.ndim > 2, adapter)


def bias_target(name: str, module: nn.Module) -> Target | None:
    """The bias of a layer, if it has one."""
    return Target(f"{name}.bias", name, module.get_parameter("bias")) if module.bias is not None else None


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """What determines a block's features and its output: weights `[rows, in]` and biases `[rows]`, zeros if there is none.

    They are the effective ones: under LoRA, merged.

    Attributes:
        makers: weight and bias of the projections that compute the features, by role, see `Block.makers`.
        output: weight and bias of the output projection.
        adapters: the LoRA adapters of all projections.
    """

    makers: Mapping[str, tuple[Tensor, Tensor]]
    output: tuple[Tensor, Tensor]
    adapters: tuple[Adapter, ...]


def block_weights(block: Block) -> BlockWeights:
    """The weights of a block, each merged once.

    Raises:
        ValueError: a layer has an adapter other than a plain LoRA one.
    """
    targets = {part.module: projection_target(part) for part in block.projections}
    merged: dict[nn.Module, Tensor] = {}

    def read(part: Projection) -> tuple[Tensor, Tensor]:
        target = targets[part.module]
        if part.module not in merged:
            merged[part.module] = target.weight()
        weight = merged[part.module][part.index]
        if part.layer.bias is None:
            return weight, weight.new_zeros(len(part.rows))
        bias: Tensor = part.layer.bias.detach() if target.adapter is None else target.adapter.merged_bias()
        return weight, bias[part.index]

    makers = {role: read(part) for role, part in block.makers.items()}
    adapters = tuple(target.adapter for target in targets.values() if target.adapter is not None)
    return BlockWeights(makers, read(block.output), adapters)


def named_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, looking through PEFT and other containers (see `model/wrappers.py`).

    Names are those of the model without adapters. A layer and its adapters are one module, a module that `modules_to_save` names is
    its active copy, and a parametrization belongs to its layer.
    """
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = active_copy(contents(module))
        if id(module) in seen or isinstance(module, ParametrizationList):
            return
        seen.add(id(module))
        yield name, module
        if not is_adapted(module):
            for key, child in module.named_children():
                yield from walk(child, f"{name}.{key}" if name else key)

    yield from walk(bare_model(model), "")


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight that counts, whether or not it can be pruned.

    Attributes:
        name: the name of its layer, or of the parameter if that is not called `weight` (`mlp.experts.down_proj`).
        module: the layer, with its adapters.
        key: its attribute name in the layer.
        left_out: why it cannot be pruned, `""` if it can.
    """

    name: str
    module: nn.Module
    key: str = "weight"
    left_out: str = ""

    def value(self) -> Tensor:
        """The effective weight in its own shape: under LoRA the merged one, if it can be pruned.

        Raises:
            ValueError: the layer has an adapter other than a plain LoRA one.
        """
        if not self.left_out:
            return weight_target(self.name, self.module).value()
        value: Tensor = getattr(base_layer(self.module), self.key)
        return value.detach()

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)` of a weight that can be pruned, else its own shape."""
        return tuple(self.value().shape) if self.left_out else weight_target(self.name, self.module).shape


def weights(model: Any) -> Iterator[Weight]:
    """Yield every weight that counts for sparsity, each once: those of linear and convolutional layers, and similar ones.

    Parameters of other modules with two or more dimensions count too (experts, routers), since activations are multiplied by them,
    but are left out of pruning. Lookup tables do not count: embeddings, and parameters of one row, such as the positions of ViT,
    `[1, tokens, hidden]`.
    """
    seen: set[object] = set()
    for name, module in named_layers(model):
        layer = base_layer(module)
        if isinstance(layer, PRUNABLE):
            found = [Weight(name, module, left_out=computed(layer))]
        elif isinstance(layer, nn.Embedding):
            found = []
        else:
            reason = f"it belongs to {type(layer).__name__}, which is not a linear or convolutional layer"
            own = {key: getattr(layer, key) for key in (*layer._parameters, *getattr(layer, "parametrizations", ()))}
            found = [
                Weight(name if key == "weight" else f"{name}.{key}".lstrip("."), module, key, reason)
                for key, value in own.items()
                if value is not None and value.ndim > 1 and len(value) > 1
            ]
        for weight in found:
            parameter = layer._parameters.get(weight.key)  # a computed weight is a new tensor at each access
            identity = (id(layer), weight.key) if parameter is None else id(parameter)
            if identity not in seen:
                seen.add(identity)
                yield weight


def prunable_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield `(name, module)` for every layer whose weight can be pruned; a shared weight is yielded once."""
    return ((weight.name, weight.module) for weight in weights(model) if not weight.left_out)


def body_prefixes(model: Any) -> tuple[str, ...]:
    """The prefixes of module names in a model's body, for `str.startswith`. The body is the model without its task head or wrapper;
    for a base model, `("",)`. A wrapper of several transformers models has several prefixes."""
    inside: Mapping[str, nn.Module] = transformers_models(model) or {"": contents(bare_model(model))}
    return tuple(f"{name}.{body_prefix(one)}" if name else body_prefix(one) for name, one in inside.items())


def selector(model: Any, names: ModuleNames, exclude: ModuleNames, field: str) -> Callable[[str], bool]:
    """A predicate on module names: those that `names` selects; without `names`, all in the model's body.

    Args:
        model: the model.
        names: see [`names_module`].
        exclude: names of modules to leave out.
        field: the config field of the names, for the message.

    Raises:
        ConfigError: there are several transformers models and no names to choose one.
    """
    if names is None and len(several := transformers_models(model)) > 1:
        example = re.escape(next(iter(several))) + r"\..*"
        kind = type(model).__name__
        allowed = f"must say which transformers model in {kind} it means: {listed(several)}. All of the first is {example!r}."
        raise ConfigError(field, names, allowed)
    body = body_prefixes(model)
    return lambda name: (name.startswith(body) if names is None else names_module(names, name)) and not names_module(exclude, name)


def body_weights(model: Any) -> Iterator[Weight]:
    """Yield the [`weights`] of a model's body, without those of its head or wrapper: sparsity is the share of zeros in them."""
    body = body_prefixes(model)
    return (weight for weight in weights(model) if weight.name.startswith(body))


#: CPU seconds for one regular expression on one name. Some expressions would take practically forever.
_SECONDS = 1


def names_module(names: ModuleNames, name: str, field: str = "target_modules") -> bool:
    """Whether `names` selects the module `name`: a regular expression matches all of it, a list item it or its end, as in PEFT.

    Raises:
        ConfigError: the regular expression, the value of `field`, takes too long.
    """
    if names is None:
        return False
    if isinstance(names, str):
        try:
            return regex.fullmatch(names, name, timeout=_SECONDS) is not None
        except TimeoutError:
            allowed = f"takes more than {_SECONDS} s to match against {name!r}; avoid nested repetition, such as '(a+)+'."
            raise ConfigError(field, names, allowed) from None
    return any(name == item or name.endswith(f".{item}") for item in names)


def check_names(names: ModuleNames, known: list[str], field: str, model_type: str = "") -> None:
    """Raise unless every expression or list item matches one of the `known` module names.

    Raises:
        ConfigError: an item matches nothing; names the closest module, or that module's name in the family `model_type`.
    """
    for item in [names] if isinstance(names, str) else [[entry] for entry in names or ()]:
        if not [name for name in known if names_module(item, name, field)]:
            ends = sorted({name.rsplit(".", 1)[-1] for name in known})
            if isinstance(item, str):
                text, order, allowed = item, (known, ends), f"a regular expression must match a whole name, such as {known[0]!r}."
            else:
                text, order, allowed = (
                    item[0],
                    (ends, known),
                    f"a list item must be a name or its end, such as {known[0].rpartition('.')[2]!r}.",
                )
            near = _renamed(text, model_type) or closest(text, order[0]) or closest(text, order[1])
            if near is not None and isinstance(item, str) and not any(names_module(near, name) for name in known):
                near = f".*{near}"
            raise ConfigError(field, text, f"matches no module; {allowed}", near)


def _renamed(text: str, model_type: str) -> str | None:
    """`text` with a last component from another family replaced by this family's name: `query` for `q_proj` in BERT."""
    tail, own = re.search(r"\w+$", text), SPECS.get(model_type)
    if tail is None or own is None:
        return None
    roles = {role for spec in SPECS.values() for role, path in _roles(spec) if path.rpartition(".")[2] == tail[0]}
    for role, path in _roles(own):
        if role in roles:
            end = path.rpartition(".")[2]
            alone = all(other == role for other, path in _roles(own) if path.rpartition(".")[2] == end)
            return text[: tail.start()] + (end if alone else path)
    return None


def _roles(spec: ArchitectureSpec) -> list[tuple[str, str]]:
    """The roles of the projections in a family's blocks, and their paths in a layer."""
    parts = [
        (role, getattr(block, role))
        for blocks, roles in ((spec.attentions, ("query", "key", "value", "output")), (spec.feed_forwards, ("up", "gate", "down")))
        for block in blocks
        for role in roles
    ]
    return [(role, part.path) for role, part in parts if part is not None]
