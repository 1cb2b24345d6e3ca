"""Encoders of text."""

from __future__ import annotations

from ..spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part
from .fragments import BERT_FFN, BERT_SIZES, NEURONS


def _bert_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=f"{name}.self",
        query=Part(f"{name}.self.query"),
        key=Part(f"{name}.self.key"),
        value=Part(f"{name}.self.value"),
        output=Part(f"{name}.output.dense"),
        head_size="attention_head_size",
        sizes=BERT_SIZES,
    )


BERT = ArchitectureSpec(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers=("encoder.layer",),
    attentions=(_bert_attention("attention"), _bert_attention("crossattention")),
    feed_forwards=(BERT_FFN,),
    widths=(NEURONS,),
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
            sizes=BERT_SIZES,
            after=("output_dropout",),
            residual_norm="LayerNorm",
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("ffn"), down=Part("ffn_output"), activation="activation"),),
    widths=(NEURONS,),
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
            sizes=BERT_SIZES,
            position_bias="taken",
        ),
    ),
    feed_forwards=(BERT_FFN,),
    widths=(NEURONS,),
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
            sizes=BERT_SIZES,
            extra=(Part("attention.self.pos_key_proj"), Part("attention.self.pos_query_proj")),
        ),
    ),
    feed_forwards=(BERT_FFN,),
    widths=(NEURONS,),
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
    widths=(NEURONS,),
)
