"""Sharing models: how checkpoints load (`reload.py`), their model card (`card.py`, filled during training by `callback.py`), and
uploading to the Hub (`push.py`)."""

from .callback import ModelCardCallback
from .card import CardFacts, model_card, write_card
from .push import push_to_hub
from .reload import MODELING, auto_map, modeling_source
from .saving import save_made_from, write_made_from

__all__ = [
    "MODELING",
    "CardFacts",
    "ModelCardCallback",
    "auto_map",
    "model_card",
    "modeling_source",
    "push_to_hub",
    "save_made_from",
    "write_card",
    "write_made_from",
]
