"""The pruning loop's three moments: `observe()` after backward, `step()` after `optimizer.step()`, `finish()` at the end.

A parameter always holds its masked values, so any checkpoint at any moment is a plain transformers checkpoint with true zeros, and
forward costs nothing extra.

```python
pruner = Pruner(model, PruningConfig(pattern="head", target_sparsity=0.5), total_steps=len(loader) * epochs)
for batch in ...:
    model(**batch).loss.backward()
    pruner.observe()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
pruner.finish()
```
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..allocation import allocate, normalize
from ..architectures.blocks import unwrapped
from ..config import PruningConfig
from ..masks import apply_masks, count_zeros
from ..targets import Target, bias_target, body_prefix, names_module, prunable_modules, weight_target
from .plan import PruningPlan, make_plan
from .rules import Rule, match_rules

_STATE_VERSION = 1


class Pruner:
    """Prunes a model while any loop trains it.

    Args:
        model: the model; its parameters are changed in place, never renamed or wrapped. With LoRA adapters, the merged weights are
            pruned, see `lora.py`; adapters of other kinds are refused.
        config: what to prune, how much, how and when.
        total_steps: number of optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch, needed when the config counts in epochs.

    Raises:
        PruningConfigError: the config does not fit the model or the run. Nothing was changed.
    """

    def __init__(self, model: nn.Module, config: PruningConfig, total_steps: int, steps_per_epoch: float | None = None) -> None:
        if getattr(unwrapped(model), "_hf_prune_attached", False):
            raise RuntimeError("A Pruner is attached to this model already; call its finish() first.")
        self.model = model
        self.config = config
        #: Optimizer steps seen.
        self.steps = 0
        self._rules, self._left_out = match_rules(model, config, total_steps, steps_per_epoch)
        views = [view for rule in self._rules for group in rule.groups for view in (*group.weights, *group.biases)]
        self._targets: dict[str, Target] = {view.target.name: view.target for view in views}
        self._weights: dict[str, Target] = {name: self._targets[name] for rule in self._rules for name in rule.weight_names}
        #: Parameter name → mask of the zeros that `keep_zeros` holds.
        self._locked: dict[str, Tensor] = {}
        if config.keep_zeros:
            self._lock_zeros()
        #: Parameter name → values that masked weights left with, where a criterion lets them come back.
        self._values: dict[str, Tensor] = {}
        #: Parameter name → value to rewind to, while a lottery schedule runs.
        self._rewind: dict[str, Tensor] = {}
        for rule in self._rules:
            if rule.criterion.regrows:
                views = [view for group in rule.groups for view in (*group.weights, *group.biases)]
                self._values |= {view.target.name: torch.zeros_like(view.target.parameter) for view in views}
                rule.criterion.values = self._values  # type: ignore[attr-defined]
            rule.criterion.attach(model, rule.groups)
        self._keep_for_rewind()
        for target in self._targets.values():
            if target.adapter is not None:
                target.adapter.keep_exact()
        unwrapped(model)._hf_prune_attached = True  # type: ignore[assignment]

    # ------------------------------------------------------------------------------------------------------ the three moments

    @torch.no_grad()
    def observe(self) -> None:
        """Read gradients, complete, unscaled and clipped, before `optimizer.step()`; drop those of masked weights."""
        for rule in self._rules:
            if self.steps < rule.timeline.last_update:
                rule.criterion.progress = rule.progress(self.steps + 1)
                for group in rule.groups:
                    rule.criterion.observe(group)
        self._apply(gradients=True)

    @torch.no_grad()
    def step(self) -> None:
        """Change masks if an update is due, and apply them; right after `optimizer.step()`."""
        self.steps += 1
        due = [rule for rule in self._rules if rule.timeline.is_due(self.steps)]
        self._apply()  # momentum moves masked weights too, and scores are read from masked values
        self._keep_for_rewind()
        if not due:
            return
        for rule in due:
            self._update(rule)
        for rule in due:
            if rule.settings.schedule == "lottery":
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self._rewind[name])
        self._exchange_values()
        for rule in due:
            if self.steps >= rule.timeline.last_update:
                rule.criterion.detach()
        if all(self.steps >= rule.timeline.last_update for rule in self._rules if rule.settings.schedule == "lottery"):
            self._rewind.clear()

    def finish(self) -> None:
        """Apply masks once more, remove hooks and let go of the model.

        Raises:
            RuntimeError: the run asked for sparsity and there is none.
        """
        self._apply()
        self.release()
        if self.target_sparsity() > 0 and self.sparsity() == 0:
            raise RuntimeError(
                f"target_sparsity={self.config.target_sparsity} was asked for and no weight is zero after {self.steps} steps; "
                "are observe() and step() called around every optimizer step?"
            )

    def release(self) -> None:
        """Remove hooks and let go of the model as it is, after a run that was cut short."""
        for rule in self._rules:
            rule.criterion.detach()
        unwrapped(self.model)._hf_prune_attached = False  # type: ignore[assignment]

    # ------------------------------------------------------------------------------------------------------------- reporting

    def plan(self) -> PruningPlan:
        """Each module's effective setting, and what is left out and why; prints as a table."""
        return make_plan(self._rules, self._left_out)

    def sparsity(self) -> float:
        """Share of true zeros in the weights that the rules name, each weight counted once."""
        zeros, elements = count_zeros(self._weights.values())
        return zeros / elements

    def target_sparsity(self) -> float:
        """The sparsity that the schedules ask for at the current step, over the same weights."""
        density = {name: 1.0 for name in self._weights if name not in self._locked}
        density |= {name: float(mask.float().mean()) for name, mask in self._locked.items() if name in self._weights}
        for rule in self._rules:
            if rule.settings.scope != "threshold":
                for name in rule.weight_names:
                    density[name] = min(density[name], 1.0) * (1 - rule.timeline.sparsity(self.steps))
        sizes = {name: target.parameter.numel() for name, target in self._weights.items()}
        return 1 - sum(density[name] * size for name, size in sizes.items()) / sum(sizes.values())

    @property
    def last_update(self) -> int:
        """The step of the last mask update of all rules."""
        return max((rule.timeline.last_update for rule in self._rules), default=0)

    @property
    def done(self) -> bool:
        """Whether the last mask update of every rule has happened."""
        return self.steps >= self.last_update

    # ----------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Units left, criterion state and side buffers, as tensors by name; `steps` counts the optimizer steps seen."""
        state = {"steps": torch.tensor(self.steps), "version": torch.tensor(_STATE_VERSION)}
        for rule in self._rules:
            state |= {f"{rule.name}/kept/{group.name}": kept for group, kept in zip(rule.groups, rule.kept)}
            state |= {f"{rule.name}/criterion/{key}": value for key, value in rule.criterion.state_dict().items()}
        for kind, buffers in (("locked", self._locked), ("values", self._values), ("rewind", self._rewind)):
            state |= {f"{kind}/{name}": value for name, value in buffers.items()}
        return state | {f"base/{name}": parameter.detach().clone() for name, parameter in self._regrown_bases().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned, for a pruner of the same config and model.

        Raises:
            ValueError: the state is of another version, config or model. Nothing was changed.
        """
        if int(state.get("version", torch.tensor(-1))) != _STATE_VERSION:
            raise ValueError(f"The pruner state has version {state.get('version')}, this hf_prune reads {_STATE_VERSION}.")
        expected = {f"{rule.name}/kept/{group.name}": group.num_units for rule in self._rules for group in rule.groups}
        found = {key: value.numel() for key, value in state.items() if "/kept/" in key}
        if expected != found:
            differing = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            raise ValueError(f"The pruner state belongs to another config or model; it differs in {', '.join(differing[:5])}.")
        self.steps = int(state["steps"])
        for rule in self._rules:
            rule.keep([state[f"{rule.name}/kept/{group.name}"].to(group.device) for group in rule.groups])
            rule.criterion.load_state_dict(_under(state, f"{rule.name}/criterion/", rule.groups[0].device))
            if self.steps >= rule.timeline.last_update:
                rule.criterion.detach()
        device = next(self.model.parameters()).device
        self._locked = _under(state, "locked/", device)
        self._values |= _under(state, "values/", device)
        self._rewind = _under(state, "rewind/", device)
        with torch.no_grad():
            for name, parameter in self._regrown_bases().items():
                parameter.copy_(state[f"base/{name}"])
            self._apply()  # a checkpoint of adapters holds no base weights, so their zeros come from here

    # ------------------------------------------------------------------------------------------------------------ inner works

    def _update(self, rule: Rule) -> None:
        settings, progress = rule.settings, rule.progress(self.steps)
        scores = [rule.criterion.scores(group) for group in rule.groups]
        comes_back = rule.criterion.regrows
        removed = allocate(
            rule.groups,
            normalize(scores, settings.normalization),
            [torch.zeros_like(kept) if comes_back else ~kept for kept in rule.kept],
            rule.timeline.sparsity(self.steps),
            settings.scope,
            floor=settings.min_sparsity_per_module * progress,
            cap=settings.max_sparsity_per_module,
            threshold=None if settings.threshold is None else settings.threshold * progress,
        )
        rule.keep([~gone for gone in removed])
        rule.criterion.updated()

    def _apply(self, gradients: bool = False) -> None:
        """Zero whatever is masked, in the parameters or in their gradients."""
        apply_masks(self._targets, self._locked, gradients)
        for rule in self._rules:
            if rule.removed_any:
                for group, kept in zip(rule.groups, rule.kept):
                    group.apply(kept, gradients)

    def _exchange_values(self) -> None:
        """Bring back the values of weights whose mask was lifted, mask, and put aside what that takes away."""
        for name, away in self._values.items():
            target = self._targets[name]
            restored = target.parameter + away
            away += target.value()
            target.parameter.copy_(restored)
        self._apply()
        for name, away in self._values.items():
            away *= self._targets[name].value() == 0

    def _regrown_bases(self) -> dict[str, Tensor]:
        """Weights under an adapter that may have come back with another value than the base model's."""
        return {name: self._targets[name].parameter for name in self._values if self._targets[name].adapter is not None}

    def _lock_zeros(self) -> None:
        """Hold the zeros of every weight that the config's `target_modules` names, and the biases of rows that are all zero."""
        names, prefix = self.config.target_modules, body_prefix(self.model)
        for name, module in prunable_modules(self.model):
            chosen = name.startswith(prefix) if names is None else names_module(names, name)
            if not chosen or names_module(self.config.exclude_modules, name):
                continue
            target, bias = weight_target(name, module), bias_target(name, module)
            self._weights.setdefault(target.name, target)
            matrix = target.weight() != 0
            if bool(matrix.all()):
                continue
            self._targets.setdefault(target.name, target)
            self._locked[target.name] = target.from_matrix(matrix)
            if bias is not None:
                self._targets.setdefault(bias.name, bias)
                self._locked[bias.name] = matrix.any(dim=1) | (bias.parameter.detach() != 0)

    def _keep_for_rewind(self) -> None:
        """At the start of a lottery schedule, keep every parameter's value."""
        starts = {rule.timeline.begin for rule in self._rules if rule.settings.schedule == "lottery"}
        if self.steps in starts:
            self._rewind = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


def _under(state: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The entries of a state whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value.to(device) for key, value in state.items() if key.startswith(prefix)}
