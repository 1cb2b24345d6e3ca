"""The three calls of the pruning loop: `observe()` after backward, `step()` after `optimizer.step()`, `finish()` at the end.

A parameter always holds its masked values, so every checkpoint is a plain transformers checkpoint with true zeros, and the forward
pass costs nothing extra.

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

import copy
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.sparsity import count_zeros
from ..model.attached import attach, detach, is_attached
from ..model.sharding import differing, is_sharded, rank
from ..model.targets import Weight, body_prefixes, weights
from ..model.wrappers import bare_model, contents, transformers_models
from ..settings.config import WHILE_TRAINING, PruningConfig
from ..settings.errors import ConfigError
from .budget import Budget, make_budgets
from .costs import WEIGHTS
from .plan import PruningPlan, make_plan
from .rules import Rule, alive_units, match_rules
from .state import Companion, GradientCheck, LockedZeros, Regrowth, Rewind, under
from .statistics import Activations
from .updates import UPDATES

logger = logging.getLogger(__name__)

_STATE_VERSION = 3


class Pruner:
    """Prunes a model in any training loop.

    Args:
        model: the model, already wrapped in DDP or sharded by FSDP2 (`fully_shard`) if it will be, or an object that holds it (a
            SentenceTransformer, a SetFitModel; see `model/wrappers.py`). Its parameters are changed in place, never renamed or
            wrapped. Under LoRA the merged weights are pruned, see `model/lora.py`; other kinds of adapters are refused.
        config: what to prune, how much, how and when.
        total_steps: number of optimizer steps of the run.
        steps_per_epoch: optimizer steps per epoch; required if the config counts in epochs.
        costs: of a run that is resumed, what it measured at its start: the entries of its state below `costs/`. The rest of the
            state comes with `load_state_dict`.

    Raises:
        ConfigError: the config does not fit the model or the run. Nothing was changed.
    """

    def __init__(
        self,
        model: Any,
        config: PruningConfig,
        total_steps: int,
        steps_per_epoch: float | None = None,
        costs: Mapping[str, Tensor] | None = None,
    ) -> None:
        model = bare_model(model)
        if any(is_attached(one) for one in _marked(model)):
            raise RuntimeError(
                "A Pruner is already attached to this model; call its finish() or release() first. Two PruningCallbacks are one "
                "with `rules`."
            )
        self.model = model
        self.config = config = config.filled(**WHILE_TRAINING)
        #: Optimizer steps done so far. Set it to start pruning late in a run: the first step then catches up.
        self.steps = 0
        self._skipped = False
        _check_updates(config)
        #: The config's rules, matched to the model, and the budgets that they share.
        self.rules, self._left_out = match_rules(model, config, total_steps, steps_per_epoch, costs=costs)
        self.budgets = make_budgets(self.rules)
        # A resumed run goes on with what it measured, and no process can run a sharded model alone.
        if not costs and not any(is_sharded(parameter) for parameter in model.parameters()):
            for budget in self.budgets:
                if budget.costs.setting is not None:
                    budget.fit(model, config.cost_targets, all(rule.criterion.scores_weights for rule in budget.rules))
        self._locked = LockedZeros(model, config)
        self._regrowth = Regrowth(self.rules)
        self._rewind = Rewind(model, self.budgets)
        self._companions: dict[str, Companion] = {"locked": self._locked, "regrowth": self._regrowth, "rewind": self._rewind}
        self._gradients = GradientCheck(model)
        self._targets = self._locked.targets | {target.name: target for rule in self.rules for target in rule.targets}
        #: The weights that count in the sparsity, by name.
        self.weights = {name: self._targets[name] for rule in self.rules for name in rule.weight_names} | self._locked.weights
        for target in self._targets.values():
            if target.adapter is not None:
                target.adapter.keep_exact()
        self._rewind.before_update(self.steps)
        self._look_ahead()
        # No hook refers to the pruner, so it is freed with the last reference to it, and its hooks with it.
        self._remove_hooks = weakref.finalize(self, _release, self._gradients, [rule.seen for rule in self.rules])
        #: Whether the run still goes on, if its driver can tell; else a pruner that is referenced counts as in use.
        self.at_work: Callable[[], bool] = lambda: True
        for one in _marked(model):
            attach(one, self)
        for concern in self.concerns if rank() == 0 else ():
            logger.warning(concern)

    # ------------------------------------------------------------------------------------------------------ the three moments

    @torch.no_grad()
    def observe(self, scaled_loss: bool = False) -> None:
        """Read the complete, unscaled and clipped gradients before `optimizer.step()`; zero those of masked weights.

        Args:
            scaled_loss: whether a `GradScaler` is used (fp16). It skips the step if a gradient is not finite; such a step counts in
                the schedule, but its gradients are not observed.

        Raises:
            FloatingPointError: a gradient is NaN or infinite; names parameter and step. Nothing was changed.
            RuntimeError: the model has no gradients, or not the parameters it had when the pruner was created.
        """
        self._check_parameters()
        broken = self._gradients.broken()
        if broken and not scaled_loss:
            raise FloatingPointError(self._gradients.message(broken, self.steps + 1))
        self._skipped = bool(broken)
        self._gradients.forget()
        for budget in self.budgets:
            for rule in () if budget.is_finished(self.steps) else budget.rules:
                if self._skipped:
                    rule.seen.discard()
                    continue
                rule.seen.keep()
                rule.criterion.begin_step(budget.progress(self.steps + 1))
                for group in rule.groups:
                    rule.criterion.observe(group)
        self._apply(gradients=True)

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks if an update is due, and apply them, right after `optimizer.step()`.

        Raises:
            RuntimeError: the masks differ between processes.
        """
        self.steps += 1
        due = [budget for budget in self.budgets if not self._skipped and budget.is_due(self.steps)]
        self._apply()  # momentum moves masked weights too, and scores are read from masked values
        self._rewind.before_update(self.steps)
        if due:
            for budget in due:
                self._update(budget)
            self._check_ranks([rule for budget in due for rule in budget.rules])
            self._rewind.after_update(due, self.steps)
            self._regrowth.exchange(self._apply)
        self._look_ahead()

    def finish(self) -> None:
        """Apply the masks once more, remove the hooks and detach from the model.

        Raises:
            RuntimeError: mask updates were due but no weight is zero: they did not happen, or removed nothing.
        """
        self._apply()
        self.release()
        missed = any(budget.is_late(self.steps) for budget in self.budgets)
        if (missed or self.is_finished) and self.target_sparsity() > 0 and self.reached_sparsity() == 0:
            raise RuntimeError(
                f"{self.config.requested} was requested and no weight is zero after {self.steps} steps; "
                "are observe() and step() called around every optimizer step?"
            )

    def release(self) -> None:
        """Remove the hooks and detach from the model as it is, after an interrupted run."""
        self._remove_hooks()
        for one in _marked(self.model):
            detach(one, self)

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """A context in which forward passes count for criteria that read activations, in training or evaluation mode."""
        with ExitStack() as stack:
            for rule in self.rules:
                stack.enter_context(rule.seen.calibrating())
            yield

    # ------------------------------------------------------------------------------------------------------------- reporting

    def plan(self) -> PruningPlan:
        """Each module's effective settings, and what is left out and why; prints as tables."""
        density, sizes = self._densities(self.last_update), self._body()
        left = sum(density.get(f"{weight.name}.{weight.key}", 1.0) * size for weight, size in sizes.items())
        return make_plan(self.budgets, self._left_out, 1 - left / sum(sizes.values()) if sizes else 0.0)

    def sparsity(self) -> float:
        """Share of true zeros in the weights of the model's body, each weight counted once, as in the report and the card."""
        return _share(count_zeros([weight]) for weight in self._body())

    def reached_sparsity(self) -> float:
        """Share of true zeros in the weights that the rules name; compare it with `target_sparsity()`."""
        return _share(count_zeros([target]) for target in self.weights.values())

    def _sparsities(self) -> tuple[float, float]:
        """`sparsity()` and `reached_sparsity()`, counting the weights that they share only once."""
        body = {f"{weight.name}.{weight.key}": count_zeros([weight]) for weight in self._body()}
        named = {name: body.get(name) or count_zeros([target]) for name, target in self.weights.items()}
        return _share(body.values()), _share(named.values())

    def target_sparsity(self, step: int | None = None) -> float:
        """The sparsity that the schedules request at `step` (default: now) in the weights that the rules name."""
        density = self._densities(self.steps if step is None else step)
        sizes = {name: target.parameter.numel() for name, target in self.weights.items()}
        return 1 - sum(density[name] * size for name, size in sizes.items()) / sum(sizes.values())

    @torch.no_grad()
    def regrown(self) -> list[str]:
        """The names of modules in which a pruned weight is not zero: none after `step()`, until something else changes them.

        Collective: all processes have to call it.
        """
        names = set(self._locked.regrown())
        for rule in self.rules:
            for group, kept, alive in zip(rule.groups, rule.kept, alive_units(rule.groups)):
                if bool((alive & ~kept).any()):
                    names.add(group.name)
        return sorted(names)

    def _densities(self, step: int) -> dict[str, float]:
        """By name, the share of each weight that the schedules leave at `step`."""
        density = {name: self._locked.density(name) for name in self.weights}
        for budget in self.budgets:
            if budget.rules[0].settings.scope != "threshold":
                for name in budget.weight_names:
                    density[name] *= 1 - max(budget.requested_sparsity, budget.timeline.sparsity(step))
        return density

    def _body(self) -> dict[Weight, int]:
        """The weights of the model's body as it is now, and their sizes, without layers whose adapters cannot be read."""
        found = {}
        bodies = body_prefixes(self.model)
        pruned = tuple(body for body in bodies if any(name.startswith(body) for name in self.weights))  # of several models one
        for weight in (weight for weight in weights(self.model) if weight.name.startswith(pruned or bodies)):
            with suppress(ValueError):
                found[weight] = math.prod(weight.shape)
        return found

    def unmasked_weights(self) -> dict[str, Tensor]:
        """Name → parameter, under criteria that let weights come back, with the values that masked weights had before."""
        return self._regrowth.unmasked()

    def metrics(self) -> dict[str, float]:
        """The metrics to log: three sparsities, where a target in costs stands, and those of criteria, summed over the rules."""
        sparsity, reached = self._sparsities()
        metrics = {"sparsity": sparsity, "reached_sparsity": reached, "target_sparsity": self.target_sparsity()}
        for budget in self.budgets:
            metrics |= budget.metrics()
        for rule in self.rules:
            for name, value in rule.criterion.metrics().items():
                metrics[name] = metrics.get(name, 0.0) + value
        return metrics

    def summary(self) -> str:
        """The plan in one line: each rule's pattern, target, steps and number of updates; when members of a family are complete."""
        members = [f"{self.config.cost_target}={value:g} after step {step}" for step, value in self.members.items()]
        return "; ".join([*(rule.summary() for rule in self.rules), *members]) or "existing zeros are kept"

    @property
    def concerns(self) -> tuple[str, ...]:
        """Warnings about settings that are allowed but perhaps not intended, rule by rule."""
        return tuple(concern for rule in self.rules for concern in rule.concerns)

    @property
    def last_update(self) -> int:
        """The step of the last mask update of all rules."""
        return max((budget.timeline.last_update for budget in self.budgets), default=0)

    @property
    def members(self) -> dict[int, float]:
        """Of a family, the step after which each member is complete → its target; empty where the target is a single one."""
        return dict(zip(self.cost_budget.timeline.ends, self.config.cost_targets)) if self.config.is_family else {}

    @property
    def cost_budget(self) -> Budget:
        """The budget that meets the config's target in costs, of which there is one."""
        return next(budget for budget in self.budgets if budget.costs is not WEIGHTS)

    def copied(self) -> nn.Module:
        """A copy of the model as it is, without the hooks of this pruner."""
        found: nn.Module = copy.deepcopy(self.model, {id(rule.seen): rule.seen for rule in self.rules})
        for rule in self.rules:
            rule.seen.leave(found)
        return found

    @property
    def is_finished(self) -> bool:
        """Whether the last mask update of every rule has happened."""
        return all(budget.is_finished(self.steps) for budget in self.budgets)

    @property
    def shortfall(self) -> str | None:
        """Why pruning would be incomplete if it ended now, or None if the masks are final."""
        if self.is_finished:
            return None
        return (
            f"Pruning is not finished: the model is that of step {self.steps}, its last mask update was due at step "
            f"{self.last_update}. {self.reached_sparsity():.2%} of the weights are zero and "
            f"{self.target_sparsity(self.last_update):.2%} were requested."
        )

    # ----------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Remaining units, criterion state and side buffers, as tensors by name; `steps` is the number of optimizer steps.

        Collective: the state is that of all processes together and the same on each, so all have to call it, and one may save it.
        """
        state = {"steps": torch.tensor(self.steps), "version": torch.tensor(_STATE_VERSION)}
        for budget in self.budgets:
            requested = torch.tensor(budget.requested_sparsity, dtype=torch.float64)
            state |= {f"costs/{name}": value for name, value in budget.costs.state_dict().items()}
            for rule in budget.rules:
                state[f"{rule.name}/requested_sparsity"] = requested.clone()
                state |= {f"{rule.name}/kept/{group.name}": kept for group, kept in zip(rule.groups, rule.kept)}
                state |= {f"{rule.name}/criterion/{key}": value for key, value in rule.criterion.state_dict().items()}
                state |= {f"{rule.name}/seen/{key}": value for key, value in rule.seen.state_dict().items()}
        for kind, companion in self._companions.items():
            state |= {f"{kind}/{name}": value for name, value in companion.state_dict().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Resume from what `state_dict` returned.

        Args:
            state: the state of a pruner, for a model that holds the weights of the same moment.
            strict: require the same config and model. Otherwise a rule that `state` lacks, or holds for other units, starts without
                scores, and its units that are all zero count as removed.

        Raises:
            ValueError: the state has another version, or, if `strict`, another config or model. Nothing was changed.
        """
        if int(state.get("version", torch.tensor(-1))) != _STATE_VERSION:
            raise ValueError(f"The pruner state has version {state.get('version')}; this hf_prune reads version {_STATE_VERSION}.")
        expected = {f"{rule.name}/kept/{group.name}": group.num_units for rule in self.rules for group in rule.groups}
        found = {key: value.numel() for key, value in state.items() if "/kept/" in key}
        others = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if others and strict:
            raise ValueError(f"The pruner state belongs to a different config or model; it differs in {', '.join(others[:5])}.")
        self.steps = int(state["steps"])
        for budget in self.budgets:
            if budget.costs.measured is not None and (measured := under(state, "costs/")):
                budget.load_costs(measured, self.config.cost_targets)
            fresh = [rule for rule in budget.rules if any(key.startswith(f"{rule.name}/") for key in others)]
            for rule in budget.rules:
                if rule in fresh:
                    rule.keep(alive_units(rule.groups))
                    continue
                own = {key: value.to(rule.groups[0].device) for key, value in under(state, f"{rule.name}/").items()}
                rule.keep([own[f"kept/{group.name}"] for group in rule.groups])
                rule.criterion.load_state_dict(under(own, "criterion/"))
                rule.seen.load_state_dict(under(own, "seen/"))
            requested = [float(state[f"{rule.name}/requested_sparsity"]) for rule in budget.rules if rule not in fresh]
            budget.requested_sparsity = budget.spent() if fresh else max(requested)
        for kind, companion in self._companions.items():
            companion.load_state_dict(under(state, f"{kind}/"))
        self._apply()  # a checkpoint of adapters holds no base weights, so their zeros come from here
        self._look_ahead()

    # ------------------------------------------------------------------------------------------------------------ inner works

    def _update(self, budget: Budget) -> None:
        """Do the updates that are due: choose units, update the remaining weights, mask."""
        for rule, kept in zip(budget.rules, budget.allocate(self.steps)):
            if rule.settings.update != "zero":
                rule.compensate(rule.kept, kept)
            rule.keep(kept)
            rule.criterion.updated()
            rule.seen.reset()

    def _apply(self, gradients: bool = False) -> None:
        """Zero all that is masked, in the parameters or in their gradients."""
        self._locked.apply(gradients)
        for rule in self.rules:
            rule.apply(gradients)

    def _look_ahead(self) -> None:
        """Announce the next mask update, before which large statistics are taken; remove the hooks after the last one."""
        for budget in self.budgets:
            for rule in budget.rules:
                if budget.is_finished(self.steps):
                    rule.seen.detach()
                elif rule.seen.is_large:
                    rule.seen.next_update_in(budget.timeline.next_due(self.steps) - self.steps)

    def _check_parameters(self) -> None:
        """Raise if the optimizer does not train the parameters that will be masked."""
        present = {id(parameter) for parameter in self.model.parameters()}
        for name, target in self._targets.items():
            # During a forward pass FSDP2 replaces the shards by gathered tensors; the shards remain the parameters.
            if id(target.parameter) not in present and not is_sharded(target.parameter):
                raise RuntimeError(
                    f"{name!r} is not the parameter it was when the Pruner was created; create it after anything that replaces "
                    "parameters, such as `fully_shard`."
                )

    def _check_ranks(self, rules: list[Rule]) -> None:
        """Raise on all ranks if some masks differ between them."""
        masks = {f"{rule.name}/{group.name}": kept for rule in rules for group, kept in zip(rule.groups, rule.kept)}
        if names := differing(masks):
            raise RuntimeError(
                f"Ranks disagree at step {self.steps} about the masks of {len(names)} of {len(masks)} modules, first {names[0]!r}: "
                "their weights or gradients differ. They must start from the same weights, and observe() must see gradients that "
                "are averaged over ranks, as DDP and FSDP2 do in backward."
            )


def _share(counts: Iterable[tuple[int, int]]) -> float:
    """The share of zeros, from the zeros and the sizes of the weights."""
    zeros, elements = map(sum, zip((0, 0), *counts))
    return zeros / elements if elements else 0.0


def _marked(model: nn.Module) -> list[nn.Module]:
    """The modules that record that a pruner is attached: the transformers models in a model, or, if there is none, the model."""
    return [*transformers_models(model).values()] or [contents(model)]


def _check_updates(config: PruningConfig) -> None:
    """Raise if an update needs what training does not give it.

    Raises:
        ConfigError: a rule's update changes the bias of a layer.
    """
    for name, settings in config.resolved_rules().items():
        if UPDATES[settings.update].moves_bias:
            allowed = "changes biases, which only `prune()` gives it; while training take 'zero', 'obs' or 'sparsegpt'."
            raise ConfigError(f"{name}.update", settings.update, allowed)


def _release(gradients: GradientCheck, seen: Iterable[Activations]) -> None:
    """Take all hooks off a model."""
    gradients.release()
    for activations in seen:
        activations.detach()
