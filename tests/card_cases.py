"""A half-pruned model and what is known of it, for the tests of cards, folders, the command line and the Hub."""

from __future__ import annotations

from typing import Any

import models
from datasets import Dataset, DatasetInfo
from helpers import ragged_rows

from hf_prune import CardFacts, PruningConfig, PruningRule
from hf_prune.model import find_blocks

HALF = PruningConfig(
    target_sparsity=0.5,
    frequency=1,
    cooldown_steps=1,
    rules=[PruningRule(pattern=pattern, target_sparsity=0.5) for pattern in ("head", "neuron")],
)


FACTS = CardFacts(
    model_name="tiny-half",
    base_model="someone/tiny",
    dataset="glue",
    dataset_config="mrpc",
    dataset_split="validation",
    language="en",
    license="apache-2.0",
    metrics_before={"loss": 0.5, "accuracy": 0.75},
    metrics={"loss": 0.625, "accuracy": 0.6875, "f1": 0.5},
    history=[{"step": 1, "sparsity": 0.25}, {"step": 2, "sparsity": 0.5, "accuracy": 0.6875}],
)


def halved(family: str = "bert", how: str = "in") -> Any:
    """A model whose first attention block has two of four heads left, and whose first feed-forward block 37 of 40 neurons."""
    model = models.tiny(family)
    attention, feed_forward = find_blocks(model)[:2]
    models.zero_units(attention, [0, 1], how)
    models.zero_units(feed_forward, [0, 1, 2], how)
    return model


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def rows(count: int) -> Dataset:
    """Rows that say, as those of a Hub dataset do, where they are from."""
    data = Dataset.from_list(ragged_rows(count))
    data._info = DatasetInfo(features=data.features, builder_name="glue", config_name="mrpc")
    return data
