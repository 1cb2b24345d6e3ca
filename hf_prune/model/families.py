"""The families hf_prune knows, one `ArchitectureSpec` each."""

from __future__ import annotations

from dataclasses import replace

from .spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part

#: How the config of most families calls the number of neurons.
_NEURONS = {"intermediate_size": "intermediate_size"}
#: The same, and heads whose width is set apart from their number.
_HEADS = {"num_attention_heads": "num_attention_heads", "head_dim": "head_dim"}

_BERT_SIZES = {"num_attention_heads": "heads", "all_head_size": "width"}
_BERT_FFN = FeedForwardSpec(up=Part("intermediate.dense"), down=Part("output.dense"), activation="intermediate.intermediate_act_fn")


def _bert_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=f"{name}.self",
        query=Part(f"{name}.self.query"),
        key=Part(f"{name}.self.key"),
        value=Part(f"{name}.self.value"),
        output=Part(f"{name}.output.dense"),
        head_size="attention_head_size",
        sizes=_BERT_SIZES,
    )


BERT = ArchitectureSpec(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers=("encoder.layer",),
    attentions=(_bert_attention("attention"), _bert_attention("crossattention")),
    feed_forwards=(_BERT_FFN,),
    widths=(_NEURONS,),
)

DISTILBERT = ArchitectureSpec(
    model_types=("distilbert",),
    layers=("transformer.layer",),
    attentions=(
        AttentionSpec(
            module="attention",
            query=Part("attention.q_lin"),
            key=Part("attention.k_lin"),
            value=Part("attention.v_lin"),
            output=Part("attention.out_lin"),
            head_size="attention_head_size",
            sizes={"n_heads": "heads", "dim": "width"},
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("ffn.lin1"), down=Part("ffn.lin2"), activation="ffn.activation"),),
    widths=({"intermediate_size": "hidden_dim"},),
)

#: The layers of a group are one layer that is run several times.
ALBERT = ArchitectureSpec(
    model_types=("albert",),
    layers=("encoder.albert_layer_groups.*.albert_layers",),
    attentions=(
        AttentionSpec(
            module="attention",
            query=Part("attention.query"),
            key=Part("attention.key"),
            value=Part("attention.value"),
            output=Part("attention.dense"),
            head_size="attention_head_size",
            sizes=_BERT_SIZES,
            after=("output_dropout",),
            residual_norm="LayerNorm",
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("ffn"), down=Part("ffn_output"), activation="activation"),),
    widths=(_NEURONS,),
)

#: The encoder computes one position bias, for all of its heads, that every layer adds to its attention scores.
MPNET = ArchitectureSpec(
    model_types=("mpnet",),
    layers=("encoder.layer",),
    attentions=(
        AttentionSpec(
            module="attention.attn",
            query=Part("attention.attn.q"),
            key=Part("attention.attn.k"),
            value=Part("attention.attn.v"),
            output=Part("attention.attn.o"),
            head_size="attention_head_size",
            sizes=_BERT_SIZES,
            position_bias="taken",
        ),
    ),
    feed_forwards=(_BERT_FFN,),
    widths=(_NEURONS,),
)

