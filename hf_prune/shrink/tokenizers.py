"""Tokenizers without some of their tokens, as operations on the contents of `tokenizer.json`.

A text whose tokens all stay is tokenized as before, because of what stays beside them:

- WordPiece takes the longest piece at each place of a word: while it stays, shorter ones do not matter. A word that cannot be spelt
  to its end is unknown; the pieces of its beginning stay too ([`beginnings`]), else others might spell it.
- BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) joins the pair that comes first in the list of merges, over and over.
  What happens inside a token is the same in every word, since no merge crosses its bounds: all that it goes through, from its
  letters on, stays ([`parts`]), and so do all merges among tokens that stay. Merges that go had nothing to do with it.
- Unigram (Kudo 2018, https://arxiv.org/abs/1804.10959) takes the pieces of the highest total score. Others that go change no score,
  but what an unknown letter costs depends on the lowest score of all, so that piece stays.
- WordLevel knows whole words.

Tokens are named by their ids, and the contents of `tokenizer.json` are as `Tokenizer.to_str` gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from ..settings.errors import ConfigError

Json = dict[str, Any]
#: Old id → new id.
NewId = Callable[[int], int]

KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_BYTES = [f"<0x{value:02X}>" for value in range(256)]


def vocabulary(data: Json) -> dict[str, int]:
    """Token → id: of the model and of what was added to it.

    Raises:
        ConfigError: the kind of tokenizer is another one, or two tokens are the same or have one id.
    """
    model = data["model"]
    if model["type"] not in KINDS:
        raise ConfigError("tokenizer", model["type"], f"must be of one of the kinds {', '.join(KINDS)}.")
    pieces = list(_pieces(model))
    known = dict(pieces)
    if len(known) < len(pieces):
        twice = next(token for index, (token, _) in enumerate(pieces) if known[token] != pieces[index][1])
        raise ConfigError("tokenizer", twice, "is in the vocabulary more than once; each token must be there once.")
    known |= {token["content"]: token["id"] for token in data["added_tokens"]}
    names: dict[int, str] = {}
    for token, index in known.items():
        if index in names:
            raise ConfigError("tokenizer", token, f"has the id {index} of {names[index]!r}; each token must have its own.")
        names[index] = token
    return known


def required(data: Json) -> dict[str, set[int]]:
    """Why → ids of tokens that stay, whatever the texts are.

    Raises:
        ConfigError: see [`vocabulary`]; or an id in the post-processor or in the padding is no token's.
    """
    known, model = vocabulary(data), data["model"]
    template: set[int] = set()
    _processor(data["post_processor"], lambda index: template.add(index) or index)  # type: ignore[func-returns-value]
    if data["padding"] is not None:
        template.add(data["padding"]["pad_id"])
    if unknown := template - set(known.values()):
        raise ConfigError("tokenizer", min(unknown), "is an id in its post-processor or padding, but no token's.")
    named = [text for part in ("normalizer", "pre_tokenizer", "decoder") for text in _strings(data[part])]
    letters = [*_BYTES, *(ByteLevel.alphabet() if "ByteLevel" in _types(data) else ()), *named]
    always = {known[token] for letter in letters for token in _spellings(model, letter) if token in known}
    always |= {known[token] for token in (model.get("unk_token"),) if token in known}
    if model["type"] == "Unigram":
        always |= {index for index in (model["unk_id"],) if index is not None}
        always |= {min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1])}
    return {"special or added": {token["id"] for token in data["added_tokens"]}, "in the template": template, "alphabet": always}


def letters(data: Json, ids: Iterable[int]) -> set[int]:
    """The letters of some tokens, as tokens of their own: a new word of known letters is then spelt, and not unknown."""
    known = vocabulary(data)
    names = {index: token for token, index in known.items()}
    used = {letter for index in ids for letter in names[index]}
    return {known[token] for letter in used for token in _spellings(data["model"], letter) if token in known}


def parts(data: Json, ids: Iterable[int]) -> set[int]:
    """The tokens that BPE goes through on its way to these; nothing for other kinds.

    A token that its own letters do not lead to (spelt with bytes, or known only as a whole word) has those of all merges to it.
    """
    model = data["model"]
    if model["type"] != "BPE":
        return set()
    known = vocabulary(data)
    names = {index: token for token, index in known.items()}
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    makers: dict[str, list[tuple[str, str]]] = {}
    for pair in ranks:
        makers.setdefault(_joined(model, pair), []).append(pair)
    found: set[str] = set()
    waiting = [names[index] for index in ids]
    while waiting:
        token = waiting.pop()
        if token in found:
            continue
        found.add(token)
        symbols = _symbols(model, token)
        passed = set(symbols)
        while len(symbols) > 1:
            rank, at = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairwise(symbols)))
            if rank == len(ranks):
                break
            symbols[at : at + 2] = [_joined(model, (symbols[at], symbols[at + 1]))]
            passed.add(symbols[at])
        if symbols == [token] and passed <= known.keys():
            found |= passed  # each is reached from its letters in the same way, so it needs nothing else
        else:
            waiting += [part for pair in makers.get(token, []) for part in pair]
    return {known[token] for token in found}


def beginnings(data: Json, words: Iterable[str]) -> set[int]:
    """The pieces of the beginnings of words that WordPiece cannot spell to their ends; nothing for other kinds."""
    known, model = vocabulary(data), data["model"]
    found: set[int] = set()
    for word in words if model["type"] == "WordPiece" else ():
        start = 0
        while start < len(word) <= model["max_input_chars_per_word"]:
            prefix = model["continuing_subword_prefix"] if start else ""
            end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in known), None)
            if end is None:
                break
            found.add(known[prefix + word[start:end]])
            start = end
    return found


def renumbered(data: Json, ids: Mapping[int, int]) -> Json:
    """The tokenizer of the tokens whose old ids are the keys, under their new ids, which are the values and have the same order."""
    model = dict(data["model"])
    kept = [(token, index) for token, index in _pieces(model) if index in ids]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][index] for _, index in kept]
        model["unk_id"] = None if model["unk_id"] is None else ids[model["unk_id"]]
    else:
        model["vocab"] = {token: ids[index] for token, index in sorted(kept, key=lambda item: item[1])}
    if model["type"] == "BPE":
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if all(token in model["vocab"] for token in (left, right, _joined(model, (left, right))))
        ]
    padding = data["padding"] and data["padding"] | {"pad_id": ids[data["padding"]["pad_id"]]}
    return data | {
        "model": model,
        "added_tokens": [token | {"id": ids[token["id"]]} for token in data["added_tokens"]],
        "post_processor": _processor(data["post_processor"], ids.__getitem__),
        "padding": padding,
    }


def _pieces(model: Json) -> Iterator[tuple[str, int]]:
    """Token and id of each token of the model."""
    if model["type"] == "Unigram":
        yield from ((piece, index) for index, (piece, _) in enumerate(model["vocab"]))
    else:
        yield from model["vocab"].items()


def _joined(model: Json, pair: tuple[str, str]) -> str:
    """What BPE makes of two tokens."""
    return pair[0] + pair[1][len(model["continuing_subword_prefix"] or "") :]


def _symbols(model: Json, token: str) -> list[str]:
    """The letters that BPE starts from where a word, or a part of it, becomes this token."""
    prefix, suffix = model["continuing_subword_prefix"] or "", model["end_of_word_suffix"] or ""
    inside = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    stem = token[len(prefix) if inside else 0 : len(token) - len(suffix) if ends else None]
    symbols = [(prefix if inside or place else "") + letter for place, letter in enumerate(stem)]
    if ends and symbols:
        symbols[-1] += suffix
    return symbols


def _spellings(model: Json, letter: str) -> list[str]:
    """A letter as it stands at the start, inside and at the end of a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return [letter, prefix + letter, letter + suffix, prefix + letter + suffix]


def _processor(processor: Any, new: NewId) -> Any:
    """A post-processor with other ids."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_processor(part, new) for part in changed["processors"]]
    if isinstance(changed.get("special_tokens"), dict):
        specials = changed["special_tokens"].items()
        changed["special_tokens"] = {name: value | {"ids": [new(index) for index in value["ids"]]} for name, value in specials}
    for name in ("sep", "cls"):
        if name in changed:
            token, index = changed[name]
            changed[name] = [token, new(index)]
    return changed


def _values(part: Any) -> Iterator[tuple[str, Any]]:
    """Key and value of all that is in nested objects, lists looked through."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _values(value)
    if isinstance(part, dict):
        yield from part.items()


def _strings(part: Any) -> Iterator[str]:
    """What a part of the tokenizer writes or looks for, as far as that is a string."""
    yield from (value for key, value in _values(part) if key != "type" and isinstance(value, str))


def _types(data: Json) -> Collection[str]:
    """The kinds of parts that make text into words."""
    return {value for part in ("normalizer", "pre_tokenizer") for key, value in _values(data[part]) if key == "type"}
