"""Movement pruning against autograd: a straight-through estimator written out, step by step, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import elements, tiny_bert
from models import ragged_batch
from torch import Tensor
from torch.func import functional_call

from hf_prune import ConfigError, Pruner, PruningConfig, condense_plan
from hf_prune.model.units import UnitGroup, whole_scores

STEPS, PENALTY = 14, 20.0
MODES: dict[str, dict[str, Any]] = {
    "hard": {"criterion": "movement", "target_sparsity": 0.5},
    "soft": {"criterion": "soft_movement", "scope": "threshold", "threshold": 0.495, "regularization": PENALTY},
}
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=0.01),
}


class StraightThrough(torch.autograd.Function):
    """W⊙M forward; backward, kept weights get their gradient and every score gets ∂L/∂W'·W, as if the mask were the score."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        weight, mask = ctx.saved_tensors
        return gradient * mask, gradient * weight, None


class Reference:
    """Dense weights, scores and masks of their own; the model computes with the masked weights."""

    def __init__(self, model: torch.nn.Module, groups: list[UnitGroup], optimizer: str) -> None:
        self.model, self.groups = model, groups
        self.weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.scores = [torch.zeros(group.num_units, dtype=torch.float64, requires_grad=True) for group in groups]
        # Parameter name → (group, unit of each element)
        self.units: dict[str, tuple[int, Tensor]] = {}
        for number, group in enumerate(groups):
            for unit, name, row, column in elements(group):
                empty = (number, torch.zeros(self.weights[name].shape, dtype=torch.long))
                self.units.setdefault(name, empty)[1][row, column] = unit
        self.optimizer = OPTIMIZERS[optimizer](self.weights.values())
        self.score_optimizer = torch.optim.Adam(self.scores, lr=1e-2)

    def masked(self) -> dict[str, Tensor]:
        """The weights that the model computes with."""
        masked = {}
        for name, weight in self.weights.items():
            if name in self.units:
                number, units = self.units[name]
                masked[name] = StraightThrough.apply(weight, self.scores[number][units], self.masks[name])
            else:
                masked[name] = weight * self.masks[name]
        return masked

    def step(self, batches: list[dict[str, Tensor]], share: float, penalty: float) -> None:
        self.optimizer.zero_grad()
        self.score_optimizer.zero_grad()
        for batch in batches:
            (functional_call(self.model, self.masked(), kwargs=batch).loss / len(batches)).backward()
        if penalty:
            (penalty * share * torch.cat([scores.sigmoid() for scores in self.scores]).mean()).backward()
        self.score_optimizer.step()
        before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        with torch.no_grad():  # a masked weight is frozen: neither gradient nor momentum nor decay moves it
            for name, mask in self.masks.items():
                self.weights[name] *= mask
            self.optimizer.step()
            for name, mask in self.masks.items():
                self.weights[name][~mask] = before[name][~mask]

    def mask_again(self, kept: list[Tensor]) -> None:
        for name, (number, units) in self.units.items():
            self.masks[name] = kept[number][units]
        for number, group in enumerate(self.groups):
            for view in group.biases:
                self.masks[view.target.name] = kept[number].repeat_interleave(view.height)

    def hard(self, share: float) -> list[Tensor]:
        """All but the lowest scores, as many as make up `share` of the weights; the units are equally large."""
        flat = torch.cat([scores.detach() for scores in self.scores])
        kept = torch.ones_like(flat, dtype=torch.bool)
        kept[flat.argsort()[: round(share * flat.numel())]] = False
        return list(kept.split([len(scores) for scores in self.scores]))

    def soft(self, threshold: float) -> list[Tensor]:
        return [scores.detach().sigmoid() > threshold for scores in self.scores]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("mode", "pattern"), [("hard", "1x1"), ("hard", "4x2"), ("hard", "head"), ("soft", "1x1"), ("soft", "auto")]
)
def test_scores_masks_and_weights_equal_the_reference_at_every_step(
    mode: str, pattern: str, optimizer: str, accumulation: int
) -> None:
    model = tiny_bert(num_hidden_layers=2, hidden_size=16, intermediate_size=12).double().train()
    config = PruningConfig(
        pattern=pattern, frequency=2, warmup_steps=0, cooldown_steps=3, max_sparsity_per_module=1.0, **MODES[mode]
    )
    pruner = Pruner(model, config, total_steps=STEPS)
    (rule,) = pruner.rules
    reference = Reference(tiny_bert(num_hidden_layers=2, hidden_size=16, intermediate_size=12).double(), rule.groups, optimizer)
    optimize = OPTIMIZERS[optimizer](model.parameters())
    came_back = 0
    for step in range(1, STEPS + 1):
        rows = [ragged_batch(model, seed=step * 7 + part) | {"labels": torch.tensor([0, 1, 1, 0])} for part in range(accumulation)]
        share = 1 - (1 - min(step / (STEPS - 3), 1)) ** 3
        for batch in rows:
            (model(**batch).loss / accumulation).backward()
        pruner.observe()
        optimize.step()
        gone = [~kept for kept in rule.kept]
        pruner.step()
        optimize.zero_grad()
        if step <= STEPS - 3:
            reference.step(rows, share, PENALTY if mode == "soft" else 0.0)
        else:  # scores rest while masks are frozen
            resting = [scores.detach().clone() for scores in reference.scores]
            reference.step(rows, share, 0.0)
            for scores, value in zip(reference.scores, resting):
                scores.data.copy_(value)
        if (step % 2 == 0 and step < STEPS - 3) or step == STEPS - 3:
            reference.mask_again(reference.hard(0.5 * share) if mode == "hard" else reference.soft(0.495 * share))
        for group, expected in zip(rule.groups, reference.scores):
            raw = rule.criterion.state[group.name]
            torch.testing.assert_close(raw, expected.detach(), rtol=0, atol=1e-6)
        expected_weights = reference.masked()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter != 0, expected_weights[name] != 0), (step, name)
            torch.testing.assert_close(parameter.detach(), expected_weights[name].detach(), rtol=0, atol=1e-6)
        came_back += sum(int((kept & was).sum()) for kept, was in zip(rule.kept, gone))
    assert pruner.reached_sparsity() > 0
    assert came_back > 0 or mode == "soft" or pattern == "head"


