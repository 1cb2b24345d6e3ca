"""Image and audio encoders."""

from __future__ import annotations

from dataclasses import replace

from ..spec import ArchitectureSpec, ByHead, FeedForwardSpec, Part
from .fragments import BERT_FFN, HEADS, NEURONS, OWN_HEADS, attention, bart_like, bert_like, feed_forward

VIT = ArchitectureSpec(
    model_types=("vit", "deit", "vit_msn", "vit_mae", "ijepa", "vivit", "audio-spectrogram-transformer"),
    layers=("layers",),
    attentions=(attention("attention", "q_proj k_proj v_proj o_proj", sizes={"num_attention_heads": "heads"}),),
    feed_forwards=(FeedForwardSpec(up=Part("mlp.fc1"), down=Part("mlp.fc2"), activation="mlp.activation_fn"),),
    depths=("num_hidden_layers",),
    pre_norm=True,
    widths=(NEURONS | HEADS,),
)

#: Layers whose blocks are scaled channel by channel.
DINOV2 = replace(
    VIT,
    model_types=("dinov2", "dinov2_with_registers"),
    layers=("encoder.layer",),
    attentions=(replace(VIT.attentions[0], scale="layer_scale1.lambda1"),),
    feed_forwards=(replace(VIT.feed_forwards[0], scale="layer_scale2.lambda1"),),
    widths=(),
    heads=OWN_HEADS,
)

DINOV3 = replace(
    DINOV2,
    model_types=("dinov3_vit",),
    layers=("layer",),
    attentions=(replace(DINOV2.attentions[0], sizes={"num_heads": "heads"}),),
    feed_forwards=(replace(feed_forward("mlp.up_proj mlp.down_proj", "mlp.act_fn"), scale="layer_scale2.lambda1"),),
    widths=(NEURONS,),
)

_table = "relative_position_bias.relative_position_bias_table"

BEIT = replace(
    VIT,
    model_types=("beit",),
    attentions=(replace(VIT.attentions[0], scale="lambda_1", by_head=(ByHead(_table, 1),)),),
    feed_forwards=(replace(VIT.feed_forwards[0], scale="lambda_2"),),
    pre_norm_when={"use_shared_relative_position_bias": False},
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

#: Stages of layers with heads and hidden sizes of their own.
SWIN = replace(
    VIT,
    model_types=("swin",),
    layers=("encoder.layers.*.blocks",),
    attentions=(replace(VIT.attentions[0], by_head=(ByHead(f"attention.{_table}", 1),)),),
    depths=(),
    pre_norm=False,
    widths=(),
)

#: One tower of a model with two: a tower alone is a model, too.
CLIP_TOWER = replace(
    VIT,
    model_types=("clip_text_model", "clip_vision_model", "siglip_vision_model"),
    layers=("encoder.layers",),
    attentions=(bart_like("self_attn"),),
    feed_forwards=(feed_forward("mlp.fc1 mlp.fc2", "mlp.activation_fn"),),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

_towers = ("text", "vision")

#: A tower for texts and one for images.
CLIP = replace(
    CLIP_TOWER,
    model_types=("clip", "siglip", "metaclip_2"),
    layers=tuple(f"{tower}_model.encoder.layers" for tower in _towers),
    depths=tuple(f"{tower}_config.num_hidden_layers" for tower in _towers),
    widths=tuple({"intermediate_size": f"{tower}_config.intermediate_size"} for tower in _towers),
    heads=tuple(f"{tower}_config.num_attention_heads" for tower in _towers),
)

#: BERT's blocks in ViT's layers.
VIDEOMAE = replace(
    VIT,
    model_types=("videomae",),
    layers=("encoder.layer",),
    attentions=(bert_like("attention.attention", "query key value", output=Part("attention.output.dense")),),
    feed_forwards=(BERT_FFN,),
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

#: Positions are added anew between layers, of whose number they have a dimension, so all stay.
YOLOS = replace(VIDEOMAE, model_types=("yolos",), depths=(), pre_norm=False)

DATA2VEC_VISION = replace(
    VIDEOMAE,
    model_types=("data2vec-vision",),
    attentions=(replace(VIDEOMAE.attentions[0], scale="lambda_1", by_head=(ByHead(f"attention.attention.{_table}", 1),)),),
    feed_forwards=(replace(BERT_FFN, scale="lambda_2"),),
    pre_norm_when={"use_shared_relative_position_bias": False},
)

#: Attention by the cosine, scaled and biased by head.
SWIN2 = replace(
    SWIN,
    model_types=("swinv2",),
    attentions=(
        bert_like(
            "attention.self",
            "query key value",
            output=Part("attention.output.dense"),
            by_head=(ByHead("attention.self.logit_scale"), ByHead("attention.self.continuous_position_bias_mlp.2.weight")),
        ),
    ),
    feed_forwards=(BERT_FFN,),
)

#: A convolution over the image stands between a neuron and its activation, so neurons stay.
SEGFORMER = replace(SWIN, model_types=("segformer",), layers=("stages.*.blocks",), attentions=VIT.attentions, feed_forwards=())

_conformer = tuple(
    FeedForwardSpec(
        up=Part(f"{name}.intermediate_dense"), down=Part(f"{name}.output_dense"), activation=f"{name}.intermediate_act_fn"
    )
    for name in ("ffn1", "ffn2")
)

#: Convolutions between attention and the feed-forward blocks stay as they are.
CONFORMER = replace(
    VIT,
    model_types=("wav2vec2-conformer",),
    layers=("encoder.layers",),
    attentions=(
        attention(
            "self_attn",
            "linear_q linear_k linear_v linear_out",
            head_size="head_size",
            sizes={"num_heads": "heads"},
            extra=(Part("self_attn.linear_pos"),),
            by_head=(ByHead("self_attn.pos_bias_u"), ByHead("self_attn.pos_bias_v")),
        ),
    ),
    feed_forwards=_conformer,
    pre_norm=False,
    widths=(NEURONS,),
    heads=OWN_HEADS,
)

WAV2VEC2 = ArchitectureSpec(
    model_types=("wav2vec2", "hubert", "unispeech", "unispeech-sat"),
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

#: Each head scales its positions by its own slice of the stream, so heads stay, and no layer is ever empty.
WAVLM = replace(WAV2VEC2, model_types=("wavlm",), attentions=(), pre_norm=False, heads=())

DATA2VEC_AUDIO = replace(WAV2VEC2, model_types=("data2vec-audio", "sew"), pre_norm=False)
