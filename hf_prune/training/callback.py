"""The Trainer's events → the pruner's three moments. `Trainer(..., callbacks=[PruningCallback(config)])` is all a user writes."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
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
from ..settings.config import PruningConfig
from .checkpoints import (
    STATE_NAME,
    changed_files,
    folder_being_written,
    load_state,
    record_of,
    save_state,
    written,
)

logger = logging.getLogger(__name__)

#: Part of the name of an optimizer or its class, without underscores → why weights that it trains cannot be pruned.
REFUSED_OPTIMIZERS = {
    "8bit": "it keeps its state in blocks of 8 bits that pruned and kept weights share",
    "4bit": "it keeps its state in blocks of 4 bits that pruned and kept weights share",
    "fp8": "it keeps its state in blocks of 8 bits that pruned and kept weights share",
    "lomo": "it steps inside backward, so no event sees the complete gradients",
    "layerwise": "it steps inside backward, so no event sees the complete gradients",
    "schedulefree": "it swaps the weights for an average that holds the values of pruned ones",
}

#: What of a rule decides which units it has and how they are scored.
_SCORED_BY = ("pattern", "criterion", "reduction", "target_modules", "exclude_modules")


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model that a Trainer trains.

    Adds `sparsity` (true zeros in the weights of the model's body, as in the report and the card), `reached_sparsity` (true zeros
    in the weights that the rules name), `target_sparsity` (what the schedule asks for of these) and, in soft movement pruning,
    `regularization` (λ) and `penalty` (what it adds to the loss) to all that the Trainer logs, wherever the callback stands among
    the others. Writes its state and `pruning_config.json` into every checkpoint, from which it resumes:
    exactly, from any folder. From the checkpoint of a run without the callback, pruning starts where the schedule is by then. A
    second `train()` on the same model keeps the masks that are there.

    Args:
        config: a [`PruningConfig`] or a dictionary with its fields.
        allow_config_change: resume from a checkpoint that was written with another config. What is pruned stays so; a rule with
            another pattern, criterion, reduction or choice of modules starts with no scores.
    """

    def __init__(self, config: PruningConfig | Mapping[str, Any], allow_config_change: bool = False) -> None:
        self.config = config if isinstance(config, PruningConfig) else PruningConfig.from_dict(config)
        self.allow_config_change = allow_config_change
        self.pruner: Pruner | None = None
        #: The files of the last checkpoint; see `record_of`.
        self.written: dict[str, Any] = {}
        #: Whether the Trainer made this callback from a checkpoint, in the place of the one that it was given.
        self.restored = False
        self._between_steps: tuple[TrainingArguments, TrainerState] | None = None
        self._best_competes = False
        #: The last step of an epoch whose evaluation came before its checkpoint.
        self._evaluated_at: int | None = None

    @property
    def between_steps(self) -> bool:
        """Whether a checkpoint that is written now holds the state of the pruner: from an optimizer step to the next one."""
        return self._between_steps is not None

    def state(self) -> dict[str, Any]:
        """What `ExportableState` stores in `trainer_state.json`.

        The Trainer asks for it when all else in a checkpoint is written and nothing older was deleted: the moment to write the
        tensors. It asks at other times too, but never between two steps.
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
        """Raise what training would raise before its first step. The model is left as it is.

        Raises:
            ConfigError: the config does not fit the model or the run.
            ValueError: the Trainer is set up in a way that pruning cannot work with.
        """
        per_epoch = _steps_per_epoch(args, train_dataloader)
        steps = args.max_steps if args.max_steps > 0 or per_epoch is None else math.ceil(args.num_train_epochs * per_epoch)
        self._attached(args, model, steps, per_epoch).release()

    # ---------------------------------------------------------------------------------------------------------------- events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Restoring puts a callback with the checkpoint's config in the place of this one; it shall know what the user asked for.
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
        steps_per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        self.pruner = self._attached(args, model, state.max_steps, steps_per_epoch)
        try:
            if state.global_step > 0:
                self._resume(state, stored.get(type(self).__name__))
            elif previous is not None and previous.model is self.pruner.model:
                self.pruner.load_state_dict({**previous.state_dict(), "steps": torch.tensor(0)})
        except BaseException:
            self.pruner.release()
            raise
        # The next save expects an entry, which a checkpoint written without this callback lacks; it names the config of this run.
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
        # An evaluation draws random numbers. The one at an epoch's end comes after a checkpoint of the epoch's last step, so a run
        # that is resumed from there would draw others: it comes before, as it does under `eval_strategy="steps"`.
        epoch = float(state.epoch or 0)
        if control.should_save and args.eval_strategy == "epoch" and epoch.is_integer() and args.eval_delay <= epoch:
            control.should_evaluate, self._evaluated_at = True, state.global_step

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._evaluated_at == state.global_step:
            control.should_evaluate = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A model below the final sparsity does not compete to be the best: the first one that has it starts the competition.
        if self.pruner is not None and not self._best_competes:
            state.best_metric = None
            self._best_competes = self.pruner.is_finished

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not args.should_save:
            self._state_of_all()  # one process asked for it while it wrote the checkpoint, and waits for the others
        elif self.written.get("step") != state.global_step:
            raise RuntimeError(
                f"The checkpoint of step {state.global_step} is not where the Trainer puts checkpoints, in {args.output_dir}, "
                "so the pruner's state is not in it."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._between_steps = None
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))
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
                "PruningCallback was not started: on_train_begin did not happen. Pass it to the Trainer as `callbacks`."
            )
        return self.pruner

    def _state_of_all(self) -> dict[str, torch.Tensor]:
        """The pruner's state for a checkpoint in which all processes have written what is theirs.

        Raises:
            RuntimeError: the weights that were written are not those that the last step left.
        """
        if regrown := self._running.regrown():
            raise RuntimeError(
                f"The checkpoint of step {self._running.steps} holds pruned weights that are not zero, in {len(regrown)} modules, "
                f"first {regrown[0]!r}: something but `optimizer.step()` changes weights, as averaging optimizers and callbacks do."
            )
        state = self._running.state_dict()
        wait_for_all()
        return state

    def _attached(self, args: TrainingArguments, model: nn.Module, total_steps: int, steps_per_epoch: float | None) -> Pruner:
        """A pruner for a run, attached to its model."""
        _refuse(args)
        pruner = Pruner(model, self.config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        pruner.at_work = self._in_training
        return pruner

    def _in_training(self) -> bool:
        """Whether a Trainer's `train()` that calls this callback is running, on any thread; no event says that it was cut short."""
        for frame in sys._current_frames().values():
            caller: FrameType | None = frame
            while caller is not None:
                trainer = caller.f_locals.get("self") if caller.f_code.co_name == "train" else None
                if isinstance(trainer, Trainer) and self in trainer.callback_handler.callbacks:
                    return True
                caller = caller.f_back
        return False

    def _resume(self, state: TrainerState, entry: dict[str, Any] | None) -> None:
        """Go on from the checkpoint that the Trainer has read.

        Raises:
            ValueError: the checkpoint is not whole, or belongs to another config.
        """
        pruner = self._running
        folder: Path = state.folder  # type: ignore[attr-defined]
        files = written(entry, state.global_step)
        if files is not None and (broken := changed_files(folder, {STATE_NAME: files.get(STATE_NAME, "")})):
            raise ValueError(
                f"{folder} is not complete: {broken[0]} is missing or not the one that was written with {TRAINER_STATE_NAME}; "
                "last_complete_checkpoint(output_dir) finds the checkpoint before."
            )
        if not (folder / STATE_NAME).is_file():
            pruner.steps = state.global_step
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None  # it is not pruned
            logger.warning(
                "%s was written without PruningCallback: pruning starts at step %d, where the schedule is at a sparsity of %.4f; "
                "its last mask update is at step %d.",
                folder,
                state.global_step,
                pruner.target_sparsity(),
                pruner.last_update,
            )
            return
        differing = _differing_fields(PruningConfig.from_pretrained(folder), self.config)
        if differing and not self.allow_config_change:
            raise ValueError(
                f"{folder} was written with another config: {'; '.join(differing)}. To go on from it with the new one, pass "
                "PruningCallback(config, allow_config_change=True)."
            )
        self._load(folder)

    def _load(self, folder: Path) -> None:
        """Take over masks, scores and all else that belongs to the model of a checkpoint, as far as it fits the config."""
        saved, state = PruningConfig.from_pretrained(folder), load_state(folder)
        rules, before = self.config.resolved_rules(), saved.resolved_rules()
        for name in before:
            if name not in rules or any(getattr(rules[name], field) != getattr(before[name], field) for field in _SCORED_BY):
                state = {key: value for key, value in state.items() if not key.startswith(f"{name}/")}
        self._running.load_state_dict(state, strict=not _differing_fields(saved, self.config))


