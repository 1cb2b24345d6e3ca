"""The latency table: every block of every family at every size, bit for bit through a file, and refused where it is not true."""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import CommandLine
from helpers import assert_equal, prepare_for_half_precision, quickly_timed, snapshot
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES, ragged_batch, tiny, zero_units
from safetensors.torch import save_file
from torch import nn

import hf_prune.measure.latency_table as module
from hf_prune import ConfigError, LatencyTable, condense, latency_table, sparsity_report
from hf_prune.condense.snapshot import unchanged
from hf_prune.measure import running
from hf_prune.measure.running import prepared
from hf_prune.model import find_blocks


@pytest.fixture(scope="module", autouse=True)
def quick_timing() -> Iterator[None]:
    with quickly_timed():
        yield


def quick(model: Any, **settings: Any) -> LatencyTable:
    return latency_table(model, **{"batch_size": 2, "length": 8, "repeats": 1} | settings)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return quick(tiny())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_of_every_family(family: str) -> None:
    model = tiny(family)
    table = quick(model)
    assert {name: max(costs) for name, costs in table.blocks.items()} == {
        block.name: block.units for block in sparsity_report(model).blocks
    }
    assert all(costs[0] == 0.0 <= min(costs.values()) for costs in table.blocks.values())
    assert table.total > 0
    assert table.fixed == pytest.approx(table.total - sum(max(costs.items())[1] for costs in table.blocks.values()))
    table.check(model)


def test_sizes_are_those_that_condensing_leaves() -> None:
    sizes = [list(costs) for costs in quick(tiny("bert", intermediate_size=200)).blocks.values()]
    assert sizes[0] == [0, 1, 2, 3, 4]
    assert sizes[1] == [0, 128, 162, 180, 192, 200]
    grouped = quick(tiny("llama")).blocks["model.layers.0.self_attn"]
    assert list(grouped) == [0, 1, 2, 4, 6, 8]  # of three heads in two groups a fourth stays, masked