def test_a_unit_that_comes_back_has_the_values_it_left_with() -> None:
    model = tiny_bert(num_hidden_layers=1).train()
    pruner = Pruner(
        model, PruningConfig(pattern="neuron", criterion="movement", frequency=1, warmup_steps=0, cooldown_steps=0), total_steps=30
    )
    (rule,) = pruner.rules
    (group,) = rule.groups
    tensors = [view.target.parameter for view in (*group.weights, *group.biases)]
    with torch.no_grad():
        for tensor in tensors:
            tensor.uniform_(0.5, 1.0)
    before = [tensor.detach().clone() for tensor in tensors]
    first = group.num_units // 2
    for step in range(28):
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        # The first half of the neurons loses in the first steps and gains in the later ones.
        up = group.weights[0].target.parameter
        up.grad[:first] = 1.0 if step < 3 else -1.0
        up.grad[first:] = 0.0
        pruner.observe()
        pruner.step()
        if step == 2:
            removed = ~rule.kept[0]
            assert 0 < int(removed.sum()) <= first
            assert not removed[first:].any()
            assert not tensors[0][removed].any()
            assert not group.biases[0].target.parameter[removed].any()
    assert bool((rule.kept[0] & removed).any())
    back = (rule.kept[0] & removed).nonzero().flatten()
    assert torch.equal(tensors[0][back], before[0][back])
    assert torch.equal(tensors[1][:, back], before[1][:, back])
    assert torch.equal(tensors[2][back], before[2][back])


