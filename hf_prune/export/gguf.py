"""GGUF, by the `gguf` package, for llama.cpp and what is built on it; run in llama.cpp by `xllamacpp`.

llama.cpp takes the number of heads and the width of the first layer for those of all, but in the architecture `deci` (NVIDIA's
pruned Llamas, llama.cpp's `src/models/deci.cpp`), which has them for each. Models whose layers differ are written as that one; it
computes what Llama does, with biases where there are some. Others are written as what they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..condense import needs_hf_prune
from ..measure.running import quietly
from ..settings.errors import ConfigError
from .compare import Agreement, ExportError
from .llama_cpp import ask, serving

FILE = "model.gguf"
#: Families that compute what Llama does → the architecture of models whose layers are equal.
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
#: What weights can be.
QUANTIZATIONS = ("f16", "q8_0")
#: How many neurons a block of quantized weights has. A layer needs some in any case: llama.cpp leaves one without neurons out of
#: its graph, with its attention.
_BLOCK = 32
#: By how much a log-probability may differ, in float32 or float16 and in eight bits, and of how many tokens it is compared.
EXACT, QUANTIZED, TOP = 0.02, 0.5, 5
#: How many prompts and how many tokens of each a file is compared on.
_PROMPTS, _PROMPT = 20, 64

_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How text is split before byte-level merges: as tokenizers write it, and llama.cpp's name for it.
_PRE_TOKENIZERS: dict[str, tuple[dict[str, Any], ...]] = {
    "gpt-2": ({"type": "ByteLevel", "use_regex": True},),
    "smollm": ({"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "use_regex": True}),
    "llama-bpe": ({"type": "Split", "pattern": {"Regex": _SPLIT % r"\p{N}{1,3}"}}, {"type": "ByteLevel", "use_regex": False}),
    "qwen2": ({"type": "Split", "pattern": {"Regex": _SPLIT % r"\p{N}"}}, {"type": "ByteLevel", "use_regex": False}),
}
#: Texts in which tokenizers differ: numbers, spaces, lines, contractions, other scripts.
_TEXTS = (
    "Hello world",
    "In 1984 it cost 12345.67, didn't it?",
    "two  spaces,\ttabs\n\nand  lines \n",
    "WE'LL see: naïve façade, Ελλάδα, 東京, 🙂!",
    "def f(x):\n    return x**2  # ok",
)


def check_model(model: PreTrainedModel) -> None:
    """Raise unless llama.cpp can compute a model.

    Raises:
        ConfigError: it is of another family, or has what llama.cpp's architecture has not.
    """
    name, config = type(model).__name__, model.config
    if config.model_type not in FAMILIES or not name.endswith("ForCausalLM"):
        raise ConfigError(
            "model", name, f"must be a causal language model of {', '.join(FAMILIES)}; llama.cpp takes no other here."
        )
    if config.hidden_act != "silu":
        raise ConfigError("model", name, f"has the activation {config.hidden_act!r}; llama.cpp computes silu.")
    rotary: Any = model.base_model.rotary_emb
    if rotary.attention_scaling != 1 or rotary.rope_type not in ("default", "linear", "llama3"):
        raise ConfigError("model", name, f"has positions of type {rotary.rope_type!r}, which this file format cannot say.")


def write(model: Any, folder: Path, quantize: str | None, tokenizer: Any) -> Path:
    """Write a model into a folder.

    Args:
        model: the model.
        folder: has the files of its tokenizer.
        quantize: `"f16"` or `"q8_0"`; by default float32. Biases and norms always are float32, and what does not fill blocks of 32
            is float16.
        tokenizer: the tokenizer.

    Raises:
        ConfigError: the tokenizer is of a kind that llama.cpp does not have.
    """
    import gguf

    file, architecture = folder / FILE, architecture_of(model.config)
    kinds = gguf.GGMLQuantizationType
    kind = {None: kinds.F32, "f16": kinds.F16, "q8_0": kinds.Q8_0}[quantize]
    writer = gguf.GGUFWriter(file, architecture)
    _add_settings(writer, model, architecture)
    writer.add_file_type({kinds.F32: 0, kinds.F16: 1, kinds.Q8_0: 7}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tokenizer(writer, folder, tokenizer, model.config.vocab_size)
    for name, tensor in tensors(model, architecture):
        fits = kind if tensor.ndim == 2 else kinds.F32
        if fits == kinds.Q8_0 and tensor.shape[-1] % _BLOCK:
            fits = kinds.F16
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), fits), raw_dtype=fits)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def architecture_of(config: Any) -> str:
    """llama.cpp's architecture for a model: that of its family, or `deci` where that cannot say its sizes."""
    own = FAMILIES[config.model_type]
    heads: int = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return "deci" if needs_hf_prune(config) or (own == "qwen2" and heads != config.hidden_size) else own


