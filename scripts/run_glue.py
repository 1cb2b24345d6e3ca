"""Fine-tune, prune and condense a text classifier on a GLUE task or on your own CSV, JSON or JSON lines files.

The script is transformers' `run_glue.py` with two more groups of arguments: pruning (`--do_prune`, `--pruning_pattern`,
`--target_sparsity`, …, or `--pruning_config file.json` for rules) and distillation (`--teacher_model_name_or_path`,
`--distill_alpha_hidden`, …). Without `--do_prune` it is plain fine-tuning; `--push_to_hub` publishes what came out. It writes

- `output_dir`: the model that was trained; a pruned one keeps its shape and has true zeros;
- `output_dir/condensed`: the smaller, equal model, where whole heads or neurons were pruned;
- `all_results.json` with the metrics as trained (`eval_`), condensed (`condensed_`) and loaded again from disk (`reloaded_`).

Arguments may also come from one `.json` or `.yaml` file: `python run_glue.py arguments.json`.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from glue_data import TASK_TO_KEYS, glue_files, label_names, load_raw_datasets, metrics_for, text_columns, tokenize
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_prune import (
    CardFacts,
    DistillationConfig,
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
from hf_prune.hub import write_card
from hf_prune.pipeline import set_dropout

#: The folder of the condensed model, below that of the pruned one.
CONDENSED = "condensed"


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

    @property
    def remote(self) -> dict[str, Any]:
        """What `from_pretrained` takes besides the path."""
        return {"revision": self.model_revision, "trust_remote_code": self.trust_remote_code}

    def load(self, names: list[str] | None) -> PreTrainedModel:
        """The model to train; see [`load_model`]."""
        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        return load_model(self.model_name_or_path, names, self.dropout, **self.remote, **attention)


@dataclass
class DataTrainingArguments:
    """Which data, and how it is cut."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASK_TO_KEYS)}."})
    glue_dir: str | None = field(
        default_factory=lambda: os.environ.get("HF_PRUNE_GLUE_DIR"),
        metadata={"help": "A folder with TASK/SPLIT.jsonl (or .json, .csv) instead of the Hub's GLUE; or set HF_PRUNE_GLUE_DIR."},
    )
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON or JSON lines, with a column `label`."})
    validation_file: str | None = field(default=None, metadata={"help": "The same for evaluation."})
    test_file: str | None = field(default=None, metadata={"help": "The same for prediction."})
    max_seq_length: int = field(default=128, metadata={"help": "Tokens that a row is cut to.", "aliases": ["--max_length"]})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every row to max_seq_length, not to its batch."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for training."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for evaluation."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only the first rows for prediction."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in TASK_TO_KEYS:
            raise ValueError(f"task_name={self.task_name!r}: must be one of {', '.join(TASK_TO_KEYS)}.")

    def files(self) -> dict[str, str]:
        """The files that were given, or those of the task in `glue_dir`, by split."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        given = {split: file for split, file in files.items() if file is not None}
        return given if given or self.glue_dir is None or self.task_name is None else glue_files(self.glue_dir, self.task_name)

    def card_facts(self) -> dict[str, Any]:
        """What a model card says of the data: its id on the Hub, when it is GLUE."""
        if self.task_name is None or self.train_file or self.validation_file:
            return {}
        return {"dataset": "nyu-mll/glue", "dataset_config": self.task_name, "dataset_split": "validation", "language": "en"}


@dataclass
class DistillationArguments:
    """[`DistillationConfig`] as flat arguments; giving any of them turns distillation on."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher; by default a frozen copy of the model that training starts from."}
    )
    distill_temperature: float | None = field(default=None, metadata={"help": "Temperature of the logits loss (2.0)."})
    distill_alpha_task: float | None = field(default=None, metadata={"help": "Weight of the task loss (0.1)."})
    distill_alpha_logits: float | None = field(default=None, metadata={"help": "Weight of the loss on the logits (0.9)."})
    distill_alpha_hidden: float | None = field(
        default=None, metadata={"help": "Weight of the loss on the last hidden state (0.0)."}
    )

    distill_loss_weight: float | None = field(
        default=None,
        metadata={"help": "As in Intel Neural Compressor: learn the last hidden state alone, with this weight, and no task loss."},
    )

    def to_config(self) -> DistillationConfig | None:
        """The config these arguments describe, or None when none was given.

        Raises:
            ValueError: weights were given in both ways.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        alphas = {name.removeprefix("distill_"): value for name, value in given.items() if name.startswith("distill_alpha_")}
        if self.distill_loss_weight is not None:
            if alphas:
                raise ValueError(f"distill_loss_weight={self.distill_loss_weight}: must not be given with distill_{min(alphas)}.")
            alphas = {"alpha_task": 0.0, "alpha_logits": 0.0, "alpha_hidden": self.distill_loss_weight}
        if self.distill_temperature is not None:
            alphas["temperature"] = self.distill_temperature
        return DistillationConfig(**alphas) if given else None

    def load_teacher(self, student: PreTrainedModel, names: list[str] | None) -> PreTrainedModel:
        """The teacher that was named, or a copy of the student as it starts."""
        path = self.teacher_model_name_or_path
        return copy.deepcopy(student) if path is None else load_model(path, names)


Arguments = tuple[ModelArguments, DataTrainingArguments, TrainingArguments, PruningArguments, DistillationArguments]


def parse_arguments(arguments: Sequence[str]) -> Arguments:
    """From a command line, or from the one JSON or YAML file that it names."""
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments, PruningArguments, DistillationArguments))
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        return parser.parse_json_file(arguments[0])
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        return parser.parse_yaml_file(arguments[0])
    return parser.parse_args_into_dataclasses(list(arguments))


def needed_splits(args: TrainingArguments) -> set[str]:
    """Which of `train`, `validation` and `test` a run of the Trainer uses."""
    needs = {"train": args.do_train, "validation": args.do_eval or args.eval_strategy != "no", "test": args.do_predict}
    return {kind for kind, needed in needs.items() if needed}


def select_splits(raw: DatasetDict, data_args: DataTrainingArguments, kinds: set[str]) -> DatasetDict:
    """The splits of these kinds, cut to the numbers of rows asked for.

    Raises:
        ValueError: a split is needed and not there, or none is needed.
    """
    limits = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
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


def splits_of(data: DatasetDict, kind: str) -> dict[str, Dataset]:
    """The splits of a kind by the suffix that their metrics get: "" or, for MNLI's mismatched half, "_mm"."""
    return {"_mm" if name.endswith("_mismatched") else "": rows for name, rows in data.items() if name.startswith(kind)}


