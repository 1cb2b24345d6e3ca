"""Whatever the Trainer supports works with the callback, or is refused with the reason before the first step."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ROWS, SCHEDULED, arguments, assert_equal, pruner_of, snapshot, tiny_bert, trainer_for
from models import tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_prune import Pruner, PruningCallback, PruningConfig, last_complete_checkpoint, sparsity_report
from hf_prune.training.checkpoints import STATE_NAME

# ------------------------------------------------------------------------------------------------------------------- the matrix

#: Criterion → config; whether masked weights may come back.
METHODS: dict[str, tuple[dict[str, Any], bool]] = {
    "snip_momentum": ({"pattern": "1x1", "criterion": "snip_momentum", "target_sparsity": 0.7}, False),
    "taylor": ({"pattern": "head", "criterion": "taylor", "scope": "local", "target_sparsity": 0.5}, False),
    "soft_movement": ({"pattern": "8x8", "criterion": "soft_movement", "target_sparsity": 0.5}, True),
}


def encoder_matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights of all linear layers that are no output head, found without hf_prune."""
    heads = ("classifier", "lm_head", "pooler")
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(head in name for head in heads)
    }


class Watch(TrainerCallback):
    """Looks at the weights after every step: what was zero is zero again, unless weights may come back, and units are whole."""

    def __init__(self, pattern: str, comes_back: bool) -> None:
        self.pattern, self.comes_back = pattern, comes_back
        self.gone: dict[str, Tensor] = {}
        self.steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps += 1
        matrices = encoder_matrices(model)
        for name, weight in matrices.items():
            zero = weight == 0
            if name in self.gone and not self.comes_back:
                assert bool(zero[self.gone[name]].all()), f"{name} came back at step {state.global_step}"
            self.gone[name] = zero
            if self.pattern == "8x8":
                tiles = zero.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).float().mean(dim=(1, 3))
                assert set(tiles.unique().tolist()) <= {0.0, 1.0}
        if self.pattern == "head":
            # Heads of width 8: rows of query, key and value, columns of the output.
            for name, weight in matrices.items():
                if name.endswith((".query", ".q", ".k")) or (name.endswith(".key") or name.endswith(".value")):
                    rows = (weight == 0).unflatten(0, (-1, 8)).float().mean(dim=(1, 2))
                    assert set(rows.unique().tolist()) <= {0.0, 1.0}


class OutOfMemory(TrainerCallback):
    """Fails as CUDA does, once, in the middle of the run."""

    def __init__(self) -> None:
        self.happened = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7 and not self.happened:
            self.happened = True
            raise RuntimeError("CUDA out of memory.")


def frozen_bert() -> PreTrainedModel:
    model = tiny_bert()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embeddings" not in name and "layer.0" not in name)
    return model


def momentum(model: nn.Module, **options: Any) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1, **options), None


def evaluated(**overrides: Any) -> dict[str, Any]:
    every = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    return every | {"eval_dataset": ROWS[:16], "per_device_eval_batch_size": 5} | overrides


