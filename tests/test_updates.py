"""Updates: what the weights that stay do when others go, with an update of the test's own; and the statistics that it reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import forget_update, tiny_bert
from models import ragged_batch, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_prune import ConfigError, Pruner, PruningConfig
from hf_prune.pruning.reconstruction import Moments
from hf_prune.pruning.statistics import WINDOW, Activations
from hf_prune.pruning.updates import register_update

LABELS = torch.tensor([0, 1, 1, 0])


def refit(weight: Tensor, moments_of_layer: Moments | None, gone: Tensor) -> Tensor:
    """Row by row, the weights that give the least squared error of the outputs: the obvious least squares."""
    assert moments_of_layer is not None
    moments = moments_of_layer.inputs.double() + 1e-9 * torch.eye(len(moments_of_layer.inputs))
    fitted = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = (~gone[row]).nonzero().flatten()
        fitted[row, kept] = torch.linalg.solve(moments[kept][:, kept], moments[kept] @ weight[row].double())
    return fitted.to(weight.dtype)


@pytest.fixture
def registered() -> Iterator[str]:
    register_update("refit", reads_second_moments=True)(refit)
    yield "refit"
    forget_update("refit")


def run(update: str, pattern: str, steps: int = 6, **settings: Any) -> Pruner:
    """Mask updates without an optimizer, so that only masks and the update change weights."""
    torch.manual_seed(0)
    model = tiny_bert(num_hidden_layers=1).train()
    config = PruningConfig(pattern=pattern, update=update, criterion="magnitude", frequency=2, **settings)
    pruner = Pruner(model, config, total_steps=steps)
    for step in range(steps):
        model(**ragged_batch(model, seed=step), labels=LABELS).loss.backward()
        pruner.observe()
        pruner.step()
    pruner.release()
    return pruner


PATTERNS = ("head", "neuron", "channelx1", "4x1", "2:4", "1x1")


@pytest.mark.parametrize(
    ("pattern", "update"),
    [
        *((pattern, update) for pattern in PATTERNS for update in ("refit", "sparsegpt")),
        *((pattern, update) for pattern in PATTERNS[:3] for update in ("obs", "least_squares")),
    ],
)
def test_an_update_repairs_what_it_can_and_masks_hold(pattern: str, update: str, registered: str) -> None:
    """The output projection of the feed-forward block gives what it gave before more nearly with the update than without."""

    def error(pruner: Pruner) -> float:
        dense = tiny_bert(num_hidden_layers=1)
        found, wanted = [
            model.get_submodule("bert.encoder.layer.0." + ("attention.output.dense" if pattern == "head" else "output.dense"))
            for model in (pruner.model, dense)
        ]
        seen: list[Tensor] = []
        handle = wanted.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        for step in range(4):
            dense(**ragged_batch(dense, seed=step))
        handle.remove()
        inputs = torch.cat([batch.flatten(0, -2) for batch in seen])
        return float(((inputs @ (found.weight - wanted.weight).T) ** 2).sum())

    plain, repaired = (run(update, pattern, schedule="constant", warmup_steps=4) for update in ("zero", update))
    assert error(repaired) < error(plain)
    assert repaired.reached_sparsity() == plain.reached_sparsity() > 0.4


def test_masks_only_grow_under_an_update(registered: str) -> None:
    model = tiny_bert(num_hidden_layers=1).train()
    pruner = Pruner(model, PruningConfig(pattern="neuron", update=registered, frequency=1), total_steps=8)
    gone = [~kept for kept in pruner.rules[0].kept]
    for step in range(8):
        model(**ragged_batch(model, seed=step), labels=LABELS).loss.backward()
        pruner.observe()
        pruner.step()
        now = [~kept for kept in pruner.rules[0].kept]
        assert all(bool((was <= is_now).all()) for was, is_now in zip(gone, now))
        gone = now


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "movement"}, {"criterion": "soft_movement", "scope": "threshold", "threshold": 0.1}, {"schedule": "lottery"}],
)
def test_what_brings_weights_back_takes_no_update_but_zero(settings: dict[str, Any], registered: str) -> None:
    with pytest.raises(ConfigError, match="update='refit'"):
        PruningConfig(pattern="neuron", update=registered, **settings)


def test_an_update_of_the_bias_is_for_pruning_without_training() -> None:
    with pytest.raises(ConfigError, match=r"config.update='bias': changes biases"):
        Pruner(tiny_bert(), PruningConfig(pattern="neuron", update="bias"), total_steps=4)


def test_an_update_under_lora_is_refused(registered: str) -> None:
    model = get_peft_model(tiny_bert(num_hidden_layers=1), LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"config.update='refit': must be 'zero' under LoRA"):
        Pruner(model, PruningConfig(pattern="2:4", update=registered, target_modules=["query"]), total_steps=4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_convolution_has_no_second_moments_that_fit(registered: str) -> None:
    model = tiny("vit", "image-classification")
    config = PruningConfig(pattern="1x1", update=registered, target_modules=r".*projection")
    with pytest.raises(ConfigError, match=r"config.update='refit': reads second moments"):
        Pruner(model, config, total_steps=4)


def test_an_unknown_update_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"update='zeros': must be one of auto, bias, least_squares, obs, sparsegpt, zero. Did you mean 'zero'\?"
    ):
        PruningConfig(pattern="neuron", update="zeros")


@pytest.mark.parametrize("stop", [5, 22, 30])
def test_a_run_under_an_update_resumes_bit_for_bit(stop: int, registered: str) -> None:
    """Also where second moments are half gathered; away from an update they are not in the state."""
    config = PruningConfig(pattern="neuron", update=registered, warmup_steps=20, cooldown_steps=8, frequency=1000)

    def steps(pruner: Pruner, model: torch.nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            model.zero_grad()
            model(**ragged_batch(model, seed=step), labels=LABELS).loss.backward()
            pruner.observe()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad if parameter.grad is not None else 0
            pruner.step()

    whole = tiny_bert(num_hidden_layers=1).train()
    steps(Pruner(whole, config, 40), whole, 0, 40)
    first = tiny_bert(num_hidden_layers=1).train()
    pruner = Pruner(first, config, 40)
    steps(pruner, first, 0, stop)
    state, weights = pruner.state_dict(), {name: value.clone() for name, value in first.state_dict().items()}
    large = [name for name, value in state.items() if "second_moments" in name and value.ndim == 2]
    assert bool(large) == (32 - WINDOW <= stop < 32 or 20 - WINDOW <= stop < 20)
    second = tiny_bert(num_hidden_layers=1, seed=7).train()
    second.load_state_dict(weights)
    resumed = Pruner(second, config, 40)
    resumed.load_state_dict(state)
    steps(resumed, second, stop, 40)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_calibration_in_evaluation_mode_counts_only_where_it_is_meant_to() -> None:
    model = tiny_bert(num_hidden_layers=1).eval()
    batch = ragged_batch(model)
    pruner = Pruner(model, PruningConfig(pattern="4x1", criterion="wanda", schedule="constant"), total_steps=2)
    with torch.no_grad():
        model(**batch)
    with pytest.raises(RuntimeError, match="has seen no training batch"):
        pruner.step()
    pruner.release()
    pruner = Pruner(model, PruningConfig(pattern="4x1", criterion="wanda", schedule="constant"), total_steps=2)
    with torch.no_grad(), pruner.calibrating():
        model(**batch)
    pruner.step()
    assert pruner.sparsity() == 0.5


@pytest.mark.parametrize("mixed", [False, True])
def test_statistics_are_means_over_tokens_that_are_no_padding(mixed: bool) -> None:
    """Under autocast of what the model computes there, with sums that are as exact."""
    model = tiny_bert(num_hidden_layers=1).to(torch.float32 if mixed else torch.float64).eval()
    pruner = Pruner(model, PruningConfig(pattern="neuron"), total_steps=2)
    (target,) = [view.target for group in pruner.rules[0].groups for view in group.weights if not view.owns_rows]
    layer = model.get_submodule(target.module_name)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    activations = Activations(model, {"second_moments": [target], "squared_inputs": [target]})
    with torch.no_grad(), activations.calibrating(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        batches = [ragged_batch(model, seed=seed) for seed in range(3)]
        for batch in batches:
            model(**batch)
    handle.remove()
    inputs = torch.cat([values[batch["attention_mask"].bool()] for values, batch in zip(seen, batches)]).double()
    assert seen[0].dtype == (torch.bfloat16 if mixed else torch.float64)
    torch.testing.assert_close(
        activations.mean("second_moments", target).double(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(activations.mean("squared_inputs", target).double(), inputs.square().mean(0), rtol=1e-4, atol=1e-6)