def _with_metrics(stock: Callable[..., None], trainer: Trainer, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Let everything that a Trainer with a [`PruningCallback`] logs carry the pruner's metrics.

    `on_log` comes too late: it is called in the order of the callbacks, and the loggers of `report_to` always come first, so they
    would have reported already. A Trainer without the callback logs as ever.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, PruningCallback) and callback.pruner is not None:
            logs.update(callback.pruner.metrics())
    stock(trainer, logs, *args, **kwargs)


def _with_config(stock: Callable[..., None], trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False) -> None:
    """Let `Trainer.save_model` put `pruning_config.json` beside a model that a [`PruningCallback`] pruned.

    There is no event for it: `on_save` is for checkpoints, which have the file already. A Trainer without the callback saves as
    ever.
    """
    for callback in trainer.callback_handler.callbacks if trainer.args.should_save and not _internal_call else ():
        if isinstance(callback, PruningCallback) and callback.pruner is not None:
            callback.config.save_pretrained(output_dir or str(trainer.args.output_dir))
    stock(trainer, output_dir, _internal_call)  # which may upload the folder


def _differing_fields(saved: PruningConfig, config: PruningConfig) -> list[str]:
    """The fields in which two configs differ, with both values."""
    old, new = saved.to_dict(), config.to_dict()
    return [f"{name} was {old[name]!r}, is {new[name]!r}" for name in new if old[name] != new[name]]


