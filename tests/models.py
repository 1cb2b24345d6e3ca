"""The tiny random models that the tests share: one table of families, one of task heads."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_prune.condense.layers import depths
from hf_prune.model import Block, Projection, find_blocks, spec_for
from hf_prune.model.families.refused import HEADS_STAY
from hf_prune.model.targets import weight_target


def _bert_like(**changes: int) -> dict[str, int]:
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
    }
    return {**sizes, **changes}


def _pixels() -> dict[str, Any]:
    return {"image_size": 12, "patch_size": 4, "encoder_stride": 4, "num_labels": 3, **_bert_like()}


def _special() -> dict[str, int]:
    """Special tokens within the vocabulary, for families whose own are beyond it."""
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def _bart_like(**changes: int) -> dict[str, int]:
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _SIDE.items()}
    special = {**_special(), "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    return {"vocab_size": 99, "d_model": 32, "max_position_embeddings": 40, **special, **sizes, **changes}


_SIDE = {"layers": 3, "attention_heads": 4, "ffn_dim": 40}


#: Attention to relative positions, as in the published DeBERTa.
_RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}

_SOUND = {
    "conv_dim": (16, 16),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "feat_extract_norm": "layer",
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "pad_token_id": 0,
}


def _t5_like() -> dict[str, int]:
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 3, "num_heads": 4}
    return sizes | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}


def _llama_like(**changes: int) -> dict[str, int]:
    """Eight query heads in four groups, of width 8 in a model of width 32."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    return _bert_like(**_special()) | heads | changes


#: Three layers of four heads of width 8 and 40 neurons; hidden sizes, and the names of the fields, differ by family.
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**_bert_like()),
    "roberta": lambda: transformers.RobertaConfig(**_bert_like(type_vocab_size=1)),
    "electra": lambda: transformers.ElectraConfig(**_bert_like(embedding_size=16)),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=40
    ),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**_bert_like(type_vocab_size=1)),
    "camembert": lambda: transformers.CamembertConfig(**_bert_like(type_vocab_size=1)),
    "albert": lambda: transformers.AlbertConfig(**_bert_like(embedding_size=16, num_hidden_groups=2)),
    "mpnet": lambda: transformers.MPNetConfig(**_bert_like()),
    "vit": lambda: transformers.ViTConfig(**_pixels()),
    "deit": lambda: transformers.DeiTConfig(**_pixels(), architectures=["DeiTForImageClassification"]),
    "modernbert": lambda: transformers.ModernBertConfig(
        **_bert_like(**_special(), local_attention=8, global_attn_every_n_layers=2)
    ),
    "deberta-v2": lambda: transformers.DebertaV2Config(**_bert_like(), **_RELATIVE),
    "deberta-v3": lambda: transformers.DebertaV2Config(**_bert_like(), **_RELATIVE, share_att_key=True, position_buckets=4),
    "whisper": lambda: transformers.WhisperConfig(
        **_bart_like(num_mel_bins=8, max_source_positions=10, max_target_positions=40),
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2Config(**_bert_like(), **_SOUND),
    "wav2vec2-stable": lambda: transformers.Wav2Vec2Config(**_bert_like(), **_SOUND, do_stable_layer_norm=True),
    "t5": lambda: transformers.T5Config(**_t5_like()),
    "t5-gated": lambda: transformers.T5Config(**_t5_like(), feed_forward_proj="gated-gelu"),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_inner=40, n_positions=40, vocab_size=99, **_special()
    ),
    "opt": lambda: transformers.OPTConfig(**_bert_like(**_special(), ffn_dim=40, word_embed_proj_dim=32)),
    "bart": lambda: transformers.BartConfig(**_bart_like()),
    "llama": lambda: transformers.LlamaConfig(**_llama_like()),
    "llama-with-biases": lambda: transformers.LlamaConfig(**_llama_like(attention_bias=True, mlp_bias=True)),
    "mistral": lambda: transformers.MistralConfig(**_llama_like(sliding_window=6)),
    "qwen2": lambda: transformers.Qwen2Config(**_llama_like()),
    "qwen3": lambda: transformers.Qwen3Config(**_llama_like()),
    "gemma": lambda: transformers.GemmaConfig(**_llama_like(num_key_value_heads=1)),
}


