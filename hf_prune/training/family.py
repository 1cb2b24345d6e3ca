"""A family from one run: at each target a copy of the model is condensed, evaluated, measured and saved with its card.

The model that trains is read and never touched, random states are put back, and what evaluates is a copy of the Trainer: training
goes on bit for bit as if nothing had been saved.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from ..compat import leave_mixed_precision, without_peft
from ..condense import condense, condense_plan
from ..files import new_folder
from ..hub import CardFacts, ModelCardCallback, write_card
from ..hub.callback import history_facts, training_facts
from ..hub.card import without_folders, write_pictures
from ..hub.family import Family, Member, folder_name, number
from ..measure.latency import Comparison, compare
from ..measure.latency_table import DTYPES
from ..measure.sparsity import evaluated
from ..model.sharding import is_sharded, wait_for_all
from ..model.wrappers import bare_model, transformers_model
from ..pruning import Pruner
from ..pruning.costs import Costs, counted
from ..settings.config import PruningConfig
from ..settings.errors import ConfigError

logger = logging.getLogger(__name__)


def check_family(model: nn.Module, config: PruningConfig, output_dir: str) -> None:
    """Check, before a run to several targets, what would otherwise fail when the first of them is reached.

    Raises:
        ConfigError: the model is sharded, has adapters, or cannot be condensed; or see [`Family.load`].
    """
    name, bare = str(config.cost_target), bare_model(model)
    reason = None
    if any(is_sharded(parameter) for parameter in bare.parameters()):
        reason = "the model is sharded over ranks, so that none can condense a copy of it; give one target"
    elif without_peft(bare) is not bare:
        reason = "of a model with adapters they alone would be saved; merge them first"
    if reason is not None:
        raise ConfigError(name, getattr(config, name), f"is a family, and {reason}.")
    condense_plan(model)
    Family.load(output_dir)


def save_member(trainer: Trainer, pruner: Pruner, config: PruningConfig, asked: float) -> None:
    """Make the member of a family that is complete now. All processes take part, and the first one writes.

    Args:
        trainer: the one that trains.
        pruner: its pruner.
        config: the config as it was given.
        asked: the target of the member.
    """
    args, output, budget = trainer.args, Path(str(trainer.args.output_dir)), pruner.cost_budget
    folder = output / folder_name(budget.costs.target, asked)
    if budget.is_late(pruner.steps):
        logger.warning("%s misses its target: the optimizer skipped the step of the last mask update.", folder.name)
    with _random_states_kept():
        model = condense(pruner.copied().eval())
        other = _copied(trainer, model)
        metrics = {} if trainer.eval_dataset is None else _numbers(evaluated(other.evaluate()))
        with new_folder(folder, replace=True) if args.should_save else nullcontext(folder) as unfinished:
            other.save_model(str(unfinished))
            if args.should_save:
                (unfinished / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # of the run, not of the model
                (predicted,) = budget.metrics().values()
                measured, comparison = _measured(model, budget.costs, config)
                parameters = sum(parameter.numel() for parameter in model.parameters())
                member = Member(folder.name, trainer.state.global_step, asked, predicted, measured, parameters, metrics)
                write_card(unfinished, model, config, _facts(trainer, budget.costs.target, member, comparison))
        if args.should_save:
            _record(trainer, pruner, member)
    wait_for_all()


# ------------------------------------------------------------------------------------------------------------ leaving no trace


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch, on all devices."""
    python, array = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


def _copied(trainer: Trainer, model: nn.Module) -> Trainer:
    """The same Trainer for another model: it evaluates and saves alike, and calls no callback but the one that all have."""
    other = copy.copy(trainer)
    other.model = other.model_wrapped = model
    other.args = copy.copy(trainer.args)
    other.args.push_to_hub = False
    other.state, other.control = copy.deepcopy(trainer.state), TrainerControl()
    other.callback_handler = CallbackHandler(  # type: ignore[no-untyped-call]
        [DefaultFlowCallback()], model, trainer.processing_class, None, None
    )
    return other


# ----------------------------------------------------------------------------------------------------------------- what is told


def _measured(model: nn.Module, costs: Costs, config: PruningConfig) -> tuple[float | None, Comparison | None]:
    """What the condensed model has of the cost, counted or timed, and how it was timed."""
    if costs.target != "target_speedup":
        return counted(model, costs.target, config.latency_length), None
    comparison = _compared(model, costs)
    return (None if comparison is None else comparison.latency_ratio), comparison


def _compared(model: nn.Module, costs: Costs) -> Comparison | None:
    """The condensed model timed against a dense one, as blocks were timed for the target; None if they were not timed here."""
    setting, inner = costs.setting, transformers_model(model)
    if setting is None:
        return None
    leave_mixed_precision(inner)
    if inner.dtype != (dtype := DTYPES[setting["dtype"]]):
        inner = copy.deepcopy(inner).to(dtype)
    where = {name: setting[name] for name in ("threads", "runtime")}
    return compare(inner, rows=setting["batch_size"], tokens=setting["length"] or 1, **where)


def _facts(trainer: Trainer, target: str, member: Member, comparison: Comparison | None) -> CardFacts:
    """What the card of a member says, with what the callback for the run's card knows."""
    args, known = trainer.args, _known(trainer)
    run = known.model_name or (args.hub_model_id or Path(str(args.output_dir)).resolve().name).rpartition("/")[2]
    return replace(
        known,
        model_name=f"{run}-{member.folder}",
        metrics=member.metrics,
        training=known.training | training_facts(args, trainer.state),
        history=history_facts(trainer.state),
        comparison=None if comparison is None else comparison.to_dict(),
        budget={"target": target, "asked": member.asked, "predicted": member.predicted, "measured": member.measured},
    )


def _known(trainer: Trainer) -> CardFacts:
    """What the callback for cards knows; without one, the name of the model that the run started from."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ModelCardCallback):
            return callback.facts
    config = getattr(transformers_model(trainer.model), "config", None)
    return CardFacts(base_model=without_folders(getattr(config, "_name_or_path", None) or None))


def _record(trainer: Trainer, pruner: Pruner, member: Member) -> None:
    """Add a member to the record of its family, draw the picture anew, and log a line."""
    output, costs, known = Path(str(trainer.args.output_dir)), pruner.cost_budget.costs, _known(trainer)
    before = Family.load(output)
    if before is None or before.target != costs.target:
        before = Family(costs.target, costs.reached(0.0))
    family = replace(before, dense=costs.reached(0.0)).with_member(member, pruner.members)
    family.save(output)
    write_pictures(output, (), CardFacts(metrics_before=known.metrics_before, metric=known.metric, family=family.to_dict()))
    logger.info(
        "%s is complete at step %d: %s predicted %s, %s; %s parameters; %s.",
        member.folder,
        member.step,
        family.cost,
        number(member.predicted),
        "not measured" if member.measured is None else f"measured {number(member.measured)}",
        f"{member.parameters:,}",
        ", ".join(f"{name} {value:.4f}" for name, value in member.metrics.items()) or "not evaluated",
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
