"""A model belongs to a pruner while a run goes on, not when the run was cut short, and a copy of it never does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from helpers import hooks, pruner_of, tiny_bert, trainer_for
from transformers import PreTrainedModel, TrainerCallback

from hf_prune import Pruner, PruningConfig, condense

CONFIG = PruningConfig(pattern="head", criterion="wanda", schedule="constant", frequency=2)


class AtStep(TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action(kwargs["model"])


def raising(error: type[BaseException]) -> AtStep:
    def action(model: PreTrainedModel) -> None:
        raise error("cut short")

    return AtStep(3, action)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("then", ["condense", "train", "prune by hand"])
def test_a_run_that_was_cut_short_leaves_the_model_free(error: type[BaseException], then: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, CONFIG, callbacks=[raising(error)])
    model = trainer.model
    with pytest.raises(error, match="cut short") as caught:  # the traceback keeps the run's frames alive, as a notebook does
        trainer.train()
    assert pruner_of(trainer).steps == 3
    if then == "condense":
        condense(model)
        assert hooks(model) == []
    elif then == "train":
        second = trainer_for(tmp_path, CONFIG, model)
        second.train()
        assert second.state.global_step == 12
        assert hooks(model) == []
    else:
        Pruner(model, CONFIG, total_steps=2).release()
    assert caught.traceback


def test_a_pruner_that_nobody_has_takes_its_hooks_along() -> None:
    model = tiny_bert()
    pruner = Pruner(model, CONFIG, total_steps=2)
    assert hooks(model)
    with pytest.raises(RuntimeError, match="already attached to this model"):
        Pruner(model, CONFIG, total_steps=2)
    with pytest.raises(RuntimeError, match=r"pruner\.finish\(\)"):
        condense(model)
    del pruner
    assert hooks(model) == []
    condense(model)


def test_a_copy_taken_while_training_can_be_condensed(tmp_path: Path) -> None:
    copies, refused = [], []

    def action(model: PreTrainedModel) -> None:
        copies.append(condense(copy.deepcopy(model)))
        try:
            condense(model)
        except RuntimeError as error:
            refused.append(str(error))

    trainer = trainer_for(tmp_path, CONFIG, callbacks=[AtStep(5, action)])
    trainer.train()
    assert "a Pruner is attached" in refused[0]
    assert copies[0].config.hf_prune["layers"]
    assert not hasattr(trainer.model.config, "hf_prune")