@pytest.mark.parametrize(
    ("share", "heads", "rate"),
    [
        (0.25, 2, 0.1),
        (0.7, 6, 0.02),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0.25, 2, 0.02), (0.5, 4, 0.02), (0.5, 4, 0.1), (0.7, 6, 0.1)]),
    ],
)
def test_the_steered_penalty_ends_within_one_head_of_the_target(share: float, heads: int, rate: float) -> None:
    torch.manual_seed(0)
    model = tiny_bert(num_hidden_layers=2).train()
    config = PruningConfig(
        pattern="auto",
        target_modules=".*attention.*",
        criterion="soft_movement",
        scope="threshold",
        threshold=0.1,
        regularization="auto",
        score_learning_rate=rate,
        target_sparsity=share,
        max_sparsity_per_module=1.0,
        frequency=5,
        warmup_steps=10,
        cooldown_steps=10,
    )
    pruner = Pruner(model, config, total_steps=300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    penalties = []
    for step in range(300):
        model(**ragged_batch(model, seed=step), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        pruner.observe()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        penalties.append(pruner.metrics()["penalty"])
    pruner.finish()
    plans = [row for row in condense_plan(model).to_dict() if row["unit"] == "heads"]
    removed = sum(row["before"] - row["after"] for row in plans)
    assert abs(removed - heads) <= 1
    assert penalties[5] == 0
    assert any(penalties)


def test_what_can_go_as_a_whole_is_scored_by_the_lines_of_its_tiles() -> None:
    model = tiny_bert(num_hidden_layers=1)
    config = PruningConfig(pattern="auto", criterion="movement")
    groups = Pruner(model, config, total_steps=2).rules[0].groups
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(group.num_units, generator=generator) for group in groups]
    found, sizes = whole_scores(groups, scores)
    by_name = {group.name.rsplit(".", 1)[1]: score for group, score in zip(groups, scores)}
    heads = torch.minimum(by_name["value"].view(4, -1).amax(1), by_name["output"].view(-1, 4).amax(0))
    neurons = torch.minimum(by_name["up"], by_name["down"])
    assert torch.equal(found, torch.cat([heads, neurons]))
    hidden, width = model.config.hidden_size, model.config.intermediate_size
    assert sizes.tolist() == [hidden * hidden] * 4 + [2 * hidden] * width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regularization": "auto", "scope": "global"}, "regularization='auto': needs scope 'threshold'"),
        ({"regularization": "auto", "scope": "threshold", "threshold": 1.5}, "regularization='auto': needs scope 'threshold'"),
        ({"regularization": "automatic"}, "Did you mean 'auto'"),
        ({"score_learning_rate": 0}, "score_learning_rate=0: must be greater than 0"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruningConfig(pattern="auto", criterion="soft_movement", **settings)


def test_scores_that_cannot_reach_the_threshold_are_an_error() -> None:
    settings = {"criterion": "soft_movement", "scope": "threshold", "threshold": 0.1, "regularization": "auto", "warmup_steps": 0}
    with pytest.raises(ConfigError, match=r"score_learning_rate=0.01: must be at least 0.044 .* in 100 steps"):
        Pruner(tiny_bert(), PruningConfig(pattern="auto", cooldown_steps=0, **settings), total_steps=100)


def test_a_state_that_was_taken_stays_as_it_was() -> None:
    """Scores and moments change in place."""
    model = tiny_bert()
    pruner = Pruner(model, PruningConfig(pattern="4x1", criterion="movement", target_sparsity=0.5), total_steps=20)

    def step() -> None:
        model.zero_grad()
        model(**ragged_batch(model)).logits.square().sum().backward()
        pruner.observe()
        pruner.step()

    step()
    taken = pruner.state_dict()
    before = {name: value.clone() for name, value in taken.items()}
    step()
    assert any(not value.equal(before[name]) for name, value in pruner.state_dict().items() if "/criterion/" in name)
    pruner.load_state_dict(taken)
    step()
    assert all(value.equal(before[name]) for name, value in taken.items())
