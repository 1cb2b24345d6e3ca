"""Encoder-decoder models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..spec import ArchitectureSpec, AttentionSpec, ByHead, FeedForwardSpec, Part
from .fragments import attention, bart_like

BART = ArchitectureSpec(
    model_types=("bart", "marian", "blenderbot-small", "plbart"),
    layers=("encoder.layers", "decoder.layers"),
    attentions=(bart_like("self_attn"), bart_like("encoder_attn", optional=True)),
    feed_forwards=(FeedForwardSpec(up=Part("fc1"), down=Part("fc2"), activation="activation_fn"),),
    depths=("encoder_layers", "decoder_layers"),
    widths=({"intermediate_size": "encoder_ffn_dim"}, {"intermediate_size": "decoder_ffn_dim"}),
    heads=("encoder_attention_heads", "decoder_attention_heads"),
)

#: BART's blocks in layers that only add to what they are given.
PRE_NORM_BART = replace(BART, model_types=("mbart", "m2m_100", "pegasus", "blenderbot", "speech_to_text"), pre_norm=True)

#: Neurons beside attention in windows, whose heads stay, and layers, as long as the list of windows in the config.
LED = replace(BART, model_types=("led",), attentions=(), depths=(), heads=())

WHISPER = replace(
    BART,
    model_types=("whisper",),
    pre_norm=True,
    pre_norm_when={"use_weighted_layer_sum": False},
)


def _t5_attention(module: str, optional: bool = False, own_bias: bool = False) -> AttentionSpec:
    """Attention to a position bias that the first layer passes on, or to one of every layer's own."""
    bias: dict[str, Any] = {"position_bias": "passed on", "position_table": "relative_attention_bias", "forwards": ("OwnHeads",)}
    if own_bias:
        bias = {"by_head": (ByHead(f"{module}.relative_attention_bias.weight", 1),)}
    return attention(
        module,
        "q k v o",
        head_size="key_value_proj_dim",
        sizes={"n_heads": "heads", "inner_dim": "width"},
        optional=optional,
        **bias,
    )


def _t5_feed_forwards(name: str) -> tuple[FeedForwardSpec, FeedForwardSpec]:
    """The plain feed-forward block, and the gated one of later versions."""
    down, activation = Part(f"{name}.wo"), f"{name}.act"
    return (
        FeedForwardSpec(up=Part(f"{name}.wi"), down=down, activation=activation, optional=True),
        FeedForwardSpec(gate=Part(f"{name}.wi_0"), up=Part(f"{name}.wi_1"), down=down, activation=activation, optional=True),
    )


#: The first layer of each stack computes a position bias for all heads, and every layer passes it on.
T5 = ArchitectureSpec(
    model_types=("t5", "mt5"),
    layers=("encoder.block", "decoder.block"),
    attentions=(_t5_attention("layer.0.SelfAttention"), _t5_attention("layer.1.EncDecAttention", optional=True)),
    feed_forwards=(*_t5_feed_forwards("layer.1.DenseReluDense"), *_t5_feed_forwards("layer.2.DenseReluDense")),
    depths=("num_layers", "num_decoder_layers"),
    pre_norm=True,
    widths=({"intermediate_size": "d_ff", "num_attention_heads": "num_heads"},) * 2,
)

UMT5 = replace(
    T5,
    model_types=("umt5",),
    attentions=(
        _t5_attention("layer.0.SelfAttention", own_bias=True),
        _t5_attention("layer.1.EncDecAttention", own_bias=True, optional=True),
    ),
)
