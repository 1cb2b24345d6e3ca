"""Fine-tune, prune and condense a text classifier on a GLUE task, or on CSV, JSON or JSON lines files with a column `label`.

The script is transformers' `run_glue.py` with two more groups of arguments: pruning (`--do_prune`, `--pruning_pattern`,
`--target_sparsity`, …, or `--pruning_config file.json` for rules) and distillation (`--teacher_model_name_or_path`,
`--distill_alpha_hidden`, …). Without `--do_prune` it is plain fine-tuning; `--push_to_hub` publishes the result. It writes to
`--output_dir` the trained model, the condensed one (`condensed/`) if whole heads or neurons were pruned, and `all_results.json`
with the metrics of both. Arguments can also be given in one `.json` or `.yaml` file: `python run_glue.py arguments.json`. The
script is self-contained: copy it and change it.

GLUE: Wang et al. 2018, https://arxiv.org/abs/1804.07461. Nothing here needs the Hub when the data comes from local files.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from huggingface_hub.constants import HF_HUB_OFFLINE
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_prune.training.arguments import DataArguments, ModelArguments, needed_splits, parse_arguments
from hf_prune.training.stage import Task, load_model, run_stage

logger = logging.getLogger(__name__)

Array = NDArray[Any]

#: The text columns of each GLUE task.
TASK_TO_KEYS: dict[str, tuple[str, str | None]] = {
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}

_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass
class DataTrainingArguments(DataArguments):
    """The data and its preprocessing."""

    task_name: str | None = field(default=None, metadata={"help": f"GLUE task: {', '.join(TASK_TO_KEYS)}."})
    glue_dir: str | None = field(
        default_factory=lambda: os.environ.get("HF_PRUNE_GLUE_DIR"),
        metadata={"help": "A folder with TASK/SPLIT.jsonl (or .json, .csv) instead of the Hub's GLUE; or set HF_PRUNE_GLUE_DIR."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Maximum tokens per row.", "aliases": ["--max_length"]})
    pad_to_max_length: bool = field(default=False, metadata={"help": "Pad every row to max_seq_length."})

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in TASK_TO_KEYS:
            raise ValueError(f"task_name={self.task_name!r}: must be one of {', '.join(TASK_TO_KEYS)}.")

    def files(self) -> dict[str, str]:
        """The files that were given, or those of the task in `glue_dir`, by split."""
        given = super().files()
        return given if given or self.glue_dir is None or self.task_name is None else glue_files(self.glue_dir, self.task_name)

    def card_facts(self) -> dict[str, Any]:
        """What the model card says about the data: its id on the Hub, if it is GLUE."""
        if self.task_name is None or self.train_file or self.validation_file:
            return {}
        return {"dataset": "nyu-mll/glue", "dataset_config": self.task_name, "dataset_split": "validation", "language": "en"}


# ----------------------------------------------------------------------------------------------------------------------------- data


def glue_files(folder: str, task_name: str) -> dict[str, str]:
    """The files of a task in a folder of GLUE data, `TASK/SPLIT.jsonl` (or `.json`, `.csv`), by split.

    Raises:
        ValueError: there are none.
    """
    found = {path.stem: str(path) for path in sorted(Path(folder, task_name).glob("*")) if path.suffix.lower() in _READERS}
    if not found:
        raise ValueError(f"glue_dir={folder!r}: has no {task_name}/train.jsonl (or another of {', '.join(_READERS)}).")
    return found


def load_raw_datasets(task_name: str | None, files: dict[str, str]) -> DatasetDict:
    """Load ``{split: file}`` (CSV, JSON or JSON lines), or the GLUE task from the Hub when no files are given.

    Raises:
        ValueError: neither files nor a task are given, or a file has an unknown extension.
    """
    if files:
        readers = set()
        for split, file in files.items():
            suffix = Path(file).suffix.lower()
            if suffix not in _READERS:
                raise ValueError(f"{split}_file={file!r}: the extension must be one of {', '.join(_READERS)}.")
            readers.add(_READERS[suffix])
        if len(readers) > 1:
            raise ValueError(f"All data files must have the same format, got {files}.")
        return load_dataset(readers.pop(), data_files=files)
    if task_name is None:
        raise ValueError("Give --task_name, or --train_file and --validation_file.")
    return load_dataset("nyu-mll/glue", task_name)


def text_columns(task_name: str | None, dataset: Dataset) -> tuple[str, str | None]:
    """The one or two text columns: those of the task, else the first string columns that are not the label."""
    if task_name is not None and all(key in dataset.column_names for key in TASK_TO_KEYS[task_name] if key):
        return TASK_TO_KEYS[task_name]
    strings = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string") and name != "label"
    ]
    if not strings:
        raise ValueError(f"No text column among {dataset.column_names}.")
    return strings[0], strings[1] if len(strings) > 1 else None


def label_names(task_name: str | None, dataset: Dataset) -> list[str] | None:
    """The names of the classes in label order, or None for regression (float labels, as in STS-B).

    Raises:
        ValueError: the data has no column `label`.
    """
    if "label" not in dataset.column_names:
        raise ValueError(f"No column 'label' among {', '.join(dataset.column_names)}.")
    feature = dataset.features["label"]
    if task_name == "stsb" or str(getattr(feature, "dtype", "")).startswith("float"):
        return None
    if hasattr(feature, "names"):
        return list(feature.names)
    return [str(value) for value in sorted(value for value in dataset.unique("label") if value != -1)]


def tokenize(
    raw: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str | None],
    names: list[str] | None,
    max_seq_length: int,
    pad_to_max_length: bool,
) -> DatasetDict:
    """Tokenize every split and turn labels into indices of `names` (floats for regression); -1, GLUE's "no label", stays.

    Raises:
        ValueError: a label is not one of `names`.
    """
    index = {name: i for i, name in enumerate(names or [])}
    feature = next(iter(raw.values())).features.get("label")
    name_of: Callable[[Any], str] = feature.int2str if isinstance(feature, ClassLabel) else str

    def to_index(value: Any) -> int:
        if value == -1:
            return -1
        if (name := name_of(value)) not in index:
            raise ValueError(f"label={name!r}: must be one of {', '.join(index)}, the labels of the training data.")
        return index[name]

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = [rows[column] for column in columns if column is not None]
        encoded = tokenizer(
            *texts,
            truncation=True,
            max_length=min(max_seq_length, tokenizer.model_max_length),
            padding="max_length" if pad_to_max_length else False,
        )
        if "label" in rows:
            labels = rows["label"]
            if names is None:
                encoded["label"] = [float(value) for value in labels]
            else:
                encoded["label"] = [to_index(value) for value in labels]
        return encoded

    return DatasetDict({split: rows.map(encode, batched=True, remove_columns=rows.column_names) for split, rows in raw.items()})


# -------------------------------------------------------------------------------------------------------------------------- metrics


def metrics_for(task_name: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The official metric of the task, from `evaluate` if its module is available, else computed here, with the same values."""
    module = None if task_name is None else metric_module("glue", "mnli" if task_name.startswith("mnli") else task_name)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        raw = prediction.predictions
        logits = np.asarray(raw[0] if isinstance(raw, tuple) else raw)
        labels = np.asarray(prediction.label_ids)
        flat = logits.squeeze(-1) if logits.ndim > 1 and logits.shape[-1] == 1 else logits
        predicted = flat if regression else logits.argmax(-1)
        if module is None:
            return glue_scores(task_name, predicted, labels, regression)
        return {name: float(value) for name, value in module.compute(predictions=predicted, references=labels).items()}

    return compute