def _add_settings(writer: Any, model: Any, architecture: str) -> None:
    config, layers = model.config, model.base_model.layers
    width = layers[0].self_attn.head_dim
    heads, groups, neurons = zip(*(_sizes(layer) for layer in layers))
    uneven = architecture == "deci"
    writer.add_block_count(len(layers))
    # beyond the window llama.cpp would see more than the model does
    writer.add_context_length(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or 2**62))
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(list(heads) if uneven else heads[0])
    writer.add_head_count_kv(list(groups) if uneven else groups[0])
    writer.add_feed_forward_length(list(neurons) if uneven else neurons[0])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _sizes(layer: Any) -> tuple[int, int, int]:
    """How many heads, groups and neurons of a layer are written: at least one and 32."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    heads, groups = attention.q_proj.out_features // width, attention.k_proj.out_features // width
    neurons: int = layer.mlp.up_proj.out_features
    return max(heads, 1), max(groups, 1), max(-(-neurons // _BLOCK) * _BLOCK, _BLOCK)


def tensors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name of each tensor, and the tensor: a layer without heads has one of zeros, zeros fill up blocks of neurons."""
    body, head = model.base_model, model.get_output_embeddings()
    yield "token_embd.weight", body.embed_tokens.weight
    yield "output_norm.weight", body.norm.weight
    if head.weight is not body.embed_tokens.weight:
        yield "output.weight", head.weight
    rotary = body.rotary_emb
    places = torch.arange(0, 2 * len(rotary.inv_freq), 2, device=rotary.inv_freq.device)
    plain = model.config.rope_parameters["rope_theta"] ** (-places / (2 * len(rotary.inv_freq)))
    if not torch.allclose(plain, rotary.inv_freq, rtol=1e-5):
        yield "rope_freqs.weight", plain / rotary.inv_freq
    for number, layer in enumerate(body.layers):
        attention, mlp, width = layer.self_attn, layer.mlp, layer.self_attn.head_dim
        heads, groups, neurons = _sizes(layer)
        yield f"blk.{number}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{number}.ffn_norm.weight", layer.post_attention_layernorm.weight
        parts: tuple[tuple[str, nn.Linear, int | None, int | None], ...] = (
            ("attn_q", attention.q_proj, heads * width, None),
            ("attn_k", attention.k_proj, groups * width, None),
            ("attn_v", attention.v_proj, groups * width, None),
            ("attn_output", attention.o_proj, None, heads * width),
            ("ffn_gate", mlp.gate_proj, neurons, None),
            ("ffn_up", mlp.up_proj, neurons, None),
            ("ffn_down", mlp.down_proj, None, neurons),
        )
        for name, linear, rows, columns in parts:
            turned = architecture != "qwen2" and name in ("attn_q", "attn_k")
            for kind, tensor in linear.named_parameters():
                padded = _padded(tensor, rows, columns if kind == "weight" else None)
                yield f"blk.{number}.{name}.{kind}", interleaved(padded, width) if turned else padded


def _padded(tensor: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """A matrix or vector with zeros at its end, up to a number of rows or columns."""
    if columns is not None:
        return nn.functional.pad(tensor, (0, columns - tensor.shape[1]))
    if rows is not None:
        return nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 1), 0, rows - tensor.shape[0]))
    return tensor


