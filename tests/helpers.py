"""What the tests of training share: a tiny BERT without dropout, ragged rows, and arguments for quick runs on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from models import tiny
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

VOCABULARY, LENGTH = 64, 12


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
    settings: dict[str, Any] = {
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
    return TrainingArguments(**settings | overrides)


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
