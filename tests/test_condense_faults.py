"""Faults of the cut, injected one by one: verification refuses each, and the model is put back as it was.

Nobody else has the parameters, so those that were cut are made anew from their parts, see `condense/snapshot.py`.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import math
import platform
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune import condense
from hf_prune.condense import cutting, forwards, resize, verify, wide
from hf_prune.condense.layers import layer_counts
from hf_prune.condense.plan import BlockPlan, CondensePlan, plan_block
from hf_prune.condense.snapshot import Snapshot, return_memory
from hf_prune.model import Block, Projection, find_blocks

condensing = importlib.import_module("hf_prune.condense")

Patch = pytest.MonkeyPatch
Fault = Callable[[Patch], None]


def after_cutting(patch: Patch, change: Callable[[Block], None]) -> None:
    """Do something to each block that has been cut and has something left."""
    keep = cutting.keep_units

    def faulty(block: Block, units: Tensor, groups: Tensor, **named: Any) -> None:
        keep(block, units, groups, **named)
        if len(units):
            change(block)

    patch.setattr(cutting, "keep_units", faulty)


def replaced(layer: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Another parameter in a layer's place."""
    old = layer.get_parameter(name)
    setattr(layer, name, nn.Parameter(change(old.detach()).clone(), requires_grad=old.requires_grad))


def wrong_head(patch: Patch) -> None:
    """A dead unit stays in the place of a living one."""
    keep = cutting.keep_units

    def faulty(block: Block, units: Tensor, groups: Tensor, **named: Any) -> None:
        dead = sorted(set(range(block.num_units)) - set(units.tolist()))
        if dead and len(units) and block.units_per_group == 1:
            units = groups = torch.tensor(sorted([*units.tolist()[1:], dead[0]]))
        keep(block, units, groups, **named)

    patch.setattr(cutting, "keep_units", faulty)


def shifted_rows(patch: Patch) -> None:
    """Rows of what goes into a block are one place further on than the columns of what leaves it."""

    def shift(block: Block) -> None:
        outputs = 1 if isinstance(block.inputs[-1].layer, Conv1D) else 0
        replaced(block.inputs[-1].layer, "weight", lambda weight: weight.roll(1, outputs))

    after_cutting(patch, shift)


def shifted_columns(patch: Patch) -> None:
    """Columns of what leaves a block are one place further on than the rows of what goes into it."""

    def shift(block: Block) -> None:
        inputs = 0 if isinstance(block.output.layer, Conv1D) else 1
        replaced(block.output.layer, "weight", lambda weight: weight.roll(1, inputs))

    after_cutting(patch, shift)


def shifted_adapters(patch: Patch) -> None:
    """The LoRA matrix that adds to rows of what goes into a block adds to the next ones."""

    def shift(block: Block) -> None:
        replaced(adapted(block.inputs[-1]).lora_B["default"], "weight", lambda weight: weight.roll(1, 0))

    after_cutting(patch, shift)


def forgotten_input_bias(patch: Patch) -> None:
    def forget(block: Block) -> None:
        for part in block.inputs:
            if part.layer.bias is not None:
                replaced(part.layer, "bias", torch.zeros_like)

    after_cutting(patch, forget)


def forgotten_fold(patch: Patch) -> None:
    """What dead units add is not put into the output bias."""
    patch.setattr(cutting, "fold", lambda plan: None)


def folded_twice(patch: Patch) -> None:
    fold = cutting.fold

    def faulty(plan: BlockPlan) -> None:
        fold(plan)
        if plan.shift.any():
            replaced(plan.block.output.layer, "bias", lambda bias: bias + plan.shift.to(bias))

    patch.setattr(cutting, "fold", faulty)


def stale_sizes(patch: Patch) -> None:
    """Modules keep the numbers of heads that they had."""

    def stale(module: Any, name: str, value: Any) -> None:
        if name in ("spec", "own_heads"):
            setattr(module, name, value)

    patch.setattr(resize, "set_attribute", stale)


