"""Where the prunable parts of each model family are: data, not code.

An [`ArchitectureSpec`] names, relative to a transformer layer, the projections of its attention and feed-forward blocks, and the
module attributes that hold sizes. Everything that deals with heads and neurons (patterns, condensing, reloading) reads these specs
and knows nothing else about a family. `find_blocks(model)` returns the modules of a model as [`Block`]s, which know their units:
how many there are, which rows and columns belong to them, and how the config names their number.

Where there is no record, `hf_prune.infer_architecture` finds and proves one. To add a family, write one `ArchitectureSpec` and pass
it to `register_architecture`, in every process that condenses or loads:

    register_architecture(
        ArchitectureSpec(
            model_types=("mine",),  # config.model_type
            layers=("encoder.layers",),  # below model.base_model
            attentions=(
                AttentionSpec(
                    module="attention",  # below a layer; has head_dim, the width of a head
                    query=Part("attention.q"),
                    key=Part("attention.k"),
                    value=Part("attention.v"),
                    output=Part("attention.o"),
                    sizes={"num_heads": "heads"},  # what attention.forward reads besides the shapes of its weights
                ),
            ),
            feed_forwards=(FeedForwardSpec(up=Part("up"), down=Part("down"), activation="act"),),
        )
    )

It is an error if a spec names what the model does not have. `condense` reveals whether the spec is complete: it compares outputs,
and restores the model if they differ.

A condensed model of a family in transformers also loads with `trust_remote_code=True`, since its spec is written into the modelling
file of the checkpoint. One with custom classes loads with these classes after `import hf_prune` and `register_architecture`; no
modelling file is written for it, because that file could not contain the classes.
"""

from .blocks import Block, Projection, blocks
from .families import SPECS, register_architecture, spec_for
from .resolve import find_blocks
from .spec import ArchitectureSpec, AttentionSpec, ByHead, FeedForwardSpec, Part
from .spelled import as_source

__all__ = [
    "SPECS",
    "ArchitectureSpec",
    "AttentionSpec",
    "Block",
    "ByHead",
    "FeedForwardSpec",
    "Part",
    "Projection",
    "as_source",
    "blocks",
    "find_blocks",
    "register_architecture",
    "spec_for",
]
