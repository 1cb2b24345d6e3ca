"""Condensing is all or nothing, wherever it is cut short, and leaves a model like any other: shared, copied, pickled."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import linecache
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import models
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import hf_prune
from hf_prune import condense
from hf_prune.model import find_blocks
from hf_prune.model.lora import RoundsToBase
from hf_prune.shrink.depth import drop_layers

CONDENSING = str(Path(hf_prune.__file__).parent / "condense")


# -------------------------------------------------------------------------------------------------------------- all or nothing


class Lines:
    """Counts the lines that run in `hf_prune/condense`, and raises at one of them.

    But not where a body under `torch.device` ends: the device that tensors are made on by default is torch's, and stays if
    something is raised there, between the body and the end of the context.
    """

    def __init__(self, error: type[BaseException] | None = None, at: int = -1) -> None:
        self.error, self.at = error, at
        self.seen: list[tuple[str, int]] = []

    def __enter__(self) -> Lines:
        sys.settrace(self._call)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        return self._line if frame.f_code.co_filename.startswith(CONDENSING) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not source.lstrip().startswith("with torch.device("):
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if self.error is not None and len(self.seen) - 1 == self.at:
                raise self.error("injected")
        return self._line


def everything(model: nn.Module, same_parameters: bool = True) -> dict[str, object]:
    """All that a model is, for comparison: objects by identity, configs and tensors by what they hold as well.

    Args:
        same_parameters: parameters by identity, too. That of one that nobody else has is nobody's business.
    """
    seen: dict[str, object] = {"random": torch.get_rng_state().tolist()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entry = [(item, id(part)) for item, part in value.items()] if isinstance(value, dict) else value
            if key == "_parameters" and not same_parameters:
                entry = list(value)
            if isinstance(value, transformers.PreTrainedConfig):
                entry = value.to_dict() | {"attention": value._attn_implementation}
            seen[f"{name}.{key}"] = (id(value), entry if isinstance(entry, (dict, list, int, float, str)) else None)
        seen[f"{name}/"] = (id(module), type(module))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        identity = (id(tensor), tensor.data_ptr()) if same_parameters or not isinstance(tensor, nn.Parameter) else type(tensor)
        values = hash(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
        seen[f"{name}/"] = (identity, tensor.dtype, tensor.shape, tensor.requires_grad, values)
    return seen


def small_llama() -> nn.Module:
    model = models.tiny("llama-with-biases", "causal-lm")
    models.prune_randomly(model)
    models.empty_layers(model, {1})
    model.model.layers[1].train()
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return model


def small_t5() -> nn.Module:
    model = models.tiny("t5", "seq2seq-lm", num_layers=2, num_decoder_layers=2).to(torch.bfloat16)
    models.prune_randomly(model)
    models.empty_layers(model, {1})
    model.set_attn_implementation("eager")
    return model.train()


def small_lora() -> nn.Module:
    model = models.tiny("bert", num_hidden_layers=2).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(target_modules=["query", "value", "dense"], r=2, task_type="SEQ_CLS"))
    for block in find_blocks(model)[:2]:
        models.zero_units(block, [1, 2], "out")
    return model


CUT_SHORT = {"llama": small_llama, "t5 in bfloat16": small_t5, "bert under LoRA": small_lora}
ERRORS = [MemoryError, RuntimeError, KeyboardInterrupt]


def check_cut_short(build: Callable[[], nn.Module], errors: Callable[[int], list[type[BaseException]]], stride: int) -> None:
    """Raise at the first and at the last time that each `stride`-th line of condensing runs: the model is as before, or done.

    Every other time somebody else has the parameters, as an optimizer does: then they are the same objects.
    """
    model = build()
    with Lines() as lines:
        condense(model)
    condensed = shapes(model)
    first = {line: event for event, line in reversed(list(enumerate(lines.seen)))}
    last = {line: event for event, line in enumerate(lines.seen)}
    chosen = [event for line in sorted(last)[::stride] for event in {first[line], last[line]}]
    model = build()
    put_back = 0
    for number, event in enumerate(chosen):
        for error in errors(number):
            shared = [*model.parameters()] if put_back % 2 else []
            before = everything(model, bool(shared))
            with Lines(error, event), contextlib.suppress(error):
                condense(model)
            if shapes(model) == condensed:  # it was done by then
                model = build()
                continue
            now = everything(model, bool(shared))
            assert {key: (value, now.get(key)) for key, value in before.items() if now.get(key) != value} == {}, lines.seen[event]
            assert now.keys() == before.keys(), lines.seen[event]
            put_back += 1
    assert put_back > len(chosen) / 2


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CUT_SHORT)
def test_cut_short_the_model_is_as_before(case: str) -> None:
    check_cut_short(CUT_SHORT[case], lambda number: [ERRORS[number % len(ERRORS)]], stride=24)


@pytest.mark.slow
@pytest.mark.parametrize("case", CUT_SHORT)
def test_cut_short_anywhere_the_model_is_as_before(case: str) -> None:
    check_cut_short(CUT_SHORT[case], lambda number: ERRORS, stride=1)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("memory", ["at first", "in the middle"])
def test_no_memory_to_verify_in_float64(memory: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    shared = [*model.parameters()]
    before, double, calls = everything(model), torch.Tensor.double, itertools.count()
    enough = {"at first": 0, "in the middle": 60}[memory]

    def limited(tensor: torch.Tensor) -> torch.Tensor:
        if next(calls) == enough:
            raise error("injected")
        return double(tensor)

    with monkeypatch.context() as patch, contextlib.suppress(error):
        patch.setattr(torch.Tensor, "double", limited)
        condense(model)
        assert error is not KeyboardInterrupt  # without memory it is verified in its own dtype
    assert shared
    assert (everything(model) == before) == (error is KeyboardInterrupt)


# ----------------------------------------------------------------------------------------------- shared, copied, pickled, hooked


def test_a_teacher_made_from_the_same_config_keeps_it(tmp_path: Path) -> None:
    config = models.FAMILIES["llama"]()
    teacher, student = (models.randomize(transformers.LlamaForCausalLM(config)).eval() for _ in range(2))
    models.prune_randomly(student)
    models.empty_layers(student, {1})
    said = teacher.config.to_dict()
    condense(student)
    assert teacher.config.to_dict() == said
    assert {id(module.config) for module in student.modules() if hasattr(module, "config")}.isdisjoint([id(config)])
    teacher.save_pretrained(tmp_path / "teacher")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert again.state_dict().keys() == teacher.state_dict().keys()
    student.set_attn_implementation("eager")
    assert all(module.config._attn_implementation == "eager" for module in student.modules() if hasattr(module, "config"))


def test_drop_layers_leaves_a_shared_config_alone() -> None:
    config = models.FAMILIES["llama"]()
    teacher, student = (models.randomize(transformers.LlamaForCausalLM(config)).eval() for _ in range(2))
    models.empty_layers(student, {1})
    assert drop_layers(student) == ["layers.1"]
    assert (student.config.num_hidden_layers, teacher.config.num_hidden_layers) == (2, 3)


@pytest.mark.parametrize("family", models.EVERY_FAMILY)
def test_condensed_models_are_pickled_and_keep_no_hooks(family: str) -> None:
    model = models.tiny(family)
    models.prune_randomly(model)
    for block in find_blocks(model):  # a first layer without heads has the most adapted class
        if block.kind == "attention" and block.layer.endswith(".0"):
            models.zero_units(block, list(range(block.num_units)), "out")
    condense(model)
    assert [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks] == []
    twins = [copy.deepcopy(model)]
    if not any(map(parametrize.is_parametrized, model.modules())):  # wav2vec2's convolution, which torch pickles in no model
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twins.append(torch.load(stream, weights_only=False))
    for twin in twins:
        assert [type(module).__name__ for module in twin.modules()] == [type(module).__name__ for module in model.modules()]
        with torch.no_grad():
            batch = models.ragged_batch(model)
            assert torch.equal(twin(**batch)[0], model(**batch)[0])


class Collator:
    """Holds a model, as `DataCollatorForSeq2Seq` does, so a worker process is sent it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, rows: list[int]) -> list[str]:
        return [type(module).__name__ for module in self.model.modules()]


@pytest.mark.slow
def test_condensed_models_are_sent_to_workers() -> None:
    model = models.tiny("t5", "seq2seq-lm")
    models.prune_randomly(model)
    collator = Collator(condense(model))
    loader = DataLoader([1], collate_fn=collator, num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == [collator([1])]


def test_what_rounds_like_its_base_layer_under_lora_is_pickled() -> None:
    model = condense(small_lora())
    assert [module for module in model.modules() if isinstance(module, RoundsToBase)]
    again = pickle.loads(pickle.dumps(model))
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
