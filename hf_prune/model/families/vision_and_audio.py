"""Encoders of images and of sound."""

from __future__ import annotations

from ..spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part
from .fragments import HEADS, NEURONS, bart_attention

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
    widths=(NEURONS | HEADS,),
)

WAV2VEC2 = ArchitectureSpec(
    model_types=("wav2vec2",),
    layers=("encoder.layers",),
    attentions=(bart_attention("attention"),),
    feed_forwards=(
        FeedForwardSpec(
            up=Part("feed_forward.intermediate_dense"),
            down=Part("feed_forward.output_dense"),
            activation="feed_forward.intermediate_act_fn",
        ),
    ),
    depths=("num_hidden_layers",),
    depths_when={"do_stable_layer_norm": True, "adapter_attn_dim": None, "use_weighted_layer_sum": False},
    widths=(NEURONS,),
)
