"""Text encoders."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ArchitectureSpec, FeedForwardSpec, Part
from .fragments import BERT_FFN, GATED, HEADS, NEURONS, OWN_HEADS, attention, bert_like, feed_forward, packed

BERT = ArchitectureSpec(
    model_types=(
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "ernie",
        "data2vec-text",
        "layoutlm",
        "bert-generation",
        "rembert",
        "roformer",
        "tapas",
        "visual_bert",
        "xmod",
    ),
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

#: BERT's blocks in layers that only add to what they are given.
PRE_NORM_BERT = replace(BERT, model_types=("megatron-bert", "xlm-roberta-xl", "roberta-prelayernorm"), pre_norm=True)


#: BERT's neurons beside attention of their own kinds, whose heads stay; see `model/families/refused.py`.
BERT_NEURONS = replace(
    BERT,
    model_types=("nystromformer", "yoso", "convbert", "deberta"),
    attentions=(),
    heads=(),
)

#: A list of windows in the config is as long as the list of layers, so all stay.
LONGFORMER = replace(BERT_NEURONS, model_types=("longformer",), depths=())

#: A second stream, of the layout, has neurons of its own.
LILT = replace(
    BERT_NEURONS,
    model_types=("lilt",),
    feed_forwards=(
        BERT_FFN,
        feed_forward("layout_intermediate.dense layout_output.dense", "layout_intermediate.intermediate_act_fn"),
    ),
    widths=(),
)

#: Blocks are in lists side by side, not in layers.
XLM = replace(
    BERT_NEURONS,
    model_types=("xlm", "flaubert"),
    layers=("ffns",),
    feed_forwards=(feed_forward("lin1 lin2", "act"),),
    depths=(),
    widths=(),
    as_hidden=(),
)

#: Several feed-forward blocks in a layer, all of them narrower than the stream between layers.
MOBILEBERT = replace(
    BERT,
    model_types=("mobilebert",),
    attentions=BERT.attentions[:1],
    feed_forwards=(
        BERT_FFN,
        *(
            replace(
                feed_forward(
                    f"ffn.{index}.intermediate.dense ffn.{index}.output.dense", f"ffn.{index}.intermediate.intermediate_act_fn"
                ),
                optional=True,
            )
            for index in range(3)
        ),
    ),
    heads=(),
    as_hidden=(),
)

#: The activation is a function that no module holds, so neurons stay; so do layers, as a head reads the attention of all of them.
ESM = replace(PRE_NORM_BERT, model_types=("esm",), feed_forwards=(), depths=(), pre_norm=False, widths=())

#: The encoder computes biases for all of its heads from the positions of words in a text and on a page.
LAYOUTLM3 = replace(
    BERT,
    model_types=("layoutlmv3",),
    attentions=(
        replace(
            BERT.attentions[0],
            position_bias="taken",
            position_arguments={"rel_pos": -3, "rel_2d_pos": -3},
            forwards=("OwnBiases",),
        ),
    ),
)

#: Words and entities have queries of their own for each other.
LUKE = replace(
    BERT,
    model_types=("luke",),
    attentions=(replace(BERT.attentions[0], extra=tuple(Part(f"attention.self.{name}_query") for name in ("w2e", "e2w", "e2e"))),),
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

NOMIC_BERT = ArchitectureSpec(
    model_types=("nomic_bert",),
    layers=("layers",),
    attentions=(attention("self_attn", "q_proj k_proj v_proj o_proj"),),
    feed_forwards=(GATED,),
    depths=("num_hidden_layers",),
    widths=(NEURONS | HEADS,),
)

JINA = replace(
    NOMIC_BERT, model_types=("jina_embeddings_v3",), feed_forwards=(feed_forward("mlp.fc1 mlp.fc2", "mlp.activation_fn"),)
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
