"""The Trainer's events → the pruner's three moments. `Trainer(..., callbacks=[PruningCallback(config)])` is all a user writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import PruningConfig
from .pruner import Pruner

STATE_NAME = "pruner.safetensors"


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model that a Trainer trains.

    Adds `sparsity` (true zeros in the weights named by the rules) and `target_sparsity` (what the schedule asks for) to the
    Trainer's logs, and writes its state and `pruning_config.json` into every checkpoint, from which it resumes.

    Args:
        config: a [`PruningConfig`] or a dictionary with its fields.
    """

    def __init__(self, config: PruningConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, PruningConfig) else PruningConfig.from_dict(config)
        self.pruner: Pruner | None = None
        self._best_competes = False

    def state(self) -> dict[str, Any]:
        """What `ExportableState` stores in `trainer_state.json`; tensors go into files of their own."""
        return {"args": {"config": self.config.to_dict()}, "attributes": {}}

    # ---------------------------------------------------------------------------------------------------------------- events

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if self.pruner is not None:
            self.pruner.release()  # The run before may have been interrupted.
        steps_per_epoch = _steps_per_epoch(args, kwargs.get("train_dataloader"))
        self.pruner = Pruner(model, self.config, total_steps=state.max_steps, steps_per_epoch=steps_per_epoch)
        # A checkpoint written without this callback has no entry for it, which the next save expects.
        stored: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        stored.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self._resume(_checkpoint(args, state.global_step))
        self._best_competes = (state.best_global_step or 0) >= self.pruner.last_update

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.observe()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._running.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.pruner is None or logs is None:
            return
        figures = {"sparsity": self.pruner.sparsity(), "target_sparsity": self.pruner.target_sparsity()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A model below the final sparsity does not compete to be the best: the first one that has it starts the competition.
        if self.pruner is not None and not self._best_competes:
            state.best_metric = None
            self._best_competes = self.pruner.done

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        tensors = self._running.state_dict()  # of all processes, so each has to ask for it
        if state.is_world_process_zero:
            folder = _checkpoint(args, state.global_step)
            self.config.save_pretrained(folder)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / STATE_NAME)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._resume(Path(state.best_model_checkpoint))
        self._running.finish()

    # ----------------------------------------------------------------------------------------------------------- inner works

    @property
    def _running(self) -> Pruner:
        if self.pruner is None:
            raise RuntimeError(
                "PruningCallback was not started: on_train_begin did not happen. Pass it to the Trainer as `callbacks`."
            )
        return self.pruner

    def _resume(self, folder: Path) -> None:
        """Load the state that a checkpoint holds."""
        if not (folder / STATE_NAME).is_file():
            raise FileNotFoundError(f"{folder} holds no {STATE_NAME}: it was not written by a run with PruningCallback.")
        self._running.load_state_dict(load_file(folder / STATE_NAME))


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _steps_per_epoch(args: TrainingArguments, dataloader: Any) -> float | None:
    """Optimizer steps of an epoch, or None when the data has no length."""
    try:
        batches = len(dataloader)
    except TypeError:
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)