#: Feature → arguments of `Trainer` and `TrainingArguments`; `model` makes the model, `optimizers` takes it.
FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "accumulation": lambda: {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "no clipping": lambda: {"max_grad_norm": 0.0},
    "hard clipping": lambda: {"max_grad_norm": 0.01},
    "bf16": lambda: {"bf16": True},
    "activation checkpointing": lambda: {"activation_checkpointing": True},
    "torch_compile": lambda: {"torch_compile": True, "torch_compile_backend": "eager"},
    "best model": lambda: evaluated(load_best_model_at_end=True, metric_for_best_model="loss"),
    "save best": lambda: evaluated(load_best_model_at_end=True, metric_for_best_model="loss", save_strategy="best"),
    "model_init": lambda: {"model_init": lambda: tiny_bert()},
    "max_steps": lambda: {"max_steps": 12, "num_train_epochs": 1},
    "epochs": lambda: evaluated(eval_strategy="epoch", save_strategy="epoch", num_train_epochs=3),
    "auto_find_batch_size": lambda: {"auto_find_batch_size": True, "callbacks": [OutOfMemory()]},
    "evaluations": lambda: evaluated(
        eval_dataset={"a": ROWS[:8], "b": ROWS[8:16]}, load_best_model_at_end=True, metric_for_best_model="a_loss"
    ),
    "early stopping": lambda: evaluated(
        load_best_model_at_end=True, metric_for_best_model="loss", callbacks=[EarlyStoppingCallback(100)]
    ),
    "fused": lambda: {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "sgd": lambda: {"optim": "sgd", "learning_rate": 0.1},
    "adafactor": lambda: {"optim": "adafactor"},
    "adagrad": lambda: {"optim": "adagrad"},
    "rmsprop": lambda: {"optim": "rmsprop"},
    "momentum": lambda: {"optimizers": momentum},
    "foreach": lambda: {"optimizers": lambda model: momentum(model, foreach=True)},
    "weight decay": lambda: {"weight_decay": 1.0},
    "frozen": lambda: {"model": frozen_bert},
    "tied": lambda: {"model": lambda: tiny("albert", "sequence-classification")},
    "cosine": lambda: {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "eval_on_start": lambda: evaluated(eval_on_start=True),
    "neftune": lambda: {"neftune_noise_alpha": 5.0},
}


def matrix() -> list[Any]:
    """Each feature with one method in the quick suite, with all of them in the slow one."""
    return [
        pytest.param(feature, method, marks=() if index % 3 == other else pytest.mark.slow)
        for (index, feature), (other, method) in itertools.product(enumerate(FEATURES), enumerate(METHODS))
    ]


@pytest.mark.parametrize(("feature", "method"), matrix())
def test_the_target_is_reached_with_exact_zeros(feature: str, method: str, tmp_path: Path) -> None:
    config, comes_back = METHODS[method]
    changes = FEATURES[feature]()
    model = None if "model_init" in changes else changes.pop("model", tiny_bert)()
    if "optimizers" in changes:
        changes["optimizers"] = changes["optimizers"](model)
    watch = Watch(str(config["pattern"]), comes_back)
    changes["callbacks"] = [watch, *changes.get("callbacks", [])]
    trainer = trainer_for(tmp_path, {**config, **SCHEDULED}, model, **changes)
    trainer.train()
    pruner = pruner_of(trainer)
    assert pruner.is_finished
    assert pruner.shortfall is None
    assert watch.steps >= 12
    targeted = {group.name for group in pruner.plan().groups}
    shares = {name: float((weight == 0).float().mean()) for name, weight in encoder_matrices(trainer.model).items()}
    if method == "taylor":
        projections = [name for name in shares if any(name.startswith(block) for block in targeted)]
        assert projections
        assert {shares[name] for name in projections if not name.endswith("pooler.dense")} == {config["target_sparsity"]}
    else:
        assert pruner.reached_sparsity() == pytest.approx(config["target_sparsity"], abs=64 / 12288)
    if trainer.args.load_best_model_at_end:
        metrics = trainer.evaluate()
        name = f"eval_{trainer.args.metric_for_best_model}"
        assert metrics[name] == trainer.state.best_metric
        assert trainer.state.best_global_step >= pruner.last_update
        best = Path(trainer.state.best_model_checkpoint)
        assert_equal(pruner.state_dict(), load_file(best / STATE_NAME))
        assert_equal(snapshot(trainer.model), load_file(best / "model.safetensors"))


def test_activation_criteria_under_torch_compile_and_accumulation(tmp_path: Path) -> None:
    runs = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        config = {"pattern": "2:4", "criterion": "wanda", "scope": "local", **SCHEDULED}
        trainer = trainer_for(tmp_path, config, per_device_train_batch_size=4, gradient_accumulation_steps=2, **changes)
        trainer.train()
        runs.append(snapshot(trainer.model))
    assert_equal(*runs)


def test_seq2seq(tmp_path: Path) -> None:
    rows = [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": row["input_ids"][:4]} for row in ROWS
    ]
    model = tiny("t5", "seq2seq-lm")
    args = Seq2SeqTrainingArguments(
        **{
            **arguments(tmp_path, num_train_epochs=2).to_dict(),
            "eval_strategy": "epoch",
            "predict_with_generate": True,
            "generation_max_length": 4,
        }
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=[PruningCallback({"pattern": "head", "criterion": "taylor", "scope": "local", **SCHEDULED})],
    )
    trainer.train()
    assert pruner_of(trainer).reached_sparsity() == 0.5
    assert "eval_loss" in trainer.evaluate()


# -------------------------------------------------------------------------------------------------------- hyper-parameter search


@pytest.mark.parametrize("method", METHODS)
def test_each_trial_of_a_search_is_a_run_of_its_own(method: str, tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    rates = {"learning_rate": [1e-2, 1e-3]}
    config = {**METHODS[method][0], **SCHEDULED}
    saving = evaluated(save_steps=5, eval_steps=5)
    trainer = trainer_for(tmp_path, config, model_init=lambda: tiny_bert(), **saving)
    trainer.hyperparameter_search(
        hp_space=lambda trial: {name: trial.suggest_categorical(name, values) for name, values in rates.items()},
        n_trials=2,
        backend="optuna",
        sampler=optuna.samplers.GridSampler(rates, seed=0),
    )
    for number in range(2):
        run = tmp_path / f"run-{number}"
        assert last_complete_checkpoint(run) == str(run / "checkpoint-12")
        rate = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())["trial_params"]["learning_rate"]
        alone = trainer_for(tmp_path / "alone", config, model_init=lambda: tiny_bert(), learning_rate=rate)
        alone.train()
        assert_equal(snapshot(alone.model), load_file(run / "checkpoint-12" / "model.safetensors"))
        again = trainer_for(tmp_path / "again", config, model_init=lambda: tiny_bert(), learning_rate=rate)
        again.train(resume_from_checkpoint=str(run / "checkpoint-5"))
        assert_equal(snapshot(again.model), snapshot(alone.model))


# ------------------------------------------------------------------------------------------------------------------------ fp16


def scaled_run(config: PruningConfig, overflows: set[int]) -> tuple[nn.Module, Pruner, list[int]]:
    """A plain loop with a GradScaler; in the steps of `overflows` one gradient of the scaled loss is infinite."""
    model = tiny_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, config, total_steps=12)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    skipped = []
    for step, batch in enumerate(itertools.islice(batches(), 12), start=1):
        scaler.scale(model(**batch).loss).backward()
        if step in overflows:
            model.bert.encoder.layer[0].output.dense.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        pruner.observe(scaled_loss=True)
        before, scale = snapshot(model), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped.append(step)
            assert_equal(snapshot(model), before)
        pruner.step()
        optimizer.zero_grad()
    return model, pruner, skipped


def batches() -> Iterator[dict[str, Tensor]]:
    for _ in range(2):
        yield from DataLoader(ROWS, batch_size=8, collate_fn=default_data_collator)


def reference_run(overflows: set[int]) -> dict[str, Tensor]:
    """Local snip_momentum pruning of single weights written out; masks due at a skipped step change after the next one."""
    model = tiny_bert().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weights = {name: module.weight for name, module in model.bert.encoder.named_modules() if isinstance(module, nn.Linear)}
    scores = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    due = 0
    for step, batch in enumerate(itertools.islice(batches(), 12), start=1):
        if step in (2, 4, 6, 8, 10):
            due = step
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if step not in overflows:
            for name, weight in weights.items():
                if step <= 10 or due:
                    scores[name] = 0.9 * scores[name] + (weight * weight.grad).abs().detach()
                weight.grad.mul_(masks[name])
            optimizer.step()
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.mul_(masks[name])
                    if due:
                        count = round((0.7 - 0.7 * (1 - (due - 2) / 8) ** 3) * weight.numel())
                        ranked = scores[name].masked_fill(masks[name] == 0, -1).flatten().argsort(stable=True)
                        masks[name].view(-1)[ranked[:count]] = 0
                        weight.mul_(masks[name])
            due = 0
        optimizer.zero_grad()
    return snapshot(model)


@pytest.mark.parametrize("overflows", [set(), {1, 2}, {4}, {5}, {9, 10, 11}])
def test_a_step_that_the_scaler_skips_is_no_observation(overflows: set[int]) -> None:
    config = PruningConfig(
        pattern="1x1",
        scope="local",
        target_sparsity=0.7,
        target_modules=r"bert\.encoder\..*",
        max_sparsity_per_module=1.0,
        **SCHEDULED,
    )
    model, pruner, skipped = scaled_run(config, overflows)
    assert set(skipped) == overflows
    assert pruner.is_finished
    assert pruner.reached_sparsity() == pytest.approx(0.7, abs=1e-3)
    assert_equal(snapshot(model), reference_run(overflows))


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "movement", "gradient"])
def test_every_criterion_survives_skipped_steps(criterion: str) -> None:
    scope = {"scope": "local"}
    config = PruningConfig(pattern="1x1", criterion=criterion, warmup_steps=0, cooldown_steps=0, frequency=1, **scope)
    model, pruner, skipped = scaled_run(config, {1, 2, 6})
    assert skipped == [1, 2, 6]
    assert pruner.reached_sparsity() == pytest.approx(0.5, abs=1e-3)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())


