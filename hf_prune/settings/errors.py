"""Errors about settings, all of one form: the field, its value, what is allowed, the closest match."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class ConfigError(ValueError):
    """A setting that cannot be used. The message names the field, the value, what is allowed and the closest match."""

    def __init__(self, name: str, value: object, allowed: str, match: str | None = None) -> None:
        hint = f" Did you mean {match!r}?" if match else ""
        super().__init__(f"{name}={_shown(value)}: {allowed}{hint}")
        self.name, self.value, self.allowed, self.match = name, value, allowed, match

    def within(self, prefix: str) -> ConfigError:
        """The same error about a field of a larger structure."""
        return ConfigError(prefix + self.name, self.value, self.allowed, self.match)


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Errors inside are about a field of a larger structure; see [`ConfigError.within`]."""
    try:
        yield
    except ConfigError as error:
        raise error.within(prefix) from None


def _shown(value: object) -> str:
    """A value as an error shows it: its `repr`, the middle left out of a long one."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a whole number of too many digits
        return f"({type(value).__name__})"
    return text if len(text) <= 400 else f"{text[:300]} … {text[-50:]}"


def closest(value: object, known: Iterable[str]) -> str | None:
    """The known name most like `value`, if any is."""
    matches = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5) if isinstance(value, str) else []
    return matches[0] if matches else None


def closest_path(path: str | os.PathLike[str], there: Iterable[Path]) -> str | None:
    """The path whose own name, without its folder, is most like that of `path`, if any is."""
    names = {other.name: str(other) for other in there}
    matches = difflib.get_close_matches(Path(path).name, list(names), n=1)
    return names[matches[0]] if matches else None
