"""A stage: train a model, resume where it was interrupted, evaluate, condense, save, write the card.

[`run_stage`] does all of it, for the scripts; recipes and training loops use its parts. A script turns its data into a [`Task`].
It writes

- `output_dir`: the trained model; a pruned one keeps its shapes and has true zeros;
- `output_dir/speedup-2.0` and so on, for each target of a family: the model as it was then, condensed;
- `output_dir/condensed`: the smaller, equivalent model, if whole heads or neurons were pruned; written all or nothing;
- `all_results.json` with the metrics as trained (`eval_`), condensed (`condensed_`) and reloaded from disk (`reloaded_`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..condense import condense, condense_plan, nothing_to_cut
from ..distillation import DistillationConfig, DistillationTrainer
from ..files import read_object, write_text
from ..hub import ModelCardCallback, push_to_hub, save_made_from
from ..hub.family import Family
from ..measure.sparsity import sparsity_report
from ..settings.checks import check_share
from ..settings.config import PruningConfig
from ..settings.errors import ConfigError
from .callback import PruningCallback
from .checkpoints import last_complete_checkpoint

#: The folder of the condensed model, below that of the pruned one.
CONDENSED = "condensed"
#: The file that says what a run trained on.
DATA_NAME = "training_data.json"
#: Loads a task's model from a path; takes the keyword arguments of `from_pretrained`, and `dropout`.
Load = Callable[..., PreTrainedModel]


@dataclass
class Task:
    """A task: its model class, its data and its metrics.

    Attributes:
        load: loads the task's model.
        tokenizer: the model's tokenizer.
        data: tokenized splits, `train`, `validation` and `test`; MNLI has two of each, such as `validation_mismatched`.
        data_collator: makes batches.
        compute_metrics: the task's metrics; None if only predictions are needed.
        names: the class names in label order; None if there are no classes.
        card: what the model card says about the data, fields of [`CardFacts`].
        trainer: additional arguments for the Trainer.
    """

    load: Load
    tokenizer: PreTrainedTokenizerBase
    data: DatasetDict
    data_collator: Callable[[list[Any]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    names: list[str] | None = None
    card: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> dict[str, int]:
        """The size of the training data, for the model card."""
        return {"training_rows": len(self.data["train"])} if "train" in self.data else {}

    def splits(self, kind: str) -> dict[str, Dataset]:
        """The splits of a kind by the suffix that their metrics get: "" or, for MNLI's mismatched half, "_mm"."""
        return {"_mm" if name.endswith("_mismatched") else "": rows for name, rows in self.data.items() if name.startswith(kind)}

    def evaluator(self, model: PreTrainedModel, args: TrainingArguments) -> Trainer:
        """A plain Trainer that evaluates a model."""
        return Trainer(model=model, args=args, **self._evaluating)

    @property
    def _evaluating(self) -> dict[str, Any]:
        return {
            "eval_dataset": self.splits("validation").get(""),
            "processing_class": self.tokenizer,
            "data_collator": self.data_collator,
            "compute_metrics": self.compute_metrics,
            **self.trainer,
        }