@cache
def metric_module(*name: str) -> Any:
    """A metric of `evaluate`, or None if it is not available, looked for once. `name`: as for `evaluate.load`."""
    if HF_HUB_OFFLINE:
        return None
    try:
        import evaluate

        return evaluate.load(*name)
    except (ImportError, OSError) as error:
        logger.info("evaluate's metric %s is not available (%s); the same values are computed here.", " ".join(name), error)
        return None


def glue_scores(task_name: str | None, predicted: Array, labels: Array, regression: bool) -> dict[str, float]:
    """MCC for CoLA, Pearson and Spearman for regression (STS-B), accuracy for the rest, with F1 for MRPC and QQP.

    Args:
        task_name: a GLUE task; None for your own data.
        predicted: classes, or values of a regression, `[rows]`.
        labels: the same, `[rows]`.
        regression: whether they are values of a regression.
    """
    if regression:
        return {"pearson": float(pearsonr(predicted, labels)[0]), "spearmanr": float(spearmanr(predicted, labels)[0])}
    if task_name == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(labels, predicted))}
    scores = {"accuracy": float(accuracy_score(labels, predicted))}
    if task_name in ("mrpc", "qqp"):
        scores["f1"] = float(f1_score(labels, predicted))
    return scores


# ------------------------------------------------------------------------------------------------------------------------------ job


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


def training_texts(data_args: DataTrainingArguments) -> list[str]:
    """The texts of the training rows."""
    raw = load_raw_datasets(data_args.task_name, data_args.files())
    rows = data_args.select(raw, {"train"})["train"]
    return [text for column in text_columns(data_args.task_name, rows) if column is not None for text in rows[column]]


def load_task(
    model_args: ModelArguments,
    data_args: DataTrainingArguments,
    kinds: set[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Task:
    """Load and tokenize the splits of these kinds, by default with the model's own tokenizer.

    Raises:
        ValueError: the data does not fit the arguments.
    """
    start, task = model_args.model_name_or_path, data_args.task_name
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model_args.tokenizer, **model_args.remote)
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
    for suffix, rows in task.splits("test").items():
        logits = trainer.predict(rows.remove_columns("label") if "label" in rows.column_names else rows).predictions
        values = logits.squeeze(-1) if names is None else [names[index] for index in logits.argmax(-1)]
        if trainer.is_world_process_zero():
            lines = ["index\tprediction", *(f"{index}\t{value}" for index, value in enumerate(values))]
            Path(str(trainer.args.output_dir), f"predict_results{suffix}.txt").write_text("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; return its metrics."""
    parsed = parse_arguments(DataTrainingArguments, sys.argv[1:] if arguments is None else arguments)
    model_args, data_args, training_args, pruning_args, distillation_args = parsed
    task = load_task(model_args, data_args, needed_splits(training_args))
    set_seed(training_args.seed)  # weights of a new classifier are random
    teacher = distillation_args.teacher_model_name_or_path
    return run_stage(
        task,
        model=model_args.load(task.load),
        args=training_args,
        pruning=pruning_args.to_config(),
        distillation=distillation_args.to_config(),
        teacher=None if teacher is None else task.load(teacher),
        pad_to_multiple_of=model_args.pad_to_multiple_of,
        predict=predict,
    )


if __name__ == "__main__":
    main()
