"""Patterns: element scores → unit scores → masks, against slow references; what does not fit is reported."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny
from torch import nn
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from hf_prune.model import find_blocks
from hf_prune.model.targets import Target, weight_target
from hf_prune.model.units import UnitGroup, View
from hf_prune.pruning.patterns import build_groups
from hf_prune.settings.errors import ConfigError
from hf_prune.settings.patterns import Pattern, parse_pattern


@pytest.mark.parametrize("apart", [False, True])
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2**20))
def test_view_sums_blocks_and_spreads_units(
    apart: bool, height: int, width: int, rows: int, columns: int, skip: int, seed: int
) -> None:
    """Its rows may follow each other or lie `apart`, in any order."""
    torch.manual_seed(seed)
    order = torch.randperm(skip + rows * height) if apart else torch.arange(skip + rows * height)
    whole = torch.randn(len(order), columns * width)
    masked = nn.Parameter(whole.clone())
    view = View(Target("w", "m", masked), height, width, order[skip:] if apart else slice(skip, None))
    kept = torch.rand(rows * columns) < 0.5
    sums = UnitGroup("m", (view,)).reduce(lambda target: whole, "sum")
    view.apply(kept)
    matrix, result = whole[order], masked[order]
    assert torch.equal(result[:skip], matrix[:skip])
    for unit in range(rows * columns):
        top, left = skip + unit // columns * height, unit % columns * width
        block = matrix[top : top + height, left : left + width]
        assert sums[unit] == pytest.approx(float(block.sum()), abs=1e-5)
        assert torch.equal(result[top : top + height, left : left + width], block * kept[unit])


@pytest.mark.parametrize(
    ("text", "shape", "units", "size"),
    [
        ("1x1", (8, 12), 96, 1),
        ("4x1", (8, 12), 24, 4),
        ("8x3", (8, 12), 4, 24),
        ("1xchannel", (8, 12), 8, 12),
        ("channelx1", (8, 12), 12, 8),
        ("2:4", (8, 12), 96, 1),
    ],
)
def test_units_of_a_linear(text: str, shape: tuple[int, int], units: int, size: int) -> None:
    groups, left_out = build_groups(parse_pattern(text), [("m", nn.Linear(shape[1], shape[0]))], [])
    assert not left_out
    assert (groups[0].num_units, groups[0].unit_size) == (units, size)


@pytest.mark.parametrize(
    "module",
    [nn.Linear(6, 4), Conv1D(4, 6), nn.Conv1d(3, 4, kernel_size=2), nn.Conv2d(3, 4, kernel_size=(1, 2))],
    ids=lambda m: type(m).__name__,
)
def test_every_layer_type_is_seen_as_out_in(module: nn.Module) -> None:
    target = weight_target("m", module)
    assert target.shape == (4, 6)
    groups, _ = build_groups(parse_pattern("1xchannel"), [("m", module)], [])
    kept = torch.tensor([True, False, True, True])
    groups[0].apply(kept)
    inputs = {nn.Linear: (2, 6), Conv1D: (2, 6), nn.Conv1d: (2, 3, 5), nn.Conv2d: (2, 3, 5, 5)}[type(module)]
    with torch.no_grad():
        output = module(torch.randn(inputs))
    channels = output.movedim(1, -1) if output.ndim > 2 else output
    assert bool((channels[..., 1] == 0).all())
    assert not bool((channels[..., [0, 2, 3]] == 0).any())


@pytest.mark.parametrize(
    ("text", "reason"), [("4x1", "not divisible by 4x1"), ("2:4", "6 inputs are not divisible by 4"), ("1x4", "1x4")]
)
def test_what_does_not_divide_is_left_out_with_its_reason(text: str, reason: str) -> None:
    groups, left_out = build_groups(parse_pattern(text), [("m", nn.Linear(6, 6))], [])
    assert not groups
    assert reason in left_out["m"]


@pytest.mark.parametrize(("kind", "units"), [("head", 4), ("neuron", 20)])
def test_heads_and_neurons_tie_every_matrix_they_live_in(kind: str, units: int) -> None:
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
    model = BertModel(config)
    groups, _ = build_groups(parse_pattern(kind), [], find_blocks(model))
    assert [group.num_units for group in groups] == [units, units]
    kept = torch.ones(units, dtype=torch.bool)
    kept[1] = False
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.ones_like(parameter)
    groups[0].apply(kept)
    groups[0].apply(kept, gradients=True)
    masks = {name: parameter != 0 for name, parameter in model.named_parameters() if bool((parameter == 0).any())}
    assert all(torch.equal(model.get_parameter(name).grad != 0, mask) for name, mask in masks.items())
    layer = "encoder.layer.0"
    if kind == "head":
        rows, output = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")], f"{layer}.attention.output.dense"
        gone = slice(4, 8)
    else:
        rows, output, gone = [f"{layer}.intermediate.dense"], f"{layer}.output.dense", slice(1, 2)
    assert set(masks) == {f"{name}.{part}" for name in rows for part in ("weight", "bias")} | {f"{output}.weight"}
    for name in rows:
        for part in ("weight", "bias"):
            mask = masks[f"{name}.{part}"]
            assert not bool(mask[gone].any())
            assert int((~mask).sum()) == (gone.stop - gone.start) * mask[0].numel()
    mask = masks[f"{output}.weight"]
    assert not bool(mask[:, gone].any())
    assert int((~mask).sum()) == (gone.stop - gone.start) * mask.shape[0]


def masks_of(model: nn.Module, group: UnitGroup, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a group zeroes, by parameter name, in a model without zeros: True where it is kept."""
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    group.apply(kept)
    return {name: parameter != 0 for name, parameter in model.named_parameters() if bool((parameter == 0).any())}