def _grouped(**changes: Any) -> dict[str, Any]:
    """Four query heads in two groups; the width of a head follows from the hidden size."""
    return _bert_like(**_special()) | {"num_key_value_heads": 2} | changes


_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def _falcon(**changes: Any) -> transformers.FalconConfig:
    return transformers.FalconConfig(**_bert_like(**_special()) | {"ffn_hidden_size": 40, "bias": True} | changes)


def _mixture(**changes: Any) -> dict[str, Any]:
    """Three layers of eight experts of width 16, of which two serve each token."""
    return {**_llama_like(num_attention_heads=4, intermediate_size=16), "num_experts_per_tok": 2, **changes}


#: The width of experts, in families whose layers without experts have another one.
_NARROW = {"moe_intermediate_size": 16}

#: Keys and values of all heads from one vector.
_COMPRESSED = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

#: Language models with experts. In the groups of DeepSeek's router only the better one is open to a token.
MIXTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmoe": lambda: transformers.OlmoeConfig(**_mixture(num_experts=8)),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **_mixture(num_experts=8, **_NARROW, norm_topk_prob=True, mlp_only_layers=[1])
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_mixture(num_local_experts=8)),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(**_mixture(num_experts=8, **_NARROW, shared_expert_intermediate_size=16)),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **_mixture(n_routed_experts=8, **_NARROW, n_group=2, topk_group=1, first_k_dense_replace=1, head_dim=None),
        **_COMPRESSED,
    ),
    "glm4-moe": lambda: transformers.Glm4MoeConfig(**_mixture(n_routed_experts=8, **_NARROW, first_k_dense_replace=1)),
    "ernie4.5-moe": lambda: transformers.Ernie4_5_MoeConfig(
        **_mixture(moe_num_experts=8, **_NARROW, moe_k=2, moe_layer_start_index=1)
    ),
    "gpt-oss": lambda: transformers.GptOssConfig(**_mixture(num_local_experts=8)),
    "granite-moe": lambda: transformers.GraniteMoeConfig(**_mixture(num_local_experts=8)),
    "phi-moe": lambda: transformers.PhimoeConfig(**_mixture(num_local_experts=8)),
    "minimax": lambda: transformers.MiniMaxConfig(**_mixture(num_local_experts=8)),
}


