"""GLUE data and metrics for the example scripts: column names, loading, tokenising, scoring.

GLUE: Wang et al. 2018, https://arxiv.org/abs/1804.07461. Nothing here needs the Hub when the data comes from local files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from huggingface_hub.constants import HF_HUB_OFFLINE
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction, PreTrainedTokenizerBase

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
        ValueError: neither files nor a task, or a file whose ending is not known.
    """
    if files:
        readers = set()
        for split, file in files.items():
            suffix = Path(file).suffix.lower()
            if suffix not in _READERS:
                raise ValueError(f"{split}_file={file!r}: the ending must be one of {', '.join(_READERS)}.")
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
    """Tokenise every split and turn labels into indices of `names` (floats for regression); -1 stays, it means no label in GLUE.

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


def metrics_for(task_name: str | None, regression: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """The official metric of the task, by `evaluate` where its module can be had, else the same numbers computed here."""
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


def metric_module(*name: str) -> Any:
    """A metric of `evaluate`, or None where it is out of reach. `name`: as for `evaluate.load`."""
    if HF_HUB_OFFLINE:
        return None
    try:
        import evaluate

        return evaluate.load(*name)
    except (ImportError, OSError) as error:
        logger.info("evaluate's metric %s is out of reach (%s); the same numbers are computed here.", " ".join(name), error)
        return None


def glue_scores(task_name: str | None, predicted: Array, labels: Array, regression: bool) -> dict[str, float]:
    """MCC for CoLA, Pearson and Spearman for regression (STS-B), accuracy for the rest, with F1 for MRPC and QQP.

    Args:
        task_name: of GLUE; None for own data.
        predicted: classes, or values of a regression, `[rows]`.
        labels: the same, `[rows]`.
        regression: whether they are values.
    """
    if regression:
        return {"pearson": float(pearsonr(predicted, labels)[0]), "spearmanr": float(spearmanr(predicted, labels)[0])}
    if task_name == "cola":
        return {"matthews_correlation": float(matthews_corrcoef(labels, predicted))}
    scores = {"accuracy": float(accuracy_score(labels, predicted))}
    if task_name in ("mrpc", "qqp"):
        scores["f1"] = float(f1_score(labels, predicted))
    return scores
