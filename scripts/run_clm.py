"""Fine-tune, prune and condense a causal language model on text: `.txt`, or `.csv`, `.json`, `.jsonl` with a column `text`.

Arguments for pruning and distillation, and output files, are those of `run_glue.py`. The metric is perplexity. The script is
self-contained: copy it and change it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, load_dataset
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from hf_prune.training.arguments import DataArguments, ModelArguments, needed_splits, parse_arguments
from hf_prune.training.stage import Task, load_model, run_stage

#: Extension of a file → the loader of `datasets` that reads it.
READERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class DataTrainingArguments(DataArguments):
    """The data and its preprocessing; `max_*_samples` count rows of text, before they are cut into blocks."""

    dataset_name: str | None = field(default=None, metadata={"help": "Data on the Hub, such as Salesforce/wikitext."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, such as wikitext-2-raw-v1."})
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens per block; fewer if the model has fewer positions."})

    def load(self) -> DatasetDict:
        """The rows of text.

        Raises:
            ValueError: there is no data, a file has an unknown extension, or the column does not exist.
        """
        given = self.files()
        for split, file in given.items():
            if Path(file).suffix not in READERS:
                raise ValueError(f"{split}_file={file!r}: the extension must be one of {', '.join(READERS)}.")
        if given:
            raw = DatasetDict(
                {split: load_dataset(READERS[Path(file).suffix], data_files=file, split="train") for split, file in given.items()}
            )
        elif self.dataset_name is None:
            raise ValueError("Give --dataset_name, or --train_file and --validation_file.")
        else:
            raw = load_dataset(self.dataset_name, self.dataset_config_name)
        for split, rows in raw.items():
            if self.text_column not in rows.column_names:
                raise ValueError(f"text_column={self.text_column!r}: the {split} data has only {', '.join(rows.column_names)}.")
        return raw


def blocks_of_text(raw: DatasetDict, tokenizer: PreTrainedTokenizerBase, column: str, size: int) -> DatasetDict:
    """Concatenate the tokens of all rows of a split and cut them into blocks of equal size.

    The remainder of every thousand rows is dropped.

    Raises:
        ValueError: a split has fewer tokens than a block.
    """

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return {"input_ids": [ids + end for ids in tokenizer(rows[column], verbose=False)["input_ids"]]}

    def group(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        tokens = [token for row in rows["input_ids"] for token in row]
        cut = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": cut, "labels": cut}

    blocks = DatasetDict()
    for split, rows in raw.items():
        encoded = rows.map(encode, batched=True, remove_columns=rows.column_names)
        blocks[split] = encoded.map(group, batched=True, remove_columns=encoded.column_names)
        if not len(blocks[split]):
            raise ValueError(f"block_size={size}: the {split} data has fewer tokens.")
    return blocks


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """-log p of each token after the first, `[rows, tokens - 1]`; logits themselves would fill the memory."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return cross_entropy(scores[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """exp of the mean of [`token_losses`]."""
    return {"perplexity": float(np.exp(np.asarray(prediction.predictions, dtype=np.float64).mean()))}


def load_task(model_args: ModelArguments, data_args: DataTrainingArguments, args: TrainingArguments) -> Task:
    """Load the splits that the run needs and cut them into blocks.

    Raises:
        ValueError: the data does not fit the arguments.
    """
    if args.do_predict:
        raise ValueError("do_predict=True: must not be set; give the text as --validation_file, with --do_eval.")
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer, **model_args.remote)
    rows = data_args.select(data_args.load(), needed_splits(args))
    size = min(data_args.block_size, tokenizer.model_max_length)
    card = {"dataset": data_args.dataset_name, "dataset_config": data_args.dataset_config_name, "dataset_split": "validation"}
    return Task(
        load=partial(load_model, AutoModelForCausalLM),
        tokenizer=tokenizer,
        data=blocks_of_text(rows, tokenizer, data_args.text_column, size),
        data_collator=default_data_collator,
        compute_metrics=perplexity,
        card=card if data_args.dataset_name else {},
        trainer={"preprocess_logits_for_metrics": torch.no_grad()(token_losses)},
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    parsed = parse_arguments(DataTrainingArguments, sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, training_args, pruning_args, distillation_args = parsed
    task = load_task(model_args, data_args, training_args)
    set_seed(training_args.seed)
    teacher = distillation_args.teacher_model_name_or_path
    return run_stage(
        task,
        model=model_args.load(task.load),
        args=training_args,
        pruning=pruning_args.to_config(),
        distillation=distillation_args.to_config(),
        teacher=None if teacher is None else task.load(teacher),
        pad_to_multiple_of=model_args.pad_to_multiple_of,
    )


if __name__ == "__main__":
    main()
