"""The families that hf_prune supports: every `ArchitectureSpec` in the modules here, one per family."""

from __future__ import annotations

from ..spec import ArchitectureSpec
from . import decoders, encoder_decoders, encoders, vision_and_audio

#: `config.model_type` → spec.
SPECS: dict[str, ArchitectureSpec] = {}


def register_architecture(spec: ArchitectureSpec) -> None:
    """Register a family under each of its `model_types`; a later registration replaces an earlier one."""
    for model_type in spec.model_types:
        SPECS[model_type] = spec


def spec_for(model_type: str) -> ArchitectureSpec:
    """The spec of a family.

    Raises:
        ValueError: the family has none; explains how to write one.
    """
    if model_type not in SPECS:
        raise ValueError(
            f"model_type={model_type!r} has no architecture spec; known are {', '.join(sorted(SPECS))}. "
            "Describe where its projections live in an `hf_prune.model.ArchitectureSpec` and pass it to "
            "`hf_prune.model.register_architecture`."
        )
    return SPECS[model_type]


for _module in (encoders, decoders, encoder_decoders, vision_and_audio):
    for _spec in vars(_module).values():
        if isinstance(_spec, ArchitectureSpec):
            register_architecture(_spec)