def test_a_skipped_step_leaves_nothing_in_activation_statistics() -> None:
    model = tiny_bert().train()
    pruner = Pruner(model, PruningConfig(pattern="1x1", criterion="wanda"), total_steps=12)
    states = []
    for step, batch in enumerate(itertools.islice(batches(), 2)):
        model(**batch).loss.backward()
        if step == 1:
            model.classifier.weight.grad.fill_(torch.nan)
        pruner.observe(scaled_loss=True)
        pruner.step()
        states.append({key: value for key, value in pruner.state_dict().items() if "/criterion/" in key})
        model.zero_grad()
    assert_equal(*states)


def test_the_last_update_may_be_skipped_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    config = PruningConfig(pattern="1x1", target_sparsity=0.7, warmup_steps=2, cooldown_steps=0, frequency=2)
    _, pruner, _ = scaled_run(config, {12})
    assert not pruner.is_finished
    assert "was due at step 12" in str(pruner.shortfall)


# ----------------------------------------------------------------------------------------------------------- NaN, early ends


class Spoil(TrainerCallback):
    """Makes the gradient that reaches a weight, or the loss, NaN at a step."""

    def __init__(self, step: int, module: str | None) -> None:
        self.step, self.module = step, module
        self.now = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.module is None:
            model.classifier.register_forward_hook(lambda module, inputs, output: output * torch.nan if self.now else output)
        else:
            weight = model.get_parameter(self.module)
            weight.register_hook(lambda gradient: gradient * torch.nan if self.now else gradient)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now = state.global_step + 1 == self.step