VIT = ArchitectureSpec(
    model_types=("vit", "deit"),
    layers=("layers",),
    attentions=(
        AttentionSpec(
            module="attention",
            query=Part("attention.q_proj"),
            key=Part("attention.k_proj"),
            value=Part("attention.v_proj"),
            output=Part("attention.o_proj"),
            sizes={"num_attention_heads": "heads"},
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.fc1"), down=Part("mlp.fc2"), activation="mlp.activation_fn"),),
    depths=("num_hidden_layers",),
    widths=(_NEURONS | _HEADS,),
)

MODERNBERT = ArchitectureSpec(
    model_types=("modernbert",),
    layers=("layers",),
    attentions=(
        AttentionSpec(
            module="attn",
            query=Part("attn.Wqkv", 0, 3),
            key=Part("attn.Wqkv", 1, 3),
            value=Part("attn.Wqkv", 2, 3),
            output=Part("attn.Wo"),
            after=("out_drop",),
        ),
    ),
    feed_forwards=(FeedForwardSpec(gate=Part("mlp.Wi", 0, 2), up=Part("mlp.Wi", 1, 2), down=Part("mlp.Wo"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    widths=(_NEURONS,),
)


def _gpt2_attention(name: str, query: Part, packed: int) -> AttentionSpec:
    """`packed`: how many parts `c_attn` has; key and value are the last two."""
    return AttentionSpec(
        module=name,
        query=query,
        key=Part(f"{name}.c_attn", packed - 2, packed),
        value=Part(f"{name}.c_attn", packed - 1, packed),
        output=Part(f"{name}.c_proj"),
        sizes={"num_heads": "heads", "split_size": "width"},
        after=("resid_dropout",),
    )


GPT2 = ArchitectureSpec(
    model_types=("gpt2",),
    layers=("h",),
    attentions=(
        _gpt2_attention("attn", Part("attn.c_attn", 0, 3), packed=3),
        _gpt2_attention("crossattention", Part("crossattention.q_attn"), packed=2),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.c_fc"), down=Part("mlp.c_proj"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    depths_when={"scale_attn_by_inverse_layer_idx": False},
    widths=({"intermediate_size": "n_inner"},),
)


def _bart_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=name,
        query=Part(f"{name}.q_proj"),
        key=Part(f"{name}.k_proj"),
        value=Part(f"{name}.v_proj"),
        output=Part(f"{name}.out_proj"),
        sizes={"num_heads": "heads"},
    )


BART = ArchitectureSpec(
    model_types=("bart",),
    layers=("encoder.layers", "decoder.layers"),
    attentions=(_bart_attention("self_attn"), _bart_attention("encoder_attn")),
    feed_forwards=(FeedForwardSpec(up=Part("fc1"), down=Part("fc2"), activation="activation_fn"),),
    widths=({"intermediate_size": "encoder_ffn_dim"}, {"intermediate_size": "decoder_ffn_dim"}),
)

WHISPER = replace(
    BART,
    model_types=("whisper",),
    depths=("encoder_layers", "decoder_layers"),
    depths_when={"use_weighted_layer_sum": False},
)

OPT = replace(
    BART,
    model_types=("opt",),
    layers=("decoder.layers",),
    depths=("num_hidden_layers",),
    depths_when={"do_layer_norm_before": True},
    widths=({"intermediate_size": "ffn_dim"},),
)

LLAMA = ArchitectureSpec(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma"),
    layers=("layers",),
    attentions=(
        AttentionSpec(
            module="self_attn",
            query=Part("self_attn.q_proj"),
            key=Part("self_attn.k_proj"),
            value=Part("self_attn.v_proj"),
            output=Part("self_attn.o_proj"),
            sizes={"num_key_value_groups": "groups"},
        ),
    ),
    feed_forwards=(
        FeedForwardSpec(gate=Part("mlp.gate_proj"), up=Part("mlp.up_proj"), down=Part("mlp.down_proj"), activation="mlp.act_fn"),
    ),
    depths=("num_hidden_layers",),
    widths=(_NEURONS | _HEADS | {"num_key_value_heads": "num_key_value_heads"},),
)

WAV2VEC2 = ArchitectureSpec(
    model_types=("wav2vec2",),
    layers=("encoder.layers",),
    attentions=(_bart_attention("attention"),),
    feed_forwards=(
        FeedForwardSpec(
            up=Part("feed_forward.intermediate_dense"),
            down=Part("feed_forward.output_dense"),
            activation="feed_forward.intermediate_act_fn",
        ),
    ),
    depths=("num_hidden_layers",),
    depths_when={"do_stable_layer_norm": True, "adapter_attn_dim": None, "use_weighted_layer_sum": False},
    widths=(_NEURONS,),
)

DEBERTA = ArchitectureSpec(
    model_types=("deberta-v2",),
    layers=("encoder.layer",),
    attentions=(
        AttentionSpec(
            module="attention.self",
            query=Part("attention.self.query_proj"),
            key=Part("attention.self.key_proj"),
            value=Part("attention.self.value_proj"),
            output=Part("attention.output.dense"),
            head_size="attention_head_size",
            sizes=_BERT_SIZES,
            extra=(Part("attention.self.pos_key_proj"), Part("attention.self.pos_query_proj")),
        ),
    ),
    feed_forwards=(_BERT_FFN,),
    widths=(_NEURONS,),
)


def _t5_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=name,
        query=Part(f"{name}.q"),
        key=Part(f"{name}.k"),
        value=Part(f"{name}.v"),
        output=Part(f"{name}.o"),
        head_size="key_value_proj_dim",
        sizes={"n_heads": "heads", "inner_dim": "width"},
        position_bias="passed on",
    )


def _t5_feed_forwards(name: str) -> tuple[FeedForwardSpec, FeedForwardSpec]:
    """The plain one, and the gated one of later versions."""
    down, activation = Part(f"{name}.wo"), f"{name}.act"
    return (
        FeedForwardSpec(up=Part(f"{name}.wi"), down=down, activation=activation),
        FeedForwardSpec(gate=Part(f"{name}.wi_0"), up=Part(f"{name}.wi_1"), down=down, activation=activation),
    )


#: The first layer of each stack computes a position bias, for all of its heads, and every layer passes it on.
T5 = ArchitectureSpec(
    model_types=("t5",),
    layers=("encoder.block", "decoder.block"),
    attentions=(_t5_attention("layer.0.SelfAttention"), _t5_attention("layer.1.EncDecAttention")),
    feed_forwards=(*_t5_feed_forwards("layer.1.DenseReluDense"), *_t5_feed_forwards("layer.2.DenseReluDense")),
    depths=("num_layers", "num_decoder_layers"),
    widths=({"intermediate_size": "d_ff"}, {"intermediate_size": "d_ff"}),
)

#: `config.model_type` → spec.
SPECS: dict[str, ArchitectureSpec] = {}


def register_architecture(spec: ArchitectureSpec) -> None:
    """Make a family known under each of its `model_types`; a later registration replaces an earlier one."""
    for model_type in spec.model_types:
        SPECS[model_type] = spec


def spec_for(model_type: str) -> ArchitectureSpec:
    """The spec of a family.

    Raises:
        ValueError: the family has none; says how to write one.
    """
    if model_type not in SPECS:
        raise ValueError(
            f"model_type={model_type!r} has no architecture spec; known are {', '.join(sorted(SPECS))}. "
            "Describe where its projections live in an `hf_prune.model.ArchitectureSpec` and pass it to "
            "`hf_prune.model.register_architecture`."
        )
    return SPECS[model_type]


for _spec in (BERT, DISTILBERT, ALBERT, MPNET, DEBERTA, VIT, MODERNBERT, GPT2, BART, WHISPER, OPT, WAV2VEC2, LLAMA, T5):
    register_architecture(_spec)
