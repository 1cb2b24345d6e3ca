"""The job that run_glue.py, run_qa.py and run_clm.py share: train with a teacher and a pruner, condense, save, load again, publish.

A script makes a [`Task`] of its data, and [`run`] does the rest. It writes

- `output_dir`: the model that was trained; a pruned one keeps its shape and has true zeros;
- `output_dir/condensed`: the smaller, equal model, where whole heads or neurons were pruned;
- `all_results.json` with the metrics as trained (`eval_`), condensed (`condensed_`) and loaded again from disk (`reloaded_`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_prune import (
    CardFacts,
    DistillationArguments,
    DistillationTrainer,
    ModelCardCallback,
    PruningArguments,
    PruningCallback,
    PruningConfig,
    condense,
    condense_plan,
    last_complete_checkpoint,
    push_to_hub,
    sparsity_report,
)
from hf_prune.condense import nothing_to_cut
from hf_prune.hub import write_card
from hf_prune.training.recipe import set_dropout

#: The folder of the condensed model, below that of the pruned one.
CONDENSED = "condensed"
#: Loads a task's model from a path, with what `from_pretrained` takes besides and `dropout`.
Load = Callable[..., PreTrainedModel]


# --------------------------------------------------------------------------------------------------------------------- arguments


@dataclass
class ModelArguments:
    """Which model to start from."""

    model_name_or_path: str = field(metadata={"help": "A folder, or an id on the Hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if it is not the model's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run modelling code that comes with the model."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, …; for short rows in bfloat16 on a CPU eager trains faster."}
    )
    dropout: float | None = field(
        default=None, metadata={"help": "Every dropout probability of the model; 0 suits a student that copies a teacher."}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Condense to a multiple of so many neurons in a block, such as 16; odd sizes are slow."}
    )

    @property
    def remote(self) -> dict[str, Any]:
        """What `from_pretrained` takes besides the path."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}

    def load(self, load: Load) -> PreTrainedModel:
        """The model to train."""
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return load(self.model_name_or_path, dropout=self.dropout, **self.remote, **attention)


