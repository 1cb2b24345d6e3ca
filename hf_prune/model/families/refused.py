"""What was tried and is in the way: of whole families, which have no record, and of the heads of some that have one for neurons."""

from __future__ import annotations

#: `config.model_type` → what about the family is in the way.
REFUSED = {
    "codegen": "its projection packs the heads in four shards of equal size",
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), "most of its layers have linear attention, which is no block of heads"
    ),
    "xlnet": "its layers take tokens first and rows second, and its projections are parameters of three dimensions",
    "mra": "its attention computes in float32 whatever the model's type is",
    "markuplm": "its embeddings of paths have widths of their own, which a smaller hidden size does not fit",
    **dict.fromkeys(
        ("moonshine", "moonshine_streaming"), "its encoder and decoder have different feed-forward blocks under the same name"
    ),
    "gpt_oss": "attention sinks take a part of the weights, so a head without values adds no constant",
    **dict.fromkeys(("mamba", "mamba2", "rwkv"), "it has no attention, and no neurons that single linear modules make"),
    **dict.fromkeys(("big_bird", "bigbird_pegasus"), "it replaces its attention by other modules where rows are short"),
    "xlstm": "its own code fails on the short rows by which a record is tried",
    "squeezebert": "its projections are grouped convolutions",
    "ibert": "its projections are quantised linear layers of its own",
    "speecht5": "its models take inputs so different that none can be made up to compare them; speech to text alone is inferred",
    "hiera": "its layers change the hidden size on the way",
    **dict.fromkeys(("siglip2", "siglip2_vision_model", "pixtral"), "it needs the sizes of its images with every batch"),
}

#: `config.model_type` → why the family's heads stay, where neurons go.
HEADS_STAY = {
    "gpt_neox_japanese": "the bias of its output projection is a parameter of another module",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), "the keys and values of all heads come from one compressed vector"),
    "deberta": "the biases of its queries and values are parameters of their own; heads of deberta-v2 go",
    **dict.fromkeys(("xlm", "flaubert"), "its blocks are in lists side by side, and a layer has one list's"),
    "convbert": "a convolution takes the place of half of the heads, and shares their queries",
    "nystromformer": "a convolution adds the values of neighbours to each head, outside of attention",
    "yoso": "its attention weights do not sum to one, so a head without values adds no constant",
    **dict.fromkeys(("longformer", "led"), "its heads have values of two kinds, local and global ones"),
    "lilt": "a second stream of layouts shares the heads of the first",
    "wavlm": "each head scales its position bias by its own slice of the hidden states",
}
