"""What `prune()` is given, checked before any work starts: the model, the config and the calibration rows."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from ..measure.sparsity import lacks_units
from ..model.changeable import check_changeable
from ..model.positions import longest_row
from ..settings.config import DECLARED, WITHOUT_TRAINING, PruningConfig
from ..settings.errors import ConfigError, closest
from .layers import Batch
from .walk import Rows

#: How many tokens are enough where the number of rows is not given, and how many rows at most.
TOKENS = 2**15
MOST_ROWS = 2048
#: What a row of no text counts for.
_PATCHES = 64
#: Fewer rows say nothing about a layer.
FEWEST_ROWS = 8
#: What in a batch is the answer, not the question.
_ANSWERS = frozenset({"labels", "label", "label_ids", "start_positions", "end_positions", "return_loss"})
#: Settings of a schedule that is over after one step.
_AT_ONCE: dict[str, Any] = {
    "schedule": "constant",
    "warmup_steps": 0,
    "warmup_epochs": None,
    "cooldown_steps": 0,
    "cooldown_epochs": None,
    "frequency": 1,
    "updates": None,
}


def check_model(model: PreTrainedModel) -> None:
    """Raise unless `prune()` can take a model.

    Raises:
        ConfigError: it lacks heads or neurons already, or see [`check_changeable`].
    """
    check_changeable(model)
    if lacks_units(model):  # the model that it should still equal is not there
        allowed = "is condensed already; prune the model before it was condensed, or train this one."
        raise ConfigError("model", type(model).__name__, allowed)


def complete(config: PruningConfig) -> PruningConfig:
    """A config with what is chosen here in the place of `"auto"`.

    Raises:
        ConfigError: a setting has a meaning while a model trains alone, or settings do not go together.
    """
    for name, settings in config.resolved_rules().items():
        if settings.criterion in DECLARED["regrows"]:
            allowed = "learns its scores while a model trains, and nothing trains here; use one that reads weights or data."
            raise ConfigError(f"{name}.criterion", settings.criterion, allowed)
    if config.is_family:
        name = str(config.cost_target)
        allowed = (
            "is a family, which a run of training makes; without training give one target at a time: "
            "`prune(..., database=folder)` makes further ones cheap."
        )
        raise ConfigError(name, getattr(config, name), allowed)
    if config.keep_zeros:
        raise ConfigError("keep_zeros", True, "keeps weights zero while they train; here nothing but units that go becomes zero.")
    return config.filled(**WITHOUT_TRAINING)


def at_once(config: PruningConfig) -> PruningConfig:
    """A complete config without its schedule, since everything happens at once.

    Raises:
        ConfigError: see [`complete`].
    """
    config = complete(config)
    inherited: dict[str, Any] = dict.fromkeys(_AT_ONCE)
    rules = [replace(rule, **inherited) for rule in config.rules]
    return replace(config, **_AT_ONCE, rules=rules)


def calibration(
    model: PreTrainedModel, dataloader: Iterable[Any], rows: int | None, held_out: float, labels: bool, seed: int
) -> Rows:
    """The first rows of a dataloader on the model's device.

    Args:
        model: the model.
        dataloader: batches as the model's forward takes them, dictionaries of tensors.
        rows: how many; by default as many as it takes for `TOKENS` tokens, up to `MOST_ROWS`. Fewer if there are no more.
        held_out: the share of rows that is held out.
        labels: whether labels stay in the batches.
        seed: says which rows are held out.

    Raises:
        ConfigError: there are too few rows, or batches are not what the model's forward takes.
    """
    if rows is not None and rows < 1:
        raise ConfigError("calibration_rows", rows, "must be a positive whole number.")
    if not 0 <= held_out < 1:
        raise ConfigError("held_out", held_out, "must be in [0, 1).")
    parameters = inspect.signature(model.forward).parameters
    batches: list[dict[str, Tensor]] = []
    found = tokens = 0
    most = MOST_ROWS if rows is None else rows
    for batch in dataloader:
        if found >= most or (rows is None and tokens >= TOKENS):
            break
        if not isinstance(batch, Mapping):
            raise ConfigError("dataloader", type(batch).__name__, "must give batches as dictionaries of tensors.")
        if labels and not _ANSWERS & batch.keys():
            raise ConfigError("labels", True, f"needs labels in the batches, which have {', '.join(batch)}.")
        kept = {key: value for key, value in batch.items() if labels or key not in _ANSWERS}
        for key in kept:
            if key not in parameters and key not in TransformersKwargs.__annotations__:  # `**kwargs` takes whatever it is given
                known = ", ".join(name for name in parameters if name != "kwargs")
                raise ConfigError(
                    "dataloader", key, f"is nothing that {type(model).__name__} takes: {known}.", closest(key, parameters)
                )
        tensors = {key: value[: most - found].to(model.device) for key, value in kept.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ConfigError("dataloader", sorted(batch), "must give batches of tensors.")
        _check_lengths(model, tensors)
        found += len(next(iter(tensors.values())))
        tokens += _count_tokens(tensors)
        batches.append(tensors)
    if found < FEWEST_ROWS:
        raise ConfigError("dataloader", f"{found} rows", f"must give at least {FEWEST_ROWS} rows.")
    order = torch.randperm(found, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(found, dtype=torch.bool)
    mask[order[: round(held_out * found)]] = True
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    return Rows(batches, [part.to(model.device) for part in mask.split(sizes)])  # type: ignore[no-untyped-call]


def _count_tokens(batch: Batch) -> int:
    """The tokens in a batch, padding aside; of rows that are no text, about as many as images have patches."""
    counted = batch.get("attention_mask")
    if counted is not None:
        return int(counted.sum())
    ids = batch.get("input_ids")
    return len(next(iter(batch.values()))) * _PATCHES if ids is None else ids.numel()


def _check_lengths(model: PreTrainedModel, batch: Batch) -> None:
    """Raise if a batch has no ids, or ids or positions that the model has not."""
    ids = batch.get("input_ids")
    if ids is None:
        return
    if not ids.numel():
        raise ConfigError("dataloader", f"input_ids of shape {tuple(ids.shape)}", "has rows without tokens; leave them out.")
    longest = longest_row(model)
    if longest is not None and ids.shape[1] > longest:
        allowed = f"are longer than the {longest} positions of {type(model).__name__}; truncate them."
        raise ConfigError("dataloader", f"rows of {ids.shape[1]} tokens", allowed)
    embeddings: Any = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and int(ids.max()) >= embeddings.num_embeddings:
        allowed = f"is beyond the {embeddings.num_embeddings} tokens of {type(model).__name__}; is it another model's tokenizer?"
        raise ConfigError("dataloader", f"token {int(ids.max())}", allowed)
