"""Families that have no record, and what about them is in the way: what was tried, or read in their code."""

from __future__ import annotations

#: `config.model_type` → what about the family is in the way.
REFUSED = {
    "codegen": "its projection packs the heads in four shards of equal size",
    "gpt_neox_japanese": "the bias of its output projection is a parameter of another module",
    "gpt_oss": "attention sinks take a part of the weights, so a head without values adds no constant",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "the keys and values of all heads come from one compressed vector"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "most of its layers have linear attention, which is no block of heads"
    ),
    **dict.fromkeys(("mamba", "mamba2", "rwkv", "xlstm"), "it has no attention and no feed-forward blocks"),
    "deberta": "the biases of its queries and values are parameters of their own; deberta-v2 has a record",
    **dict.fromkeys(("xlm", "flaubert"), "its blocks are in lists side by side, not in layers"),
    "xlnet": "its projections are parameters of three dimensions, not linear layers",
    "squeezebert": "its projections are grouped convolutions",
    "ibert": "its projections are quantised linear layers of its own",
    "convbert": "a convolution takes the place of half of the heads, and shares their queries",
    "nystromformer": "a convolution adds the values of neighbours to each head, outside of attention",
    **dict.fromkeys(("yoso", "mra"), "its attention weights do not sum to one, so a head without values adds no constant"),
    **dict.fromkeys(("longformer", "led"), "its heads have values of two kinds, local and global ones"),
    **dict.fromkeys(("big_bird", "bigbird_pegasus"), "it replaces its attention by modules of the stock size where rows are short"),
    "lilt": "a second stream of layouts shares the heads of the first",
    "wavlm": "each head scales its position bias by its own slice of the hidden states",
    "speecht5": "its models take inputs so different that none can be made up to compare them",
    **dict.fromkeys(
        ("moonshine", "moonshine_streaming"), "its encoder and decoder have different feed-forward blocks under the same name"
    ),
    "hiera": "its layers change the hidden size on the way",
    **dict.fromkeys(("siglip2", "siglip2_vision_model", "pixtral"), "it needs the sizes of its images with every batch"),
}