#: The other families and variants. They run in the same tests, which are slow for them, see `conftest.py`.
MORE_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "phi3": lambda: transformers.Phi3Config(**_grouped()),
    "phi": lambda: transformers.PhiConfig(**_grouped(partial_rotary_factor=0.5)),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_bert_like(**_special())),
    "gpt_neox-serial": lambda: transformers.GPTNeoXConfig(**_bert_like(**_special()), use_parallel_residual=False),
    "falcon": lambda: _falcon(),
    "falcon-multihead": lambda: _falcon(multi_query=False),
    "falcon-grouped": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=32, n_layer=3, n_head=4, n_inner=40, n_positions=40, rotary_dim=4, vocab_size=99, **_special()
    ),
    "granite": lambda: transformers.GraniteConfig(**_grouped(residual_multiplier=0.7, attention_multiplier=0.3)),
    "cohere": lambda: transformers.CohereConfig(**_grouped()),
    "smollm3": lambda: transformers.SmolLM3Config(**_grouped(no_rope_layer_interval=2)),
    "starcoder2": lambda: transformers.Starcoder2Config(**_grouped()),
    "helium": lambda: transformers.HeliumConfig(**_grouped(head_dim=8)),
    "glm": lambda: transformers.GlmConfig(**_llama_like()),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(
        n_embd=32, n_layer=3, n_head=4, n_inner=40, n_positions=40, vocab_size=99, **_special()
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_bert_like(**_special()) | {"num_layers": 3, "num_heads": 4},
        attention_types=[[["global", "local", "global"], 1]],
        window_size=4,
    ),
    "cohere2": lambda: transformers.Cohere2Config(**_grouped(sliding_window=6, layer_types=_ALTERNATING)),
    "gemma2": lambda: transformers.Gemma2Config(**_llama_like(sliding_window=6, layer_types=_ALTERNATING)),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**_llama_like(sliding_window=6, layer_types=_ALTERNATING)),
    "exaone4": lambda: transformers.Exaone4Config(**_grouped(sliding_window=6, layer_types=_ALTERNATING)),
    "glm4": lambda: transformers.Glm4Config(**_llama_like(attention_bias=False)),
    "olmo2": lambda: transformers.Olmo2Config(**_bert_like(**_special())),
    "olmo2-grouped": lambda: transformers.Olmo2Config(**_grouped()),
    "olmo3": lambda: transformers.Olmo3Config(**_bert_like(**_special()), sliding_window=6, layer_types=_ALTERNATING),
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=99, **_special()),
    "ernie4_5": lambda: transformers.Ernie4_5Config(**_llama_like()),
    "seed_oss": lambda: transformers.SeedOssConfig(**_llama_like()),
    "dinov2": lambda: transformers.Dinov2Config(**_pixels(), mlp_ratio=2, layerscale_value=0.5),
    "dinov2_with_registers": lambda: transformers.Dinov2WithRegistersConfig(**_pixels(), mlp_ratio=2),
    "dinov3_vit": lambda: transformers.DINOv3ViTConfig(**_pixels(), num_register_tokens=2),
    "beit": lambda: transformers.BeitConfig(**_pixels(), use_relative_position_bias=True, drop_path_rate=0.0),
    "swin": lambda: transformers.SwinConfig(
        image_size=12, patch_size=2, embed_dim=32, depths=[1, 2], num_heads=[4, 8], window_size=3, mlp_ratio=1.25
    ),
    "vivit": lambda: transformers.VivitConfig(**_pixels() | {"num_frames": 4, "tubelet_size": [2, 4, 4]}),
    "audio-spectrogram-transformer": lambda: transformers.ASTConfig(
        **_bert_like(), patch_size=4, max_length=12, num_mel_bins=8, frequency_stride=4, time_stride=4
    ),
    "clip_text_model": lambda: transformers.CLIPTextConfig(**_bert_like(**_special())),
    "clip_vision_model": lambda: transformers.CLIPVisionConfig(**_pixels()),
    "clip": lambda: transformers.CLIPConfig(text_config=_bert_like(**_special()), vision_config=_pixels(), projection_dim=16),
    "siglip": lambda: transformers.SiglipConfig(text_config=_bert_like(**_special(), projection_size=32), vision_config=_pixels()),
    "siglip_vision_model": lambda: transformers.SiglipVisionConfig(**_pixels()),
    "ernie": lambda: transformers.ErnieConfig(**_bert_like()),
    "data2vec-text": lambda: transformers.Data2VecTextConfig(**_bert_like(type_vocab_size=1)),
    "layoutlm": lambda: transformers.LayoutLMConfig(**_bert_like()),
    "bert-generation": lambda: transformers.BertGenerationConfig(**_bert_like(**_special())),
    "rembert": lambda: transformers.RemBertConfig(**_bert_like(), input_embedding_size=16, output_embedding_size=24),
    "roformer": lambda: transformers.RoFormerConfig(**_bert_like(), embedding_size=16),
    "megatron-bert": lambda: transformers.MegatronBertConfig(**_bert_like()),
    "xlm-roberta-xl": lambda: transformers.XLMRobertaXLConfig(**_bert_like(type_vocab_size=1)),
    "roberta-prelayernorm": lambda: transformers.RobertaPreLayerNormConfig(**_bert_like(type_vocab_size=1)),
    "mobilebert": lambda: transformers.MobileBertConfig(**_bert_like(), embedding_size=32, intra_bottleneck_size=32),
    "luke": lambda: transformers.LukeConfig(**_bert_like(type_vocab_size=1), entity_vocab_size=9, entity_emb_size=16),
    "nomic_bert": lambda: transformers.NomicBertConfig(**_bert_like(head_dim=8)),
    "jina_embeddings_v3": lambda: transformers.JinaEmbeddingsV3Config(**_bert_like(type_vocab_size=1)),
    "eurobert": lambda: transformers.EuroBertConfig(**_llama_like()),
    "biogpt": lambda: transformers.BioGptConfig(**_bert_like(**_special())),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=99, d_model=32, ffn_dim=40, num_layers=3, attention_heads=4, max_position_embeddings=40, **_special()
    ),
    "nemotron": lambda: transformers.NemotronConfig(**_grouped(head_dim=8)),
    "arcee": lambda: transformers.ArceeConfig(**_llama_like()),
    "nanochat": lambda: transformers.NanoChatConfig(**_grouped()),
    "persimmon": lambda: transformers.PersimmonConfig(**_bert_like(**_special())),
    "mbart": lambda: transformers.MBartConfig(**_bart_like()),
    "m2m_100": lambda: transformers.M2M100Config(**_bart_like()),
    "marian": lambda: transformers.MarianConfig(**_bart_like()),
    "pegasus": lambda: transformers.PegasusConfig(**_bart_like()),
    "blenderbot": lambda: transformers.BlenderbotConfig(**_bart_like()),
    "blenderbot-small": lambda: transformers.BlenderbotSmallConfig(**_bart_like()),
    "plbart": lambda: transformers.PLBartConfig(**_bart_like()),
    "speech_to_text": lambda: transformers.Speech2TextConfig(
        **_bart_like(
            input_feat_per_channel=8,
            max_source_positions=40,
            max_target_positions=40,
            conv_channels=16,
            num_conv_layers=1,
            conv_kernel_sizes=[3],
        )
    ),
    "mt5": lambda: transformers.MT5Config(**_t5_like()),
    "umt5": lambda: transformers.UMT5Config(**_t5_like()),
    "mixtral": lambda: transformers.MixtralConfig(**_grouped(num_local_experts=4)),
    "olmoe": lambda: transformers.OlmoeConfig(**_bert_like(**_special()), num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_llama_like(), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**_grouped(num_local_experts=4)),
    "granitemoe": lambda: transformers.GraniteMoeConfig(**_grouped(num_local_experts=4)),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **_llama_like(), moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=0
    ),
    "mpt": lambda: transformers.MptConfig(
        d_model=32, n_heads=4, n_layers=3, expansion_ratio=2, max_seq_len=40, vocab_size=99, **_special()
    ),
    "modernbert-decoder": lambda: transformers.ModernBertDecoderConfig(
        **_bert_like(**_special(), local_attention=8, global_attn_every_n_layers=2)
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_grouped(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "esm": lambda: transformers.EsmConfig(**_bert_like(), position_embedding_type="rotary", mask_token_id=3, pad_token_id=0),
    "layoutlmv3": lambda: transformers.LayoutLMv3Config(
        **_bert_like(),
        coordinate_size=4,
        shape_size=8,
        rel_pos_bins=8,
        rel_2d_pos_bins=8,
        max_2d_position_embeddings=64,
        visual_embed=False,
    ),
    "videomae": lambda: transformers.VideoMAEConfig(**_pixels() | {"num_frames": 4}),
    "yolos": lambda: transformers.YolosConfig(**_pixels() | {"image_size": [12, 12], "num_detection_tokens": 4}),
    "data2vec-vision": lambda: transformers.Data2VecVisionConfig(**_pixels(), use_relative_position_bias=True, drop_path_rate=0.0),
    "swinv2": lambda: transformers.Swinv2Config(
        image_size=12, patch_size=2, embed_dim=32, depths=[1, 2], num_heads=[4, 8], window_size=3, mlp_ratio=1.25
    ),
    "segformer": lambda: transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[4, 1],
        hidden_sizes=[32, 64],
        num_attention_heads=[4, 8],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    "vit_mae": lambda: transformers.ViTMAEConfig(
        **_pixels(),
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    ),
    "metaclip_2": lambda: transformers.MetaClip2Config(
        text_config=_bert_like(**_special()), vision_config=_pixels(), projection_dim=16
    ),
    "sew": lambda: transformers.SEWConfig(**_bert_like(), **_SOUND, squeeze_factor=1),
    "wav2vec2-conformer": lambda: transformers.Wav2Vec2ConformerConfig(**_bert_like(), **_SOUND, conv_depthwise_kernel_size=3),
    "vit_msn": lambda: transformers.ViTMSNConfig(**_pixels()),
    "ijepa": lambda: transformers.IJepaConfig(**_pixels()),
    "hubert": lambda: transformers.HubertConfig(**_bert_like(), **_SOUND),
    "unispeech": lambda: transformers.UniSpeechConfig(**_bert_like(), **_SOUND),
    "unispeech-sat": lambda: transformers.UniSpeechSatConfig(**_bert_like(), **_SOUND),
    "data2vec-audio": lambda: transformers.Data2VecAudioConfig(
        **_bert_like(), **_SOUND | {"num_conv_pos_embeddings": 1}, conv_pos_kernel_size=3
    ),
    "stablelm": lambda: transformers.StableLmConfig(**_grouped(use_qkv_bias=True)),
    "longformer": lambda: transformers.LongformerConfig(**_bert_like(**_special()), attention_window=4),
    "nystromformer": lambda: transformers.NystromformerConfig(**_bert_like(**_special()), num_landmarks=4, segment_means_seq_len=4),
    "yoso": lambda: transformers.YosoConfig(**_bert_like(**_special()), use_expectation=True),
    "convbert": lambda: transformers.ConvBertConfig(**_bert_like(**_special()), embedding_size=16),
    "deberta": lambda: transformers.DebertaConfig(**_bert_like(), **_RELATIVE),
    "lilt": lambda: transformers.LiltConfig(**_bert_like(**_special(), hidden_size=24), channel_shrink_ratio=2),
    "xlm": lambda: transformers.XLMConfig(
        vocab_size=99, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=40, **_special()
    ),
    "flaubert": lambda: transformers.FlaubertConfig(
        vocab_size=99, emb_dim=32, n_layers=3, n_heads=4, max_position_embeddings=40, **_special()
    ),
    "wavlm": lambda: transformers.WavLMConfig(**_bert_like(), **_SOUND),
    "led": lambda: transformers.LEDConfig(
        **_bart_like(attention_window=4, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40)
    ),
    "gpt_neox_japanese": lambda: transformers.GPTNeoXJapaneseConfig(**_bert_like(**_special()), intermediate_multiple_size=2),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**_mixture(n_routed_experts=8, **_NARROW, first_k_dense_replace=1)),
    "dots1": lambda: transformers.Dots1Config(
        **_mixture(n_routed_experts=8, n_shared_experts=1, **_NARROW, first_k_dense_replace=1)
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **_mixture(n_routed_experts=8, n_shared_experts=1, **_NARROW, first_k_dense_replace=1, head_dim=None, **_COMPRESSED)
    ),
    "deepseek_v3": MIXTURES["deepseek-v3"],
    "olmo": lambda: transformers.OlmoConfig(**_grouped()),
    "ministral": lambda: transformers.MinistralConfig(**_llama_like(sliding_window=6, layer_types=_ALTERNATING)),
    "cwm": lambda: transformers.CwmConfig(**_llama_like(sliding_window=6, layer_types=_ALTERNATING)),
    "tapas": lambda: transformers.TapasConfig(**_bert_like(), type_vocab_sizes=[3] * 7),
    "xmod": lambda: transformers.XmodConfig(**_bert_like(type_vocab_size=1), default_language="en_XX"),
    "visual_bert": lambda: transformers.VisualBertConfig(**_bert_like(), visual_embedding_dim=16),
}


