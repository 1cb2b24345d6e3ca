"""What the tests of training share: a tiny BERT without dropout, ragged rows, and arguments for quick runs on the CPU."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_prune import LatencyTable, Pruner, PruningCallback, PruningConfig, PruningRule
from hf_prune.measure.latency_table import device_facts, model_facts
from hf_prune.model import find_blocks
from hf_prune.model.targets import Target
from hf_prune.model.units import UnitGroup, View
from hf_prune.pruning.criteria import CRITERIA
from hf_prune.pruning.updates import UPDATES
from hf_prune.settings import config as settings

VOCABULARY, LENGTH = 64, 12


#: For a tiny BERT that is timed: at 32 tokens its feed-forward blocks take most of the time, so that a few hundredths can be
#: saved on any machine, however busy.
TIMED = {"intermediate_size": 4096}


@contextmanager
def quickly_timed() -> Iterator[None]:
    """A context in which models are timed less often, feed-forward blocks at fewer widths than 43, and only one choice of sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_prune.measure.latency._FORWARDS", 1)
        patch.setattr("hf_prune.measure.latency_table._WIDTHS", 3)
        patch.setattr("hf_prune.measure.latency_table._SECONDS", 0.0)
        patch.setattr("hf_prune.pruning.costs._TRIALS", 1)
        yield


def tiny_bert(head: str = "sequence-classification", seed: int = 0, **config: Any) -> PreTrainedModel:
    """The tiny BERT of `models`, without dropout unless asked for."""
    return tiny("bert", head, seed, **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} | config)


def ragged_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Padded rows of 4 to `LENGTH` tokens. The label says whether the first token is in the upper half of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(4, LENGTH + 1, (1,), generator=generator))
        tokens = torch.randint(1, VOCABULARY, (size,), generator=generator).tolist()
        rows.append(
            {
                "input_ids": tokens + [0] * (LENGTH - size),
                "attention_mask": [1] * size + [0] * (LENGTH - size),
                "labels": int(tokens[0] >= VOCABULARY // 2),
            }
        )
    return rows


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    """Quick, quiet, on the CPU, every step logged."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 32,
        "num_train_epochs": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
    }
    return TrainingArguments(**given | overrides)


#: Twelve steps: 2 of warm-up, updates after steps 2, 4, 6, 8, 10, and 2 of cool-down.
SCHEDULED: dict[str, Any] = {"warmup_steps": 2, "cooldown_steps": 2, "frequency": 2}

ROWS = ragged_rows(48)


def trainer_for(
    folder: Path,
    config: PruningConfig | PruningCallback | dict[str, Any],
    model: PreTrainedModel | None = None,
    kind: type[Trainer] = Trainer,
    **overrides: Any,
) -> Trainer:
    """A Trainer for two epochs of six steps, with pruning. `overrides`: arguments of `Trainer` and of `TrainingArguments`."""
    extra = {name: overrides.pop(name) for name in set(inspect.signature(Trainer).parameters) & set(overrides)}
    callback = config if isinstance(config, PruningCallback) else PruningCallback(config)
    callbacks = [callback, *extra.pop("callbacks", [])]
    if "model_init" not in extra:
        extra["model"] = tiny_bert() if model is None else model
    args = arguments(folder, **{"num_train_epochs": 2} | overrides)
    return kind(args=args, callbacks=callbacks, **{"train_dataset": ROWS} | extra)


def pruner_of(trainer: Trainer) -> Pruner:
    """The pruner of the callback that is at work, which is another one after states were restored."""
    (callback,) = (item for item in trainer.callback_handler.callbacks if isinstance(item, PruningCallback))
    assert callback.pruner is not None
    return callback.pruner


def with_dropout(seed: int) -> PreTrainedModel:
    """A tiny BERT with dropout."""
    return tiny_bert(seed=seed, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


class Gradients(TrainerCallback):
    """Keeps a copy of the complete gradients of every optimizer step, by parameter name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, *args: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        named = ((name, parameter.grad) for name, parameter in model.named_parameters())
        self.steps.append({name: gradient.clone() for name, gradient in named if gradient is not None})


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, by name."""
    return copy.deepcopy(model.state_dict())


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert that two sets of tensors have the same names and are equal bit for bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def forget_criterion(name: str) -> None:
    """Undo `register_criterion`."""
    CRITERIA.pop(name, None)
    for names in (settings.CRITERIA, *settings.DECLARED.values()):
        names.discard(name)


def forget_update(name: str) -> None:
    """Undo `register_update`."""
    UPDATES.pop(name, None)
    settings.UPDATES.discard(name)


def prune_at_once(model: torch.nn.Module, config: PruningConfig) -> None:
    """Let a pruner go through one step of a loop, with a criterion that reads no gradients."""
    pruner = Pruner(model, config, total_steps=1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    pruner.observe()
    pruner.step()
    pruner.finish()
    model.zero_grad()


def elements(group: UnitGroup) -> Iterator[tuple[int, str, int, int]]:
    """`(unit, parameter name, row, column)` of every weight of a group, spelled out."""
    for view in group.weights:
        columns = view.target.shape[1] // view.width
        for place, row in enumerate(torch.arange(view.target.shape[0])[view.rows].tolist()):
            for column in range(view.target.shape[1]):
                yield place // view.height * columns + column // view.width, view.target.name, row, column


def unit_group(name: str, units: int, size: int = 1, n_of_m: tuple[int, int] | None = None) -> UnitGroup:
    """Units of `size` weights, side by side in one row each."""
    target = Target(f"{name}.weight", name, nn.Parameter(torch.ones(units, size)))
    return UnitGroup(name, (View(target, 1, size),), n_of_m=n_of_m)


def rules(family: str) -> list[PruningRule]:
    """Heads, or groups of them, and neurons, which share a target."""
    return [PruningRule(pattern="kv_group" if family == "llama" else "head"), PruningRule(pattern="neuron")]


def table_of(model: Any, file: Path, milliseconds: float = 1.0) -> Path:
    """A made-up table: a head costs `milliseconds`, a neuron a hundredth; three heads cost as much as four."""
    blocks: dict[str, dict[int, float]] = {}
    for block in find_blocks(model):
        each = milliseconds * (0.01 if block.unit == "neuron" else 1.0)
        blocks[block.name] = {units: each * units for units in range(0, block.num_units + 1, block.units_per_group)}
        if block.unit == "head" and 3 in blocks[block.name]:
            blocks[block.name][3] = each * 4
    total = 1.0 + sum(costs[max(costs)] for costs in blocks.values())
    LatencyTable(model_facts(model), {"name": "no machine"}, {}, total, blocks).save(file)
    return file


def timed_here(file: Path, model: Any, **setting: Any) -> Path:
    """A made-up table that says that it was measured on this machine."""
    table = LatencyTable.load(table_of(model, file))
    given = {"batch_size": 2, "length": 8, "dtype": "float32", "threads": 1, "runtime": "torch"} | setting
    replace(table, device=device_facts(torch.device("cpu"), given["runtime"]), setting=given).save(file)
    return file


def hooks(model: PreTrainedModel) -> list[str]:
    """The modules and parameters that have one."""
    found = [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return found + [name for name, item in model.named_parameters() if getattr(item, "_post_accumulate_grad_hooks", None)]


def prepare_for_half_precision(model: Any) -> None:
    """Put around the forward of a model what accelerate puts there in a Trainer with `bf16=True`, whatever ran before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
