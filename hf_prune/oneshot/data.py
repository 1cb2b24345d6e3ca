"""Calibration rows from a file of text, as a model's own tokenizer makes them.

A model that reads text gets rows of the file, one or two columns of it. A causal language model gets windows of one length out of
the joined text, as it was trained on (and as GPTQ, SparseGPT and Wanda are calibrated). An encoder-decoder that writes gets what it
shall read, and what it shall write as the decoder's input.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from torch import Tensor
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from ..model.positions import longest_row
from ..settings.errors import ConfigError, closest, closest_path
from .calibration import FEWEST_ROWS, MOST_ROWS, TOKENS

#: What reads a file, by its ending.
READERS = {".txt": "text", ".csv": "csv", ".json": "json", ".jsonl": "json"}
#: Columns with the text, as they are called in GLUE, in SQuAD and in most corpora; the first that are there are taken.
COLUMNS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("text",),
    ("sentence",),
)
#: Columns that hold the answer.
_ANSWERS = frozenset({"label", "labels", "label_text"})


def check_file(file: str | os.PathLike[str]) -> None:
    """Raise unless a file is there and of a known kind.

    Raises:
        ConfigError: it is not; names it and what comes closest.
    """
    path = Path(file)
    if path.suffix.lower() not in READERS:
        raise ConfigError("data", str(file), f"must end in {', '.join(READERS)}.")
    if not path.is_file():
        raise ConfigError("data", str(file), "is no file.", closest_path(path, path.parent.glob("*.*")))


def load_tokenizer(folder: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ConfigError: there is none, or it is malformed. For some families transformers then makes one that knows no words.
    """
    allowed = (
        f"has no tokenizer, without which text cannot be read; tokenizer.save_pretrained({os.fspath(folder)!r}) puts it there."
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError("PATH", os.fspath(folder), allowed) from error
    except Exception as error:  # the tokenizers library raises nothing more special for a file that it cannot read
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError("PATH", os.fspath(folder), f"has a tokenizer that cannot be loaded ({reason}).") from error
    words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys() - set(tokenizer.all_special_tokens)
    if len(words) < 2:
        raise ConfigError("PATH", os.fspath(folder), allowed)
    return tokenizer


def read_file(file: str | os.PathLike[str], whole: bool = False) -> Dataset:
    """The rows of a file.

    Args:
        file: `.txt` (a row is a line, the column is `text`), `.csv`, `.json` or `.jsonl`.
        whole: a `.txt` is one row.

    Raises:
        ConfigError: see [`check_file`]; or the file cannot be read so.
    """
    check_file(file)
    reader = READERS[Path(file).suffix.lower()]
    settings = {"sample_by": "document"} if whole and reader == "text" else {}
    try:
        return load_dataset(reader, data_files=os.fspath(file), split="train", **settings)
    except (DatasetsError, ValueError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError("data", os.fspath(file), f"cannot be read as {reader} ({reason}).") from None


def text_columns(data: Dataset, named: Sequence[str] = (), fewest: int = 1, most: int = 2) -> tuple[str, ...]:
    """The columns with the text: those named, else, where one is enough, the only one or those with usual names.

    Args:
        data: the rows.
        named: the columns.
        fewest, most: how many the model takes.

    Raises:
        ConfigError: one is not there or holds no text, too many or too few are named, or it cannot be told which are meant.
    """
    kinds = {name: str(getattr(feature, "dtype", type(feature).__name__)) for name, feature in data.features.items()}
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    there = ", ".join(strings)
    if not strings:
        raise ConfigError("data", ", ".join(kinds), "has no column with text.")
    for name in named:
        if name not in strings:
            allowed = f"holds {kinds[name]}; must be" if name in kinds else "must be"
            raise ConfigError("text_column", name, f"{allowed} one with text: {there}.", closest(name, strings))
    if named:
        if not fewest <= len(named) <= most:
            number = str(most) if fewest == most else f"{fewest} or {most}"
            raise ConfigError("text_column", ", ".join(named), f"must name {number} of {there} for this model.")
        return tuple(named)
    questions = [name for name in strings if name not in _ANSWERS]
    if fewest == 1:
        found = [names for names in COLUMNS if len(names) <= most and set(names) <= set(questions)]
        if len(questions) == 1 or found:
            return (questions[0],) if len(questions) == 1 else found[0]
    what = "two, what is read and what is written" if fewest > 1 else "which is meant"
    raise ConfigError("text_column", None, f"must say {what}; the data has {there}.")


def row_length(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: int | None = None,
    most: int = 512,
    name: str = "max_length",
) -> int:
    """Tokens of a row: as many as asked for, else as model and tokenizer allow, at most `most`; `name` is that of the setting.

    Raises:
        ConfigError: more were asked for than they allow.
    """
    allowed = min(tokenizer.model_max_length, longest_row(model) or tokenizer.model_max_length)
    if asked is not None and not 0 < asked <= allowed:
        raise ConfigError(name, asked, f"must be from 1 to {allowed}, the longest row of {type(model).__name__}.")
    return asked or min(allowed, most)


def calibration_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | os.PathLike[str],
    columns: Sequence[str] = (),
    max_length: int | None = None,
    batch_size: int = 16,
    rows: int | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Batches for [`hf_prune.prune`], without labels.

    Args:
        model: what will be pruned.
        tokenizer: its tokenizer.
        file: see [`read_file`].
        columns: one or two with the text; see [`text_columns`]. An encoder-decoder that writes needs two: what it reads, and what
            it writes.
        max_length: tokens of a row, see [`row_length`].
        batch_size: rows of a batch.
        rows: how many, chosen at random; by default enough for 32,768 tokens, at most 2,048. Fewer if there are no more.
        seed: of the choice.

    Raises:
        ConfigError: the model takes no text, a setting cannot be used, or the file has too few rows.
    """
    if model.main_input_name != "input_ids":
        allowed = f"takes {model.main_input_name}, and no text; give `hf_prune.prune` batches of your own."
        raise ConfigError("model", type(model).__name__, allowed)
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        allowed = "reads several texts a row, from which it chooses; give `hf_prune.prune` batches of your own."
        raise ConfigError("model", type(model).__name__, allowed)
    if rows is not None and rows < FEWEST_ROWS:
        raise ConfigError("rows", rows, f"must be at least {FEWEST_ROWS}.")
    length, writes = row_length(model, tokenizer, max_length), model.can_generate()
    is_causal = writes and not model.config.is_encoder_decoder
    data = read_file(file, whole=is_causal)
    names = text_columns(data, columns, fewest=1 if is_causal or not writes else 2, most=1 if is_causal else 2)
    texts = _texts(data, names, seed)
    answers = len(names) - 1 if writes and not is_causal else 0
    encoded = (
        windows(
            tokenizer, (text for (text,) in texts), length, rows or min(max(-(-TOKENS // length), FEWEST_ROWS), MOST_ROWS), seed
        )
        if is_causal
        else _enough((_encoded(tokenizer, row, answers, length) for row in texts), rows)
    )
    if len(encoded) < FEWEST_ROWS:
        of = f" of {length} tokens" if is_causal else ""
        raise ConfigError("data", os.fspath(file), f"has {len(encoded)} rows{of}; it must have at least {FEWEST_ROWS}.")
    return list(_batches(model, tokenizer, encoded, batch_size))


def text_tokens(tokenizer: PreTrainedTokenizerBase, file: str | os.PathLike[str], columns: Sequence[str] = ()) -> Tensor:
    """The ids of all the text in a file, in its order, `[tokens]`; rows are joined by an empty line, a `.txt` is as it is.

    Raises:
        ConfigError: see [`read_file`] and [`text_columns`].
    """
    data = read_file(file, whole=True)
    (name,) = text_columns(data, columns, most=1)
    text = "\n\n".join(value for value in data[name] if value)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, number: int, seed: int
) -> list[dict[str, list[int]]]:
    """Windows of one length out of joined texts, each text with the token that ends it; at random where there are more than enough.

    Args:
        tokenizer: of the model.
        texts: read only until there are enough.
        length: tokens of a window.
        number: how many are wanted.
        seed: of the choice.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= number * length:
            break
        tokens += tokenizer(text, verbose=False)["input_ids"] + end
    starts = torch.arange(0, max(len(tokens) - length + 1, 0), length)
    starts = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:number]]
    return [{"input_ids": tokens[start : start + length]} for start in starts.tolist()]