def run_stage(
    task: Task,
    model: PreTrainedModel,
    args: TrainingArguments,
    pruning: PruningConfig | None = None,
    distillation: DistillationConfig | None = None,
    teacher: PreTrainedModel | None = None,
    pad_to_multiple_of: int | None = None,
    predict: Callable[[Trainer, Task], None] | None = None,
) -> dict[str, float]:
    """Train, evaluate, predict, condense and publish, as `args` says.

    Args:
        task: the data.
        model: what is trained.
        args: the Trainer's. Training resumes from `resume_from_checkpoint` or the last complete checkpoint in `output_dir`.
        pruning: what to prune; None for plain fine-tuning.
        distillation: what to learn from the teacher; None for the task's loss alone.
        teacher: by default a frozen copy of the model as it starts.
        pad_to_multiple_of: see [`condense`].
        predict: is called under `do_predict`, with the Trainer and the task.

    Returns:
        All metrics.

    Raises:
        ConfigError: `output_dir` holds a run on other data, which would go on.
        ValueError: a file of results that an earlier run left in `output_dir` cannot be read; names the file.
    """
    for path in sorted(Path(str(args.output_dir)).glob("*_results.json")):
        read_object(path)  # the Trainer, and the card, will add to what an earlier run wrote
    callbacks = [PruningCallback(pruning), ModelCardCallback(**task.card, training=task.size)] if pruning is not None else []
    if distillation is not None and teacher is None:
        teacher = copy.deepcopy(model)
    trainer = make_trainer(
        distillation, teacher, model=model, args=args, train_dataset=task.data.get("train"), callbacks=callbacks, **task._evaluating
    )
    metrics: dict[str, float] = {}
    if args.do_train:
        _note_data(trainer)
        if args.do_eval and resumed_checkpoint(args) is None:
            trainer.evaluate()  # what a model card compares with
        metrics |= train(trainer)
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if args.do_eval:
        metrics |= evaluate(trainer, task, "eval")
    if args.do_predict and predict is not None:
        predict(trainer, task)
    if pruning is not None:
        if trainer.is_world_process_zero():
            print(sparsity_report(model))
            if pruning.is_family:
                print(Family.load(str(args.output_dir)))
        metrics |= condense_saved(trainer, task, pad_to_multiple_of)
    if args.push_to_hub:
        publish(trainer)
    return metrics


# ----------------------------------------------------------------------------------------------------------------------- training


def make_trainer(
    distillation: DistillationConfig | Mapping[str, Any] | None, teacher: PreTrainedModel | None, **settings: Any
) -> Trainer:
    """A Trainer; with `distillation`, a [`DistillationTrainer`]."""
    if distillation is None:
        return Trainer(**settings)
    return DistillationTrainer(teacher=teacher, distillation=distillation, **settings)


def _note_data(trainer: Trainer) -> None:
    """Note in `output_dir` what a run trains on; refuse to go on by itself with a run on other data.

    Raises:
        ConfigError: the last checkpoint is of a run on other data. One that `resume_from_checkpoint` names is taken.
    """
    args, now = trainer.args, described(trainer.train_dataset)
    file = Path(str(args.output_dir), DATA_NAME)
    before = read_object(file).get("train_dataset", now) if file.is_file() else now
    if before != now and args.resume_from_checkpoint is None and resumed_checkpoint(args) is not None:
        allowed = f"is not the data of the run in {args.output_dir}, {before!r}, which would go on; choose another output_dir."
        raise ConfigError("train_dataset", now, allowed)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"train_dataset": now}, indent=2) + "\n")


def described(data: Dataset, rows: int = 64) -> str:
    """A fingerprint of a dataset: its length, and a digest of its columns and of `rows` evenly spaced rows.

    It takes a few milliseconds, however large the data; changes in other rows go unnoticed.
    """
    places = sorted({round(place * (len(data) - 1) / max(rows - 1, 1)) for place in range(rows)}) if len(data) else []
    table = data.with_format("arrow")[places]
    digest = hashlib.sha256(repr((data.column_names, [str(kind) for kind in table.schema.types], table.to_pylist())).encode())
    return f"{len(data)} rows, {digest.hexdigest()[:16]}"


def resumed_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: `resume_from_checkpoint`, or the last complete one in `output_dir`."""
    return args.resume_from_checkpoint or last_complete_checkpoint(str(args.output_dir))


def train(trainer: Trainer) -> dict[str, float]:
    """Train from the start, or resume from [`resumed_checkpoint`]; return the metrics of training."""
    metrics: dict[str, float] = trainer.train(resume_from_checkpoint=resumed_checkpoint(trainer.args)).metrics
    return metrics


def pruning_callback(trainer: Trainer) -> PruningCallback | None:
    """The Trainer's [`PruningCallback`]; after resuming it is not the object that the Trainer was given."""
    callbacks: list[TrainerCallback] = trainer.callback_handler.callbacks
    return next((callback for callback in callbacks if isinstance(callback, PruningCallback)), None)


