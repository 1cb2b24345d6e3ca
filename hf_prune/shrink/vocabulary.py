"""A smaller vocabulary: tokens that some texts do not need leave the embeddings, the output head, the configs and the tokenizer.

Half of the parameters of a small encoder are its word embeddings, and two thirds of a multilingual one's; a task needs few of them.
(TextPruner, Yang et al. 2022, https://arxiv.org/abs/2203.15996, does this for three tokenizers by hand.) What is left is an
ordinary model with an ordinary tokenizer, which compute what they did for every text whose tokens all stayed.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..condense.snapshot import Snapshot, all_or_nothing, configs_of, own_configs
from ..condense.verify import all_outputs, sample_batch, tolerance
from ..model.changeable import check_changeable
from ..model.positions import padding_of_positions
from ..settings.errors import ConfigError, closest
from .outline import cut_to, outline, sized
from .token_ids import renumber, token_ids
from .tokenizers import Json, beginnings, letters, parts, renumbered, required, vocabulary

logger = logging.getLogger(__name__)

#: Texts that are tokenized at a time.
_TEXTS = 1000
#: What a chat calls those who speak, which no template says.
_ROLES = ("system", "user", "assistant", "tool")
#: What in a batch holds ids.
_IDS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True, eq=False)
class VocabularyPlan:
    """Which tokens stay, and why.

    Attributes:
        ids: new id of each old one, -1 for tokens that leave, `[old size]`. The order stays.
        stays: why → how many tokens stay for it; each counts once, where it fits first.
    """

    ids: Tensor
    stays: Mapping[str, int]

    @property
    def kept(self) -> Tensor:
        """The old ids of what stays, ascending, `[new size]`."""
        return (self.ids >= 0).nonzero().flatten()


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    min_count: int = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor]:
    """Take tokens that the texts do not need out of a model and its tokenizer.

    What stays, besides the tokens of the texts: special and added tokens; those of the post-processor, of the padding and of the
    chat template; those whose ids are in the config or the generation config, suppressed and bad words too; the byte alphabet, what
    normalizers write, and every letter of the texts that is a token; and what `tokenizers.py` says that tokenization needs. Rows of
    the embeddings that are no token's leave.

    A text whose tokens all stay is tokenized as before, and the model's outputs for it are equal (a language model's logits are
    those of the tokens that stay, so its probabilities renormalise). Both are verified, the first on `texts`. Other texts are
    tokenized otherwise, into more pieces or into unknown ones: `vocabulary_report` measures that. Prompts and prefixes that the
    model is used with belong into the texts.

    Dtype, device, mode, tying and `requires_grad` stay. The parameters are new objects, so an optimizer has to be made anew, and a
    teacher has to be of the same vocabulary. `model.config` is a new object, whose `hf_prune` holds the original size; the model is
    an ordinary one and loads without hf_prune, unless it was condensed unevenly.

    Args:
        model: a transformers model. It is changed in place, all or nothing.
        tokenizer: its tokenizer, a fast one; it is not changed.
        texts: what the model will read and write, such as its training data.
        keep: tokens that stay in any case, as they are in the vocabulary (`"##ing"`, `"Ġthe"`).
        min_count: how often a token has to occur in the texts.

    Returns:
        The same model object, the new tokenizer, and the new id of each old one, -1 for tokens that left, `[old size]`.

    Raises:
        TypeError: not a transformers model.
        ConfigError: the tokenizer is a slow one, of another kind, malformed, or has tokens without embeddings; the model is
            quantized, sharded, has adapters, several vocabularies or embeddings that its config does not describe; or the other
            arguments cannot be used.
        RuntimeError: model or tokenizer are not equal to what they were, or the tokenizer does not survive being saved.
    """
    found = checked_texts(texts)
    return apply_vocabulary(model, tokenizer, found, plan_vocabulary(model, tokenizer, found, keep=keep, min_count=min_count))


def plan_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    min_count: int = 1,
) -> VocabularyPlan:
    """Which tokens [`prune_vocabulary`] would keep, whose arguments and errors it has; nothing is changed."""
    size = _check_model(model)
    data = contents(tokenizer)
    known = vocabulary(data)
    for token, index in tokenizer.get_vocab().items():
        if known.get(token) != index:  # what is saved of it then has only one of the two
            raise ConfigError("tokenizer", token, f"has the id {index}, as another token has; each token must have its own.")
    if beyond := {index: token for token, index in known.items() if index >= size}:
        token = beyond[min(beyond)]
        allowed = f"has the id {min(beyond)}, and the model has {size} embeddings; call `model.resize_token_embeddings` first."
        raise ConfigError("tokenizer", token, allowed)
    if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
        raise ConfigError("min_count", min_count, "must be a whole number, 1 or more.")
    asked = _check_keep(keep, known)
    tokenizer = copy.deepcopy(tokenizer)  # tokenizing changes its settings
    counts, unknown = _counts(tokenizer, data, checked_texts(texts))
    template, _ = _counts(tokenizer, data, _chat(tokenizer))
    always = required(data)
    reasons: dict[str, set[int]] = {
        "in the texts": {index for index, count in counts.items() if count >= min_count},
        "asked for": asked,
        "special or added": always["special or added"],
        "in the template": always["in the template"] | set(template),
        "in the config": _configured(model, size),
        "alphabet": always["alphabet"] | letters(data, counts) | unknown,
    }
    tokens = set().union(*reasons.values()) & set(known.values())
    reasons["part of others"] = parts(data, tokens)
    stays: set[int] = set()
    counted = {}
    for reason, found in reasons.items():
        counted[reason] = len(found - stays)
        stays |= found
    ids = torch.full((size,), -1, dtype=torch.long)
    ids[sorted(stays)] = torch.arange(len(stays))
    return VocabularyPlan(ids, counted)


def apply_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], plan: VocabularyPlan
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor]:
    """Do what a plan for these texts says; see [`prune_vocabulary`]."""
    small = smaller_tokenizer(tokenizer, plan.ids)
    _check_tokenizer(tokenizer, small, texts, plan.ids)
    if len(plan.kept) == len(plan.ids):
        logger.warning("Every token stays: the texts, or the configs, need all %d of them.", len(plan.ids))
    with all_or_nothing(model) as snapshot:
        batch = _batch(model, plan.ids)
        before = None if batch is None else all_outputs(model, batch)
        _cut(model, plan, snapshot)
        if batch is not None and before is not None:
            _check_outputs(model, batch, before, plan)
    return model, small, plan.ids


def smaller_tokenizer(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> PreTrainedTokenizerBase:
    """The tokenizer of the tokens that stay, as `from_pretrained` reads it from the files that it is saved in.

    Raises:
        RuntimeError: some tokens have other ids than they should, so the tokenizer does not survive being saved.
    """
    data = contents(tokenizer)
    new = {index: int(ids[index]) for index in vocabulary(data).values() if ids[index] >= 0}
    small = renumbered(data, new)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        Path(folder, "tokenizer.json").write_text(json.dumps(small, ensure_ascii=False), encoding="utf-8")
        again: PreTrainedTokenizerBase = type(tokenizer).from_pretrained(folder)
    again.name_or_path = tokenizer.name_or_path
    wanted = {token: new[index] for token, index in vocabulary(data).items() if index in new}
    there = vocabulary(contents(again))
    if there != wanted:
        token = min((wanted.items() ^ there.items()), key=lambda item: item[1])[0]
        raise RuntimeError(
            f"the smaller {type(tokenizer).__name__} has the id {there.get(token)} for {token!r} and should have "
            f"{wanted.get(token)}: its class cannot be loaded with other tokens than the usual ones. Nothing was changed."
        )
    return again


def contents(tokenizer: Any) -> Json:
    """What `tokenizer.json` holds of a tokenizer.

    Raises:
        ConfigError: it is a slow one, or tokenizes at random.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not getattr(tokenizer, "is_fast", False) or backend is None:
        allowed = "must be a fast tokenizer, one of the tokenizers library: the vocabulary of others is in files of their own."
        raise ConfigError("tokenizer", type(tokenizer).__name__, allowed)
    data: Json = json.loads(backend.to_str())
    if data["model"].get("dropout"):
        raise ConfigError("tokenizer", type(tokenizer).__name__, f"tokenizes at random (dropout={data['model']['dropout']}).")
    return data


