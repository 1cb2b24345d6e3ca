"""Passes over whole weights: equal to torch's own, bit by bit, on one thread and on more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from hf_prune.model.passes import count_nonzero, keep_


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 12), (8, 1), (1, 12), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_keep_is_a_product(dtype: torch.dtype, shape: tuple[int, int], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(12, 8, generator=generator).T.to(dtype) if transposed else torch.randn(8, 12).to(dtype))
    kept = torch.rand(shape, generator=generator) < 0.5
    with torch.no_grad():
        weight[0, 0], weight[1, 1], weight[2, 2] = torch.nan, -0.0, -torch.inf
    wanted, version = weight.detach() * kept, weight._version
    keep_(weight.detach(), kept)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert weight.detach().view(bits).equal(wanted.view(bits))
    assert weight._version > version


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int8])
def test_zeros_of_both_signs_are_no_values(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 1e-7, *([torch.nan, torch.inf] if dtype.is_floating_point else [])]).to(dtype)
    assert count_nonzero(values) == int(torch.count_nonzero(values))
    assert count_nonzero(nn.Parameter(torch.eye(3))) == 3