@pytest.mark.parametrize("clipping", [0.0, 1.0])
def test_a_nan_gradient_names_parameter_and_step(clipping: float, tmp_path: Path) -> None:
    name = "bert.encoder.layer.1.output.dense.weight"
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED}, max_grad_norm=clipping, callbacks=[Spoil(5, name)])
    with pytest.raises(
        FloatingPointError, match=rf"^Step 5: the gradient of '{name}' is NaN or infinite\. No weight was changed\."
    ):
        trainer.train()
    assert all(bool(torch.isfinite(value).all()) for value in trainer.model.state_dict().values())


def test_a_nan_loss_is_called_one(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "4x1", **SCHEDULED}, callbacks=[Spoil(3, None)])
    with pytest.raises(
        FloatingPointError, match=r"^Step 3: the gradient of 'classifier.*All gradients are, so the loss seems to be"
    ):
        trainer.train()


def test_observing_without_gradients_is_an_error() -> None:
    pruner = Pruner(tiny_bert(), PruningConfig(pattern="4x1"), total_steps=2)
    with pytest.raises(RuntimeError, match="No parameter has a gradient"):
        pruner.observe()


@pytest.mark.parametrize("counts_from", ["the start", "the final sparsity"])
def test_early_stopping_under_target_warns_once(counts_from: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = iter([3.0, 2.0, 1.0, 0.5, 0.4, 0.3])
    trainer = trainer_for(
        tmp_path,
        {"pattern": "1x1", "warmup_steps": 1, "cooldown_steps": 10, "frequency": 1},
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[EarlyStoppingCallback(2)],
        num_train_epochs=3,
        **evaluated(load_best_model_at_end=True, metric_for_best_model="score", greater_is_better=True),
    )
    if counts_from == "the start":  # whichever callback comes first acts first
        trainer.add_callback(trainer.pop_callback(PruningCallback))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("hf_prune")]
    pruner = pruner_of(trainer)
    if counts_from == "the final sparsity":
        assert (trainer.state.global_step, trainer.state.best_global_step) == (12, 8)
        assert (messages, pruner.shortfall) == ([], None)
        return
    assert trainer.state.global_step == 6
    assert messages == [pruner.shortfall]
    assert messages[0] == (
        f"Pruning is not finished: the model is that of step {trainer.state.best_global_step}, its last mask update was due at "
        f"step 8. {pruner.reached_sparsity():.2%} of the weights are zero and 50.00% were requested."
    )
    report = sparsity_report(trainer.model, pruner.shortfall)
    assert report.shortfall == report.to_dict()["shortfall"] == messages[0]
    assert "Pruning is not finished" in str(report)


def test_a_finished_run_has_nothing_to_warn_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "1x1", **SCHEDULED})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("hf_prune")]
    assert sparsity_report(trainer.model, pruner_of(trainer).shortfall).shortfall is None


# --------------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        ("adamw_bnb_8bit", "blocks of 8 bits"),
        ("adamw_torch_4bit", "blocks of 4 bits"),
        ("adalomo", "steps inside backward"),
        ("galore_adamw_layerwise", "steps inside backward"),
        ("schedule_free_adamw", "an average that holds the values of pruned ones"),
    ],
)
def test_some_optimizers_are_refused(optimizer: str, reason: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "1x1"})
    trainer.create_optimizer()  # these packages are not installed
    trainer.args.optim = optimizer
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match=rf"optim='{optimizer}' does not work with PruningCallback: .*{reason}"):
        trainer.train()
    assert_equal(snapshot(trainer.model), before)