def _there(make: Callable[[], PreTrainedConfig]) -> bool:
    """Whether the installed version of transformers has a family."""
    try:
        make()
    except AttributeError:
        return False
    return True


MORE_FAMILIES = {family: make for family, make in MORE_FAMILIES.items() if _there(make)}

#: Of the first, those that are another one but for their name, or for what is no matter here (a window, a tokenizer, a head).
TWINS = frozenset({"xlm-roberta", "camembert", "deit", "mistral", "qwen2"})

#: Those whose feed-forward blocks are no neurons of hf_prune's: experts.
ATTENTION_ALONE = ("esm", "segformer", "mixtral", "olmoe", "phimoe", "granitemoe")

#: Those of whose attention hf_prune knows no heads.
NEURONS_ALONE = tuple(HEADS_STAY)

#: One for each thing that a record can say and none of the first families needs.
REPRESENTATIVES = ("phi3", "falcon-grouped", "olmo2", "bloom", "gemma2", "dinov2", "swin", "clip")

#: All of them.
EVERY_FAMILY = FAMILIES | MORE_FAMILIES

#: Task head → Auto class.
HEADS: dict[str, type] = {
    "bare": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
    "causal-lm": transformers.AutoModelForCausalLM,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "audio-classification": transformers.AutoModelForAudioClassification,
    "speech-seq2seq": transformers.AutoModelForSpeechSeq2Seq,
    "ctc": transformers.AutoModelForCTC,
    "image-classification": transformers.AutoModelForImageClassification,
    "masked-image-modeling": transformers.AutoModelForMaskedImageModeling,
}


