"""Fine-tune, prune and condense a model that finds answers in texts, on data in SQuAD's format.

Arguments for pruning and distillation are those of `run_glue.py`; what is written is listed in `job.py`, and
`predict_predictions.json` has the answers for the test file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from job import DataArguments, ModelArguments, Task, like, load_model, needed_splits, parse_arguments, run
from squad_data import best_answers, load_squad, metrics_for, windows
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments


@dataclass
class DataTrainingArguments(DataArguments):
    """Which data, how it is cut, and how answers are chosen."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data on the Hub, such as rajpurkar/squad."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window, question included."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that neighbouring windows of a context share."})
    n_best_size: int = field(default=20, metadata={"help": "How many starts and ends of a window are tried."})
    max_answer_length: int = field(default=30, metadata={"help": "Tokens of an answer."})
    version_2_with_negative: bool = field(default=False, metadata={"help": "Some questions have no answer, as in SQuAD 2."})
    null_score_diff_threshold: float = field(
        default=0.0,
        metadata={"help": "There is no answer where the score for that is higher than the best one's by more than this."},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.doc_stride < self.max_seq_length:
            raise ValueError(f"doc_stride={self.doc_stride}: must be less than max_seq_length={self.max_seq_length}.")

    @property
    def choice(self) -> dict[str, Any]:
        """The settings of [`best_answers`]."""
        threshold = self.null_score_diff_threshold if self.version_2_with_negative else None
        return {
            "n_best_size": self.n_best_size,
            "max_answer_length": self.max_answer_length,
            "null_score_diff_threshold": threshold,
        }


def load_task(model_args: ModelArguments, data_args: DataTrainingArguments, args: TrainingArguments) -> tuple[Task, DatasetDict]:
    """The task, and the examples before they were cut into windows.

    Raises:
        ValueError: the data is not what the arguments say, or the run would mix up the windows of its examples.
    """
    if args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "train_sampling_strategy='group_by_length': must be 'random' here; it changes the order in evaluation too."
        )
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or model_args.model_name_or_path, **model_args.remote)
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer_name={tokenizer.name_or_path!r}: must be a fast tokenizer, which knows each token's characters."
        )
    examples = data_args.select(load_squad(data_args.files(), data_args.dataset_name), needed_splits(args))
    cut = partial(windows, tokenizer=tokenizer, max_seq_length=data_args.max_seq_length, doc_stride=data_args.doc_stride)
    data = DatasetDict({split: cut(rows, keep=split != "train") for split, rows in examples.items()})
    task = Task(
        load=partial(load_model, AutoModelForQuestionAnswering),
        tokenizer=tokenizer,
        data=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        card={"dataset": data_args.dataset_name, "dataset_split": "validation"} if data_args.dataset_name else {},
    )
    if "validation" in data:
        find = partial(best_answers, **data_args.choice)
        task.compute_metrics = metrics_for(data["validation"], examples["validation"], find, data_args.version_2_with_negative)
    return task, examples


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    given = sys.argv[1:] if arguments is None else arguments
    model_args, data_args, training_args, *others = parse_arguments(DataTrainingArguments, given)
    task, examples = load_task(model_args, data_args, training_args)

    def predict(trainer: Trainer, task: Task) -> None:
        logits = like(trainer, trainer.model, replace(task, compute_metrics=None)).predict(task.data["test"]).predictions
        found = best_answers(logits[:2], task.data["test"], examples["test"], **data_args.choice)
        if trainer.is_world_process_zero():
            file = Path(str(training_args.output_dir), "predict_predictions.json")
            file.write_text(json.dumps(dict(zip(examples["test"]["id"], found)), indent=2, ensure_ascii=False) + "\n")

    return run(task, model_args, training_args, *others, predict=predict)


if __name__ == "__main__":
    main()