@dataclass
class DataArguments:
    """Which files, and how much of the data is used."""

    train_file: str | None = field(default=None, metadata={"help": "Data to train on; see the top of the script for its form."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for prediction."})

    def files(self) -> dict[str, str]:
        """The files that were given, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in files.items() if file is not None}

    def select(self, raw: DatasetDict, kinds: set[str]) -> DatasetDict:
        """The splits of these kinds, cut to the numbers of rows asked for.

        Raises:
            ValueError: a split is needed and not there, or none is needed.
        """
        limits = {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}
        selected = DatasetDict()
        for kind, limit in limits.items():
            needed = kind in kinds
            # MNLI has two of each: validation_matched, validation_mismatched.
            found = [name for name in raw if name.split("_")[0] == kind]
            if needed and not found:
                raise ValueError(f"{kind}_file: must be given for this run; the data has only {', '.join(raw)}.")
            for name in found if needed else ():
                selected[name] = raw[name] if limit is None else raw[name].take(min(limit, len(raw[name])))
        if not selected:
            raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
        return selected


def load_teacher(path: str | None, student: PreTrainedModel, load: Load) -> PreTrainedModel:
    """The teacher that was named, or a copy of the student as it starts."""
    return copy.deepcopy(student) if path is None else load(path)


def parse_arguments(data_arguments: type, arguments: Sequence[str]) -> tuple[Any, ...]:
    """From a command line, or from the one JSON or YAML file that it names.

    Args:
        data_arguments: the script's own dataclass, about its data.
        arguments: the command line's.

    Returns:
        `ModelArguments`, the script's own, `TrainingArguments`, `PruningArguments`, `DistillationArguments`.

    Raises:
        ValueError: what was asked for cannot be done.
    """
    parser = HfArgumentParser((ModelArguments, data_arguments, TrainingArguments, PruningArguments, DistillationArguments))
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        parsed = parser.parse_json_file(arguments[0])
    elif len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(arguments[0])
    else:
        parsed = parser.parse_args_into_dataclasses(list(arguments))
    training_args, pruning_args = parsed[2:4]
    if pruning_args.to_config() is not None and not training_args.do_train:
        raise ValueError("do_train=False: must be set with --do_prune, since a model is pruned while it trains.")
    return parsed


def needed_splits(args: TrainingArguments) -> set[str]:
    """Which of `train`, `validation` and `test` a run of the Trainer uses."""
    needs = {"train": args.do_train, "validation": args.do_eval or args.eval_strategy != "no", "test": args.do_predict}
    return {kind for kind, needed in needs.items() if needed}


# -------------------------------------------------------------------------------------------------------------------------- task


@dataclass
class Task:
    """What a script does with a model.

    Attributes:
        load: loads the task's model.
        tokenizer: the model's.
        data: tokenized splits, `train`, `validation` and `test`; MNLI has two of each, such as `validation_mismatched`.
        data_collator: makes batches.
        compute_metrics: the task's metrics; None where only answers are wanted.
        names: of the classes in label order; None where there are none.
        card: what a model card says of the data, a part of `CardFacts`.
        trainer: what the Trainer is given besides.
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
        """How much it learns from, for a model card."""
        return {"training_rows": len(self.data["train"])} if "train" in self.data else {}


def load_model(
    auto_class: Any, path: str | Path, dropout: float | None = None, num_labels: int | None = None, **kwargs: Any
) -> PreTrainedModel:
    """A model of an Auto class. `kwargs` as for `from_pretrained`."""
    labels = {} if num_labels is None else {"num_labels": num_labels}
    config = AutoConfig.from_pretrained(path, **labels, **kwargs)
    if dropout is not None:
        set_dropout(config, dropout)
    model: PreTrainedModel = auto_class.from_pretrained(path, config=config, **kwargs)
    return model


def splits_of(data: DatasetDict, kind: str) -> dict[str, Dataset]:
    """The splits of a kind by the suffix that their metrics get: "" or, for MNLI's mismatched half, "_mm"."""
    return {"_mm" if name.endswith("_mismatched") else "": rows for name, rows in data.items() if name.startswith(kind)}


# --------------------------------------------------------------------------------------------------------------------------- job


def run(
    task: Task,
    model_args: ModelArguments,
    training_args: TrainingArguments,
    pruning_args: PruningArguments,
    distillation_args: DistillationArguments,
    predict: Callable[[Trainer, Task], None] | None = None,
) -> dict[str, float]:
    """Train, evaluate, predict, condense and publish, as the arguments say; return the metrics."""
    pruning, distillation = pruning_args.to_config(), distillation_args.to_config()
    set_seed(training_args.seed)
    model = model_args.load(task.load)
    settings: dict[str, Any] = {
        "args": training_args,
        "train_dataset": task.data.get("train"),
        "eval_dataset": splits_of(task.data, "validation").get(""),
        "processing_class": task.tokenizer,
        "data_collator": task.data_collator,
        "compute_metrics": task.compute_metrics,
        "callbacks": [PruningCallback(pruning), ModelCardCallback(**task.card, training=task.size)] if pruning else [],
        **task.trainer,
    }
    if distillation is None:
        trainer = Trainer(model=model, **settings)
    else:
        teacher = load_teacher(distillation_args.teacher_model_name_or_path, model, task.load)
        trainer = DistillationTrainer(model=model, teacher=teacher, distillation=distillation, **settings)

    metrics: dict[str, float] = {}
    if training_args.do_train:
        metrics |= train(trainer)
    if training_args.do_eval:
        metrics |= evaluate(trainer, task, "eval")
    if training_args.do_predict and predict is not None:
        predict(trainer, task)
    if pruning is not None:
        if trainer.is_world_process_zero():
            pruning.save_pretrained(str(training_args.output_dir))
            print(sparsity_report(model))
        metrics |= condense_saved(trainer, task, model_args.pad_to_multiple_of)
    if training_args.push_to_hub:
        publish(trainer)
    return metrics


def train(trainer: Trainer) -> dict[str, float]:
    """Train, or go on from the checkpoint that is named or the last one in `output_dir`; save the model and the metrics."""
    args = trainer.args
    checkpoint = args.resume_from_checkpoint or last_complete_checkpoint(str(args.output_dir))
    if checkpoint is None and args.do_eval:
        trainer.evaluate()  # what a model card compares with
    metrics = trainer.train(checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    return metrics


def evaluate(trainer: Trainer, task: Task, prefix: str) -> dict[str, float]:
    """Evaluate on every validation split; metrics are printed and written as `PREFIX_results.json`."""
    metrics: dict[str, float] = {}
    for suffix, rows in splits_of(task.data, "validation").items():
        scores = trainer.evaluate(rows, metric_key_prefix=prefix)
        metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def condense_saved(trainer: Trainer, task: Task, pad_to_multiple_of: int | None) -> dict[str, float]:
    """Condense the model saved in `output_dir`, save it below, load it again; return the metrics of both."""
    source = Path(str(trainer.args.output_dir))
    model = condensed_from(source, task.load, pad_to_multiple_of)
    if model is None:
        return {}
    metrics = evaluate(like(trainer, model, task), task, "condensed")
    if trainer.is_world_process_zero():
        save_condensed(model, source, task.tokenizer)
    trainer.accelerator.wait_for_everyone()
    return metrics | evaluate(like(trainer, task.load(source / CONDENSED), task), task, "reloaded")


def condensed_from(source: Path, load: Load, pad_to_multiple_of: int | None) -> PreTrainedModel | None:
    """The saved model, condensed; None, after a line that says why, when nothing can be cut out.

    The saved model is taken because the trained one still has its optimizer.
    """
    model = load(source)
    if condense_plan(model, pad_to_multiple_of).empty:
        print(nothing_to_cut(model, pad_to_multiple_of))
        return None
    return condense(model, pad_to_multiple_of=pad_to_multiple_of)


def save_condensed(model: PreTrainedModel, source: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the condensed model below the one it was made from, with a card of its own."""
    target = source / CONDENSED
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_card(target, model, PruningConfig.from_pretrained(source), CardFacts.load(source))


def publish(trainer: Trainer) -> None:
    """Push to the Hub: the condensed model when there is one, else the model as it was trained, each with its card."""
    condensed = Path(str(trainer.args.output_dir), CONDENSED)
    if not condensed.is_dir():
        trainer.push_to_hub()
    elif trainer.is_world_process_zero():
        args = trainer.args
        push_to_hub(
            condensed, str(trainer.hub_model_id), private=args.hub_private_repo, revision=args.hub_revision, token=args.hub_token
        )


def like(trainer: Trainer, model: PreTrainedModel, task: Task) -> Trainer:
    """A plain Trainer that evaluates another model under the same settings."""
    other = Trainer(
        model=model,
        args=trainer.args,
        eval_dataset=trainer.eval_dataset,
        data_collator=task.data_collator,
        processing_class=task.tokenizer,
        compute_metrics=task.compute_metrics,
        **task.trainer,
    )
    other.state.epoch = trainer.state.epoch
    return other