def heads_of(family: str) -> list[str]:
    """The task heads, of those in `HEADS`, that a family has."""
    config = type(EVERY_FAMILY[family]())
    return [head for head, auto in HEADS.items() if config in auto._model_mapping]


def classifier_of(family: str) -> str:
    """The task head that classifies what the family reads, or that it has instead."""
    kinds = (
        "sequence-classification",
        "image-classification",
        "audio-classification",
        "seq2seq-lm",
        "speech-seq2seq",
        *list(HEADS)[1:],
        "bare",
    )
    return next(head for head in kinds if head in heads_of(family))


#: Families that are encoders first, though they have a head that generates.
_ENCODERS = (
    "ernie",
    "data2vec-text",
    "rembert",
    "roformer",
    "megatron-bert",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "bert-generation",
    "xlm",
    "xmod",
)

#: The families that generate, each with the head that does.
GENERATORS: dict[str, str] = {
    "gpt2": "causal-lm",
    "opt": "causal-lm",
    "bart": "seq2seq-lm",
    "t5": "seq2seq-lm",
    "t5-gated": "seq2seq-lm",
    "whisper": "speech-seq2seq",
    "llama": "causal-lm",
    "mistral": "causal-lm",
    "qwen2": "causal-lm",
    "qwen3": "causal-lm",
    "gemma": "causal-lm",
    **{
        family: head
        for family in MORE_FAMILIES
        if (head := next((head for head in ("seq2seq-lm", "causal-lm") if head in heads_of(family)), None))
        and MORE_FAMILIES[family]().model_type not in _ENCODERS
    },
}


