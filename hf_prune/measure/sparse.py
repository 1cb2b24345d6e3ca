"""Sparse kernels: Linear layers that compute with a sparse copy of their weight, where that is faster.

Zeros that follow no structure, 4x1 blocks and 2:4 make a model no smaller and, by themselves, no faster. torch has kernels for
three formats: CSR (single weights), BSR (square blocks) and semi-structured (2:4, CUDA only). A CPU runs the first two well as
`(S @ Xᵀ)ᵀ` and badly as `X @ Sᵀ`, the form that `torch.nn.functional.linear` asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from ..model.targets import Weight, body_weights
from ..model.wrappers import bare_model
from .latency import benchmark
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


#: Format → a weight, `[out, in]`, in that format. Raises ValueError or RuntimeError with the reason where it cannot be.
FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": lambda weight: weight.to_sparse_csr(),
    "bsr": _bsr,
    "semi_structured": _semi_structured,
}


#: The descriptor behind `Tensor.data`.
_DATA: Any = torch.Tensor.data


class _Watched(nn.Parameter):
    """A parameter that counts how often its `.data` was asked for: what is written there leaves no trace in its version."""

    data_asked_for = 0

    @property
    def data(self) -> Tensor:
        self.data_asked_for += 1
        data: Tensor = _DATA.__get__(self)
        return data

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)


class SparseLinear(nn.Linear):
    """A Linear that computes with a sparse copy of its weight wherever no gradient is recorded.

    The parameters are those of the layer it was made from, dense and by their old names, so that checkpoints are plain and training
    goes on as before. The copy is made anew when the weight has changed, by way of its `.data` too.
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
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        weight, bias, rows = self.sparse_weight(), self._parameters["bias"], input.reshape(-1, self.in_features)
        if self.format == "semi_structured":
            output = functional.linear(rows, weight, bias)
        elif bias is None:
            output = (weight @ rows.T).T
        else:
            output = torch.addmm(bias[:, None], weight, rows.T).T
        return output.reshape(*input.shape[:-1], self.out_features)

    def sparse_weight(self) -> Tensor:
        """The weight in the layer's format."""
        if type(self.weight) is nn.Parameter:
            self.weight.__class__ = _Watched
        weight, asked = self.weight.detach(), getattr(self.weight, "data_asked_for", 0)
        version = None if self.weight.is_inference() else self.weight._version
        state = (version, asked, weight.data_ptr(), weight.shape, weight.dtype, weight.device)
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
    """The decision for one layer.

    Attributes:
        name: of the module.
        shape: `(out, in)`; its own where it is no layer's weight.
        sparsity: share of true zeros.
        kernel: `"dense"` or the format.
        dense_ms, sparse_ms: milliseconds per batch, median; None where nothing was measured.
        reason: why the layer stays dense, `""` if it does not.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    kernel: str = "dense"
    dense_ms: float | None = None
    sparse_ms: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class SparseReport:
    """What [`to_sparse`] decided, layer by layer."""

    layers: tuple[SparseDecision, ...]

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data, ready for JSON."""
        return [asdict(layer) for layer in self.layers]

    def __rich__(self) -> Table:
        swapped = sum(layer.kernel != "dense" for layer in self.layers)
        table = Table(title=f"{swapped} of {len(self.layers)} layers run a sparse kernel")
        for column in ("module", "shape", "sparsity", "dense ms", "sparse ms", "kernel", ""):
            table.add_column(column, justify="left" if column in ("module", "kernel", "") else "right")
        for layer in self.layers:
            times = ("" if ms is None else f"{ms:.2f}" for ms in (layer.dense_ms, layer.sparse_ms))
            table.add_row(layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.2%}", *times, layer.kernel, layer.reason)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def to_sparse(model: Any, format: str = "csr", tokens: int = 1024, repeats: int = 5, margin: float = 0.05) -> SparseReport:
    """Use sparse weights in those layers of a model's body where that is faster, and print the decisions.

    Each Linear that has zeros forwards the same random batch both ways in turn, on one thread, and stays dense unless the sparse
    kernel gives the same and takes clearly less CPU time (on CUDA: time). The saved checkpoint stays dense and plain, and loads
    anywhere as the dense model; call this again after loading.

    Args:
        model: changed in place. Its layers run the sparse kernel where no gradient is recorded (`torch.no_grad()`, as in
            `pipeline`, `generate` and `Trainer.evaluate`) and train as before.
        format: `"csr"` for single zeros and 4x1, `"bsr"` for square blocks, `"semi_structured"` for 2:4 (CUDA only).
        tokens: rows of the measured batch: the number you will run at a time.
        repeats: timed forward passes of each kind.
        margin: share of the dense time that must be saved.

    Raises:
        ValueError: the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: allowed are {', '.join(map(repr, FORMATS))}.")
    decisions = []
    for weight in list(body_weights(model)):
        decision = _decide(weight, format, tokens, repeats, margin)
        decisions.append(decision)
        if decision.kernel != "dense" and isinstance(weight.module, nn.Linear):
            bare_model(model).set_submodule(weight.name, SparseLinear(weight.module, format))
    report = SparseReport(tuple(decisions))
    print(report)
    return report


@torch.no_grad()
def _decide(weight: Weight, format: str, tokens: int, repeats: int, margin: float) -> SparseDecision:
    zeros, size = count_zeros([weight])
    decision, module = SparseDecision(weight.name, weight.shape, zeros / size if size else 0.0), weight.module
    if weight.left_out:
        return replace(decision, reason=weight.left_out)
    if not isinstance(module, nn.Linear):
        return replace(decision, reason=f"a {type(module).__name__}")
    if not zeros:
        return replace(decision, reason="no zeros")
    sparse = SparseLinear(module, format)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(tokens, module.in_features, generator=generator).to(module.weight)
    try:
        wanted, given = module(batch), sparse(batch)
        times = benchmark({"dense": module, "sparse": sparse}, {"input": batch}, repeats)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return replace(decision, reason=str(error).splitlines()[0])
    decision = replace(decision, dense_ms=times["dense"], sparse_ms=times["sparse"])
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
        return replace(decision, reason="the kernel gives something else")
    if times["sparse"] > (1 - margin) * times["dense"]:
        return replace(decision, reason="dense is as fast")
    return replace(decision, kernel=format)