def evaluate(trainer: Trainer, task: Task, prefix: str) -> dict[str, float]:
    """Evaluate on every validation split; metrics are printed and written as `PREFIX_results.json`."""
    metrics: dict[str, float] = {}
    for suffix, rows in task.splits("validation").items():
        scores = trainer.evaluate(rows, metric_key_prefix=prefix)
        metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------- condensing


def condense_saved(trainer: Trainer, task: Task, pad_to_multiple_of: int | None = None) -> dict[str, float]:
    """Condense the model saved in `output_dir`, save the result below it and reload it; return the metrics of both."""
    source = Path(str(trainer.args.output_dir))
    model = condensed_from(source, task.load, pad_to_multiple_of)
    if model is None:
        return {}
    metrics = evaluate(_like(trainer, model, task), task, "condensed")
    if trainer.is_world_process_zero():
        save_condensed(model, source)
    trainer.accelerator.wait_for_everyone()
    return metrics | evaluate(_like(trainer, task.load(source / CONDENSED), task), task, "reloaded")


def condensed_from(source: Path, load: Load, pad_to_multiple_of: int | None = None) -> PreTrainedModel | None:
    """The saved model, condensed; None if nothing can be removed, after printing why.

    It loads the saved model because the trained one still belongs to its optimizer.
    """
    model = load(source)
    if condense_plan(model, pad_to_multiple_of).empty:
        print(nothing_to_cut(model, pad_to_multiple_of))
        return None
    return condense(model, pad_to_multiple_of=pad_to_multiple_of)


def save_condensed(model: PreTrainedModel, source: Path) -> None:
    """Save the condensed model below the one it was made from, replacing that of an earlier run."""
    save_made_from(model, source, source / CONDENSED, replace=True)


def publish(trainer: Trainer) -> None:
    """Push the condensed model, if there is one, or else the trained model to the Hub, with its card."""
    condensed = Path(str(trainer.args.output_dir), CONDENSED)
    if not condensed.is_dir():
        trainer.push_to_hub()
    elif trainer.is_world_process_zero():
        args = trainer.args
        push_to_hub(
            condensed, str(trainer.hub_model_id), private=args.hub_private_repo, revision=args.hub_revision, token=args.hub_token
        )


def _like(trainer: Trainer, model: PreTrainedModel, task: Task) -> Trainer:
    """A plain Trainer that evaluates another model with the same settings, at the same point of training."""
    other = task.evaluator(model, trainer.args)
    other.state.epoch = trainer.state.epoch
    return other


# ------------------------------------------------------------------------------------------------------------------------- models


def load_model(
    auto_class: Any, path: str | Path, dropout: float | None = None, num_labels: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A model of an Auto class. `kwargs` as for `from_pretrained`; for `dropout` see [`set_dropout`]."""
    labels = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(path, **labels, **kwargs)
    if dropout is not None:
        set_dropout(config, dropout)
    model: PreTrainedModel = auto_class.from_pretrained(path, config=config, **kwargs)
    return model


def set_dropout(config: PreTrainedConfig, probability: float) -> None:
    """Set every dropout probability of a model's config.

    Raises:
        ConfigError: it is not in [0, 1).
    """
    check_share("dropout", probability)
    config.update(dict.fromkeys(dropouts(config), probability))


def dropouts(config: PreTrainedConfig) -> dict[str, float]:
    """The dropout probabilities of a config by their names, such as `hidden_dropout_prob` or, in GPT-2, `attn_pdrop`."""
    numbers = {name: value for name, value in config.to_dict().items() if type(value) in (int, float)}
    return {name: value for name, value in numbers.items() if re.search("dropout|pdrop", name)}
