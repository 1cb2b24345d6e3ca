"""Text encoders."""

from __future__ import annotations

from ..spec import ArchitectureSpec, FeedForwardSpec, Part
from .fragments import BERT_FFN, NEURONS, OWN_HEADS, attention, bert_like, packed

BERT = ArchitectureSpec(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers=("encoder.layer",),
    attentions=(
        bert_like("attention.self", "query key value", output=Part("attention.output.dense")),
        bert_like("crossattention.self", "query key value", output=Part("crossattention.output.dense"), optional=True),
    ),
    feed_forwards=(BERT_FFN,),
    depths=("num_hidden_layers",),
    widths=(NEURONS,),
    heads=OWN_HEADS,
    as_hidden=("embedding_size",),
)

DISTILBERT = ArchitectureSpec(
    model_types=("distilbert",),
    layers=("transformer.layer",),
    attentions=(
        attention(
            "attention",
            "q_lin k_lin v_lin out_lin",
            head_size="attention_head_size",
            sizes={"n_heads": "heads", "dim": "width"},
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("ffn.lin1"), down=Part("ffn.lin2"), activation="ffn.activation"),),
    depths=("num_hidden_layers",),
    widths=({"intermediate_size": "hidden_dim"},),
    heads=("n_heads",),
)

#: The layers of a group are a single layer that is applied several times.
ALBERT = ArchitectureSpec(
    model_types=("albert",),
    layers=("encoder.albert_layer_groups.*.albert_layers",),
    attentions=(bert_like("attention", "query key value dense", after=("output_dropout",), residual_norm="LayerNorm"),),
    feed_forwards=(FeedForwardSpec(up=Part("ffn"), down=Part("ffn_output"), activation="activation"),),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

#: The encoder computes one position bias, for all of its heads, that every layer adds to its attention scores.
MPNET = ArchitectureSpec(
    model_types=("mpnet",),
    layers=("encoder.layer",),
    attentions=(bert_like("attention.attn", "q k v o", position_bias="taken", forwards=("OwnHeads",)),),
    feed_forwards=(BERT_FFN,),
    depths=("num_hidden_layers",),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

DEBERTA = ArchitectureSpec(
    model_types=("deberta-v2",),
    layers=("encoder.layer",),
    attentions=(
        bert_like(
            "attention.self",
            "query_proj key_proj value_proj",
            output=Part("attention.output.dense"),
            extra=(Part("attention.self.pos_key_proj"), Part("attention.self.pos_query_proj")),
        ),
    ),
    feed_forwards=(BERT_FFN,),
    depths=("num_hidden_layers",),
    widths=(NEURONS,),
    heads=OWN_HEADS,
    as_hidden=("pooler_hidden_size", "embedding_size"),
)

_query, _key, _value = packed("attn.Wqkv", 3)
_gate, _up = packed("mlp.Wi", 2)

MODERNBERT = ArchitectureSpec(
    model_types=("modernbert",),
    layers=("layers",),
    attentions=(attention("attn", "", query=_query, key=_key, value=_value, output=Part("attn.Wo"), after=("out_drop",)),),
    feed_forwards=(FeedForwardSpec(gate=_gate, up=_up, down=Part("mlp.Wo"), activation="mlp.act"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS,),
    heads=OWN_HEADS,
)