class _Of:
    """A model in as far as [`depths`] looks at it."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config


#: The families whose layers only add to what they are given, with the path of each list of layers.
PRE_NORM = {
    **dict.fromkeys(("vit", "deit", "modernbert", "llama", "llama-with-biases", "mistral", "qwen2", "qwen3", "gemma"), ("layers",)),
    **dict.fromkeys(("t5", "t5-gated"), ("encoder.block", "decoder.block")),
    "whisper": ("encoder.layers", "decoder.layers"),
    "wav2vec2-stable": ("encoder.layers",),
    "gpt2": ("h",),
    "opt": ("decoder.layers",),
    **{
        family: paths
        for family, config in MORE_FAMILIES.items()
        if (paths := tuple(depths(_Of(made := config()), spec_for(made.model_type))))
    },
}


#: Each of the first families with every task head that it has.
MATRIX: list[tuple[str, str]] = [(family, head) for family in FAMILIES for head in heads_of(family)]


def tiny(family: str = "bert", head: str | None = None, seed: int = 0, **config: object) -> PreTrainedModel:
    """A tiny model with random weights, in evaluation mode.

    Args:
        family: a name in `FAMILIES`.
        head: a name in `HEADS`; default the one that classifies what the family reads.
        seed: of the weights.
        config: changes to the family's config.
    """
    torch.manual_seed(seed)
    settings = EVERY_FAMILY[family]()
    settings.update(config)
    return randomize(HEADS[head or classifier_of(family)].from_config(settings)).eval()


@contextmanager
def disguised(family: str) -> Iterator[PreTrainedModel]:
    """A tiny model of a family under names that nobody knows: of the config and its `model_type`, the model, and its modules.

    The classes of transformers have these names as long as the context lasts. Those without a linear module keep theirs, by which
    transformers itself knows how to initialize some (rotary embeddings).
    """
    model = tiny(family, GENERATORS.get(family, "bare"))
    random = Random(family)

    def name() -> str:
        return "".join(random.choices(string.ascii_lowercase, k=12)).title()

    config: Any = type(name(), (type(model.config),), {"model_type": name().lower()})
    stranger: Any = type(name(), (type(model),), {"config_class": config})
    named = [module for module in model.modules() if "transformers.models" in type(module).__module__]
    linear = [module for module in named if any(isinstance(inner, (nn.Linear, Conv1D)) for inner in module.modules())]
    kinds = sorted({type(module) for module in linear}, key=str)
    before = {kind: kind.__name__ for kind in kinds}
    try:
        for kind in kinds:
            kind.__name__ = name()
        made = stranger(config.from_dict(model.config.to_dict() | {"model_type": config.model_type}))
        made.load_state_dict(model.state_dict())
        yield made.eval()
    finally:
        for kind, known in before.items():
            kind.__name__ = known


@torch.no_grad()
def randomize(model: PreTrainedModel) -> PreTrainedModel:
    """Give every bias and every norm random non-zero values, and weights a size at which every unit matters."""
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if "Norm" in type(module).__name__ and weight is not None:
            nn.init.normal_(weight, 1.0, 0.2)
        elif isinstance(module, (nn.Linear, Conv1D)):
            nn.init.normal_(weight, std=(module.in_features if isinstance(module, nn.Linear) else module.nx) ** -0.5)
            if name.endswith("Attention.q"):
                weight.mul_(model.config.d_kv**-0.5)  # T5 does not scale its attention scores, its queries are smaller instead
        else:
            continue
        if bias is not None:
            nn.init.normal_(bias, std=0.2)
    return model


def ragged_batch(model: PreTrainedModel, rows: int = 4, tokens: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """A right-padded batch of random tokens, each row shorter than the one before; for models that see, random images."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    vision, text = (getattr(config, f"{kind}_config", config) for kind in ("vision", "text"))
    images = {}
    if model.main_input_name == "pixel_values" or vision is not config:
        size = getattr(vision, "image_size", 64)
        shape = (
            *((vision.num_frames,) if hasattr(vision, "num_frames") else ()),
            3,
            *(size if isinstance(size, list) else [size] * 2),
        )
        images = {"pixel_values": torch.randn(rows, *shape, generator=generator)}
    if model.main_input_name == "pixel_values" and "noise" in inspect.signature(model.forward).parameters:
        return images | {"noise": torch.rand(rows, (vision.image_size // vision.patch_size) ** 2, generator=generator)}
    if model.main_input_name == "pixel_values":
        return images
    if model.main_input_name == "input_values" and hasattr(config, "num_mel_bins"):
        return {"input_values": torch.randn(rows, config.max_length, config.num_mel_bins, generator=generator)}
    if model.main_input_name == "input_values":
        mask = (torch.arange(320) < torch.linspace(320, 100, rows)[:, None]).long()
        return {"input_values": torch.randn(rows, 320, generator=generator), "attention_mask": mask}
    mask = (torch.arange(tokens) < torch.linspace(tokens, 2, rows).long()[:, None]).long()
    ids = torch.randint(5, text.vocab_size, (rows, tokens), generator=generator)
    batch = {"input_ids": torch.where(mask.bool(), ids, text.pad_token_id or 0), "attention_mask": mask} | images
    accepted = inspect.signature(model.forward).parameters
    if model.main_input_name == "input_features":
        channels = getattr(config, "input_feat_per_channel", 0)
        shape = (20, channels) if channels else (config.num_mel_bins, 2 * config.max_source_positions)
        features = torch.randn(rows, *shape, generator=generator)
        return {"input_features": features} | ({"decoder_input_ids": ids} if "decoder_input_ids" in accepted else {})
    if getattr(config, "type_vocab_size", 0) > 1 and "token_type_ids" in accepted:
        batch["token_type_ids"] = torch.randint(config.type_vocab_size, (rows, tokens), generator=generator)
    if "global_attention_mask" in accepted:  # else Longformer looks for the ends of questions
        batch["global_attention_mask"] = (torch.arange(tokens) == 0).long().repeat(rows, 1)
    if config.is_encoder_decoder:
        batch["input_ids"][torch.arange(rows), mask.sum(1) - 1] = config.eos_token_id  # BART classifies by it
    if "decoder_input_ids" in accepted:
        batch["decoder_input_ids"] = batch["input_ids"]
    if "MultipleChoice" in type(model).__name__:
        batch = {name: value[None] for name, value in batch.items()}
    return batch


def attentions_of(model: PreTrainedModel) -> list[str]:
    """The attention implementations that a model is compared in."""
    return ["eager", "sdpa"] if model._supports_sdpa else ["eager"]


@torch.no_grad()
def zero_units(block: Block, units: list[int], how: str) -> None:
    """Zero some heads or neurons of a block. `how`: `"in"` (value or up rows), `"out"` (output or down columns), `"query"`."""
    features = block.features(torch.tensor(units, dtype=torch.long))
    parts: tuple[Projection, ...] = (block.output,)
    if how != "out":
        parts = (
            (block.roles["query"],)
            if how == "query"
            else tuple(block.roles[name] for name in ("value", "up", "gate") if name in block.roles)
        )
    if how != "query" and any(entry.forward for _, _, entry in block.by_head):  # a norm over all heads sees these
        chosen, shared = torch.zeros(block.num_units, dtype=torch.bool), block.units_per_group
        for unit in units:
            chosen[unit * shared : (unit + 1) * shared] |= how == "in"
            chosen[unit] |= how == "out"
        whole = chosen.view(-1, shared).all(1).nonzero().flatten()
        for role, some in (("query", chosen.nonzero().flatten()), ("key", whole)):
            block.roles[role].layer.weight[block.roles[role].rows[block.features(some)]] = 0
    for part in parts:  # a gated neuron is constant only if both factors are
        target = weight_target("", part.module)
        matrix = target.matrix(target.parameter)
        if how == "out":
            matrix[:, features] = 0
        else:
            matrix[part.rows[features]] = 0


def prune_randomly(model: PreTrainedModel, seed: int = 0) -> dict[str, int]:
    """Zero random units of each block, each by its rows or its columns; the first attention and the second FFN block lose all.

    Returns how many units each block has left, by the block's name, where all of those can go.
    """
    generator = torch.Generator().manual_seed(seed)
    left = {}
    for number, block in enumerate(find_blocks(model)):
        count = block.num_units
        shared = block.units_per_group
        dead = torch.rand(count, generator=generator) < (1.0 if number in (0, 3) else 0.5)
        by_rows = torch.rand(count, generator=generator) < 0.5
        if shared > 1:  # rows that heads share go only with all of them
            silent = dead.view(-1, shared).all(1) & by_rows[::shared]
            zero_units(block, silent.nonzero().flatten().tolist(), "in")
            zero_units(block, (dead & ~silent.repeat_interleave(shared)).nonzero().flatten().tolist(), "out")
            copies = not any(entry.forward for _, _, entry in block.by_head)
            left[block.name] = heads_left(dead.view(-1, shared).tolist(), copies)
            continue
        zero_units(block, (dead & by_rows).nonzero().flatten().tolist(), "in")
        zero_units(block, (dead & ~by_rows).nonzero().flatten().tolist(), "out")
        left[block.name] = count - int(dead.sum())
    return left


#: The families whose config can say how many heads there are without changing their width.
SET_HEADS = ("vit", "deit", "llama", "llama-with-biases", "mistral", "qwen2", "qwen3", "gemma", "t5", "t5-gated")


def prune_evenly(model: PreTrainedModel, heads: bool) -> None:
    """Zero a quarter of the neurons of every block and, if asked, half of the heads."""
    for block in find_blocks(model):
        if block.kind == "feed_forward":
            zero_units(block, list(range(block.num_units // 4)), "out")
        elif heads:
            zero_units(block, list(range(block.num_units // 2)), "out")


def empty_layers(model: PreTrainedModel, indices: set[int], silent: bool = False) -> dict[str, list[int]]:
    """Zero all heads and neurons of these layers of each list, and if `silent` all that they add; return the indices by list."""
    emptied: dict[str, set[int]] = {}
    for block in find_blocks(model):
        path, _, index = block.layer.rpartition(".")
        if int(index) in indices:
            count = block.num_units if silent else block.num_groups
            zero_units(block, list(range(count)), "out" if silent else "in")
            emptied.setdefault(path, set()).add(int(index))
            if silent and (bias := block.output.module.bias) is not None:
                nn.init.zeros_(bias)
    return {path: sorted(found) for path, found in emptied.items()}


def heads_left(groups: list[list[bool]], copies: bool = True) -> int:
    """How many query heads have to stay when these are dead, group by group: as many in each living group, or all on their own, if
    there may be copies of their keys."""
    alive = [group.count(False) for group in groups]
    living = [size for size in alive if size]
    together, alone = len(living) * max(living, default=0), sum(alive)
    return alone if copies and alone <= len(groups) and 2 * alone < together + len(living) else together


@torch.no_grad()
def tiny_mixture(name: str, **config: object) -> PreTrainedModel:
    """A tiny causal language model of `MIXTURES`, all of whose parameters and buffers of experts are random."""
    torch.manual_seed(0)
    settings = MIXTURES[name]()
    settings.update(config)
    model = HEADS["causal-lm"].from_config(settings).eval()
    randomize(model)
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "expert" in key or ".gate." in key or "router" in key or "e_score" in key:
            nn.init.normal_(tensor, std=0.3)
    return model