def test_blocks_that_are_alike_cost_the_same() -> None:
    model = tiny()
    first = find_blocks(model)[1]
    zero_units(first, [0, 1], "out")
    costs = list(quick(condense(model)).blocks.values())
    assert max(costs[1]) == 38
    assert costs[3] == costs[5] != costs[1]
    assert costs[2] == costs[4] != costs[0]  # its neighbour is another


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "mpnet", "t5"])
def test_a_size_is_a_smaller_model(family: str) -> None:
    """All blocks of a kind have it, the others are as they were, and it runs; without any block it runs, too."""
    model = tiny(family)
    kinds, names = module.block_kinds(model, find_blocks(model)), [block.name for block in find_blocks(model)]
    dense, batch = dict(zip(names, (block.num_units for block in find_blocks(model)))), ragged_batch(model, rows=1)
    assert sorted(block.name for kind in kinds for block in kind.blocks) == sorted(names)
    for number, kind in enumerate(kinds):
        size = kind.sizes[len(kind.sizes) // 2]
        with unchanged(model), torch.no_grad():
            module.resize(model, kinds, (number, size))
            left = dense | {block.name: size for block in kind.measured}
            assert all(block.num_units == left[block.name] for block in find_blocks(model))
            assert model(**batch).logits.isfinite().all()
    with unchanged(model), torch.no_grad():
        module.resize(model, kinds, module.GONE)
        assert {block.num_units for block in find_blocks(model)} == {0}
        assert model(**batch).logits.isfinite().all()
    assert {block.name: block.num_units for block in find_blocks(model)} == dense


def test_of_a_deep_model_some_layers_are_measured() -> None:
    model = tiny("modernbert", num_hidden_layers=20, layer_types=["full_attention", "sliding_attention"] * 10)
    kinds = module.block_kinds(model, find_blocks(model))
    # attention and neurons of the first layer, which has no norm, of the other global layers and of local ones
    assert sorted(len(kind.blocks) for kind in kinds) == [1, 1, 9, 9, 10, 10]
    for number, kind in enumerate(kinds):
        with unchanged(model):
            module.resize(model, kinds, (number, 1))
            cut = [block for block in find_blocks(model) if block.num_units == 1]
            assert len(cut) == len(kind.measured) == min(len(kind.blocks), 6)
            assert model.config.num_hidden_layers == len({block.layer for block in find_blocks(model)}) <= 7
            model(**ragged_batch(model))
    assert model.config.num_hidden_layers == 20


@pytest.mark.parametrize("together", [0.0, 2.0])
def test_what_kinds_cost_together_is_shared(together: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A time that is linear in both kinds, and higher where both are there, comes back along the diagonal."""
    monkeypatch.setattr(module, "_WIDTHS", 43)
    model = tiny()
    kinds = module.block_kinds(model, find_blocks(model))
    heads, neurons = (kind.sizes[-1] for kind in kinds)

    def taken(head: int, neuron: int) -> float:
        first, second = head / heads, neuron / neurons
        return 5 + 6 * first + 9 * second + together * first * second

    times = {(0, size): taken(size, neurons) for size in kinds[0].sizes} | {
        (1, size): taken(heads, size) for size in kinds[1].sizes
    }
    times |= {module.DENSE: taken(heads, neurons), module.GONE: taken(0, 0)}
    table = LatencyTable({}, {}, {}, times[module.DENSE], module.costs_of(kinds, times))
    assert table.fixed == pytest.approx(5)
    for head in range(heads + 1):
        units = {"head": head, "neuron": neurons * head // heads}
        predicted = table.fixed + sum(table.milliseconds(block.name, units[block.unit]) for block in find_blocks(model))
        assert predicted == pytest.approx(taken(*units.values()), rel=0.01)


def test_turns_at_which_the_machine_was_slow_count_as_others() -> None:
    times = {(-1, 1): [[4.0, 4.0], [8.0], [4.0]], (-1, 0): [[1.0], [2.0], [1.0]], (0, 1): [[3.0], [6.0], [3.0]]}
    assert module.slowness(times) == [1.0, 2.0, 1.0]


SIZES = [16, 20, 33, 40, 64, 65, 100, 128, 160, 192, 200, 256, 300, 320]


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.floats(0, 10))
def test_what_lies_on_a_curve_stays(coefficients: list[float], error: float) -> None:
    values = [coefficients[0] + coefficients[1] * size / 100 + coefficients[2] * (size / 100) ** 2 for size in SIZES]
    assert module.evened(SIZES, values, [error] * len(SIZES)) == pytest.approx(values, abs=1e-8)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=len(SIZES)))
def test_without_errors_or_with_few_sizes_timings_stay(values: list[float]) -> None:
    for count, error in ((len(values), 0.0), (min(len(values), 3), 5.0)):
        assert module.evened(SIZES[:count], values[:count], [error] * count) == pytest.approx(values[:count], abs=1e-6)


def test_chance_is_evened_out_and_an_odd_size_is_not() -> None:
    generator, true = np.random.default_rng(0), np.array(SIZES) / 10 + 3
    before, after = [], []
    for _ in range(200):
        values = true + generator.normal(0, 2, len(SIZES))
        before.append(np.square(values - true).mean())
        after.append(np.square(module.evened(SIZES, list(values), [2.0] * len(SIZES)) - true).mean())
    assert np.mean(after) < np.mean(before) / 3  # 3/14 are the coefficients'
    odd = true + 8 * (np.array(SIZES) == 65)
    assert module.evened(SIZES, list(odd), [0.2] * len(SIZES)) == pytest.approx(odd, abs=0.3)


def test_a_size_that_was_timed_more_often_counts_more() -> None:
    """As in weighted least squares; and it is drawn toward the curve by less."""
    sizes, errors = np.array(SIZES), np.where(np.array(SIZES) == 320, 0.1, 3.0)
    generator, true = np.random.default_rng(1), np.array(SIZES) / 10
    values = true + errors * generator.normal(size=len(SIZES))
    values[-1] += 5
    values[5] += 30
    free, weights = len(SIZES) - 3, 1 / errors**2
    design = np.stack([np.ones(len(SIZES)), sizes, sizes**2], axis=1).astype(float)
    hat = design @ np.linalg.inv(design.T * weights @ design) @ (design.T * weights)
    curve = hat @ values
    beyond = (weights * (values - curve) ** 2).sum() - free
    own = beyond / (weights * (1 - np.diag(hat))).sum()
    assert own > 1
    expected = curve + own / (own + errors**2) * (values - curve)
    assert module.evened(SIZES, list(values), list(errors)) == pytest.approx(list(expected), rel=1e-6)
    assert expected[-1] == pytest.approx(values[-1], abs=0.1)


@pytest.mark.parametrize("layers", [2, 8])
def test_what_is_the_same_model_is_timed_as_one(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At full size heads and neurons are, and the dense model is, too, if no layer is absent."""
    model = tiny(num_hidden_layers=layers)
    kinds = module.block_kinds(model, find_blocks(model))
    full = [(number, kind.sizes[-1]) for number, kind in enumerate(kinds)]
    shapes = {}
    for case in [module.DENSE, *full]:
        with unchanged(model):
            module.resize(model, kinds, case)
            shapes[case] = (len({block.layer for block in find_blocks(model)}), [b.num_units for b in find_blocks(model)])
    for case in full:
        same = module.same_model(kinds, case)
        assert (same == module.DENSE) == (layers == 2)
        assert shapes[same] == shapes[case]
    assert len({module.same_model(kinds, case) for case in full}) == 1
    assert module.same_model(kinds, (0, 1)) == (0, 1)
    seen: list[int] = []
    errors: list[list[float]] = []

    def evened(sizes: list[int], values: list[float], noise: list[float]) -> list[float]:
        errors.append([error / value for error, value in zip(noise, values)])
        return values

    monkeypatch.setattr(module, "evened", evened)
    quick(model, repeats=2, progress=lambda turns: seen.append(len(turns)) or turns)
    sizes = sum(len(kind.sizes) for kind in kinds) - (2 if layers == 2 else 1)
    assert seen == [2 * (2 + sizes + 4 * (4 if layers == 2 else 5))]  # what all costs rest on has five turns instead of one
    for found in errors:
        assert found == pytest.approx([found[0]] * (len(found) - 1) + [found[0] / 5**0.5])


@pytest.mark.parametrize("scatter", [0.0, 0.4])
@pytest.mark.parametrize(("seconds", "comparisons"), [(10.0, 100), (0.29, 15), (0.0, 3)])
def test_only_a_large_model_is_compared_less_often(
    seconds: float, comparisons: int, scatter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one whose timings happen to agree: whatever else the machine does may change all of them alike."""
    taken: list[float] = []

    def timed(*_: Any) -> list[float]:
        turn, is_cut = divmod(len(taken), 2)
        taken.append(0.01 * (1 + scatter * (turn % 3 - 1)) if is_cut else 0.02)
        return taken[-1:]

    monkeypatch.setattr(module, "_timed", timed)
    monkeypatch.setattr(module, "_SECONDS", seconds)
    model = tiny()
    found = module.measured_speedup(model, module.table_setting(model, 2, 8), {find_blocks(model)[0].name: 1})
    assert len(taken) == 2 * comparisons
    assert found == pytest.approx(2)


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in pages of a file of weights."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return ".safetensors" in line
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lie_in_files_for_a_while(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `from_pretrained` leaves them; what is shared or strided stays where it is."""
    monkeypatch.setattr(running, "_FILE", 1000)  # so that there are several files
    model = tiny().to(dtype)
    model.twins = nn.ParameterList([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(0))])
    model.twins.append(nn.Parameter(model.twins[0].data))
    model.strided = nn.Parameter(torch.ones(3, 5).T)
    before, places = snapshot(model), {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    with running.as_loaded(model), torch.inference_mode():
        assert_equal(snapshot(model), before)
        for name, tensor in model.named_parameters():
            assert mapped(tensor) == (name not in ("twins.0", "twins.1", "strided")), name
            assert tensor.dtype == (torch.float32 if name.startswith(("twins", "strided")) else dtype)
    assert_equal(snapshot(model), before)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places


def test_without_room_weights_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    places = [tensor.data_ptr() for tensor in model.parameters()]
    size = sum(tensor.nbytes for tensor in running.tensors_in(model) if tensor.is_floating_point())
    for free, stay in ((2 * size - 1, True), (2 * size, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with running.as_loaded(model):
            assert ([tensor.data_ptr() for tensor in model.parameters()] == places) is stay


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of pages")
def test_a_model_and_its_sizes_are_compared_where_a_loaded_model_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which writes them once, and not in each turn."""
    model = tiny()
    block = next(block for block in find_blocks(model) if block.unit == "neuron")
    written: list[int] = []
    widths: list[int] = []

    def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
        written.append(len(tensors))
        save_file(tensors, file)

    def timed(inner: Any, *_: Any) -> list[float]:
        assert all(mapped(parameter) for parameter in inner.parameters())
        widths.append(len(inner.bert.get_submodule(block.layer).intermediate.dense.weight))
        return [1.0]

    monkeypatch.setattr(running, "save_file", save)
    monkeypatch.setattr(module, "_timed", timed)
    module.measured_speedup(model, module.table_setting(model, 2, 8), {block.name: 8}, repeats=3)
    assert widths == [40, 8] * 3
    assert written == [len(list(model.parameters())), 3]
    assert not any(mapped(parameter) for parameter in model.parameters())


def test_the_standard_error_of_a_median() -> None:
    """Against medians that are drawn again and again; more values in a turn are no more turns."""
    generator = np.random.default_rng(0)
    medians = [float(np.median(generator.normal(0, 1, 25))) for _ in range(4000)]
    found = [module.standard_error(list(generator.normal(0, 1, 25)), 25) for _ in range(400)]
    assert np.mean(found) == pytest.approx(np.std(medians), rel=0.1)
    assert module.standard_error([1.0, 2.0, 3.0, 4.0] * 2, 4) == pytest.approx(
        module.standard_error([1.0, 2.0, 3.0, 4.0] * 4, 4), rel=0.2
    )
    assert module.standard_error([1.0], 1) == 0.0


def test_between_sizes_the_cost_is_linear(table: LatencyTable) -> None:
    made = LatencyTable({}, {}, {}, 10.0, {"one": {0: 0.0, 4: 1.0, 8: 5.0}})
    assert [made.milliseconds("one", units) for units in range(9)] == [0, 0.25, 0.5, 0.75, 1, 2, 3, 4, 5]
    assert made.fixed == 5.0
    for name, costs in table.blocks.items():
        assert {units: table.milliseconds(name, units) for units in costs} == costs
    with pytest.raises(ConfigError, match=r"units=9: must be from 0 to 8, the size of one"):
        made.milliseconds("one", 9)
    with pytest.raises(ConfigError, match="units=-1"):
        made.milliseconds("one", -1)
    with pytest.raises(ConfigError, match="block='two': must be a block of the table, one of one"):
        made.milliseconds("two", 1)


@pytest.mark.slow
def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDTHS", 1)
    model = tiny(num_hidden_layers=2)
    before = snapshot(model)
    table = quick(model, runtime="compile")
    assert table.setting["runtime"] == "compile"
    assert [list(costs) for costs in table.blocks.values()] == [[0, 1, 2, 3, 4], [0, 40]] * 2
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_onnx_runtime_runs_the_model_that_is_timed(family: str) -> None:
    """It gives what the model gives, at a size of one kind of blocks, and without any block."""
    model = tiny(family).eval()
    kinds, inputs = module.block_kinds(model, find_blocks(model)), ragged_batch(model)
    inputs.pop("labels", None)
    for case in ((0, kinds[0].sizes[1]), module.GONE):
        with unchanged(model), torch.no_grad():
            module.resize(model, kinds, case)
            expected, found = model(**inputs).logits, prepared(model, inputs, "onnx")()
        assert min(np.abs(one - expected.numpy()).max() for one in found if one.shape == expected.shape) < 1e-5


def test_onnx_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"runtime='onnx': needs onnxruntime; `pip install hf-prune\[onnx\]`"):
        quick(tiny(), runtime="onnx")


def test_a_table_for_onnx_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WIDTHS", 1)
    model = tiny(num_hidden_layers=1, num_attention_heads=2)
    before = snapshot(model)
    table = quick(model, runtime="onnx")
    assert (table.setting["runtime"], table.setting["attn_implementation"]) == ("onnx", "eager")
    assert table.device["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert [list(costs) for costs in table.blocks.values()] == [[0, 1, 2], [0, 40]]
    assert table.is_from_here(model)
    built: list[int] = []
    monkeypatch.setattr(module, "prepared", lambda inner, *given: built.append(inner.num_parameters()) or prepared(inner, *given))
    assert module.measured_speedup(model, table.setting, dict.fromkeys(table.blocks, 0)) > 0
    assert built == [model.num_parameters(), model.num_parameters() - 4 * 32 * 32 - 2 * 32 * 40 - 3 * 32 - 40]  # once each
    assert_equal(snapshot(model), before)


def test_half_precision_of_a_trainer_is_left_out_and_left_alone() -> None:
    """accelerate puts autocast around the forward of a model: no dtype that a table has would be true."""
    model = tiny()
    seen: list[bool] = []
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    prepare_for_half_precision(model)
    module.measured_speedup(model, quick(model).setting, {block.name: 1 for block in find_blocks(model)}, repeats=1)
    assert set(seen) == {False}
    model(**ragged_batch(model))
    assert seen[-1]


def test_the_model_is_left_as_it_was() -> None:
    model = tiny().train()
    model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([1])).loss.backward()
    before, config = snapshot(model), model.config.to_dict()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    copies = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    identities = [id(parameter) for parameter in model.parameters()]
    handle = model.register_forward_hook(lambda *inputs: None)
    hooks = dict(model._forward_hooks)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    threads = torch.get_num_threads()

    quick(model, dtype="bfloat16", threads=2)
    assert_equal(snapshot(model), before)
    assert model.dtype == torch.float32
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(parameter.grad is gradients[name] for name, parameter in model.named_parameters())
    assert_equal({name: gradient for name, gradient in gradients.items() if gradient is not None}, copies)
    assert model.config.to_dict() == config
    assert dict(model._forward_hooks) == hooks
    assert all(module.training for module in model.modules())
    assert torch.get_num_threads() == threads
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert now[:2] == states[:2]
    assert torch.equal(now[2], states[2])
    handle.remove()


def test_a_file_keeps_every_bit(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "tables" / "one.json")
    again = LatencyTable.load(tmp_path / "tables" / "one.json")
    assert again == table
    assert again.to_dict() == table.to_dict()
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["one.json"]


BLOCK = "bert.encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data.pop("total"), "total=None: must be a number, 0 or more"),
        (lambda data: data.update(total=float("nan")), "total=nan: must be a number, 0 or more"),
        (lambda data: data.update(device=[]), "device=[]: must be an object"),
        (lambda data: data.pop("blocks"), "blocks=None: must be an object"),
        (lambda data: data["blocks"].pop(BLOCK), "must be those of `model`"),
        (lambda data: data["blocks"].update({BLOCK: 3}), f"blocks.{BLOCK}=3: must be an object"),
        (lambda data: data["blocks"][BLOCK].update({"2": -1.0}), f"blocks.{BLOCK}.2=-1.0: must be a number, 0 or more"),
        (lambda data: data["blocks"][BLOCK].update({"half": 1.0}), "from numbers of units to milliseconds"),
        (lambda data: data["blocks"][BLOCK].update({"0": 1.0}), "must have 0 units, at no cost, and all 4"),
        (lambda data: data["blocks"][BLOCK].pop("4"), "must have 0 units, at no cost, and all 4"),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, table: LatencyTable, tmp_path: Path) -> None:
    data = json.loads(json.dumps(table.to_dict()))
    damage(data)
    file = tmp_path / "table.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as caught:
        LatencyTable.load(file)
    assert str(caught.value).startswith(f"latency_table={str(file)!r}: is damaged: ")
    assert message in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"latency_table='.*missing.json': cannot be read \(No such file"):
        LatencyTable.load(tmp_path / "missing.json")
    (tmp_path / "half.json").write_text('{"model": {')
    with pytest.raises(ConfigError, match=r"latency_table='.*half.json': is damaged: .*is not valid JSON"):
        LatencyTable.load(tmp_path / "half.json")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"intermediate_size": 48}, "bert.encoder.layer.0.intermediate.dense.units is 40 in the table and 48 here"),
        ({"num_hidden_layers": 2}, "bert.encoder.layer.2.attention.self is {.*} in the table and None here"),
        ({"hidden_size": 64}, "hidden_size is 32 in the table and 64 here"),
        (
            {"family": "electra"},
            "class is 'BertForSequenceClassification' in the table and 'ElectraForSequenceClassification' here",
        ),
        ({"head": "masked-lm"}, "class is 'BertForSequenceClassification' in the table and 'BertForMaskedLM' here"),
    ],
)
def test_the_table_of_another_model_is_refused(other: dict[str, Any], message: str, table: LatencyTable) -> None:
    for elsewhere in (False, True):
        with pytest.raises(ConfigError, match=f"was measured of another model: .*{message}"):
            table.check(tiny(**other), elsewhere=elsewhere)


@pytest.mark.parametrize(("name", "value"), [("name", "Abacus"), ("cores", 1000), ("torch", "1.0"), ("type", "cuda")])
def test_the_table_of_another_machine_is_refused(name: str, value: object, table: LatencyTable) -> None:
    other = LatencyTable(**vars(table) | {"device": {**table.device, name: value}})
    with pytest.raises(ConfigError, match=f"was measured elsewhere: {name} is {value!r} in the table and .* here"):
        other.check(tiny())
    other.check(tiny(), elsewhere=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number of rows, 1 or more"),
        ({"length": 1.5}, "length=1.5: must be a whole number of tokens, 1 or more"),
        ({"threads": 0}, "threads=0: must be a whole number of threads"),
        ({"repeats": 0}, "repeats=0: must be a whole number of turns"),
        ({"dtype": "float31"}, "dtype='float31': must be one of .* Did you mean 'float32'?"),
        ({"runtime": "compiled"}, "runtime='compiled': must be one of torch, compile, onnx. Did you mean 'compile'?"),
        ({"runtime": "onnx", "dtype": "bfloat16"}, "dtype='bfloat16': must be 'float32' in ONNX Runtime"),
        ({"length": 41}, "length=41: must be at most 40, what BertForSequenceClassification has positions for"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quick(tiny(), **settings)


def test_a_decoder_without_padding_classifies_one_row() -> None:
    model = tiny("gpt2", pad_token_id=None)
    with pytest.raises(ConfigError, match=r"batch_size=2: must be 1: GPT2ForSequenceClassification has no padding token"):
        quick(model)
    assert quick(model, batch_size=1).setting["inputs"]["input_ids"] == [1, 8]


def test_the_longest_rows() -> None:
    assert quick(tiny("roberta"), length=38).setting["inputs"]["input_ids"] == [2, 38]
    with pytest.raises(ConfigError, match="length=39: must be at most 38"):
        quick(tiny("roberta"), length=39)


def test_the_command(cli: CommandLine, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    size = ("--batch-size", 2, "--length", 8, "--repeats", 1)
    printed = cli.json("latency", tmp_path / "model", tmp_path / "tables" / "one.json", *size, "--dtype", "bfloat16")
    table = LatencyTable.load(tmp_path / "tables" / "one.json")
    assert printed == {"path": str(tmp_path / "tables" / "one.json"), **json.loads(json.dumps(table.to_dict()))}
    assert (table.setting["dtype"], table.setting["inputs"]["input_ids"]) == ("bfloat16", [2, 8])
    table.check(model)

    before = (tmp_path / "tables" / "one.json").read_bytes()
    cli("latency", tmp_path / "model", tmp_path / "tables" / "one.json", *size, code=1)
    assert f"OUT={tmp_path / 'tables' / 'one.json'}: exists; give a new file." in cli.err
    assert (tmp_path / "tables" / "one.json").read_bytes() == before
    for wrong, code in ((("--dtype", "float31"), 1), (("--runtime", "onyx"), 1), (("--threads", 0), 2), (("--device", "cuba"), 1)):
        cli("latency", tmp_path / "model", tmp_path / "two.json", *size, *wrong, code=code)
        assert wrong[0].removeprefix("--") in cli.err
    assert not (tmp_path / "two.json").exists()
    shown = cli("latency", tmp_path / "model", tmp_path / "two.json", *size)
    assert "bert.encoder.layer.2.intermediate.dense" in shown
    assert "batch_size 2, length 8, dtype float32, threads 1, runtime torch" in shown


def test_what_is_written_down(table: LatencyTable) -> None:
    assert {key: table.setting[key] for key in ("batch_size", "length", "dtype", "threads", "runtime")} == {
        "batch_size": 2,
        "length": 8,
        "dtype": "float32",
        "threads": 1,
        "runtime": "torch",
    }
    assert table.setting["inputs"]["input_ids"] == [2, 8]
    assert table.device["torch"] == torch.__version__
    assert quick(tiny("vit")).setting["length"] is None
