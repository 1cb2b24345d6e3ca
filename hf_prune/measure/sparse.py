"""Sparse kernels: Linear layers that compute with a sparse copy of their weight, where that is faster.

Zeros that follow no structure, 4x1 blocks and 2:4 make a model no smaller and, by themselves, no faster. torch has kernels for
three formats: CSR (single weights), BSR (square blocks) and semi-structured (2:4, CUDA only). A CPU runs the first two well as
`(S @ Xᵀ)ᵀ` and badly as `X @ Sᵀ`, the form that `torch.nn.functional.linear` asks for.

On many CPUs a dense weight that oneDNN has laid out beforehand beats both these and torch's own dense kernel, so it competes too.
What a layer gains by itself says little about the model, whose other parts have to read what the layer gives (`(S @ Xᵀ)ᵀ` lies in
memory column by column) and share the caches with it: what is reported is the time of the whole model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from ..condense import sample_batch
from ..model.targets import Weight, body_weights
from ..model.wrappers import bare_model, transformers_model
from .latency import benchmark, protocol_of
from .sparsity import count_zeros
from .tables import as_text


def _bsr(weight: Tensor) -> Tensor:
    """In square blocks of the size that stores fewest values, the larger of equal ones."""
    sizes = [size for size in (32, 16, 8, 4) if not any(length % size for length in weight.shape)]
    if not sizes:
        raise ValueError(f"its shape {weight.shape[0]}x{weight.shape[1]} is not divisible by 4x4")
    blocks = {size: weight.view(weight.shape[0] // size, size, -1, size).ne(0).any(3).any(1).sum() * size**2 for size in sizes}
    size = min(sizes, key=lambda size: int(blocks[size]))
    return weight.to_sparse_bsr((size, size))


def _semi_structured(weight: Tensor) -> Tensor:
    if weight.shape[1] % 4 or int(weight.view(weight.shape[0], -1, 4).count_nonzero(dim=2).max()) > 2:
        raise ValueError("it is not 2:4 sparse")
    if weight.device.type != "cuda":
        raise ValueError("the kernel for 2:4 needs CUDA")
    sparse: Tensor = torch.sparse.to_sparse_semi_structured(weight)
    return sparse


def _onednn(weight: Tensor) -> Tensor:
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not has_onednn or weight.device.type != "cpu" or weight.dtype != torch.float32:
        raise ValueError("oneDNN's layout needs float32 on a CPU")
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return packed


#: The dense kernel that competes with every format. Its operators, which torch's Inductor calls, have no names without underscores;
#: what `Tensor.to_mkldnn` offers instead converts inputs and outputs too, and takes longer than torch's own dense kernel.
_PREPACKED = "onednn"

#: Format → a weight, `[out, in]`, in that format. Raises ValueError or RuntimeError with the reason where it cannot be.
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": lambda weight: weight.to_sparse_csr(),
    "bsr": _bsr,
    "semi_structured": _semi_structured,
    _PREPACKED: _onednn,
}


#: The descriptor behind `Tensor.data`.
_DATA: Any = torch.Tensor.data


class _Watched(nn.Parameter):
    """A parameter that counts accesses to `.data`, since writes to it do not change the parameter's version."""

    data_accesses = 0

    @property
    def data(self) -> Tensor:
        self.data_accesses += 1
        data: Tensor = _DATA.__get__(self)
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)