def encoded(tokenizer: Any, texts: Sequence[str], special: bool = True) -> Iterator[list[Any]]:
    """The encodings of texts, whole and without padding, some texts at a time; by default with the special tokens around them."""
    for start in range(0, len(texts), _TEXTS):
        batch = list(texts[start : start + _TEXTS])
        yield tokenizer(batch, add_special_tokens=special, truncation=False, padding=False, verbose=False).encodings


# ------------------------------------------------------------------------------------------------------------------- what is given


def checked_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list.

    Raises:
        ConfigError: they are not texts, or empty.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise ConfigError("texts", texts, "must be a list of texts, or another iterable.")
    found = list(texts)
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise ConfigError(f"texts[{index}]", text, "must be a string.")
    if not any(text.strip() for text in found):
        raise ConfigError("texts", found, "holds no text; must be what the model will read and write.")
    return found


def _check_keep(keep: Iterable[str], known: Mapping[str, int]) -> set[int]:
    """The ids of tokens by their names."""
    if isinstance(keep, (str, bytes)) or not isinstance(keep, Iterable):
        raise ConfigError("keep", keep, "must be a list of tokens.")
    ids = set()
    for token in keep:
        if token not in known:
            raise ConfigError("keep", token, "is no token of the tokenizer.", closest(token, known))
        ids.add(known[token])
    return ids


