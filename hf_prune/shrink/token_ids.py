"""Ids of tokens in a model's config and generation config.

| where | what it holds |
| --- | --- |
| `*_token_id`, `*_token_ids`, `*_token_index`, `*suppress_tokens`, `bad_words_ids`, `force_words_ids`, `*_to_id` | ids, nested |
| `forced_decoder_ids` | pairs of a position and an id |
| `sequence_bias` | lists of ids, each with its bias; or by such a list |
| `task_specific_params` | all of these, by task |

Ids that are none (−1, or beyond the vocabulary, as defaults for larger models are) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ENDINGS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens", "bad_words_ids", "force_words_ids", "_to_id")


def token_ids(config: object, size: int) -> set[int]:
    """The ids of tokens in the attributes of a config, of those from 0 to `size` - 1."""
    found: set[int] = set()

    def note(index: int) -> int:
        found.add(index)
        return index

    for name, value in vars(config).items():
        _renumbered(name, value, note)
    return {index for index in found if 0 <= index < size}


def renumber(config: Any, new: Callable[[int], int]) -> None:
    """Give the ids of tokens in the attributes of a config their new values."""
    for name, value in list(vars(config).items()):
        changed = _renumbered(name, value, new)
        if changed != value:
            setattr(config, name, changed)


def _renumbered(name: str, value: Any, new: Callable[[int], int]) -> Any:
    """The value of a config's field with other ids; the same value if it holds none."""
    if name == "forced_decoder_ids" and value is not None:
        return [[place, _each(index, new)] for place, index in value]
    if name == "sequence_bias" and isinstance(value, dict):
        return {tuple(_each(list(ids), new)): bias for ids, bias in value.items()}
    if name == "sequence_bias" and value is not None:
        return [[_each(ids, new), bias] for ids, bias in value]
    if name.endswith(_ENDINGS):
        return _each(value, new)
    if isinstance(value, dict) and name != "label2id":  # whose keys are anybody's
        return {key: _renumbered(str(key), own, new) for key, own in value.items()}
    return value


def _each(value: Any, new: Callable[[int], int]) -> Any:
    """Nested lists, or the values of a dictionary, with each whole number replaced."""
    if type(value) is int:
        return new(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(own, new) for own in value)
    if isinstance(value, dict):
        return {key: _each(own, new) for key, own in value.items()}
    return value
