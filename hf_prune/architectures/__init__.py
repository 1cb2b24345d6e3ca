"""Where the prunable parts of each model family live: data, not code.

An [`ArchitectureSpec`] names, relative to a transformer layer, the projections of its attention and feed-forward blocks, and the
attributes a module keeps about its own size. Everything that knows about heads and neurons (patterns, condensing, reloading)
reads these specs and has no other knowledge of a family. `blocks(model)` finds the real modules in a model.

To add a family, write one `ArchitectureSpec` and pass it to `register_architecture`.
"""

from .blocks import AttentionBlock, Block, FeedForwardBlock, Projection, blocks, find_blocks
from .families import SPECS, register_architecture, spec_for
from .spec import ArchitectureSpec, AttentionSpec, FeedForwardSpec, Part

__all__ = [
    "SPECS",
    "ArchitectureSpec",
    "AttentionBlock",
    "AttentionSpec",
    "Block",
    "FeedForwardBlock",
    "FeedForwardSpec",
    "Part",
    "Projection",
    "blocks",
    "find_blocks",
    "register_architecture",
    "spec_for",
]
