"""Maps the Trainer's events to the pruner's three calls: `Trainer(..., callbacks=[PruningCallback(config)])`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ..compat import remember_folders, save_between_steps, wrap
from ..model.sharding import wait_for_all
from ..pruning import Pruner
from ..pruning.state import under
from ..settings.config import WHILE_TRAINING, PruningConfig
from ..settings.errors import ConfigError
from .checkpoints import (
    STATE_NAME,
    changed_files,
    folder_being_written,
    load_state,
    record_of,
    save_state,
    written,
)
from .family import check_family, save_member

logger = logging.getLogger(__name__)

#: Substring of an optimizer's name or class, without underscores → why weights that it trains cannot be pruned.
REFUSED_OPTIMIZERS = {
    "8bit": "it keeps its state in blocks of 8 bits that pruned and kept weights share",
    "4bit": "it keeps its state in blocks of 4 bits that pruned and kept weights share",
    "fp8": "it keeps its state in blocks of 8 bits that pruned and kept weights share",
    "lomo": "it steps inside backward, so no event sees the complete gradients",
    "layerwise": "it steps inside backward, so no event sees the complete gradients",
    "schedulefree": "it swaps the weights for an average that holds the values of pruned ones",
}

#: The fields of a rule that determine its units and their scores.
_SCORED_BY = ("pattern", "criterion", "reduction", "target_modules", "exclude_modules")


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model that a Trainer trains.

    Adds `sparsity` (share of zeros in the weights of the model's body, as in the report and the card), `reached_sparsity` (share of
    zeros in the weights that the rules name), `target_sparsity` (what the schedule requests for these) and, for soft movement
    pruning, `regularization` (λ) and `penalty` (what it adds to the loss) to everything the Trainer logs, whatever the order of the
    callbacks. Saves its state and `pruning_config.json` in every checkpoint and resumes from it exactly, in any folder. From the
    checkpoint of a run without the callback, pruning starts at the current point of its schedule. A second `train()` on the same
    model keeps the existing masks.

    Where the config's target is a list, a condensed copy of the model is evaluated and saved in `output_dir` as each is reached, in
    a folder such as `speedup-2.0`, with its card; `family.json` and a picture tell of all. Training goes on as without it.

    Args:
        config: a [`PruningConfig`] or a dictionary with its fields.
        allow_config_change: resume from a checkpoint that was written with a different config. Pruned units stay pruned; a rule
            whose pattern, criterion, reduction or modules changed starts without scores.
    """

    def __init__(self, config: PruningConfig | Mapping[str, Any], allow_config_change: bool = False) -> None:
        self.config = config if isinstance(config, PruningConfig) else PruningConfig.from_dict(config)
        self.allow_config_change = allow_config_change
        self.pruner: Pruner | None = None
        #: The files of the last checkpoint; see `record_of`.
        self.written: dict[str, Any] = {}
        #: Whether the Trainer restored this callback from a checkpoint, replacing the one it was given.
        self.restored = False
        self._between_steps: tuple[TrainingArguments, TrainerState] | None = None
        self._best_competes = False
        #: The last step of an epoch, if its evaluation ran before its checkpoint.
        self._evaluated_at: int | None = None

    @property
    def between_steps(self) -> bool:
        """Whether a checkpoint written now would hold the pruner's state: from one optimizer step until the next begins."""
        return self._between_steps is not None

    def state(self) -> dict[str, Any]:
        """What `ExportableState` stores in `trainer_state.json`.

        The Trainer calls it after everything else in a checkpoint is written and before older checkpoints are deleted: the moment
        to write the tensors. It calls it at other times too, but never between two steps.
        """
        if self._between_steps is not None:
            args, state = self._between_steps
            folder = folder_being_written(Path(str(args.output_dir)), state.global_step, state.is_hyper_param_search)
            if folder.is_dir():
                self.config.save_pretrained(folder)
                save_state(self._state_of_all(), folder)
                self.written = record_of(folder, state.global_step)
        given = {"config": self.config.to_dict(), "allow_config_change": self.allow_config_change}
        return {"args": given, "attributes": {"written": self.written, "restored": True}}

    def check(self, args: TrainingArguments, model: nn.Module, train_dataloader: Any) -> None:
        """Raise what training would raise before its first step, without changing the model.

        Raises:
            ConfigError: the config does not fit the model or the run.
            ValueError: the Trainer is set up in a way that pruning cannot work with.
        """
        per_epoch = _steps_per_epoch(args, train_dataloader)
        steps = args.max_steps if args.max_steps > 0 or per_epoch is None else math.ceil(args.num_train_epochs * per_epoch)
        self._attached(args, model, steps, per_epoch).release()

    # ---------------------------------------------------------------------------------------------------------------- events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Restoring replaces this callback by one with the checkpoint's config, which has to know the user's settings.
        args._pruning = (self.config.to_dict(), self.allow_config_change)  # type: ignore[attr-defined]

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        previous, self._between_steps = self.pruner, None
        if previous is not None:
            previous.release()  # The run before may have been interrupted.
        _refuse_optimizer(kwargs.get("optimizer"))
        if self.restored and hasattr(args, "_pruning"):
            config, self.allow_config_change = args._pruning
            self.config = PruningConfig.from_dict(config)
        stored: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        if isinstance(stored.get(type(self).__name__), list):
            raise ValueError("The Trainer has two PruningCallbacks; give one of them a config with `rules` instead.")
        if state.is_hyper_param_search and self.config.is_family:
            allowed = "is a family, of which each trial would replace the last one's; search with one target."
            raise ConfigError(name := str(self.config.cost_target), getattr(self.config, name), allowed)
        steps_per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        folder = None if state.global_step == 0 else self._checkpoint(state, stored.get(type(self).__name__))
        saved = {} if folder is None else load_state(folder)
        self.pruner = self._attached(args, model, state.max_steps, steps_per_epoch, under(saved, "costs/"))
        try:
            if folder is not None:
                self._load(folder, saved)
            elif state.global_step > 0:
                self._start_late(state)
            elif previous is not None and previous.model is self.pruner.model:
                self.pruner.load_state_dict({**previous.state_dict(), "steps": torch.tensor(0)})
        except BaseException:
            self.pruner.release()
            raise
        # The next save expects an entry with this run's config; a checkpoint written without this callback has none.
        stored[type(self).__name__] = self.state()
        self._best_competes = (state.best_global_step or 0) >= self.pruner.last_update
        if state.is_world_process_zero:
            logger.info("Pruning starts at step %d of %d: %s.", state.global_step, state.max_steps, self.pruner.summary())

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._between_steps = None

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.observe(scaled_loss=getattr(kwargs.get("optimizer"), "scaler", None) is not None)

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.step()
        self._between_steps = args, state  # before `on_step_end`, in which other callbacks may save

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if (asked := self._running.members.get(state.global_step)) is not None:
            save_member(self._trainer, self._running, self.config, asked)
        # An evaluation draws random numbers. The one at the end of an epoch normally runs after the checkpoint of its last step, so
        # a run resumed from there would draw different ones. Run it before, as `eval_strategy="steps"` does.
        epoch = float(state.epoch or 0)
        if control.should_save and args.eval_strategy == "epoch" and epoch.is_integer() and args.eval_delay <= epoch:
            control.should_evaluate, self._evaluated_at = True, state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._evaluated_at == state.global_step:
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Models below the final sparsity do not compete for the best model: the first one that reaches it starts the competition.
        if self.pruner is not None and not self._best_competes:
            state.best_metric = None
            self._best_competes = self.pruner.is_finished

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            self._state_of_all()  # collective: the process that writes the checkpoint is waiting for the others
        elif self.written.get("step") != state.global_step:
            raise RuntimeError(
                f"The checkpoint of step {state.global_step} is not in {args.output_dir}, where the Trainer puts checkpoints, "
                "so the pruner's state was not saved in it."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._between_steps = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            self._load(best, load_state(best))
        self._running.finish()
        metrics = self._running.metrics()  # under FSDP2 all processes have to count
        if state.is_world_process_zero:
            said = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            logger.info("Pruning ended at step %d: %s.", state.global_step, said)
        if (shortfall := self._running.shortfall) is not None:
            logger.warning(shortfall)

    # ----------------------------------------------------------------------------------------------------------- inner works

    @property
    def _running(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError(
                "PruningCallback was not started: on_train_begin was not called. Pass it to the Trainer in `callbacks`."
            )
        return self.pruner

    def _state_of_all(self) -> dict[str, torch.Tensor]:
        """The pruner's state, once all processes have written their part of the checkpoint.

        Raises:
            RuntimeError: the saved weights are not those of the last step.
        """
        if regrown := self._running.regrown():
            raise RuntimeError(
                f"The checkpoint of step {self._running.steps} holds pruned weights that are not zero, in {len(regrown)} modules, "
                f"first {regrown[0]!r}: something other than `optimizer.step()` changes weights, such as an averaging optimizer or "
                "callback."
            )
        state = self._running.state_dict()
        wait_for_all()
        return state

    def _attached(
        self,
        args: TrainingArguments,
        model: nn.Module,
        total_steps: int,
        steps_per_epoch: float | None,
        costs: Mapping[str, torch.Tensor] | None = None,
    ) -> Pruner:
        """A new pruner for a run, attached to its model."""
        _refuse(args)
        if self.config.is_family:
            check_family(model, self.config, str(args.output_dir))
        pruner = Pruner(model, self.config, total_steps, steps_per_epoch, costs)
        pruner.at_work = self._in_training
        return pruner

    @property
    def _trainer(self) -> Trainer:
        """The Trainer that calls this callback."""
        return next(trainer for trainer in reversed(_AT_WORK) if self in trainer.callback_handler.callbacks)

    def _in_training(self) -> bool:
        """Whether a `train()` that calls this callback is running, on any thread; no event reports that one was interrupted."""
        return any(self in trainer.callback_handler.callbacks for trainer in _AT_WORK)

    def _checkpoint(self, state: TrainerState, entry: dict[str, Any] | None) -> Path | None:
        """The checkpoint that the Trainer has read, or None if it has no pruner's state.

        Raises:
            ValueError: the checkpoint is incomplete, or was written with a different config.
        """
        folder: Path = state.folder  # type: ignore[attr-defined]
        files = written(entry, state.global_step)
        if files is not None and (broken := changed_files(folder, {STATE_NAME: files.get(STATE_NAME, "")})):
            raise ValueError(
                f"{folder} is incomplete: {broken[0]} is missing or does not match {TRAINER_STATE_NAME}; "
                "last_complete_checkpoint(output_dir) finds an earlier one."
            )
        if not (folder / STATE_NAME).is_file():
            return None
        differing = _differing_fields(PruningConfig.from_pretrained(folder), self.config)
        if differing and not self.allow_config_change:
            raise ValueError(
                f"{folder} was written with a different config: {'; '.join(differing)}. To resume from it with the new one, pass "
                "PruningCallback(config, allow_config_change=True)."
            )
        return folder

    def _start_late(self, state: TrainerState) -> None:
        """Start from a checkpoint that was written without this callback."""
        pruner = self._running
        pruner.steps = state.global_step
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None  # it is not pruned
        logger.warning(
            "%s was written without PruningCallback: pruning starts at step %d, where the schedule requests sparsity %.4f; "
            "the last mask update is at step %d.",
            state.folder,  # type: ignore[attr-defined]
            state.global_step,
            pruner.target_sparsity(),
            pruner.last_update,
        )

    def _load(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Take up the masks, scores and the rest of a checkpoint's pruner state, as far as they fit the config."""
        saved = PruningConfig.from_pretrained(folder)
        rules, before = self.config.resolved_rules(), saved.resolved_rules()
        for name in before:
            if name not in rules or any(getattr(rules[name], field) != getattr(before[name], field) for field in _SCORED_BY):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}/")}
        self._running.load_state_dict(state, strict=not _differing_fields(saved, self.config))


#: The Trainers whose `train()` is running, the latest last.
_AT_WORK: list[Trainer] = []


def _noted(stock: Callable[..., Any], trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    """Note that a Trainer is at work while `Trainer.train` runs: callbacks are told neither which Trainer calls them nor that it
    was interrupted."""
    _AT_WORK.append(trainer)
    try:
        return stock(trainer, *args, **kwargs)
    finally:
        _AT_WORK.remove(trainer)


def _with_metrics(stock: Callable[..., None], trainer: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Add the pruner's metrics to everything that a Trainer with a [`PruningCallback`] logs.

    `on_log` would be too late: callbacks are called in order, and the loggers of `report_to` always come first. A Trainer without
    the callback is not affected.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PruningCallback) and callback.pruner is not None:
            logs.update(callback.pruner.metrics())
    stock(trainer, logs, *args, **kwargs)


def _with_config(stock: Callable[..., None], trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """Let `Trainer.save_model` write `pruning_config.json` beside a model that a [`PruningCallback`] pruned.

    There is no event for it: `on_save` is for checkpoints, which have the file already. A Trainer without the callback is not
    affected.
    """
    for callback in trainer.callback_handler.callbacks if trainer.args.should_save and not _internal_call else ():
        if isinstance(callback, PruningCallback) and callback.pruner is not None:
            callback.config.save_pretrained(output_dir or str(trainer.args.output_dir))
    stock(trainer, output_dir, _internal_call)  # which may upload the folder


def _differing_fields(saved: PruningConfig, config: PruningConfig) -> list[str]:
    """The fields that differ between two configs, with both values; a default that is written out does not."""
    old, new = (given.filled(**WHILE_TRAINING).to_dict() for given in (saved, config))
    return [f"{name} was {old[name]!r}, is {new[name]!r}" for name in new if old[name] != new[name]]


def _refuse(args: TrainingArguments) -> None:
    """Raise if the Trainer's arguments do not work with pruning."""
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(
            "PruningCallback does not work with DeepSpeed, which steps inside backward, so no event sees the complete gradients; "
            "use DDP or FSDP2."
        )
    if args.enable_jit_checkpoint and args.world_size > 1:
        raise ValueError(
            f"enable_jit_checkpoint=True does not work with PruningCallback on {args.world_size} processes: each of them receives "
            "the signal at a different step, and the checkpoint is that of one process."
        )
    _refuse_named("optim", str(getattr(args.optim, "value", args.optim)))


def _refuse_named(field: str, name: str, *traits: str) -> None:
    """Raise if an optimizer is one of [`REFUSED_OPTIMIZERS`], by its name or by its other `traits`."""
    for part, reason in REFUSED_OPTIMIZERS.items():
        if any(part in text.lower().replace("_", "") for text in (name, *traits)):
            raise ValueError(f"{field}={name!r} does not work with PruningCallback: {reason}. Use a torch optimizer.")


def _refuse_optimizer(optimizer: Any) -> None:
    """Raise if an optimizer object, passed to the Trainer or created by it, does not work with pruning."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    swaps = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)  # of bitsandbytes
    _refuse_named("optimizers", type(optimizer).__name__, f"{bits}bit", "schedule_free" if swaps else "")


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> float | None:
    """Optimizer steps per epoch, or None if the data has no length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)


# At import, so that the patches are in place wherever a callback is, even one that was unpickled. The first two are needed in
# transformers 5.0 to 5.23; of the third it was not tried.
wrap(Trainer, "train", _noted)
wrap(Trainer, "log", _with_metrics)
wrap(Trainer, "save_model", _with_config)
remember_folders()
save_between_steps()
