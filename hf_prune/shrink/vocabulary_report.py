"""What a smaller vocabulary does to texts that it was not chosen from."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from ..measure.tables import as_text
from .vocabulary import checked_texts, contents, encoded


@dataclass(frozen=True)
class VocabularyReport:
    """Two tokenizers on the same texts. Prints as a table.

    Attributes:
        texts: how many there are.
        changed: share of the texts that become other tokens.
        unknown_before, unknown: share of the tokens that are unknown, special tokens left out.
        lengthening: by which share of the tokens before there are more; an unknown word is one token, so it can be below 0.
    """

    texts: int
    changed: float
    unknown_before: float
    unknown: float
    lengthening: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table("", "", title=f"{self.texts:,} other texts", show_header=False)
        table.add_row("texts that become other tokens", f"{self.changed:.2%}")
        table.add_row("unknown tokens", f"{self.unknown_before:.2%} → {self.unknown:.2%}")
        table.add_row("more tokens", f"{self.lengthening:+.2%}")
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


def vocabulary_report(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Iterable[str]) -> VocabularyReport:
    """Compare the tokenizer of a smaller vocabulary with the one that it was made from.

    Args:
        before, after: fast tokenizers. They are not changed.
        texts: such as the model will see, but not those that the tokens were chosen from.

    Raises:
        ConfigError: a tokenizer is a slow one, or there are no texts.
    """
    found = checked_texts(texts)
    for tokenizer in (before, after):
        contents(tokenizer)
    changed = tokens_before = tokens = unknown_before = unknown = 0
    both: tuple[Any, Any] = copy.deepcopy(before), copy.deepcopy(after)
    for old, new in zip(*(encoded(tokenizer, found, special=False) for tokenizer in both)):
        for one, other in zip(old, new):
            changed += one.tokens != other.tokens
            tokens_before += len(one.ids)
            tokens += len(other.ids)
            unknown_before += one.ids.count(both[0].unk_token_id)
            unknown += other.ids.count(both[1].unk_token_id)
    return VocabularyReport(
        texts=len(found),
        changed=changed / len(found),
        unknown_before=unknown_before / max(tokens_before, 1),
        unknown=unknown / max(tokens, 1),
        lengthening=tokens / max(tokens_before, 1) - 1,
    )
