"""Save a model that was made from another one, with the other files of its folder and a new card, atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import new_folder
from ..settings.config import CONFIG_NAME, PruningConfig
from .card import CardFacts, write_card
from .files import carry_over


def save_made_from(
    model: PreTrainedModel, source: str | os.PathLike[str], out: str | os.PathLike[str], replace: bool = False
) -> dict[str, str]:
    """Save a condensed or converted model beside or below the one it was made from.

    Args:
        model: the new model.
        source: the folder of the old one. Its tokenizer and all else that [`carry_over`] takes come along; from its facts and its
            config the card is written.
        out: the folder to write.
        replace: whether what is there is replaced; otherwise it is an error.

    Returns:
        What is left out: path in `source` → why.

    Raises:
        ValueError: there is something at `out`, or something in `source` cannot be read; see [`CardFacts.load`].
    """
    facts = CardFacts.load(source)
    # the first two were measured on the other model, the third lies beside it
    facts.comparison, facts.runtimes, facts.family = None, {}, {}
    config = PruningConfig.from_pretrained(source) if Path(source, CONFIG_NAME).is_file() else None
    with new_folder(out, replace) as folder:
        return write_made_from(model, source, folder, config, facts)


def write_made_from(
    model: PreTrainedModel,
    source: str | os.PathLike[str],
    folder: Path,
    config: PruningConfig | None,
    facts: CardFacts,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, str]:
    """Write a model into an empty folder, with the other files of the one it was made from and a card.

    Args:
        model: the new model.
        source: the folder of the old one.
        folder: the empty one, of the name that the model will have.
        config: what the new one was pruned with.
        facts: what its card says beside.
        tokenizer: its own, a fast one, if its vocabulary is not that of the old model. It is written in the formats of the old one
            too, as far as there are any besides `tokenizer.json`.

    Returns:
        What is left out: path in `source` → why.
    """
    facts.model_name = facts.model_name or folder.name
    left = carry_over(source, folder, vocabulary=tokenizer is None)
    if tokenizer is not None:
        save_tokenizer(tokenizer, source, folder)
        left = {name: reason for name, reason in left.items() if not Path(folder, name).exists()}
    model.save_pretrained(folder)
    write_card(folder, model, config, facts)
    return left


def save_tokenizer(tokenizer: Any, source: str | os.PathLike[str], folder: Path) -> None:
    """Save a fast tokenizer, and its vocabulary in those of its other formats (`vocab.txt`; `vocab.json` with `merges.txt`) that
    the folder of the old one has."""
    tokenizer.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as beside:
        for file in map(Path, tokenizer.backend_tokenizer.model.save(beside)):
            if Path(source, file.name).is_file():
                shutil.copyfile(file, folder / file.name)