def interleaved(tensor: Tensor, width: int) -> Tensor:
    """Rows of queries or keys in the order in which llama.cpp rotates them: pairs side by side instead of half a head apart."""
    return tensor.reshape(-1, 2, width // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


# ----------------------------------------------------------------------------------------------------------------------- tokenizer


def _add_tokenizer(writer: Any, folder: Path, tokenizer: Any, size: int) -> None:
    """Write the vocabulary: tokens by id, their types, merges or scores, special tokens, the chat template."""
    import gguf

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = pre_tokenizer(state)
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    words = {index: token for token, index in tokenizer.get_vocab().items()}
    types = gguf.TokenType
    found: list[tuple[str, Any]] = []
    for index in range(size):
        if index in added:
            found.append((words[index], types.CONTROL if added[index]["special"] else types.USER_DEFINED))
        elif index in words:
            is_byte = kind is None and words[index].startswith("<0x")
            found.append((words[index], types.BYTE if is_byte else types.NORMAL))
        else:
            found.append((f"[PAD{index}]", types.UNUSED))
    writer.add_tokenizer_model("gpt2" if kind else "llama")
    writer.add_tokenizer_pre(kind or "default")
    writer.add_token_list([token for token, _ in found])
    writer.add_token_types([kind for _, kind in found])
    if kind is None:
        ranks = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(state["model"]["merges"])))}
        writer.add_token_scores([ranks.get(token, -1000.0 if index in added else -1e6) for index, (token, _) in enumerate(found)])
        writer.add_add_space_prefix(_prepends_space(state))
    with quietly():
        special = gguf.SpecialVocab(folder, load_merges=kind is not None, n_vocab=size)
        special.add_special_token = {"bos": False, "eos": False} | special.add_special_token
        special.add_to_gguf(writer, quiet=True)


def pre_tokenizer(state: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer splits text before merging bytes; None for one that merges characters of pieces.

    Raises:
        ConfigError: it is of another kind.
    """
    model, before = state["model"], state["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return None
    for name, known in _PRE_TOKENIZERS.items():
        alike = len(steps) == len(known) and all(wanted.items() <= step.items() for wanted, step in zip(known, steps))
        if model["type"] == "BPE" and alike:
            return name
    named = " and ".join(str(step.get("type")) for step in steps)
    allowed = f"splits text by {named}, which must be one of llama.cpp's {', '.join(_PRE_TOKENIZERS)}, or sentencepiece's BPE."
    raise ConfigError("tokenizer", model["type"], allowed)


def _prepends_space(state: Mapping[str, Any]) -> bool:
    text = json.dumps([state["normalizer"], state["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


# -------------------------------------------------------------------------------------------------------------------- comparison


def prompts_of(batches: Iterable[Mapping[str, Tensor]]) -> list[list[int]]:
    """The first rows of some batches without their padding, as lists of ids."""
    found = []
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found += [ids[kept.bool()][:_PROMPT].tolist() for ids, kept in zip(batch["input_ids"], mask)]
    return found[:_PROMPTS]


def compare(model: Any, tokenizer: Any, file: Path, prompts: Sequence[list[int]], quantized: bool) -> Agreement:
    """Compare a file in llama.cpp with the model: the log-probabilities of the likeliest tokens after each prompt, and how texts
    are split into tokens.

    Raises:
        ExportError: llama.cpp does not load the file, splits a text otherwise than the tokenizer, or a log-probability differs by
            more than the bound.
    """
    gaps, same = [], 0
    with serving(file, 2 * _PROMPT) as server:
        for text in _TEXTS:
            wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
            if (found := ask(server, "/tokenize", {"content": text, "add_special": False})["tokens"]) != wanted:
                raise ExportError(f"llama.cpp's tokenizer makes {found} of {text!r}, and not {wanted}; nothing was written.")
        # What llama.cpp draws is always the same letter, since it says nothing where a token ends the text or is part of a letter;
        # log-probabilities are those before.
        letter = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        for prompt in prompts:
            likely = model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1).topk(TOP)
            request = {"prompt": prompt, "n_predict": 1, "n_probs": 4 * TOP, "logit_bias": [[letter, 1e4]], "cache_prompt": False}
            answer = ask(server, "/completion", request)
            given = {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}
            lowest = min(given.values())
            gaps += [abs(given.get(token, lowest) - value) for value, token in zip(likely.values.tolist(), likely.indices.tolist())]
            same += max(given, key=lambda token: given[token]) == int(likely.indices[0])
    found = torch.tensor(gaps)
    agreement = Agreement(
        rows=len(prompts),
        difference=float(found.max()),
        error=float(found.square().mean().sqrt()),
        same=same / len(prompts),
        bound=QUANTIZED if quantized else EXACT,
        unit="of log-probability",
    )
    if not agreement.difference <= agreement.bound:
        measured = f"log-probabilities differ by {agreement.difference:.2e}"
        raise ExportError(f"the file computes something else: {measured}; allowed: {agreement.bound:g}.")
    return agreement
