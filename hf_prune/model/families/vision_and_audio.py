"""Image and audio encoders."""

from __future__ import annotations

from ..spec import ArchitectureSpec, FeedForwardSpec, Part
from .fragments import HEADS, NEURONS, OWN_HEADS, attention, bart_like

VIT = ArchitectureSpec(
    model_types=("vit", "deit"),
    layers=("layers",),
    attentions=(attention("attention", "q_proj k_proj v_proj o_proj", sizes={"num_attention_heads": "heads"}),),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.fc1"), down=Part("mlp.fc2"), activation="mlp.activation_fn"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS | HEADS,),
)

WAV2VEC2 = ArchitectureSpec(
    model_types=("wav2vec2",),
    layers=("encoder.layers",),
    attentions=(bart_like("attention"),),
    feed_forwards=(
        FeedForwardSpec(
            up=Part("feed_forward.intermediate_dense"),
            down=Part("feed_forward.output_dense"),
            activation="feed_forward.intermediate_act_fn",
        ),
    ),
    depths=("num_hidden_layers",),
    pre_norm=True,
    pre_norm_when={"do_stable_layer_norm": True, "adapter_attn_dim": None, "use_weighted_layer_sum": False},
    widths=(NEURONS,),
    heads=OWN_HEADS,
)
