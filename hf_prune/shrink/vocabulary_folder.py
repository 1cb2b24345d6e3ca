"""From a model's folder to that of one with a smaller vocabulary: choose, cut, save with tokenizer and card, reload, compare."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import new_folder
from ..hub import CardFacts, write_made_from
from ..hub.files import IDS_NAME
from ..measure.tables import as_text
from ..oneshot.data import load_tokenizer, read_file, text_columns
from ..oneshot.folder import reloading_difference
from ..settings.config import CONFIG_NAME, PruningConfig
from ..settings.errors import ConfigError
from .vocabulary import apply_vocabulary, encoded, plan_vocabulary
from .vocabulary_report import VocabularyReport, vocabulary_report

#: One row of so many is held back.
_HELD_BACK = 10
#: Lines of a text for a language model that make a row.
_LINES = 8


@dataclass(frozen=True)
class PrunedVocabulary:
    """What was written. Prints as a table.

    Attributes:
        tokens_before, tokens: of the model.
        parameters_before, parameters: of the model.
        stays: why → how many tokens stay for it; see [`VocabularyPlan`].
        held_back: what became of the rows that the tokens were not chosen from.
        difference: the most by which an output of the reloaded model differs from that of the model in memory.
        left_out: file beside the old model → why it was left behind.
    """

    tokens_before: int
    tokens: int
    parameters_before: int
    parameters: int
    stays: Mapping[str, int]
    held_back: VocabularyReport
    difference: float
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        share = self.tokens / self.tokens_before
        table = Table("", "", title=f"{self.tokens:,} of {self.tokens_before:,} tokens stay ({share:.2%})", show_header=False)
        table.add_row("parameters", f"{self.parameters_before:,} → {self.parameters:,}")
        for reason, number in self.stays.items():
            if number:
                table.add_row(f"stay: {reason}", f"{number:,}")
        held = self.held_back
        table.add_row(f"{held.texts:,} texts held back: become other tokens", f"{held.changed:.2%}")
        table.add_row("their unknown tokens", f"{held.unknown_before:.2%} → {held.unknown:.2%}")
        table.add_row("their number of tokens", f"{held.lengthening:+.2%}")
        table.add_row("difference after reloading", f"{self.difference:.1e}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def rows_of_text(model: PreTrainedModel, file: str | os.PathLike[str], columns: Sequence[str] = ()) -> list[list[str]]:
    """The rows of a file, each with the texts of its columns; a `.txt` for a causal language model is cut into rows of lines.

    Args:
        model: what reads them.
        file: see [`read_file`].
        columns: those with text; see [`text_columns`].

    Raises:
        ConfigError: the file cannot be read, or has too few rows with text.
    """
    whole = model.can_generate() and not model.config.is_encoder_decoder
    data = read_file(file, whole=whole)
    names = text_columns(data, columns, most=max(len(columns), 2))
    rows = [[row[name] for name in names if row[name] and row[name].strip()] for row in data.select_columns(list(names))]
    if whole and Path(file).suffix.lower() == ".txt":
        lines = [line for (text,) in rows for line in text.splitlines(keepends=True)]
        rows = [["".join(lines[start : start + _LINES])] for start in range(0, len(lines), _LINES)]
    rows = [row for row in rows if row]
    if len(rows) < _HELD_BACK:
        allowed = f"has {len(rows)} rows with text; it must have at least {_HELD_BACK}, of which one in {_HELD_BACK} is held back."
        raise ConfigError("data", os.fspath(file), allowed)
    return rows


def prune_vocabulary_to_folder(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rows: Sequence[Sequence[str]],
    *,
    keep: Iterable[str] = (),
    min_count: int = 1,
    seed: int = 0,
    base_model: str | None = None,
    data: str | None = None,
) -> PrunedVocabulary:
    """Cut a model's vocabulary in place, and save it beside the one that it was loaded from; all or nothing on disk.

    Args:
        model: as `source` has it.
        source: its folder, with its tokenizer. All else that belongs to a model comes along.
        out: the folder to write. `vocabulary_ids.npy` in it has the new id of each token of the original model, -1 for those that
            left, `[original size]`.
        rows: texts, row by row. One row of ten, at random, is held back: the tokens are chosen from the others, and the report is
            of these.
        keep, min_count: see [`prune_vocabulary`].
        seed: of the choice of rows.
        base_model: what the card says the model was made from.
        data: what the card says the texts are.

    Raises:
        ConfigError, RuntimeError: see [`prune_vocabulary`].
        ValueError: every token stays, there is something at `out`, or something in `source` cannot be read.
    """
    tokenizer, facts, before = load_tokenizer(source), CardFacts.load(source), model.num_parameters()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    number = len(rows) // _HELD_BACK
    held, chosen = ([text for index in part for text in rows[index]] for part in (order[:number], order[number:]))
    config = PruningConfig.from_pretrained(source) if Path(source, CONFIG_NAME).is_file() else None
    with new_folder(out) as folder:
        plan = plan_vocabulary(model, tokenizer, chosen, keep=keep, min_count=min_count)
        if len(plan.kept) == len(plan.ids):
            raise ValueError(f"data={data}: its texts need all {len(plan.ids)} tokens, so nothing was written.")
        _, small, ids = apply_vocabulary(model, tokenizer, chosen, plan)
        report = vocabulary_report(tokenizer, small, held)
        described = {"data": data, "min_count": min_count, **report.to_dict()}
        facts = facts.of_child(base_model, vocabulary=described)
        left = write_made_from(model, source, folder, config, facts, small)
        np.save(folder / IDS_NAME, since_original(source, ids).numpy())
        difference = reloading_difference(model, folder)
        check_reloaded(small, folder, [*held, *chosen][:1000])
    return PrunedVocabulary(
        tokens_before=len(plan.ids),
        tokens=len(plan.kept),
        parameters_before=before,
        parameters=model.num_parameters(),
        stays=plan.stays,
        held_back=report,
        difference=difference,
        left_out=left,
    )


def since_original(source: str | os.PathLike[str], ids: Tensor) -> Tensor:
    """The new ids of the tokens of the original model, whose vocabulary may have been cut before, `[original size]`."""
    if not Path(source, IDS_NAME).is_file():
        return ids
    earlier = torch.from_numpy(np.load(Path(source, IDS_NAME)))
    return torch.where(earlier < 0, earlier, ids[earlier.clamp(min=0)])


def check_reloaded(tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str], texts: Sequence[str]) -> None:
    """Raise unless a saved tokenizer, loaded again, does the same as the one in memory."""
    both = (encoded(one, texts) for one in (tokenizer, load_tokenizer(folder)))
    if any(one.ids != other.ids for here, there in zip(*both) for one, other in zip(here, there)):
        raise RuntimeError(f"the {type(tokenizer).__name__} makes other tokens when it is loaded again; nothing was written.")
