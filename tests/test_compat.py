"""The patches of transformers: each does what it says, and a test fails when transformers no longer needs it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import extract_model_from_parallel
from helpers import arguments, prepare_for_half_precision, ragged_rows, tiny_bert
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainerState
from transformers.integrations import INTEGRATION_TO_CALLBACK
from transformers.models.auto import modeling_auto
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

import hf_prune.hub.callback
import hf_prune.training.callback  # noqa: F401  the patches are made where callbacks are
from hf_prune.compat import auto_classes, leave_mixed_precision, wrap

pytestmark = pytest.mark.core


def test_wrapping_twice_is_wrapping_once() -> None:
    class Owner:
        def method(self, value: int) -> int:
            return value

        @classmethod
        def made(cls, value: int) -> tuple[type, int]:
            return cls, value

    class Heir(Owner): ...

    def around(stock: Any, *args: Any) -> Any:
        return stock(*args[:-1], args[-1] + 1)

    for _ in range(2):
        wrap(Owner, "method", around)
        wrap(Owner, "made", around)
    assert Owner().method(1) == 2
    assert Heir.made(1) == (Heir, 2)


def test_states_remember_their_folder_which_stock_ones_do_not(tmp_path: Path) -> None:
    TrainerState(epoch=1.0).save_to_json(str(tmp_path / "trainer_state.json"))
    stock: Any = TrainerState.load_from_json.__func__.__wrapped__  # type: ignore[attr-defined]
    assert not hasattr(stock(TrainerState, str(tmp_path / "trainer_state.json")), "folder"), "remember_folders() can go"
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).folder == tmp_path  # type: ignore[attr-defined]


@pytest.mark.parametrize("event", ["on_pre_optimizer_step", "on_step_begin"])
def test_jit_checkpoints_are_still_written_within_a_step(event: str) -> None:
    stock = getattr(JITCheckpointCallback, event).__wrapped__
    assert stock.__qualname__ == f"JITCheckpointCallback.{event}", "save_between_steps() can go"


def test_loggers_still_run_before_callbacks_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Trainer.log` is wrapped since `on_log` is called in the order of the callbacks, loggers first."""

    class Logger(TrainerCallback): ...

    class Users(TrainerCallback): ...

    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "like", Logger)
    trainer = Trainer(tiny_bert(), arguments(tmp_path, report_to=["like"]), callbacks=[Users()])
    order = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert order.index(Logger) < order.index(Users), "the patch of Trainer.log can go"


def test_callbacks_are_still_not_told_who_calls_them(tmp_path: Path) -> None:
    told: list[Any] = []

    class Asking(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            told.extend([*args, *kwargs.values()])

    trainer = Trainer(tiny_bert(), arguments(tmp_path, max_steps=1), callbacks=[Asking()], train_dataset=ragged_rows(8))
    trainer.train()
    assert told
    assert not any(isinstance(value, Trainer) for value in told), "the patch of Trainer.train can go"


def test_auto_classes_know_every_head_and_their_mapping_is_still_private() -> None:
    known = dict(auto_classes("bert"))
    assert known["AutoModel"] == ("BertModel",)
    assert known["AutoModelForSequenceClassification"] == ("BertForSequenceClassification",)
    assert not any(auto_classes("no such family"))
    assert not hasattr(modeling_auto.AutoModel, "model_mapping"), "auto_classes() can use the public name"


def test_accelerate_still_takes_too_much_off_a_forward() -> None:
    own = BertForSequenceClassification.forward
    assert hasattr(own, "__wrapped__")  # a decorator of transformers
    for leave in (leave_mixed_precision, partial(extract_model_from_parallel, keep_fp32_wrapper=False)):
        model = tiny_bert()
        prepare_for_half_precision(model)
        assert model.forward.__func__ is not own
        leave(model)
        assert (model.forward.__func__ is own) == (leave is leave_mixed_precision)
