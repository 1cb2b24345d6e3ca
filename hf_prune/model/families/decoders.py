"""Decoders: causal language models."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ArchitectureSpec, AttentionSpec, ByHead, FeedForwardSpec, Part
from .encoder_decoders import BART
from .fragments import GATED, HEADS, NEURONS, OWN_HEADS, attention, bart_like, feed_forward, packed, packed_attention


def _gpt2_attention(module: str, parts: tuple[Part, ...], optional: bool = False) -> AttentionSpec:
    query, key, value = parts
    return AttentionSpec(
        module=module,
        query=query,
        key=key,
        value=value,
        output=Part(f"{module}.c_proj"),
        sizes={"num_heads": "heads", "split_size": "width"},
        after=("resid_dropout",),
        optional=optional,
    )


GPT2 = ArchitectureSpec(
    model_types=("gpt2",),
    layers=("h",),
    attentions=(
        _gpt2_attention("attn", packed("attn.c_attn", 3)),
        _gpt2_attention("crossattention", (Part("crossattention.q_attn"), *packed("crossattention.c_attn", 2)), optional=True),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.c_fc"), down=Part("mlp.c_proj"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    pre_norm_when={"scale_attn_by_inverse_layer_idx": False},
    widths=({"intermediate_size": "n_inner"},),
    heads=("n_head",),
)

BIOGPT = replace(
    BART,
    model_types=("biogpt",),
    layers=("layers",),
    attentions=BART.attentions[:1],
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

XGLM = replace(
    BIOGPT,
    model_types=("xglm",),
    attentions=(replace(BART.attentions[0], sizes={"num_heads": "heads", "embed_dim": "width"}),),
    depths=("num_layers",),
    widths=({"intermediate_size": "ffn_dim"},),
    heads=("attention_heads",),
)

OPT = replace(
    BART,
    model_types=("opt",),
    layers=("decoder.layers",),
    attentions=BART.attentions[:1],
    depths=("num_hidden_layers",),
    pre_norm=True,
    pre_norm_when={"do_layer_norm_before": True},
    widths=({"intermediate_size": "ffn_dim"},),
    heads=OWN_HEADS,
    as_hidden=("word_embed_proj_dim",),
)

GPT_BIGCODE = replace(
    GPT2,
    model_types=("gpt_bigcode",),
    attentions=(
        packed_attention(
            "attn",
            "c_attn c_proj",
            interleaved=True,
            sizes={"num_heads": "heads", "embed_dim": "width", "kv_heads": "key_value_heads", "num_key_value_groups": "groups"},
            after=("resid_dropout",),
        ),
    ),
    pre_norm_when={},
)

GPTJ = replace(
    GPT2,
    model_types=("gptj",),
    attentions=(
        attention("attn", "q_proj k_proj v_proj out_proj", sizes={"num_attention_heads": "heads"}, after=("resid_dropout",)),
    ),
    feed_forwards=(feed_forward("mlp.fc_in mlp.fc_out", "mlp.act"),),
    pre_norm_when={},
)

#: Local and global layers alternate by their numbers, so all stay.
GPT_NEO = replace(
    GPT2,
    model_types=("gpt_neo",),
    attentions=(bart_like("attn.attention", after=("resid_dropout",)),),
    depths=(),
    pre_norm=False,
    widths=({"intermediate_size": "intermediate_size"},),
    heads=("num_heads",),
)

GPT_NEOX = ArchitectureSpec(
    model_types=("gpt_neox",),
    layers=("layers",),
    attentions=(packed_attention("attention", "query_key_value dense", interleaved=True, head_size="head_size"),),
    feed_forwards=(feed_forward("mlp.dense_h_to_4h mlp.dense_4h_to_h", "mlp.act"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

#: The bias of the output projection is a parameter of another module, so heads stay, and no layer is ever empty.
GPT_NEOX_JAPANESE = replace(GPT_NEOX, model_types=("gpt_neox_japanese",), attentions=(), pre_norm=False, widths=(), heads=())

FALCON = replace(
    GPT_NEOX,
    model_types=("falcon",),
    layers=("h",),
    attentions=(
        packed_attention(
            "self_attention",
            "query_key_value dense",
            interleaved=True,
            sizes={"num_heads": "heads", "num_kv_heads": "key_value_heads"},
        ),
    ),
    widths=({"intermediate_size": "ffn_hidden_size"},),
)

#: Norms over the queries, and over the keys, of all heads at once.
NORMS_OVER_HEADS = tuple(ByHead(f"self_attn.{role[0]}_norm.weight", role=role, forward="StockMean") for role in ("query", "key"))

LLAMA = ArchitectureSpec(
    model_types=(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "granite",
        "cohere",
        "cohere2",
        "smollm3",
        "helium",
        "ernie4_5",
        "seed_oss",
        "eurobert",
        "olmo",
        "ministral",
        "cwm",
    ),
    layers=("layers",),
    attentions=(attention("self_attn", "q_proj k_proj v_proj o_proj", sizes={"num_key_value_groups": "groups"}),),
    feed_forwards=(GATED,),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS | HEADS | {"num_key_value_heads": "num_key_value_heads"},),
)

_gate, _up = packed("mlp.gate_up_proj", 2)

GLM = replace(
    LLAMA,
    model_types=("glm",),
    feed_forwards=(FeedForwardSpec(gate=_gate, up=_up, down=Part("mlp.down_proj"), activation="mlp.activation_fn"),),
)

PHI3 = replace(
    GLM,
    model_types=("phi3",),
    attentions=(
        packed_attention(
            "self_attn",
            "qkv_proj o_proj",
            sizes={
                "config.num_attention_heads": "heads",
                "num_key_value_heads": "key_value_heads",
                "num_key_value_groups": "groups",
            },
            forwards=("OwnConfig",),
        ),
    ),
)

PHI = replace(
    LLAMA,
    model_types=("phi",),
    attentions=(attention("self_attn", "q_proj k_proj v_proj dense", sizes={"num_key_value_groups": "groups"}),),
    feed_forwards=(feed_forward("mlp.fc1 mlp.fc2", "mlp.activation_fn"),),
)

STARCODER2 = replace(
    LLAMA,
    model_types=("starcoder2",),
    feed_forwards=(feed_forward("mlp.c_fc mlp.c_proj", "mlp.act"),),
)

NEMOTRON = replace(
    LLAMA, model_types=("nemotron", "arcee"), feed_forwards=(feed_forward("mlp.up_proj mlp.down_proj", "mlp.act_fn"),)
)

NANOCHAT = replace(LLAMA, model_types=("nanochat",), feed_forwards=(feed_forward("mlp.fc1 mlp.fc2", "mlp.activation_fn"),))

#: Experts stay as they are, so no layer is ever empty.
MIXTURES = replace(
    LLAMA,
    model_types=("mixtral", "phimoe", "granitemoe"),
    feed_forwards=(),
    pre_norm=False,
    widths=(HEADS | {"num_key_value_heads": "num_key_value_heads"},),
)

_dense = replace(GATED, optional=True)


def _shared(name: str) -> FeedForwardSpec:
    """The feed-forward block beside the experts that serves every token."""
    gate, up, down = (Part(f"mlp.{name}.{part}_proj") for part in ("gate", "up", "down"))
    return FeedForwardSpec(gate=gate, up=up, down=down, activation=f"mlp.{name}.act_fn", optional=True)


#: Layers without experts among others.
QWEN3_MOE = replace(MIXTURES, model_types=("qwen3_moe",), feed_forwards=(_dense,), widths=LLAMA.widths)

QWEN2_MOE = replace(
    MIXTURES,
    model_types=("qwen2_moe",),
    feed_forwards=(_dense, _shared("shared_expert")),
    widths=({**MIXTURES.widths[0], "intermediate_size": "shared_expert_intermediate_size"},),
)

#: The width of shared experts is a multiple of that of the others.
ERNIE_MOE = replace(MIXTURES, model_types=("ernie4_5_moe", "glm4_moe", "dots1"), feed_forwards=(_dense, _shared("shared_experts")))

#: Keys and values of all heads come from one compressed vector, so heads stay.
DEEPSEEK = replace(ERNIE_MOE, model_types=("deepseek_v2", "deepseek_v3"), attentions=(), widths=())

#: Norms over the queries and keys of all heads, and experts.
OLMOE = replace(
    MIXTURES,
    model_types=("olmoe",),
    attentions=(replace(LLAMA.attentions[0], by_head=NORMS_OVER_HEADS),),
    widths=(),
    heads=OWN_HEADS,
)

PERSIMMON = replace(
    GPT_NEOX,
    model_types=("persimmon",),
    attentions=(packed_attention("self_attn", "query_key_value dense", interleaved=True, sizes={"num_heads": "heads"}),),
)

STABLELM = replace(
    LLAMA,
    model_types=("stablelm",),
    attentions=(
        attention(
            "self_attn",
            "q_proj k_proj v_proj o_proj",
            sizes={"num_heads": "heads", "num_key_value_heads": "key_value_heads", "num_key_value_groups": "groups"},
        ),
    ),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)


def _with_norms(attention: str, feed_forward: str, qk_norms: bool = False) -> ArchitectureSpec:
    """Llama's layers with norms of these names on what their blocks add, and perhaps on the queries and keys of all heads."""
    [attend], [feed] = LLAMA.attentions, LLAMA.feed_forwards
    return replace(
        LLAMA,
        attentions=(replace(attend, norm=attention, by_head=NORMS_OVER_HEADS if qk_norms else ()),),
        feed_forwards=(replace(feed, norm=feed_forward),),
    )


