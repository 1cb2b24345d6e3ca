"""Fine-tune, prune and condense a text classifier on a GLUE task, or on CSV, JSON or JSON lines files with a column `label`.

The script is transformers' `run_glue.py` with two more groups of arguments: pruning (`--do_prune`, `--pruning_pattern`,
`--target_sparsity`, …, or `--pruning_config file.json` for rules) and distillation (`--teacher_model_name_or_path`,
`--distill_alpha_hidden`, …). Without `--do_prune` it is plain fine-tuning; `--push_to_hub` publishes what came out. What it writes
is listed in `job.py`. Arguments may also come from one `.json` or `.yaml` file: `python run_glue.py arguments.json`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from glue_data import TASK_TO_KEYS, glue_files, label_names, load_raw_datasets, metrics_for, text_columns, tokenize
from job import DataArguments, ModelArguments, Task, load_model, needed_splits, parse_arguments, run, splits_of
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    default_data_collator,
)


@dataclass
class DataTrainingArguments(DataArguments):
    """Which data, and how it is cut."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASK_TO_KEYS)}."})
    glue_dir: str | None = field(
        default_factory=lambda: os.environ.get("HF_PRUNE_GLUE_DIR"),
        metadata={"help": "A folder with TASK/SPLIT.jsonl (or .json, .csv) instead of the Hub's GLUE; or set HF_PRUNE_GLUE_DIR."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Tokens that a row is cut to.", "aliases": ["--max_length"]})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every row to max_seq_length, not to its batch."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in TASK_TO_KEYS:
            raise ValueError(f"task_name={self.task_name!r}: must be one of {', '.join(TASK_TO_KEYS)}.")

    def files(self) -> dict[str, str]:
        """The files that were given, or those of the task in `glue_dir`, by split."""
        given = super().files()
        return given if given or self.glue_dir is None or self.task_name is None else glue_files(self.glue_dir, self.task_name)

    def card_facts(self) -> dict[str, Any]:
        """What a model card says of the data: its id on the Hub, when it is GLUE."""
        if self.task_name is None or self.train_file or self.validation_file:
            return {}
        return {"dataset": "nyu-mll/glue", "dataset_config": self.task_name, "dataset_split": "validation", "language": "en"}


def in_model_order(names: list[str] | None, config: PreTrainedConfig) -> list[str] | None:
    """The class names in the order that a model fine-tuned on these classes already has for them."""
    known = [config.id2label[index] for index in sorted(config.id2label)]
    return known if names is not None and sorted(known) == sorted(names) else names


def load_classifier(names: list[str] | None, path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """A classifier of these classes (a regressor when `names` is None); see [`load_model`]."""
    model = load_model(AutoModelForSequenceClassification, path, num_labels=1 if names is None else len(names), **kwargs)
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    return model


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
    splits = data_args.select(raw, kinds)
    return Task(
        load=partial(load_classifier, names),
        tokenizer=tokenizer,
        names=names,
        data=tokenize(splits, tokenizer, text_columns(task, example), names, data_args.max_seq_length, padding),
        data_collator=default_data_collator if padding else DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics_for(task, regression=names is None),
        card=data_args.card_facts(),
    )


def predict(trainer: Trainer, task: Task) -> None:
    """Write the predictions for the test rows to `predict_results.txt`."""
    names = task.names
    for suffix, rows in splits_of(task.data, "test").items():
        logits = trainer.predict(rows.remove_columns("label") if "label" in rows.column_names else rows).predictions
        values = logits.squeeze(-1) if names is None else [names[index] for index in logits.argmax(-1)]
        if trainer.is_world_process_zero():
            lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
            Path(str(trainer.args.output_dir), f"predict_results{suffix}.txt").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    model_args, data_args, training_args, *others = parse_arguments(
        DataTrainingArguments, sys.argv[1:] if arguments is None else arguments
    )
    task = load_task(model_args, data_args, needed_splits(training_args))
    return run(task, model_args, training_args, *others, predict=predict)


if __name__ == "__main__":
    main()
