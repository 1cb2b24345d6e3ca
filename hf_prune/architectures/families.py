"""The families hf_prune knows, one `ArchitectureSpec` each."""

from __future__ import annotations

from .spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part

_BERT_SIZES = {"num_attention_heads": "heads", "all_head_size": "width"}


def _bert_attention(name: str) -> AttentionSpec:
    return AttentionSpec(
        module=f"{name}.self",
        query=Part(f"{name}.self.query"),
        key=Part(f"{name}.self.key"),
        value=Part(f"{name}.self.value"),
        output=Part(f"{name}.output.dense"),
        sizes=_BERT_SIZES,
    )


BERT = ArchitectureSpec(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers=("encoder.layer",),
    attentions=(_bert_attention("attention"), _bert_attention("crossattention")),
    feed_forwards=(
        FeedForwardSpec(up=Part("intermediate.dense"), down=Part("output.dense"), activation="intermediate.intermediate_act_fn"),
    ),
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
            heads="n_heads",
            sizes={"n_heads": "heads", "dim": "width"},
        ),
    ),
    feed_forwards=(FeedForwardSpec(up=Part("ffn.lin1"), down=Part("ffn.lin2"), activation="ffn.activation"),),
)

#: `config.model_type` → spec.
SPECS: dict[str, ArchitectureSpec] = {}


def register_architecture(spec: ArchitectureSpec) -> None:
    """Make a family known under each of its `model_types`; a later registration replaces an earlier one."""
    for model_type in spec.model_types:
        SPECS[model_type] = spec


def spec_for(model_type: str) -> ArchitectureSpec:
    """The spec of a family.

    Raises:
        ValueError: the family has none; says how to write one.
    """
    if model_type not in SPECS:
        raise ValueError(
            f"model_type={model_type!r} has no architecture spec; known are {', '.join(sorted(SPECS))}. "
            "Describe where its projections live in an `hf_prune.architectures.ArchitectureSpec` and pass it to "
            "`hf_prune.architectures.register_architecture`."
        )
    return SPECS[model_type]


for _spec in (BERT, DISTILBERT):
    register_architecture(_spec)
