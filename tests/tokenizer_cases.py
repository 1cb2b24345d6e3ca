"""Tokenizers of every kind, trained on made-up texts, each with a tiny model of a family that uses it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import transformers
from models import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

_SYLLABLES = ("ba", "re", "mi", "fo", "tu", "ska", "ren", "ol", "é", "ü", "ing", "un", "ter", "2", "0", "7", "mä", "st")
_MARKS = (".", ",", "!", "?", " - ", "'s ", '"', "\n", "  ", "\n\n", " 日本 ", " 🙂 ")


def made_up(count: int, seed: int = 0, words: int = 60) -> list[str]:
    """Sentences of made-up words, which differ from seed to seed."""
    choose = random.Random(seed)
    known = ["".join(choose.choices(_SYLLABLES, k=choose.randint(1, 4))) for _ in range(words)]
    texts = []
    for _ in range(count):
        picked = [choose.choice(known).capitalize() if choose.random() < 0.2 else choose.choice(known) for _ in range(8)]
        texts.append("".join(word + choose.choice((*_MARKS, *[" "] * 20)) for word in picked).strip())
    return texts


CORPUS = made_up(150, seed=0) + made_up(150, seed=1)
#: The texts that a vocabulary is cut to.
TEXTS = made_up(20, seed=1)


def trained(name: str, size: int, **settings: Any) -> Any:
    """A tokenizer of a class of transformers, trained on the corpus."""
    return getattr(transformers, name)(**settings).train_new_from_iterator(CORPUS, size)


def trained_llama3() -> Any:
    """Byte-level BPE that takes words which are tokens as they are, with a chat template."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    begin = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=begin)
    named = dict(zip(("bos_token", "eos_token"), special))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, pad_token="<|eot_id|>", **named)
    said = " ".join(word for text in CORPUS[:3] for word in text.split() if word.isalnum())
    made.chat_template = f"{{% for m in messages %}}{{{{ m['role'] + ': {said}' }}}}{{{{ m['content'] }}}}{{% endfor %}}"
    return made


def trained_words() -> Any:
    """Whole words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    ends = [(token, tokenizer.token_to_id(token)) for token in special[2:]]
    tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)


def trained_llama2() -> Any:
    """BPE on metaspaces with byte fallback, and every way to make a token among its merges, as converted from sentencepiece."""
    plain = trained("LlamaTokenizer", 300)
    vocab = {token: index for token, index in plain.get_vocab().items() if index not in plain.added_tokens_decoder}
    size = len(plain)
    known = set(vocab)
    merges = [(one[:cut], one[cut:]) for one in vocab for cut in range(1, len(one)) if {one[:cut], one[cut:]} <= known]
    merges.sort(key=lambda pair: (vocab[pair[0] + pair[1]], len(pair[0])))
    vocab |= {str(token): index for index, token in plain.added_tokens_decoder.items()}
    vocab |= {f"<0x{value:02X}>": size + value for value in range(256)}
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, pad_token="<unk>")


#: Name → what makes the tokenizer, the family of the model, its task head.
KINDS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "WordPiece, BERT": (lambda: trained("BertTokenizer", 260), "bert", "masked-lm"),
    "WordPiece, DistilBERT": (lambda: trained("DistilBertTokenizer", 260), "distilbert", "sequence-classification"),
    "WordPiece, ELECTRA": (lambda: trained("ElectraTokenizer", 260, do_lower_case=False), "electra", "token-classification"),
    "byte-level BPE, GPT-2": (lambda: trained("GPT2Tokenizer", 420), "gpt2", "causal-lm"),
    "byte-level BPE, RoBERTa": (lambda: trained("RobertaTokenizer", 420), "roberta", "masked-lm"),
    "byte-level BPE, BART": (lambda: trained("BartTokenizer", 420), "bart", "seq2seq-lm"),
    "byte-level BPE, Whisper": (lambda: trained("WhisperTokenizer", 420), "whisper", "speech-seq2seq"),
    "byte-level BPE, Llama 3": (trained_llama3, "llama", "causal-lm"),
    "BPE with byte fallback, Llama 2": (trained_llama2, "mistral", "causal-lm"),
    "BPE with metaspaces, Gemma": (lambda: trained("GemmaTokenizer", 260), "gemma", "causal-lm"),
    "Unigram, T5": (lambda: trained("T5Tokenizer", 300), "t5", "seq2seq-lm"),
    "Unigram, XLM-R": (lambda: trained("XLMRobertaTokenizer", 200), "xlm-roberta", "masked-lm"),
    "Unigram, ALBERT": (lambda: trained("AlbertTokenizer", 200), "albert", "sequence-classification"),
    "words": (trained_words, "bert", "sequence-classification"),
}


def case(kind: str, padded: int = 5) -> tuple[PreTrainedModel, Any]:
    """A model with a few rows of embeddings more than tokens, and its tokenizer."""
    make, family, head = KINDS[kind]
    tokenizer = make()
    names = ("pad", "bos", "eos", "cls", "sep")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in names}
    if special["eos_token_id"] is not None and family in ("bart", "t5", "whisper"):
        special["decoder_start_token_id"] = special["eos_token_id"]
    if family == "bart":
        special["forced_eos_token_id"] = special["eos_token_id"]
    known = {name: index for name, index in special.items() if index is not None}
    return tiny(family, head, vocab_size=len(tokenizer) + padded, **known), tokenizer