class Averaging(torch.optim.SGD):
    """Trains with the last iterate and evaluates with the mean of all."""

    def train(self) -> None:
        self._hold("last")

    def eval(self) -> None:
        self._hold("mean")

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter, held in self.state.items():
            held["count"] = held.get("count", 0) + 1
            held["mean"] = held.get("mean", 0) + (parameter.detach() - held.get("mean", 0)) / held["count"]
            held["last"] = parameter.detach().clone()
        return loss

    def _hold(self, kind: str) -> None:
        with torch.no_grad():
            for parameter, held in self.state.items():
                parameter.copy_(held[kind])


class Adam8bit(torch.optim.Adam):
    """Has the name of one that keeps its state in 8 bits."""


class Bits(torch.optim.SGD):
    """Says how wide its state is as the optimizers of bitsandbytes do."""

    args = SimpleNamespace(optim_bits=8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda given: Averaging(given, lr=0.1, momentum=0.9), "optimizers='Averaging' .* an average that holds"),
        (Adam8bit, "optimizers='Adam8bit' .* blocks of 8 bits"),
        (lambda given: Bits(given, lr=0.1), "optimizers='Bits' .* blocks of 8 bits"),
        (lambda given: LayerWiseDummyOptimizer({}), "optimizers='LayerWiseDummyOptimizer' .* steps inside backward"),
    ],
)
def test_optimizers_that_are_given_are_refused_by_what_they_are(make: Callable[..., Any], reason: str, tmp_path: Path) -> None:
    model = tiny_bert()
    trainer = trainer_for(tmp_path, {"pattern": "1x1"}, model, optimizers=(make(model.parameters()), None))
    before = snapshot(model)
    with pytest.raises(ValueError, match=reason):
        trainer.train()
    assert_equal(snapshot(model), before)
    Pruner(model, PruningConfig(pattern="1x1"), total_steps=1)  # nothing stays attached


class Elated(TrainerCallback):
    """Gives pruned weights values between a step and its checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.weight += 1e-3


@pytest.mark.parametrize("config", [{"pattern": "4x1"}, {"pattern": "1x1", "criterion": "movement"}, {"keep_zeros": True}])
def test_a_checkpoint_whose_zeros_are_not_zero_is_an_error(config: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[::2] = 0
    saving = {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_for(tmp_path, {**config, **SCHEDULED}, model, callbacks=[Elated()], **saving)
    message = r"checkpoint of step 4 holds pruned weights that are not zero, in 1 modules, first 'bert.encoder.layer.1.output.dense"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


def test_deepspeed_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, {"pattern": "1x1"})
    trainer.args.deepspeed = {"zero_optimization": {"stage": 2}}  # DeepSpeed is not installed
    with pytest.raises(ValueError, match="does not work with DeepSpeed, which steps inside backward"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("later", [False, True])
def test_two_callbacks_are_refused(later: bool, tmp_path: Path) -> None:
    second = PruningCallback({"pattern": "head"})
    trainer = trainer_for(tmp_path, {"pattern": "4x1"}, callbacks=[] if later else [second])
    if later:
        trainer.add_callback(second)
    with pytest.raises(ValueError, match="two PruningCallbacks; give one of them a config with `rules`"):
        trainer.train()


# ---------------------------------------------------------------------------------------------------------- loops of one's own


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerate_loop_equals_the_trainer(method: str, accumulation: int, tmp_path: Path) -> None:
    from accelerate import Accelerator

    config = PruningConfig.from_dict({**METHODS[method][0], **SCHEDULED})
    size = 8 // accumulation
    trainer = trainer_for(
        tmp_path,
        config,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        max_grad_norm=0.5,
        optim="adamw_torch",
    )
    trainer.train()

    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    model = tiny_bert().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    loader = DataLoader(ROWS, batch_size=size, collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    pruner = Pruner(accelerator.unwrap_model(model), config, total_steps=12)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(model):
                # Trainer does not divide the loss of a model that takes any argument; Accelerate always does.
                accelerator.backward(model(**batch).loss * accumulation)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                    pruner.observe(scaled_loss=accelerator.scaler is not None)
                optimizer.step()
                if accelerator.sync_gradients:
                    pruner.step()
                optimizer.zero_grad()
    pruner.finish()
    assert_equal(pruner.state_dict(), pruner_of(trainer).state_dict())
    assert_equal(snapshot(model), snapshot(trainer.model))