def wrong_constant(patch: Patch) -> None:
    """A projection that has no inputs left adds something else than its bias."""
    forward = resize.NoInputs.forward

    def faulty(self: resize.NoInputs, states: Tensor) -> Tensor:
        output = forward(self, states)
        return output + torch.linspace(0, 0.01, output.shape[-1])  # a LayerNorm takes out what is the same for all features

    patch.setattr(resize.NoInputs, "forward", faulty)


def wrong_residual(patch: Patch) -> None:
    """An attention block that has no head left passes on what it was given, which its layer adds once more."""
    forward = forwards.NoHeads.forward

    def faulty(self: forwards.NoHeads, hidden_states: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
        output, weights = forward(self, hidden_states, *others, **named)
        return output + hidden_states, weights

    patch.setattr(forwards.NoHeads, "forward", faulty)


def swapped_layers(patch: Patch) -> None:
    remove = cutting.remove_layers

    def faulty(model: PreTrainedModel, spec: Any, removed: dict[str, list[int]]) -> None:
        remove(model, spec, removed)
        layers = next(iter(resize.layer_lists(model, spec.layers[0]).values()))
        layers[0], layers[1] = layers[1], layers[0]

    patch.setattr(cutting, "remove_layers", faulty)


def stale_depth(patch: Patch) -> None:
    """The config goes on counting layers that are gone."""
    remove = cutting.remove_layers

    def faulty(model: PreTrainedModel, spec: Any, removed: dict[str, list[int]]) -> None:
        remove(model, spec, removed)
        for path in removed:
            setattr(model.config, layer_counts(spec)[path], getattr(model.config, layer_counts(spec)[path]) + 1)

    patch.setattr(cutting, "remove_layers", faulty)


def stale_layer_numbers(patch: Patch) -> None:
    """Modules keep the numbers of the layers that they were in, under which a cache has their keys and values."""
    remove = cutting.remove_layers

    def faulty(model: PreTrainedModel, spec: Any, removed: dict[str, list[int]]) -> None:
        numbers = {module: module.layer_idx for module in model.modules() if hasattr(module, "layer_idx")}
        remove(model, spec, removed)
        for module, number in numbers.items():
            resize.set_attribute(module, "layer_idx", number)

    patch.setattr(cutting, "remove_layers", faulty)


def wrong_layer(patch: Patch) -> None:
    """The layer before the empty one goes."""
    remove = cutting.remove_layers
    patch.setattr(
        cutting,
        "remove_layers",
        lambda model, spec, removed: remove(model, spec, {path: [index - 1 for index in gone] for path, gone in removed.items()}),
    )


def constant_of_a_layer_forgotten(patch: Patch) -> None:
    """What a removed layer adds is not given to the block before it."""
    plan = condensing.condense_plan

    def faulty(model: PreTrainedModel, *others: Any) -> Any:
        made = plan(model, *others)
        return replace(made, blocks=tuple(replace(block, shift=plan_block(block.block, 1).shift) for block in made.blocks))

    patch.setattr(condensing, "condense_plan", faulty)


def said_sizes(patch: Patch) -> None:
    """The config has the sizes of before."""
    entry = CondensePlan.entry
    patch.setattr(CondensePlan, "entry", lambda self, before=None: entry(self, before) | {"layers": {}})


def bias_of_another_dtype(patch: Patch) -> None:
    """A bias that was folded into stays in the dtype in which it was added up."""
    fold = cutting.fold

    def faulty(plan: BlockPlan) -> None:
        fold(plan)
        if plan.shift.any():
            replaced(plan.block.output.layer, "bias", lambda bias: bias.double())

    patch.setattr(cutting, "fold", faulty)


def masked(family: str) -> PreTrainedModel:
    model = models.tiny(family)
    models.prune_randomly(model)
    return model


def under_lora(family: str) -> Any:
    """The first block has no head left, and others lack units that add nothing, or a constant: of the merged weights."""
    model = models.tiny(family)
    layers = sorted({part.name for block in find_blocks(model) for part in block.projections})
    model = get_peft_model(model, LoraConfig(target_modules=layers, r=2, init_lora_weights=False))
    for number, block in enumerate(find_blocks(model)):
        units = torch.arange(block.num_units if number == 0 else 2)
        how = "in" if block.unit == "neuron" else "out"
        models.zero_units(block, units.tolist(), how)
        if how == "out":
            adapted(block.output).lora_A["default"].weight.detach()[:, block.features(units)] = 0
        for part in (block.roles[name] for name in ("up", "gate") if how == "in" and name in block.roles):
            adapted(part).lora_B["default"].weight.detach()[part.rows[units]] = 0
    return model.eval()


def adapted(part: Projection) -> Any:
    """A layer with its adapters."""
    return part.module


def without_a_layer(family: str) -> PreTrainedModel:
    """The second layer does nothing but add a constant."""
    model = models.tiny(family)
    models.zero_units(find_blocks(model)[-1], [1, 2], "in")
    models.empty_layers(model, {1})
    return model


CUTS: list[Fault] = [wrong_head, shifted_rows, shifted_columns, wrong_constant, said_sizes]
BIASES: list[Fault] = [forgotten_input_bias, forgotten_fold, folded_twice, bias_of_another_dtype]
LAYERS: list[Fault] = [swapped_layers, stale_depth, stale_layer_numbers, wrong_layer, constant_of_a_layer_forgotten]
ADAPTED: list[Fault] = [wrong_head, shifted_rows, shifted_columns, shifted_adapters, said_sizes, swapped_layers]
CASES = [
    *((fault, masked, family) for fault in CUTS for family in ("bert", "gpt2", "llama-with-biases", "t5", "bart", "vit", "albert")),
    *((fault, masked, family) for fault in BIASES for family in ("bert", "gpt2", "llama-with-biases", "bart")),
    *((swapped_layers, masked, family) for family in ("bert", "t5", "bart", "vit")),
    *((wrong_residual, masked, family) for family in ("albert", "gpt2", "llama-with-biases", "t5")),
    *((stale_sizes, masked, family) for family in ("gpt2", "llama-with-biases", "t5")),  # others tell their heads from their width
    *((fault, under_lora, "bert") for fault in (*ADAPTED, forgotten_input_bias, forgotten_fold, folded_twice)),
    *(
        pytest.param(fault, under_lora, family, marks=pytest.mark.slow)
        for family, more in {"llama": [stale_sizes], "t5": [stale_sizes, wrong_residual]}.items()
        for fault in (*ADAPTED, *more)
    ),
    *((fault, without_a_layer, family) for fault in LAYERS for family in ("llama-with-biases", "gpt2")),
]


def values(model: nn.Module) -> dict[str, object]:
    """What every parameter and buffer holds and is."""
    return {
        name: (hashlib.sha256(bytes_of(tensor)).hexdigest(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(("fault", "build", "family"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_of_the_cut_is_refused(
    fault: Fault, build: Callable[[str], PreTrainedModel], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    before, config = values(model), model.config.to_dict()
    fault(monkeypatch)
    with pytest.raises((RuntimeError, IndexError)):
        condense(model)
    monkeypatch.undo()
    assert values(model) == before
    assert model.config.to_dict() == config
    assert condense(model).num_parameters() < sum(math.prod(shape) for _, shape, *_ in before.values())  # type: ignore[misc]


def test_parameters_that_are_cut_are_not_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = masked("bert")
    blocks = [plan.block for plan in condensing.condense_plan(model).changed]
    cut = [weakref.ref(part.layer.weight) for block in blocks for part in block.projections]
    shared = model.bert.encoder.layer[2].output.dense.weight
    shared.note, shared.grad = "mine", torch.ones_like(shared)
    query = model.bert.encoder.layer[1].attention.self.query.weight
    query.note, query.grad = "its own", torch.ones_like(query)
    query.requires_grad_(False)
    name, before = "bert.encoder.layer.1.attention.self.query.weight", query.detach().clone()
    del query, blocks
    alive: list[object] = []

    def refuse(*arguments: object) -> None:
        alive.extend(parameter for reference in cut if (parameter := reference()) is not None)
        raise RuntimeError("refused")

    monkeypatch.setattr(condensing, "compare", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        condense(model)
    assert [id(parameter) for parameter in alive] == [id(shared)]
    assert model.bert.encoder.layer[2].output.dense.weight is shared
    query = model.get_parameter(name)
    assert query.equal(before)
    assert (query.note, query.requires_grad, query.grad.sum()) == ("its own", False, before.numel())
    monkeypatch.undo()
    condense(model)
    assert shared.shape == (32, 40)


@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
def test_what_is_not_verified_is_told(even: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Mine(transformers.BertModel):
        def __init__(self, config: transformers.BertConfig, others: int) -> None:
            super().__init__(config)

    model = Mine(models.FAMILIES["bert"](), 1).eval()
    for number, block in enumerate(block for block in find_blocks(model) if block.unit == "neuron"):
        models.zero_units(block, [*range(4 if even else 4 + number)], "out")
    neurons = model.config.intermediate_size
    condense(model)
    assert model.config.intermediate_size == neurons  # no config says the size of a model that none can make
    assert all(layer.output.dense.in_features < neurons for layer in model.encoder.layer)
    assert caplog.messages == [
        "What the config says of the sizes is not verified: Mine raises TypeError: "
        f"{Mine.__qualname__}.__init__() missing 1 required positional argument: 'others'"
    ]


def test_a_check_that_is_cut_short_while_it_puts_back_leaves_the_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = masked("llama")
    wanted = verify.all_outputs(model)
    restore, calls = Snapshot.restore, itertools.count()

    def cut_short(self: Snapshot) -> None:
        if next(calls) == 0:
            model.base_model.embed_tokens._parameters.clear()
            raise MemoryError("injected")
        restore(self)

    monkeypatch.setattr(Snapshot, "restore", cut_short)
    condense(model)
    assert caplog.messages == [
        "The dtype of the outputs is not verified: LlamaForSequenceClassification raises MemoryError: injected"
    ]
    for name, value in verify.all_outputs(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-5)


def resident() -> int:
    """The memory of this process, in bytes."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads Linux's /proc, of a process with glibc")
def test_holes_in_memory_are_returned_while_a_model_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [torch.zeros(1 << 16, dtype=torch.uint8) for _ in range(1 << 9)]  # 32 MB, too small to be mapped one by one
    del others[::2]
    before = resident()
    return_memory()
    assert before - resident() > 12 << 20
    returned: list[None] = []
    monkeypatch.setattr(cutting, "return_memory", lambda: returned.append(None))
    model = masked("bert")
    blocks = [plan for plan in condensing.condense_plan(model).changed if plan.dead.any()]
    condense(model)
    assert len(returned) == len(blocks) > 1


def test_no_second_model_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.tiny("llama", "causal-lm")
    models.prune_randomly(model)
    largest: list[int] = []
    double = Tensor.double

    def counted(tensor: Tensor) -> Tensor:
        largest.append(tensor.numel())
        return double(tensor)

    monkeypatch.setattr(wide, "ELEMENTS", 256)
    monkeypatch.setattr(Tensor, "double", counted)
    condensing.observe(model)
    assert max(largest) <= max(256, 3 * 16 * 32)  # a slice of a weight, or a batch of hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_widened_as_it_is_read_a_model_computes_as_in_float64(family: str, dtype: torch.dtype) -> None:
    model = models.tiny(family).to(dtype)
    seen = condensing.observe(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()
    try:
        wanted = verify.all_outputs(model)
    except RuntimeError:  # experts have no kernel in float64, and a mask may be too large for what stays in float32
        assert not seen.wide
        return
    if not seen.wide:  # the mask of a query that sees nothing is −inf in a softmax in float32
        assert any(not value.isfinite().all() for value in wanted.values())
        return
    assert seen.outputs.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(seen.outputs[name], value, rtol=1e-12, atol=1e-12)
