"""The families that hf_prune supports: every `ArchitectureSpec` in the modules here, one per family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...settings.errors import closest
from ..spec import ArchitectureSpec
from ..spelled import as_json, from_json
from . import decoders, encoder_decoders, encoders, vision_and_audio
from .refused import REFUSED

#: `config.model_type` → spec.
SPECS: dict[str, ArchitectureSpec] = {}


#: The model types whose spec is no record: it was inferred from the model that is described here, or came with a checkpoint (None).
INFERRED: dict[str, object] = {}


def register_architecture(spec: ArchitectureSpec) -> None:
    """Register a family under each of its `model_types`; a later registration replaces an earlier one."""
    for model_type in spec.model_types:
        SPECS[model_type] = spec
        INFERRED.pop(model_type, None)


def remember(spec: ArchitectureSpec, model_type: str, source: object = None) -> None:
    """Register an inferred spec, which a condensed checkpoint of the family then carries, for its `source`."""
    register_architecture(replace(spec, model_types=(model_type,)))
    INFERRED[model_type] = source


def recall(config: Any) -> bool:
    """Register the spec that the config of a condensed model carries, unless a record describes its family. Whether it did.

    Raises:
        ValueError: what it carries is no spec; see `spelled.from_json`.
    """
    entry, model_type = getattr(config, "hf_prune", None), str(config.model_type)
    if isinstance(entry, dict) and "architecture" in entry and (model_type not in SPECS or model_type in INFERRED):
        remember(from_json(entry["architecture"]), model_type)
        return True
    return False


def carry(config: Any) -> None:
    """Let the config of a condensed model carry the spec of its family, if that is no record."""
    if config.model_type in INFERRED:
        config.hf_prune = config.hf_prune | {"architecture": as_json(SPECS[config.model_type])}


def why_not(model_type: str) -> str:
    """In parentheses why a family has no record, if that is known."""
    return f" ({REFUSED[model_type]})" if model_type in REFUSED else ""


def spec_for(model_type: str) -> ArchitectureSpec:
    """The spec of a family.

    Raises:
        ValueError: the family has none; explains why it cannot have one, or how to write one.
    """
    if model_type not in SPECS:
        match = closest(model_type, SPECS)
        raise ValueError(
            f"model_type={model_type!r} has no architecture spec{why_not(model_type) or f', unlike {match!r}' * bool(match)}; "
            f"{len(SPECS)} "
            "families have. Describe where its projections live in an `hf_prune.model.ArchitectureSpec` and pass it to "
            "`hf_prune.model.register_architecture`; `hf_prune.infer_architecture(model)` may find and prove one."
        )
    return SPECS[model_type]


for _module in (encoders, decoders, encoder_decoders, vision_and_audio):
    for _spec in vars(_module).values():
        if isinstance(_spec, ArchitectureSpec):
            register_architecture(_spec)
