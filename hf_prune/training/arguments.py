"""What training scripts ask for beside `TrainingArguments`: which model, which data, how to prune, what to learn from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict
from transformers import HfArgumentParser, PreTrainedModel, TrainingArguments

from ..distillation import DistillationArguments
from ..settings.arguments import PruningArguments
from ..settings.errors import ConfigError
from .stage import Load


@dataclass
class ModelArguments:
    """Which model to start from, and how it is loaded and condensed."""

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
        default=None,
        metadata={"help": "Pad the neurons left in a condensed block to a multiple, such as 16; odd sizes can be slow."},
    )

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is."""
        return self.tokenizer_name or self.model_name_or_path

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
    """Which files, and how much of the data is used; a script adds what is its own."""

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
        """The splits of these kinds, cut to the requested numbers of rows.

        Raises:
            ConfigError: a split is needed and not there.
            ValueError: none is needed.
        """
        limits = {"train": self.max_train_samples, "validation": self.max_eval_samples, "test": self.max_predict_samples}
        selected = DatasetDict()
        for kind, limit in limits.items():
            needed = kind in kinds
            # MNLI has two of each: validation_matched, validation_mismatched.
            found = [name for name in raw if name.split("_")[0] == kind]
            if needed and not found:
                raise ConfigError(f"{kind}_file", None, f"must be given for this run; the data has only {', '.join(raw)}.")
            for name in found if needed else ():
                selected[name] = raw[name] if limit is None else raw[name].take(min(limit, len(raw[name])))
        if not selected:
            raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
        return selected


def parse_arguments(data_arguments: type, arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command line, or the JSON or YAML file that is its only argument.

    Args:
        data_arguments: the script's dataclass of data arguments.
        arguments: the arguments of the command line.

    Returns:
        [`ModelArguments`], `data_arguments`, `TrainingArguments`, [`PruningArguments`], [`DistillationArguments`].

    Raises:
        ConfigError: the arguments contradict each other.
    """
    groups: Any = (ModelArguments, data_arguments, TrainingArguments, PruningArguments, DistillationArguments)
    parser = HfArgumentParser(groups)
    if len(arguments) == 1 and arguments[0].endswith(".json"):
        parsed = parser.parse_json_file(arguments[0])
    elif len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        parsed = parser.parse_yaml_file(arguments[0])
    else:
        parsed = parser.parse_args_into_dataclasses(list(arguments))
    training_args, pruning_args = parsed[2:4]
    if pruning_args.to_config() is not None and not training_args.do_train:
        raise ConfigError("do_train", False, "must be set with --do_prune, since a model is pruned while it trains.")
    return parsed


def needed_splits(args: TrainingArguments) -> set[str]:
    """Which of `train`, `validation` and `test` a run of the Trainer uses."""
    needs = {"train": args.do_train, "validation": args.do_eval or args.eval_strategy != "no", "test": args.do_predict}
    return {kind for kind, needed in needs.items() if needed}