def _check_model(model: PreTrainedModel) -> int:
    """Raise unless the vocabulary of a model can be cut; return its size."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {type(model).__name__}; allowed: a transformers PreTrainedModel. Take it out of its wrapper, merge "
            "adapters first (`merge_and_unload()`), and give the wrapper the new tokenizer too."
        )
    check_changeable(model)
    sizes = {size for config in configs_of(model) if type(size := getattr(config, "vocab_size", None)) is int}
    if len(sizes) != 1:
        what = f"has several vocabularies, of {sorted(sizes)} tokens" if sizes else "has no vocabulary, as its config says"
        raise ConfigError("model", type(model).__name__, f"{what}; must have one, of the tokenizer's tokens.")
    return sizes.pop()


# --------------------------------------------------------------------------------------------------------------------- what stays


def _counts(tokenizer: Any, data: Json, texts: Sequence[str]) -> tuple[Counter[int], set[int]]:
    """How often each token is in the texts, and what has to stay lest their unknown words become known."""
    counts: Counter[int] = Counter()
    words: set[str] = set()
    normalizer = tokenizer.backend_tokenizer.normalizer
    for start, encodings in enumerate(encoded(tokenizer, texts)):
        for place, encoding in enumerate(encodings, start * _TEXTS):
            counts.update(encoding.ids)
            if data["model"]["type"] == "WordPiece" and tokenizer.unk_token_id in encoding.ids:
                spans = [span for index, span in zip(encoding.ids, encoding.offsets) if index == tokenizer.unk_token_id]
                words |= {texts[place][first:last] for first, last in spans}
    return counts, beginnings(data, (normalizer.normalize_str(word) if normalizer else word for word in words))


def _chat(tokenizer: Any) -> list[str]:
    """What a chat template writes by itself, and the names of those who speak."""
    templates = tokenizer.chat_template
    found: list[str] = []
    for template in templates.values() if isinstance(templates, dict) else [templates] if templates else []:
        try:
            lexed = list(Environment().lex(template))
        except TemplateError:  # it can write nothing
            continue
        found += [text if kind == "data" else text[1:-1] for _, kind, text in lexed if kind in ("data", "string")]
    return [*found, *_ROLES] if found else []


def _configured(model: PreTrainedModel, size: int) -> set[int]:
    """The ids that a model's configs name, and those before the padding's where positions are counted from it."""
    configs = [*configs_of(model), *filter(None, [getattr(model, "generation_config", None)])]
    padding = padding_of_positions(model)
    return set().union(*(token_ids(config, size) for config in configs)) | set(range(0 if padding is None else padding + 1))


# ---------------------------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def _cut(model: PreTrainedModel, plan: VocabularyPlan, snapshot: Snapshot) -> None:
    """Cut all that has a dimension of the vocabulary's size, and write the new size and ids wherever the old ones stand."""
    size, kept = len(plan.ids), plan.kept
    own_configs(model)
    old = outline(model)
    _renumber(model, plan.ids, len(kept))
    new = outline(model)
    if not sized(old, new) and len(kept) < size:
        raise ConfigError("model", type(model).__name__, "has no embeddings or logits of tokens; must have some.")
    stays = torch.zeros(size, dtype=torch.bool).index_fill(0, kept, True)
    cut_to(model, old, new, lambda name: stays, "tokens, which config.vocab_size says", snapshot)