def in_model_order(names: list[str] | None, config: PreTrainedConfig) -> list[str] | None:
    """The class names in the order that a model fine-tuned on these classes already has for them."""
    known = [config.id2label[index] for index in sorted(config.id2label)]
    return known if names is not None and sorted(known) == sorted(names) else names


def load_model(path: str | Path, names: list[str] | None, dropout: float | None = None, **kwargs: Any) -> PreTrainedModel:
    """A classifier of these classes (a regressor when `names` is None)."""
    count = 1 if names is None else len(names)
    config = AutoConfig.from_pretrained(path, num_labels=count, **kwargs)
    if dropout is not None:
        set_dropout(config, dropout)
    model = AutoModelForSequenceClassification.from_pretrained(path, config=config, **kwargs)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


@dataclass
class Task:
    """A task's data and what scores it.

    Attributes:
        tokenizer: the model's.
        names: of the classes in label order; None for regression.
        data: the tokenized splits.
        data_collator: makes batches.
        compute_metrics: the task's metric.
    """

    tokenizer: PreTrainedTokenizerBase
    names: list[str] | None
    data: DatasetDict
    data_collator: Callable[[list[Any]], dict[str, Any]]
    compute_metrics: Callable[[EvalPrediction], dict[str, float]]


def load_task(model_args: ModelArguments, data_args: DataTrainingArguments, kinds: set[str]) -> Task:
    """Load and tokenize the splits of these kinds.

    Raises:
        ValueError: the data is not what the arguments say.
    """
    start, task = model_args.model_name_or_path, data_args.task_name
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or start, **model_args.remote)
    raw = load_raw_datasets(task, data_args.files())
    example = next(iter(raw.values()))
    names = in_model_order(label_names(task, example), AutoConfig.from_pretrained(start, **model_args.remote))
    padding = data_args.pad_to_max_length
    splits = select_splits(raw, data_args, kinds)
    return Task(
        tokenizer=tokenizer,
        names=names,
        data=tokenize(splits, tokenizer, text_columns(task, example), names, data_args.max_seq_length, padding),
        data_collator=default_data_collator if padding else DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_for(task, regression=names is None),
    )


