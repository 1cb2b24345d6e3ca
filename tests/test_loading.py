"""A checkpoint is loaded whole: a tensor that it lacks is an error that names it, never random numbers in what is written."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
from reloading import without
from safetensors.torch import load_file
from transformers import BertModel

from hf_prune import convert_v4_pruned_heads
from hf_prune.model.loading import load_model


def test_a_head_that_was_never_trained_is_missing(tmp_path: Path) -> None:
    BertModel(models.tiny("bert").config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    with pytest.raises(ValueError, match=r"lacks classifier\.bias, classifier\.weight, which BertForSequenceClassification would"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"lacks classifier\.bias"):
        convert_v4_pruned_heads(tmp_path)


def test_ten_are_named_and_the_others_counted(tmp_path: Path) -> None:
    models.tiny("bert").save_pretrained(tmp_path)
    names = sorted(name for name in load_file(tmp_path / "model.safetensors") if ".attention." in name)
    without(tmp_path, *names)
    with pytest.raises(ValueError, match=rf"lacks {', '.join(names[:10])} and {len(names) - 10} more"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("family", "head"),
    [("gpt2", "causal-lm"), ("t5", "seq2seq-lm"), ("bart", "seq2seq-lm"), ("bert", "masked-lm"), ("albert", None)],
)
def test_tied_weights_and_positions_are_not_missing(family: str, head: str | None, tmp_path: Path) -> None:
    """They are not in the file, or need not be: a head that is the embeddings, position ids, constants."""
    model = models.tiny(family, head)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spare = [name for name in tensors if name.endswith(("position_ids", "final_logits_bias"))]
    without(tmp_path, *spare)
    assert len(tensors) - len(spare) < len(model.state_dict()) or family == "albert"
    assert load_model(tmp_path).num_parameters() == model.num_parameters()
