"""Patterns, the units that are removed together: a string in a config, a parsed value in the library."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import ConfigError, closest

#: Structural patterns and the level at which they nest: a unit of a higher level contains units of lower ones.
STRUCTURAL_PATTERNS: dict[str, int] = {"auto": 0, "head": 2, "kv_group": 2, "neuron": 2, "block": 3, "layer": 4}


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern string.

    Attributes:
        kind: `"NxM"` (rows and columns included), `"N:M"`, or a name in `STRUCTURAL_PATTERNS`.
        n, m: block height (along outputs) and width (along inputs), `None` for the whole extent; for `"N:M"`, n zeros in every m
            neighbouring inputs.
    """

    kind: str
    n: int | None = 1
    m: int | None = 1

    @property
    def level(self) -> int:
        """Nesting level: 0 weights and blocks of weights, 1 rows and columns, 2 heads, groups of heads and neurons."""
        if self.is_structural:
            return STRUCTURAL_PATTERNS[self.kind]
        return 1 if self.n is None or self.m is None else 0

    @property
    def max_sparsity(self) -> float:
        """The largest share of zeros that the pattern allows."""
        return self.n / self.m if self.kind == "N:M" and self.n and self.m else 1.0

    @property
    def form(self) -> str:
        """The form it belongs to, as `CONFLICTS` names it."""
        return self.kind if self.kind != "NxM" or (self.n and self.m) else str(self)

    @property
    def is_structural(self) -> bool:
        """Whether its units are parts of attention and feed-forward blocks; those of the others are parts of single weights."""
        return self.kind in STRUCTURAL_PATTERNS

    @property
    def is_condensable(self) -> bool:
        """Whether `condense` cuts out each unit of it."""
        return self.is_structural and self.kind != "auto"

    def __str__(self) -> str:
        """The string that it was parsed from."""
        if self.is_structural:
            return self.kind
        return f"{self.n}:{self.m}" if self.kind == "N:M" else f"{self.n or 'channel'}x{self.m or 'channel'}"


#: The forms in words.
FORMS = (
    "'NxM' (a block of N outputs by M inputs, such as '1x1' or '4x1'), 'N:M' (N zeros in every M neighbouring inputs, "
    "such as '2:4'), '1xchannel' (an output row), 'channelx1' (an input column), 'auto' (tiles as high as a head in attention, "
    "rows and columns in the feed-forward block), 'head', 'kv_group' (a key and value head with all the heads that share it), "
    "'neuron', 'block' (a whole attention or feed-forward sublayer) or 'layer'"
)


def check_pattern(name: str, value: object) -> None:
    """A pattern string."""
    parse_pattern(value, name)


def parse_pattern(text: object, name: str = "pattern") -> Pattern:
    """Parse a pattern string.

    Raises:
        ConfigError: it is not one of the known forms.
    """
    if isinstance(text, str):
        if text == "1xchannel":
            return Pattern("NxM", 1, None)
        if text == "channelx1":
            return Pattern("NxM", None, 1)
        if text in STRUCTURAL_PATTERNS:
            return Pattern(text)
        if match := re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text):
            return Pattern("NxM", int(match[1]), int(match[2]))
        match = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", text)
        if match and int(match[1]) < int(match[2]):
            return Pattern("N:M", int(match[1]), int(match[2]))
    known = ("1x1", "4x1", "2:4", "1xchannel", "channelx1", *STRUCTURAL_PATTERNS)
    raise ConfigError(name, text, f"must be {FORMS}.", closest(text, known))
