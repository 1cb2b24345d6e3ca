"""A card as a by-product of training: `Trainer(..., callbacks=[PruningCallback(config), ModelCardCallback(dataset="glue")])`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..compat import wrap
from ..measure.sparsity import evaluated
from ..model.sharding import is_sharded
from ..model.wrappers import bare_model, transformers_model
from ..settings.checks import dataclass_from_dict
from ..settings.config import PruningConfig
from .card import CardFacts, budget_facts, without_folders, write_card
from .family import Family

logger = logging.getLogger(__name__)

#: The training arguments that a card lists.
_LISTED = (
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "optim",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
)


class ModelCardCallback(TrainerCallback):
    """Collects the facts of a model card while a Trainer trains, and writes the card into `output_dir` when training ends.

    The metrics before pruning are those of an evaluation before the first step: `trainer.evaluate()`, or `eval_on_start=True`. An
    evaluation after training updates the card. `Trainer.push_to_hub` then publishes it, with its pictures. Of a model in shards
    (FSDP2) only the facts are written, from which `hf-prune card` makes the card of the saved model.

    Args:
        facts: fields of [`CardFacts`] that the Trainer does not know.

    Raises:
        ConfigError: no such field.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts = dataclass_from_dict(CardFacts, facts)
        self._over: tuple[nn.Module, PruningConfig | None] | None = None

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        facts, self._over = self.facts, None
        if facts.base_model is None:
            config = getattr(transformers_model(model), "config", None)
            facts.base_model = without_folders(getattr(config, "_name_or_path", None) or None)
        if state.global_step > 0 and not facts.metrics_before:
            facts.metrics_before = CardFacts.load(str(args.output_dir)).metrics_before
        elif state.is_world_process_zero:
            facts.save(str(args.output_dir))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        facts = self.facts
        data: Any = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        # Datasets names data that was read from files after the file format, which is not a dataset on the Hub
        if facts.dataset is None and getattr(data, "builder_name", None) not in (None, "csv", "json", "parquet", "text"):
            facts.dataset, facts.dataset_config = data.builder_name, data.config_name
            facts.dataset_split = None if data.split is None else str(data.split)
        measured = evaluated(metrics or {})
        if state.global_step == 0:
            facts.metrics_before = measured or facts.metrics_before
        else:
            facts.metrics = measured or facts.metrics
        if self._over is not None:
            self.write(args, state)

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        facts = self.facts
        facts.training = facts.training | training_facts(args, state)
        facts.history = history_facts(state)
        if args.load_best_model_at_end:
            best = [entry for entry in state.log_history if entry["step"] == state.best_global_step]
            facts.metrics = next((found for entry in best if (found := evaluated(entry))), facts.metrics)
        callbacks: Any = state.stateful_callbacks
        stored = callbacks.get("PruningCallback")
        config = PruningConfig.from_dict(stored["args"]["config"]) if stored else None
        if config is not None:
            cost = str(config.cost_target).removeprefix("target_")
            facts.budget = budget_facts(config, next((entry[cost] for entry in reversed(state.log_history) if cost in entry), None))
        family = Family.load(str(args.output_dir)) if config is not None and config.is_family else None
        facts.family = {} if family is None else family.to_dict()
        self._over = bare_model(model), config
        self.write(args, state)

    def write(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the card, its pictures and `pruning_config.json` into the output folder, when training is over."""
        if self._over is None:
            raise RuntimeError("ModelCardCallback has no card yet: it is made when training ends.")
        if not state.is_world_process_zero:
            return
        (model, config), folder = self._over, Path(str(args.output_dir))
        self.facts.model_name = self.facts.model_name or (args.hub_model_id or folder.resolve().name).rpartition("/")[2]
        if any(is_sharded(parameter) for parameter in model.parameters()):
            self.facts.save(folder)
            logger.warning("This process holds a part of the model only; `hf-prune card` makes the card of the saved model.")
        else:
            write_card(folder, model, config, self.facts, args.hub_model_id)


def _leaving_card(stock: Callable[..., None], trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Let `Trainer.create_model_card`, and so `Trainer.push_to_hub`, leave the card of a [`ModelCardCallback`] in place.

    The Trainer writes its own card right before it uploads, where no event lets a callback have the last word. A Trainer without
    the callback writes its own card as ever.
    """
    stock(trainer, *args, **kwargs)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ModelCardCallback) and callback._over is not None:
            callback.facts.complete_from(str(trainer.args.output_dir))
            callback.write(trainer.args, trainer.state)


def training_facts(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What a card lists of a run that has come to some step."""
    listed = {name: getattr(args, name) for name in _LISTED}
    settings = {name: getattr(value, "value", value) for name, value in listed.items()}
    return settings | {"steps": state.global_step}


def history_facts(state: TrainerState) -> list[dict[str, float]]:
    """What a card shows of what a run has logged so far."""
    names = ("step", "sparsity", "reached_sparsity", "target_sparsity")
    return [{name: entry[name] for name in names if name in entry} | evaluated(entry) for entry in state.log_history]


wrap(Trainer, "create_model_card", _leaving_card)  # here, so that it holds wherever a callback is, also one that was unpickled