def _refuse(args: TrainingArguments) -> None:
    """Raise if the Trainer is set up in a way that pruning cannot work with."""
    if args.deepspeed or args.deepspeed_plugin is not None:
        raise ValueError(
            "PruningCallback does not work with DeepSpeed, which steps inside backward, so no event sees the complete gradients; "
            "use DDP or FSDP2."
        )
    if args.enable_jit_checkpoint and args.world_size > 1:
        raise ValueError(
            f"enable_jit_checkpoint=True does not work with PruningCallback on {args.world_size} processes: each of them hears the "
            "signal in another step, and their checkpoint is that of one."
        )
    _refuse_named("optim", str(getattr(args.optim, "value", args.optim)))


def _refuse_named(field: str, name: str, *traits: str) -> None:
    """Raise if an optimizer is one of those that pruning cannot work with, by its name or what else it is known by."""
    for part, reason in REFUSED_OPTIMIZERS.items():
        if any(part in text.lower().replace("_", "") for text in (name, *traits)):
            raise ValueError(f"{field}={name!r} does not work with PruningCallback: {reason}. Use a torch optimizer.")


def _refuse_optimizer(optimizer: Any) -> None:
    """Raise if an optimizer, given to the Trainer or made by it, shows before its first step that pruning cannot work with it."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    swaps = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)  # of bitsandbytes
    _refuse_named("optimizers", type(optimizer).__name__, f"{bits}bit", "schedule_free" if swaps else "")


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> float | None:
    """Optimizer steps of an epoch, or None when the data has no length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)


# Here, so that they hold wherever a callback is, also one that was unpickled.
wrap(Trainer, "log", _with_metrics)
wrap(Trainer, "save_model", _with_config)
remember_folders()
save_between_steps()
