"""Teacher logits as columns of a dataset, computed once and kept on disk.

[`add_teacher_logits`] adds them, [`TeacherLogitsCollator`] pads them as the wrapped collator pads the tokens they belong to.

- `teacher_logits`: `[classes]` a row for sequence classification, `[tokens, classes]` for token classification and language models,
  `[tokens, 2]` (start, end) for question answering. Tokens are those of the row itself, so a batch may be padded in any way.
- `teacher_indices`: with `top_k`, int `[tokens, k]`, the classes that `teacher_logits` `[tokens, k]` are of.
- `teacher_lost_mass`: with `top_k`, the teacher's probability of all other classes at temperature 1, averaged over tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..compat import without_peft
from ..settings.errors import ConfigError
from .models import forward_arguments, select, teacher_arguments

LOGITS, INDICES, LOST_MASS = COLUMNS = ("teacher_logits", "teacher_indices", "teacher_lost_mass")

#: Fields of a config that change no logits, but may change when a model is trained or saved.
IGNORED_FIELDS = {"_name_or_path", "architectures", "auto_map", "dtype", "problem_type", "transformers_version", "use_cache"}

Row = dict[str, Any]
Collator = Callable[[list[Row]], Mapping[str, Any]]

logger = logging.getLogger(__name__)


def add_teacher_logits(
    dataset: Dataset,
    teacher: PreTrainedModel,
    collator: Collator,
    batch_size: int,
    top_k: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Dataset:
    """Add the teacher's logits to a tokenized dataset, for a [`DistillationTrainer`] without a teacher.

    The result is kept on disk under a fingerprint of the teacher's weights and config, of all data, and of every batch as the
    collator makes it. A second call reads it without running the teacher; another teacher, other data, another tokenizer length or
    padding makes a new one. A file that cannot be read, or has another number of rows, is named in a warning and recomputed.

    Args:
        dataset: tokenized rows; columns that the teacher does not take are kept and ignored. Teacher logits it may already have are
            replaced.
        teacher: runs on its own device, in evaluation mode.
        collator: makes a batch of rows, as in the Trainer; the same batch each time.
        batch_size: rows per forward pass of the teacher.
        top_k: for tasks with logits of each token, keep only the k largest. The student then learns from the teacher's distribution
            over these; what the others had is in the column `teacher_lost_mass`, and its mean is logged.
        cache_dir: folder of the files; by default `teacher_logits` in the cache of the datasets library.

    Raises:
        ConfigError: `top_k` does not fit the logits, or the collator is random or does not return one row per row.
    """
    dataset = dataset.remove_columns([name for name in dataset.column_names if name in COLUMNS])
    if not select(dict.fromkeys(dataset.column_names), forward_arguments(teacher)):
        raise ConfigError("dataset", dataset.column_names, f"has none of the inputs of {type(teacher).__name__}; is it tokenized?")
    fingerprint = _fingerprint(dataset, teacher, collator, batch_size, top_k)
    folder = Path(cache_dir) if cache_dir is not None else Path(datasets.config.HF_DATASETS_CACHE) / "teacher_logits"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{fingerprint}.arrow"
    if reason := _defect(file, len(dataset)):
        logger.warning("%s is not whole (%s); the teacher's logits are computed again.", file, reason)
        file.unlink()

    def forward(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return _teacher_columns(_rows(columns, teacher), teacher, collator, top_k)

    was_training = teacher.training
    teacher.train(False)
    try:
        result = dataset.with_format(None).map(
            forward,
            batched=True,
            batch_size=batch_size,
            new_fingerprint=fingerprint,
            cache_file_name=str(file),
            load_from_cache_file=True,
            desc="Teacher logits",
        )
    finally:
        teacher.train(was_training)
    if top_k is not None and len(result):
        lost = sum(result[LOST_MASS]) / len(result)
        logger.warning("teacher_logits: the top %d classes leave out %.3g of the teacher's probability.", top_k, lost)
    return result.with_format(dataset.format["type"], **dataset.format["format_kwargs"])


class TeacherLogitsCollator:
    """A collator that also makes a batch of the teacher's logits, padded with zeros where the rows are padded.

    Args:
        collator: makes a batch of everything else; it never sees the teacher's columns.
        aligned_with: the column whose items the logits of tokens belong to; `"labels"` for encoder-decoder language models.

    Raises:
        ConfigError: a batch does not hold a row as it is, to its left or its right end.
    """

    def __init__(self, collator: Collator, aligned_with: str = "input_ids") -> None:
        self.collator, self.aligned_with = collator, aligned_with
        #: The Trainer saves the tokenizer that it finds here.
        self.tokenizer = getattr(collator, "tokenizer", None)

    def __call__(self, features: Sequence[Row]) -> dict[str, Any]:
        rows = [{name: value for name, value in row.items() if name not in COLUMNS} for row in features]
        batch = dict(self.collator(rows))
        for name, dtype in ((LOGITS, torch.float32), (INDICES, torch.long)):
            if name in features[0]:
                values = [torch.as_tensor(row[name], dtype=dtype) for row in features]
                batch[name] = torch.stack(values) if values[0].dim() == 1 else self._padded(values, rows, batch)
        return batch

    def _padded(self, values: list[Tensor], rows: list[Row], batch: Mapping[str, Any]) -> Tensor:
        length = batch[self.aligned_with].shape[1]
        padded = values[0].new_zeros(len(values), length, values[0].shape[-1])
        for index, (value, start) in enumerate(zip(values, row_starts(rows, batch, self.aligned_with))):
            padded[index, start : start + len(value)] = value
        return padded


def row_starts(rows: Sequence[Row], batch: Mapping[str, Any], column: str) -> list[int]:
    """Where each row begins in its padded batch: at 0 when it is padded to its right, later when to its left.

    Raises:
        ConfigError: the batch has other rows.
    """
    padded = batch[column]
    starts = []
    for row, line in zip(rows, padded if len(padded) == len(rows) else ()):
        own = torch.as_tensor(row[column])
        last = len(line) - len(own)
        starts += [start for start in (0, last) if last >= 0 and torch.equal(line[start : start + len(own)], own)][:1]
    if len(starts) != len(rows):
        raise ConfigError("collator", column, "must keep every row whole, padded to its left or right, and change no token.")
    return starts


# ------------------------------------------------------------------------------------------------------------------- inner works


def _defect(file: Path, rows: int) -> str | None:
    """Why a cached dataset cannot be used, or None if it can or is not there. Arrow keeps no checksums, so lengths have to do."""
    if not file.exists():
        return None
    try:
        found = len(Dataset.from_file(str(file)))
    except (OSError, pyarrow.ArrowException) as error:
        return str(error)
    return None if found == rows else f"it has {found} rows for {rows}"


def _rows(columns: Mapping[str, list[Any]], teacher: PreTrainedModel) -> list[Row]:
    """The rows of a batch of columns, with what the teacher or a collator takes."""
    wanted = select(columns, forward_arguments(teacher) | {"label", "label_ids"})
    return [dict(zip(wanted, values)) for values in zip(*wanted.values())]


def _teacher_columns(rows: list[Row], teacher: PreTrainedModel, collator: Collator, top_k: int | None) -> dict[str, list[Any]]:
    """The new columns of one batch of rows."""
    batch = collator(rows)
    with torch.no_grad():
        inputs = {name: value.to(teacher.device) for name, value in select(batch, teacher_arguments(teacher)).items()}
        outputs = teacher(**inputs)
    answers = "start_logits" in outputs
    logits = torch.stack((outputs["start_logits"], outputs["end_logits"]), dim=-1) if answers else outputs["logits"]
    logits = logits.float().cpu()
    per_token = logits.dim() == 3
    if top_k is not None and (not per_token or answers or not 0 < top_k <= logits.shape[-1]):
        raise ConfigError("top_k", top_k, f"must fit logits of each token, 1 to their number; these are {list(logits.shape)}.")
    if not per_token:
        return {LOGITS: list(logits.numpy())}
    column = "labels" if without_peft(teacher).config.is_encoder_decoder and not answers else "input_ids"
    spans = [line[start : start + len(row[column])] for row, line, start in zip(rows, logits, row_starts(rows, batch, column))]
    if top_k is None:
        return {LOGITS: [span.numpy() for span in spans]}
    largest = [span.topk(top_k) for span in spans]
    shares = [span.softmax(dim=-1).gather(-1, top.indices).sum(dim=-1) for span, top in zip(spans, largest)]
    return {
        LOGITS: [top.values.numpy() for top in largest],
        INDICES: [top.indices.int().numpy() for top in largest],
        LOST_MASS: [1 - float(share.mean()) for share in shares],
    }


def _fingerprint(dataset: Dataset, teacher: PreTrainedModel, collator: Collator, batch_size: int, top_k: int | None) -> str:
    """A digest of all that the new dataset depends on: what the teacher is, what the rows hold, what batches are made of them.

    Batches are digested, not the collator: objects such as tokenizers change their pickles when they are used.
    """
    digest = hashlib.sha256(f"1 {type(teacher).__name__} {top_k} {batch_size}".encode())
    config = {name: value for name, value in without_peft(teacher).config.to_dict().items() if name not in IGNORED_FIELDS}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        _digest_tensor(digest, name, tensor)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.combine_chunks())
        digest.update(sink.getvalue())
    for index, rows in enumerate(_batches(dataset, teacher, batch_size)):
        batch = collator([dict(row) for row in rows])
        again = collator([dict(row) for row in rows]) if index == 0 else batch
        for name, value in sorted(batch.items()):
            if torch.is_tensor(value):
                if not torch.equal(value, again[name]):
                    raise ConfigError("collator", name, "must be the same whenever a batch is made; cached logits fit one only.")
                _digest_tensor(digest, name, value)
    return digest.hexdigest()


def _batches(dataset: Dataset, teacher: PreTrainedModel, batch_size: int) -> Iterator[list[Row]]:
    for columns in dataset.with_format(None).iter(batch_size=batch_size):
        yield _rows(columns, teacher)


def _digest_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