GEMMA2 = replace(_with_norms("post_attention_layernorm", "post_feedforward_layernorm"), model_types=("gemma2", "gemma3_text"))

EXAONE4 = replace(GEMMA2, model_types=("exaone4",))

GLM4 = replace(
    GEMMA2,
    model_types=("glm4",),
    attentions=(replace(GEMMA2.attentions[0], norm="post_self_attn_layernorm"),),
    feed_forwards=(replace(GLM.feed_forwards[0], norm="post_mlp_layernorm"),),
)

#: Norms over the queries and keys of all heads have the width of the stock model, which the number of heads in the config gives.
OLMO2 = replace(
    _with_norms("post_attention_layernorm", "post_feedforward_layernorm", qk_norms=True),
    model_types=("olmo2", "olmo3"),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

BLOOM = replace(
    FALCON,
    model_types=("bloom",),
    attentions=(
        packed_attention(
            "self_attention",
            "query_key_value dense",
            interleaved=True,
            sizes={"num_heads": "heads"},
            adds_residual=True,
            position_bias="taken",
            position_arguments={"alibi": 0},
            forwards=("OwnBiases",),
        ),
    ),
    feed_forwards=(feed_forward("mlp.dense_h_to_4h mlp.dense_4h_to_h", "mlp.gelu_impl"),),
    pre_norm_when={"apply_residual_connection_post_layernorm": False},
    widths=(),
    heads=("n_head",),
)

MPT = replace(
    BLOOM,
    model_types=("mpt",),
    layers=("blocks",),
    attentions=(
        packed_attention(
            "attn",
            "Wqkv out_proj",
            sizes={"n_heads": "heads"},
            position_bias="taken",
            position_arguments={"position_bias": -3},
            forwards=("OwnBiases",),
        ),
    ),
    feed_forwards=(feed_forward("ffn.up_proj ffn.down_proj", "ffn.act"),),
    pre_norm_when={},
    heads=("n_heads",),
)

_gate, _up = packed("mlp.Wi", 2)

MODERNBERT_DECODER = replace(
    LLAMA,
    model_types=("modernbert-decoder",),
    attentions=(
        attention("attn", "q_proj k_proj v_proj Wo", sizes={"num_heads": "heads", "all_head_size": "width"}, after=("out_drop",)),
    ),
    feed_forwards=(FeedForwardSpec(gate=_gate, up=_up, down=Part("mlp.Wo"), activation="mlp.act"),),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)