class SparseLinear(nn.Linear):
    """A Linear that computes with a sparse copy of its weight wherever no gradient is recorded.

    The parameters are those of the original layer, dense and under their old names, so that checkpoints are plain and training
    works as before. The copy is made again after the weight has changed, even through its `.data`.
    """

    def __init__(self, linear: nn.Linear, format: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.format = format
        self.train(linear.training)
        self._copy: tuple[object, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The same as `nn.Linear`: `[..., in]` → `[..., out]`."""
        recorded = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if recorded or (self.format == _PREPACKED and not self._in_float32(input)):
            return super().forward(input)
        weight, bias, rows = self.sparse_weight(), self._parameters["bias"], input.reshape(-1, self.in_features)
        if self.format == "semi_structured":
            output = functional.linear(rows, weight, bias)
        elif self.format == _PREPACKED:
            output = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
        elif bias is None:
            output = (weight @ rows.T).T
        else:
            output = torch.addmm(bias[:, None], weight, rows.T).T
        return output.reshape(*input.shape[:-1], self.out_features)

    def _in_float32(self, input: Tensor) -> bool:
        """Whether the layer computes in float32 on a CPU, all that oneDNN's layout is used for."""
        same = input.dtype == self.weight.dtype == torch.float32 and self.weight.device.type == "cpu"
        return same and not torch.is_autocast_enabled("cpu")

    def sparse_weight(self) -> Tensor:
        """The weight in the layer's format."""
        if type(self.weight) is nn.Parameter:
            self.weight.__class__ = _Watched
        weight, accesses = self.weight.detach(), getattr(self.weight, "data_accesses", 0)
        version = None if self.weight.is_inference() else self.weight._version
        state = (version, accesses, weight.data_ptr(), weight.shape, weight.dtype, weight.device)
        if self._copy is None or self._copy[0] != state:
            self._copy = (state, FORMATS[self.format](weight))
        return self._copy[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}

    def extra_repr(self) -> str:
        """As `nn.Linear`, with the format."""
        return f"{super().extra_repr()}, format={self.format}"


@dataclass(frozen=True)
class SparseDecision:
    """What became of one layer.

    Attributes:
        name: of the module.
        shape: `(out, in)`; its own where it is no layer's weight.
        sparsity: share of true zeros.
        kernel: `"dense"` or the format.
        milliseconds: by kernel, of the layer by itself, see [`benchmark`]; empty where nothing was measured.
        reason: why the layer stays dense, `""` if it does not.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str = "dense"
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def fastest(self, kernels: Iterable[str], margin: float) -> str:
        """The one of these kernels that is fastest by itself and saves the margin, else `"dense"`."""
        limit = (1 - margin) * self.milliseconds.get("dense", 0.0)
        times = {kernel: self.milliseconds.get(kernel, math.inf) for kernel in kernels}
        return min((kernel for kernel in times if times[kernel] <= limit), key=times.__getitem__, default="dense")


@dataclass(frozen=True)
class SparseReport:
    """What [`to_sparse`] decided, layer by layer, and what the model gains.

    Attributes:
        layers: the decisions.
        dense_ms, model_ms: milliseconds of a forward of the whole model before and after, measured in turn, see [`benchmark`].
        protocol: how it was measured, in words.
    """

    layers: tuple[SparseDecision, ...]
    dense_ms: float
    model_ms: float
    protocol: str

    @property
    def speedup(self) -> float:
        """How many times faster the whole model has become."""
        return self.dense_ms / self.model_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "speedup": self.speedup}

    def __rich__(self) -> Table:
        swapped = [layer.kernel for layer in self.layers if layer.kernel != "dense"]
        title = f"{len(swapped)} of {len(self.layers)} layers run another kernel; the model is {self.speedup:.2f} times as fast"
        kernels = list(dict.fromkeys(kernel for layer in self.layers for kernel in layer.milliseconds))
        table = Table(title=title, caption=self.protocol)
        for column in ("module", "shape", "sparsity", *(f"{kernel} ms" for kernel in kernels), "kernel", ""):
            table.add_column(column, justify="left" if column in ("module", "kernel", "") else "right")
        for layer in self.layers:
            times = (f"{layer.milliseconds[kernel]:.2f}" if kernel in layer.milliseconds else "" for kernel in kernels)
            table.add_row(layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.2%}", *times, layer.kernel, layer.reason)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def to_sparse(
    model: Any, format: str = "csr", rows: int = 8, tokens: int = 128, repeats: int = 7, margin: float = 0.05
) -> SparseReport:
    """Let the layers of a model's body compute with sparse weights where the whole model gains by it, and print what was decided.

    Each Linear that has zeros forwards the same random batch in turn with every kernel: torch's dense one, the format's and that of
    a dense weight in oneDNN's layout. Then the whole model runs with the format alone, with oneDNN's layout alone and with the
    fastest of both, each where a layer gains by it; the fastest of these stays, unless the dense model is as fast. All on one
    thread, in CPU time (on CUDA: time). The saved checkpoint stays dense and plain, and loads anywhere as the dense model; call
    this again after loading.

    Args:
        model: changed in place. Its layers run the kernel where no gradient is recorded (`torch.no_grad()`, as in `pipeline`,
            `generate` and `Trainer.evaluate`) and train as before.
        format: `"csr"` for single zeros and 4x1, `"bsr"` for square blocks, `"semi_structured"` for 2:4 (CUDA only), `"onednn"` for
            the dense layout alone.
        rows, tokens: of the batch that is measured; as many as you will run at a time, since which kernel wins depends on it.
        repeats: forwards of each kind.
        margin: share of the dense time that must be saved, by a layer and by the model.

    Raises:
        ValueError: the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: allowed are {', '.join(map(repr, FORMATS))}.")
    kernels, inner = tuple(dict.fromkeys((format, _PREPACKED))), transformers_model(model)
    inputs = {name: value.to(inner.device) for name, value in sample_batch(inner, rows, tokens, shortest=tokens).items()}
    decisions = [_decide(weight, kernels, rows * tokens, repeats, margin) for weight in body_weights(model)]
    choices: dict[str, dict[str, str]] = {"dense": {}}
    for name, allowed in {"fastest": kernels, **{kernel: (kernel,) for kernel in kernels}}.items():
        fastest = {layer.name: layer.fastest(allowed, margin) for layer in decisions}
        choices[name] = {layer: kernel for layer, kernel in fastest.items() if kernel != "dense"}
    variants = {name: _variant(model, chosen) for name, chosen in choices.items() if chosen or name == "dense"}
    times = benchmark(variants, inputs, repeats)
    best = min(times, key=times.__getitem__)
    # The fastest of several looks faster than it is: what is reported is measured anew.
    times = benchmark({"dense": variants["dense"], best: variants[best]}, inputs, repeats)
    if times[best] > (1 - margin) * times["dense"]:
        best = "dense"
    _swap(bare_model(model), choices[best])
    layers = tuple(_decided(layer, choices[best], bool(choices["fastest"].get(layer.name))) for layer in decisions)
    report = SparseReport(layers, times["dense"], times[best], protocol_of(inner, inputs, repeats))
    print(report)
    return report


def _decided(layer: SparseDecision, chosen: Mapping[str, str], gains: bool) -> SparseDecision:
    kernel = chosen.get(layer.name, "dense")
    return replace(layer, kernel=kernel, reason="the whole model gains nothing" if gains and kernel == "dense" else layer.reason)


def _swap(model: nn.Module, kernels: Mapping[str, str]) -> None:
    """Let the layers of these names run these kernels."""
    for name, kernel in kernels.items():
        model.set_submodule(name, SparseLinear(model.get_submodule(name), kernel))  # type: ignore[arg-type]


def _variant(model: Any, kernels: Mapping[str, str]) -> nn.Module:
    """The transformers model with other kernels: modules of its own, and the same parameters."""
    bare = bare_model(model)
    shared = {id(tensor): tensor for tensor in (*bare.parameters(), *bare.buffers())}
    variant = copy.deepcopy(bare, shared)
    _swap(variant, kernels)
    inner: nn.Module = transformers_model(variant)
    return inner


@torch.no_grad()
def _decide(weight: Weight, kernels: Iterable[str], rows: int, repeats: int, margin: float) -> SparseDecision:
    """Time a layer by itself with each kernel that gives what the dense one gives."""
    zeros, size = count_zeros([weight])
    decision, module = SparseDecision(weight.name, weight.shape, zeros / size if size else 0.0), weight.module
    if weight.left_out:
        return replace(decision, reason=weight.left_out)
    if not isinstance(module, nn.Linear):
        return replace(decision, reason=f"a {type(module).__name__}")
    if not zeros:
        return replace(decision, reason="no zeros")
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(rows, module.in_features, generator=generator).to(module.weight)
    wanted, usable, reasons = module(batch), {"dense": module}, []
    for kernel in kernels:
        sparse = SparseLinear(module, kernel)
        try:
            given = sparse(batch)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reasons.append(f"{kernel}: {str(error).splitlines()[0]}")
            continue
        if torch.allclose(given, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
            usable[kernel] = sparse
        else:
            reasons.append(f"{kernel}: the kernel gives something else")
    decision = replace(decision, milliseconds=benchmark(usable, {"input": batch}, repeats) if len(usable) > 1 else {})
    if decision.fastest(kernels, margin) == "dense":
        decision = replace(decision, reason="; ".join(["dense is as fast"] * (len(usable) > 1) + reasons))
    return decision