def _texts(data: Dataset, columns: Sequence[str], seed: int) -> Iterator[tuple[str, ...]]:
    """The text of each row, in random order; rows without are passed over."""
    for row in data.select_columns(list(columns)).shuffle(seed=seed, keep_in_memory=True):
        texts = tuple(row[name] for name in columns)
        if all(text is not None and text.strip() for text in texts):
            yield texts


def _enough(encoded: Iterable[dict[str, list[int]]], rows: int | None) -> list[dict[str, list[int]]]:
    """The first rows, by default as many as it takes for the tokens that are enough."""
    found: list[dict[str, list[int]]] = []
    tokens = 0
    for row in islice(encoded, rows or MOST_ROWS):
        if rows is None and tokens >= TOKENS:
            break
        found.append(row)
        tokens += len(row["input_ids"])
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, row: tuple[str, ...], answers: int, length: int) -> dict[str, list[int]]:
    """The tokens of a row, of which the last texts are the answer."""
    texts, target = row[: len(row) - answers], row[len(row) - answers :]
    settings = {"text_target": target[0]} if target else {}
    return dict(tokenizer(*texts, **settings, truncation=True, max_length=length))


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], size: int
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of what the model's forward takes."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked, so any will do
    writes = "labels" in rows[0]
    collate = DataCollatorForSeq2Seq(tokenizer, model) if writes else DataCollatorWithPadding(tokenizer)
    accepted = inspect.signature(model.forward).parameters
    for start in range(0, len(rows), size):
        batch: dict[str, Tensor] = dict(collate([dict(row) for row in rows[start : start + size]]))
        if writes:
            batch["decoder_attention_mask"] = (batch.pop("labels") >= 0).long()
        yield {name: value for name, value in batch.items() if name in accepted}
