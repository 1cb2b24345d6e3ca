"""Where every stranger starts, offline: a tiny random model with a tokenizer of whole words, and sentences about animals."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

ANIMALS = ("ant", "bee", "frog", "mouse", "cat", "goat", "lion", "whale")
VERBS = ("chased", "saw", "fed", "heard")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Sentences of two animals, and whether the first is the larger one."""
    choose = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        first, second = choose.sample(range(len(ANIMALS)), 2)
        texts.append(f"the {ANIMALS[first]} {choose.choice(VERBS)} the {ANIMALS[second]}")
        labels.append(int(first > second))
    return texts, labels


def make(folder: Path, family: str = "bert") -> str:
    """Save a tiny random model of a family, `"bert"` or `"llama"`, with its tokenizer; return the folder."""
    words = [*SPECIAL, "the", *ANIMALS, *VERBS]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    ends = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **named, **ends).save_pretrained(folder)
    set_seed(0)
    ids = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        BertForSequenceClassification(BertConfig(**_SIZES, **ids)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**_SIZES, **ids, num_key_value_heads=2)).save_pretrained(folder)
    return str(folder)