def evaluate(trainer: Trainer, data: DatasetDict, prefix: str) -> dict[str, float]:
    """Evaluate on every validation split; metrics are printed and written as `PREFIX_results.json`."""
    metrics: dict[str, float] = {}
    for suffix, rows in splits_of(data, "validation").items():
        scores = trainer.evaluate(rows, metric_key_prefix=prefix)
        metrics |= {f"{name}{suffix}": value for name, value in scores.items()}
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def predict(trainer: Trainer, data: DatasetDict, names: list[str] | None) -> None:
    """Write the predictions for the test rows to `predict_results.txt`."""
    for suffix, rows in splits_of(data, "test").items():
        logits = trainer.predict(rows.remove_columns("label") if "label" in rows.column_names else rows).predictions
        values = logits.squeeze(-1) if names is None else [names[index] for index in logits.argmax(-1)]
        if trainer.is_world_process_zero():
            lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
            Path(str(trainer.args.output_dir), f"predict_results{suffix}.txt").write_text("\n".join(lines) + "\n")


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


def condense_saved(trainer: Trainer, data: DatasetDict, names: list[str] | None) -> dict[str, float]:
    """Condense the model saved in `output_dir`, save it below, load it again; return the metrics of both."""
    source = Path(str(trainer.args.output_dir))
    model = condensed_from(source, names)
    if model is None:
        return {}
    metrics = evaluate(like(trainer, model), data, "condensed")
    if trainer.is_world_process_zero():
        save_condensed(model, source, trainer.processing_class)
    trainer.accelerator.wait_for_everyone()
    return metrics | evaluate(like(trainer, load_model(source / CONDENSED, names)), data, "reloaded")


def condensed_from(source: Path, names: list[str] | None) -> PreTrainedModel | None:
    """The saved model, condensed; None when no whole head or neuron can be removed.

    The saved model is taken because the trained one still has its optimizer.
    """
    model = load_model(source, names)
    multiple = 16  # odd numbers of neurons are slow
    if not condense_plan(model, multiple).changed:
        return None
    return condense(model, pad_to_multiple_of=multiple)


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
        push_to_hub(condensed, str(trainer.hub_model_id), token=trainer.args.hub_token)


def like(trainer: Trainer, model: PreTrainedModel) -> Trainer:
    """A plain Trainer that evaluates another model under the same settings."""
    other = Trainer(
        model=model,
        args=trainer.args,
        eval_dataset=trainer.eval_dataset,
        data_collator=trainer.data_collator,
        processing_class=trainer.processing_class,
        compute_metrics=trainer.compute_metrics,
    )
    other.state.epoch = trainer.state.epoch
    return other


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, training_args, pruning_args, distillation_args = parsed
    pruning, distillation = pruning_args.to_config(), distillation_args.to_config()
    if pruning is not None and not training_args.do_train:
        raise ValueError("do_train=False: must be set with --do_prune, since a model is pruned while it trains.")
    set_seed(training_args.seed)

    task = load_task(model_args, data_args, needed_splits(training_args))
    data, names = task.data, task.names
    model = model_args.load(names)
    settings: dict[str, Any] = {
        "args": training_args,
        "train_dataset": data.get("train"),
        "eval_dataset": splits_of(data, "validation").get(""),
        "processing_class": task.tokenizer,
        "data_collator": task.data_collator,
        "compute_metrics": task.compute_metrics,
        "callbacks": [PruningCallback(pruning), ModelCardCallback(**data_args.card_facts())] if pruning else [],
    }
    if distillation is None:
        trainer = Trainer(model=model, **settings)
    else:
        teacher = distillation_args.load_teacher(model, names)
        trainer = DistillationTrainer(model=model, teacher=teacher, distillation=distillation, **settings)

    metrics: dict[str, float] = {}
    if training_args.do_train:
        metrics |= train(trainer)
    if training_args.do_eval:
        metrics |= evaluate(trainer, data, "eval")
    if training_args.do_predict:
        predict(trainer, data, names)
    if pruning is not None:
        if trainer.is_world_process_zero():
            pruning.save_pretrained(str(training_args.output_dir))
            print(sparsity_report(model))
        metrics |= condense_saved(trainer, data, names)
    if training_args.push_to_hub:
        publish(trainer)
    return metrics


if __name__ == "__main__":
    main()