def test_groups_of_heads_and_the_heads_that_share_one() -> None:
    model = tiny("qwen2")
    attention = find_blocks(model)[0]
    together, alone = (build_groups(parse_pattern(kind), [], [attention])[0][0] for kind in ("kv_group", "head"))
    assert (together.num_units, together.unit_size) == (4, 2 * 8 * 32 + 8 * 32 + 8 * 32 + 32 * 2 * 8)
    assert (alone.num_units, alone.unit_size) == (8, 8 * 32 + 32 * 8)
    masks = masks_of(model, together, torch.tensor([True, False, True, True]))
    name = attention.name
    for part, rows in (("q_proj", slice(16, 32)), ("k_proj", slice(8, 16)), ("v_proj", slice(8, 16))):
        for parameter in ("weight", "bias"):
            mask = masks.pop(f"{name}.{part}.{parameter}")
            assert not bool(mask[rows].any())
            assert int((~mask).sum()) == mask[rows].numel()
    mask = masks.pop(f"{name}.o_proj.weight")
    assert not bool(mask[:, 16:32].any())
    assert int((~mask).sum()) == 32 * 16
    assert not masks
    masks = masks_of(model, alone, torch.arange(8) != 3)
    assert set(masks) == {f"{name}.q_proj.weight", f"{name}.q_proj.bias", f"{name}.o_proj.weight"}

    bert = find_blocks(tiny("bert"))[:1]
    heads, groups = (build_groups(parse_pattern(kind), [], bert)[0][0] for kind in ("head", "kv_group"))
    assert (heads.num_units, heads.unit_size, len(heads.biases)) == (groups.num_units, groups.unit_size, len(groups.biases))


def test_units_of_nesting_patterns_multiply() -> None:
    module = nn.Linear(4, 4, bias=False)
    rows, _ = build_groups(parse_pattern("1xchannel"), [("m", module)], [])
    elements, _ = build_groups(parse_pattern("1x1"), [("m", module)], [])
    rows[0].apply(torch.tensor([True, False, True, True]))
    kept = torch.ones(16, dtype=torch.bool)
    kept[0] = False
    elements[0].apply(kept)
    assert int((module.weight == 0).sum()) == 5


@pytest.mark.parametrize("text", ["", "4", "0x1", "x", "4:2", "2:2", "0:4", "4x1x1", "Head", "channel", None, 4, ["1x1"]])
def test_patterns_that_do_not_parse(text: object) -> None:
    with pytest.raises(ConfigError, match="must be 'NxM'"):
        parse_pattern(text)  # type: ignore[arg-type]


def test_levels_nest() -> None:
    levels = [parse_pattern(text).level for text in ("4x1", "2:4", "1xchannel", "channelx1", "head", "kv_group", "neuron")]
    assert levels == [0, 0, 1, 1, 2, 2, 2]
    assert Pattern("N:M", 2, 4).max_sparsity == 0.5


@pytest.mark.parametrize("family", ["bert", "gpt2", "modernbert", "llama"])
def test_blocks_by_role_are_tiles_rows_and_columns(family: str) -> None:
    """Together they hold every weight of the blocks once; a living head or neuron needs a tile in each line that decides."""
    model = tiny(family, "bare")
    found = find_blocks(model)
    groups, left_out = build_groups(parse_pattern("auto"), [], found)
    assert not left_out
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    for group in groups:
        (view,) = group.weights
        role = group.name.rsplit(".", 1)[1]
        expected = {"up": (1, view.target.shape[1]), "gate": (1, view.target.shape[1]), "down": (view.target.shape[0], 1)}
        assert (view.height, view.width) == expected.get(role, (8, 8))
        shared = family == "llama" and role == "value"
        axes = {"down": "columns", "output": "columns", "query": "", "key": ""}
        assert group.unit_axis == axes.get(role, "" if shared else "rows")
        assert bool(group.biases) == (role in ("up", "gate") and family in ("bert", "gpt2"))
        assert group.block in [block.name for block in found]
        group.apply(torch.zeros(group.num_units, dtype=torch.bool))
    names = {part.name for block in found for part in block.projections}
    for name, module in model.named_modules():
        if name in names:
            assert not module.weight.any()