def _renumber(model: PreTrainedModel, ids: Tensor, size: int) -> None:
    """Write a new size and new ids into a model's configs, and the original size into `config.hf_prune`."""

    def new(index: int) -> int:
        return int(ids[index]) if 0 <= index < len(ids) else index

    model_any: Any = model
    if (generation := getattr(model, "generation_config", None)) is not None:
        model_any.generation_config = copy.deepcopy(generation)
        renumber(model_any.generation_config, new)
    for config in configs_of(model):
        renumber(config, new)
        if type(getattr(config, "vocab_size", None)) is int:
            config.vocab_size = size
    entry = getattr(model.config, "hf_prune", None) or {"version": 1, "layers": {}}
    if size < len(ids):
        model_any.config.hf_prune = entry | {"original": {"vocab_size": len(ids)} | entry.get("original", {})}


# ----------------------------------------------------------------------------------------------------------------- what is verified


def _check_tokenizer(before: Any, after: Any, texts: Sequence[str], ids: Tensor) -> None:
    """Raise unless texts whose tokens all stayed are tokenized as before, up to the new ids."""
    before, after, new = copy.deepcopy(before), copy.deepcopy(after), ids.tolist()
    for start, (old, others) in enumerate(zip(encoded(before, texts), encoded(after, texts))):
        for place, (one, other) in enumerate(zip(old, others), start * _TEXTS):
            wanted = [new[index] for index in one.ids]
            if wanted != other.ids and min(wanted) >= 0:
                raise RuntimeError(
                    f"texts[{place}] is tokenized as {other.tokens[:20]} by the smaller tokenizer, and as {one.tokens[:20]} by the "
                    "one before, though all these tokens stay. Nothing was changed."
                )


def _batch(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor] | None:
    """A batch of tokens that stay; None, and a warning, if it is not known what the model takes."""
    try:
        batch = sample_batch(model, tokens=8)
    except Exception as error:  # a model that reads more than the batch has
        logger.warning("%s is not verified: %s", type(model).__name__, f"{type(error).__name__}: {error}".partition("\n")[0])
        return None
    kept = (ids >= 0).nonzero().flatten()
    ordinary = kept[~torch.isin(kept, torch.tensor(sorted(_configured(model, len(ids))), dtype=torch.long))]
    choices = ordinary if len(ordinary) else kept
    stand_in = torch.where(ids >= 0, torch.arange(len(ids)), choices[torch.arange(len(ids)) % len(choices)])
    return {name: stand_in.to(value.device)[value] if name in _IDS else value for name, value in batch.items()}


def _check_outputs(model: PreTrainedModel, batch: dict[str, Tensor], before: Mapping[str, Tensor], plan: VocabularyPlan) -> None:
    """Raise unless a model gives for a batch with new ids what it gave with the old ones, of the tokens that stay."""
    ids, kept = plan.ids, plan.kept
    after = all_outputs(model, {name: ids.to(value.device)[value] if name in _IDS else value for name, value in batch.items()})
    gaps = {}
    for name, value in before.items():
        cut = value.shape[-1:] == ids.shape and after[name].shape[-1] == len(kept)
        wanted = value[..., kept.to(value.device)] if cut else value
        gap = float((wanted.double() - after[name].double()).abs().max())
        if not gap <= tolerance(wanted, model.dtype):
            gaps[name] = gap
    if gaps:
        name = max(gaps, key=lambda name: gaps[name])
        raise RuntimeError(
            f"the model differs by {gaps[name]:.2e} in {name} after its vocabulary was cut, for tokens that stay: it depends on "
            "their numbers in a way that is not known. The model was restored."
        )
