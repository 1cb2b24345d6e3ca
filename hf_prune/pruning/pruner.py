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

import contextlib
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..model.attached import attach, detach, is_attached
from ..model.masks import apply_masks, count_zeros
from ..model.sharding import differing, is_sharded, local, placed_like, rank, summed, whole
from ..model.targets import Target, Weight, bias_target, body_prefixes, check_names, selector, weight_target, weights
from ..model.wrappers import bare_model, contents, transformers_models
from ..settings.config import PruningConfig
from ..settings.errors import PruningConfigError
from .allocation import allocate, normalize
from .criteria.base import Criterion
from .plan import PruningPlan, make_plan
from .rules import Rule, alive_units, match_rules

logger = logging.getLogger(__name__)

_STATE_VERSION = 2


class Pruner:
    """Prunes a model while any loop trains it.

    Args:
        model: the model, inside DDP or sharded by FSDP2 (`fully_shard`) if it is to be, or what holds it (a SentenceTransformer, a
            SetFitModel; see `wrappers.py`); its parameters are changed in place, never renamed or wrapped. Under LoRA the merged
            weights are pruned, see `lora.py`; other kinds of adapters are refused.
        config: what to prune, how much, how and when.
        total_steps: number of optimizer steps of the run.
        steps_per_epoch: optimizer steps of an epoch, needed when the config counts in epochs.

    Raises:
        PruningConfigError: the config does not fit the model or the run. Nothing was changed.
    """

    def __init__(self, model: Any, config: PruningConfig, total_steps: int, steps_per_epoch: float | None = None) -> None:
        model = bare_model(model)
        if any(is_attached(one) for one in _marked(model)):
            raise RuntimeError(
                "A Pruner is attached to this model already; call its finish() or release() first. Two PruningCallbacks are one "
                "with `rules`."
            )
        self.model = model
        self.config = config
        #: Optimizer steps of the run that are over. Set it to begin with pruning late in a run: the first step then catches up.
        self.steps = 0
        self._skipped = False
        #: Parameter name → norm of its gradient as backward left it; clipping spreads what is not finite to all of them.
        self._norms: dict[str, Tensor] = {}
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
        trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        handles = [parameter.register_post_accumulate_grad_hook(partial(_note, self._norms, name)) for name, parameter in trained]
        # no hook holds the pruner, so it goes with the last one who has it, and the hooks go with it
        self._remove_hooks = weakref.finalize(self, _detach, handles, [rule.criterion for rule in self._rules])
        for target in self._targets.values():
            if target.adapter is not None:
                target.adapter.keep_exact()
        #: Whether the run goes on, if something can tell; whoever holds a pruner is else taken to be at it.
        self.at_work: Callable[[], bool] = lambda: True
        for one in _marked(model):
            attach(one, self)
        if rank() == 0:
            for rule in self._rules:
                for concern in rule.concerns:
                    logger.warning(concern)

    # ------------------------------------------------------------------------------------------------------ the three moments

    @torch.no_grad()
    def observe(self, scaled_loss: bool = False) -> None:
        """Read gradients, complete, unscaled and clipped, before `optimizer.step()`; drop those of masked weights.

        Args:
            scaled_loss: a `GradScaler` is at work (fp16). It skips the step when a gradient is not finite; such a step counts as a
                step of the schedule, and is no observation.

        Raises:
            FloatingPointError: a gradient is NaN or infinite; names parameter and step. Nothing was changed.
            RuntimeError: the model has no gradient at all, or other parameters than when the pruner was made.
        """
        self._check_parameters()
        broken = _not_finite({name: item.grad for name, item in self.model.named_parameters() if item.grad is not None})
        if broken and not scaled_loss:
            raise FloatingPointError(self._overflow(broken))
        self._skipped = bool(broken)
        self._norms.clear()
        for rule in self._rules:
            if rule.over(self.steps):
                continue
            if self._skipped:
                rule.criterion.discard()
                continue
            rule.criterion.begin_step(rule.progress(self.steps + 1))
            for group in rule.groups:
                rule.criterion.observe(group)
        self._apply(gradients=True)

    @torch.no_grad()
    def step(self) -> None:
        """Change masks if an update is due, and apply them; right after `optimizer.step()`.

        Raises:
            RuntimeError: several processes train together and came to different masks.
        """
        self.steps += 1
        due = [rule for rule in self._rules if not self._skipped and rule.due(self.steps)]
        self._apply()  # momentum moves masked weights too, and scores are read from masked values
        self._keep_for_rewind()
        if not due:
            return
        for rule in due:
            self._update(rule)
        self._check_ranks(due)
        for rule in due:
            if rule.settings.schedule == "lottery":
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(self._rewind[name])
        self._exchange_values()
        for rule in due:
            if rule.over(self.steps):
                rule.criterion.detach()
        if not self._lotteries():
            self._rewind.clear()

    def finish(self) -> None:
        """Apply masks once more, remove hooks and let go of the model.

        Raises:
            RuntimeError: mask updates were due, and there is no sparsity: they did not happen, or all of them removed nothing.
        """
        self._apply()
        self.release()
        missed = any(rule.behind(self.steps) for rule in self._rules)
        if (missed or self.done) and self.target_sparsity() > 0 and self.reached_sparsity() == 0:
            raise RuntimeError(
                f"target_sparsity={self.config.target_sparsity} was asked for and no weight is zero after {self.steps} steps; "
                "are observe() and step() called around every optimizer step?"
            )

    def release(self) -> None:
        """Remove hooks and let go of the model as it is, after a run that was cut short."""
        self._remove_hooks()
        for one in _marked(self.model):
            detach(one, self)

    # ------------------------------------------------------------------------------------------------------------- reporting

    def plan(self) -> PruningPlan:
        """Each module's effective setting, and what is left out and why; prints as a table."""
        density, sizes = self._densities(self.last_update), self._body()
        left = sum(density.get(f"{weight.name}.{weight.key}", 1.0) * size for weight, size in sizes.items())
        return make_plan(self._rules, self._left_out, 1 - left / sum(sizes.values()) if sizes else 0.0)

    def sparsity(self) -> float:
        """Share of true zeros in the weights of the model's body, each weight counted once: what the report and the card say."""
        zeros, elements = count_zeros(self._body())
        return zeros / elements if elements else 0.0

    def reached_sparsity(self) -> float:
        """How much of the weights that the rules name is zero; compare it with `target_sparsity()`."""
        zeros, elements = count_zeros(self._weights.values())
        return zeros / elements

    def target_sparsity(self, step: int | None = None) -> float:
        """The sparsity that the schedules ask for at `step`, by default the current one, in the weights that the rules name."""
        density = self._densities(self.steps if step is None else step)
        sizes = {name: target.parameter.numel() for name, target in self._weights.items()}
        return 1 - sum(density[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def _densities(self, step: int) -> dict[str, float]:
        """By name, the share of each weight that the schedules leave at `step`."""
        density = {name: 1.0 for name in self._weights if name not in self._locked}
        density |= {name: int(whole(mask.sum())) / mask.numel() for name, mask in self._locked.items() if name in self._weights}
        for rule in self._rules:
            if rule.settings.scope != "threshold":
                for name in rule.weight_names:
                    density[name] = min(density[name], 1.0) * (1 - max(rule.asked, rule.timeline.sparsity(step)))
        return density

    def _body(self) -> dict[Weight, int]:
        """The weights of the model's body as it is now, and their sizes, without layers whose adapters cannot be read."""
        found = {}
        bodies = body_prefixes(self.model)
        pruned = tuple(body for body in bodies if any(name.startswith(body) for name in self._weights))  # of several models one
        for weight in (weight for weight in weights(self.model) if weight.name.startswith(pruned or bodies)):
            with contextlib.suppress(ValueError):
                found[weight] = math.prod(weight.shape)
        return found

    @torch.no_grad()
    def regrown(self) -> list[str]:
        """The names of modules in which a pruned weight is not zero: after `step()` none, until something else writes to them.

        All processes have to ask together.
        """
        names = {name for name, mask in self._locked.items() if bool(whole((self._targets[name].value() * ~mask).any()))}
        for rule in self._rules:
            for group, kept, alive in zip(rule.groups, rule.kept, alive_units(rule.groups)):
                if bool((alive & ~kept).any()):
                    names.add(group.name)
        return sorted(names)

    def unmasked_weights(self) -> dict[str, Tensor]:
        """By name, the parameters under a criterion that lets weights come back, with the values that masked ones left with."""
        return {name: self._targets[name].value() + away for name, away in self._values.items()}

    def figures(self) -> dict[str, float]:
        """What a log shall say: the three sparsities, and what the criteria report, summed over the rules."""
        figures = {
            "sparsity": self.sparsity(),
            "reached_sparsity": self.reached_sparsity(),
            "target_sparsity": self.target_sparsity(),
        }
        for rule in self._rules:
            for name, value in rule.criterion.figures().items():
                figures[name] = figures.get(name, 0.0) + value
        return figures

    def summary(self) -> str:
        """What is going to happen, in a line: each rule's pattern, target, steps and number of updates."""
        return "; ".join(rule.summary() for rule in self._rules) or "the zeros that are there stay"

    @property
    def last_update(self) -> int:
        """The step of the last mask update of all rules."""
        return max((rule.timeline.last_update for rule in self._rules), default=0)

    @property
    def done(self) -> bool:
        """Whether the last mask update of every rule has happened."""
        return all(rule.over(self.steps) for rule in self._rules)

    @property
    def shortfall(self) -> str | None:
        """What a model lacks whose pruning ended here, or None if it has its final masks."""
        if self.done:
            return None
        return (
            f"Pruning is not finished: the model is that of step {self.steps}, its last mask update was due at step "
            f"{self.last_update}. {self.reached_sparsity():.2%} of the weights are zero and "
            f"{self.target_sparsity(self.last_update):.2%} were asked for."
        )

    # ----------------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Tensor]:
        """Units left, criterion state and side buffers, as tensors by name; `steps` counts the optimizer steps seen.

        The state of all processes together, the same on each: all of them have to ask for it, and one may save it.
        """
        state = {"steps": torch.tensor(self.steps), "version": torch.tensor(_STATE_VERSION)}
        for rule in self._rules:
            state[f"{rule.name}/asked"] = torch.tensor(rule.asked, dtype=torch.float64)
            state |= {f"{rule.name}/kept/{group.name}": kept for group, kept in zip(rule.groups, rule.kept)}
            state |= {f"{rule.name}/criterion/{key}": value for key, value in rule.criterion.state_dict().items()}
        for kind, buffers in (("locked", self._locked), ("values", self._values), ("rewind", self._rewind)):
            state |= {f"{kind}/{name}": whole(value) for name, value in buffers.items()}
        return state | {f"base/{name}": parameter.detach().clone() for name, parameter in self._regrown_bases().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: the state of a pruner, for a model that holds the weights of the same moment.
            strict: the pruner had the same config and model. Otherwise a rule that `state` does not hold, or holds for other units,
                begins with no scores; its units that are all zero are gone.

        Raises:
            ValueError: the state is of another version, or strictly of another config or model. Nothing was changed.
        """
        if int(state.get("version", torch.tensor(-1))) != _STATE_VERSION:
            raise ValueError(f"The pruner state has version {state.get('version')}, this hf_prune reads {_STATE_VERSION}.")
        expected = {f"{rule.name}/kept/{group.name}": group.num_units for rule in self._rules for group in rule.groups}
        found = {key: value.numel() for key, value in state.items() if "/kept/" in key}
        others = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if others and strict:
            raise ValueError(f"The pruner state belongs to another config or model; it differs in {', '.join(others[:5])}.")
        self.steps = int(state["steps"])
        for rule in self._rules:
            if any(key.startswith(f"{rule.name}/") for key in others):
                rule.keep(alive_units(rule.groups))
                rule.asked = sum(int((~kept).sum()) * group.unit_size for group, kept in zip(rule.groups, rule.kept)) / rule.size
            else:
                rule.keep([state[f"{rule.name}/kept/{group.name}"].to(group.device) for group in rule.groups])
                rule.asked = float(state[f"{rule.name}/asked"])
                rule.criterion.load_state_dict(_under(state, f"{rule.name}/criterion/", rule.groups[0].device))
            if rule.over(self.steps):
                rule.criterion.detach()
        parameters = {name: target.parameter for name, target in self._targets.items()}
        self._locked = _placed(state, "locked/", parameters)
        self._values |= {name: value for name, value in _placed(state, "values/", parameters).items() if name in self._values}
        self._rewind = _placed(state, "rewind/", dict(self.model.named_parameters())) if self._lotteries() else {}
        with torch.no_grad():
            for name, parameter in self._regrown_bases().items():
                if f"base/{name}" in state:
                    parameter.copy_(state[f"base/{name}"])
            self._apply()  # a checkpoint of adapters holds no base weights, so their zeros come from here

    # ------------------------------------------------------------------------------------------------------------ inner works

    def _update(self, rule: Rule) -> None:
        step = rule.timeline.last_due(self.steps)
        settings, progress = rule.settings, rule.progress(step)
        rule.asked = max(rule.asked, rule.timeline.sparsity(step))
        scores = [rule.criterion.scores(group) for group in rule.groups]
        comes_back = rule.criterion.regrows
        removed = allocate(
            rule.groups,
            normalize(scores, settings.normalization),
            [torch.zeros_like(kept) if comes_back else ~kept for kept in rule.kept],
            rule.asked,
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
        names, exclude, found = self.config.target_modules, self.config.exclude_modules, list(weights(self.model))
        alone = self.config.pattern is None  # else they are the pattern's names, and checked with it
        if alone:
            for field, given in (("target_modules", names), ("exclude_modules", exclude)):
                check_names(given, [weight.name for weight in found], field)
        chosen = selector(self.model, names, exclude, "target_modules")
        for weight in found:
            if not chosen(weight.name):
                continue
            if weight.left_out:
                if alone and names is not None:
                    raise PruningConfigError("target_modules", names, f"names {weight.name!r}, but {weight.left_out}.")
                continue
            target, bias = weight_target(weight.name, weight.module), bias_target(weight.name, weight.module)
            self._weights.setdefault(target.name, target)
            matrix = target.weight() != 0
            if bool(matrix.all()):
                continue
            self._targets.setdefault(target.name, target)
            self._locked[target.name] = target.from_matrix(matrix)
            if bias is not None:
                self._targets.setdefault(bias.name, bias)
                kept = matrix.any(dim=1, keepdim=True) | (bias.matrix(bias.parameter.detach()) != 0)
                self._locked[bias.name] = bias.from_matrix(kept)

    def _check_parameters(self) -> None:
        """Raise if the optimizer trains other parameters than those that will be masked."""
        present = {id(parameter) for parameter in self.model.parameters()}
        for name, target in self._targets.items():
            # What FSDP2 gathers for a forward pass stands in for the shards, which stay the parameters.
            if id(target.parameter) not in present and not is_sharded(target.parameter):
                raise RuntimeError(
                    f"{name!r} is another parameter than when the Pruner was made; make it after whatever replaces parameters, "
                    "such as `fully_shard`."
                )

    def _check_ranks(self, rules: list[Rule]) -> None:
        """Raise on all ranks if the masks of some rules are not the same everywhere."""
        masks = {f"{rule.name}/{group.name}": kept for rule in rules for group, kept in zip(rule.groups, rule.kept)}
        if names := differing(masks):
            raise RuntimeError(
                f"Ranks disagree at step {self.steps} about the masks of {len(names)} of {len(masks)} modules, first {names[0]!r}: "
                "their weights or gradients differ. They must start from the same weights, and observe() must see gradients that "
                "are averaged over ranks, as DDP and FSDP2 do in backward."
            )

    def _keep_for_rewind(self) -> None:
        """At the start of a lottery schedule, or at the first step of a run that began later, keep every parameter's value."""
        starts = [rule.timeline.begin for rule in self._lotteries()]
        if self.steps in starts or (starts and not self._rewind and self.steps > min(starts)):
            self._rewind = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def _overflow(self, broken: list[str]) -> str:
        """The message about gradients that are not finite: where backward met the first of them."""
        first, *more = [name for name, norm in self._norms.items() if not torch.isfinite(norm)] or broken
        others = f", as are those of {len(more)} more parameters" if more else ""
        cause = ". All gradients are, so the loss seems to be" if len(more) + 1 == len(self._norms) else ""
        return f"Step {self.steps + 1}: the gradient of {first!r} is NaN or infinite{others}{cause}. No weight was changed."

    def _lotteries(self) -> list[Rule]:
        """The rules that have lottery tickets to draw."""
        return [rule for rule in self._rules if rule.settings.schedule == "lottery" and not rule.over(self.steps)]


def _marked(model: nn.Module) -> list[nn.Module]:
    """What says that a pruner is attached: the transformers models in a model, whoever wraps them; without any the model itself."""
    return [*transformers_models(model).values()] or [contents(model)]


def _not_finite(gradients: Mapping[str, Tensor]) -> list[str]:
    """The names of the gradients that hold NaN or infinity; in one pass and with one synchronisation if there are none.

    Raises:
        RuntimeError: there is no gradient.
    """
    if not gradients:
        raise RuntimeError(
            "No parameter has a gradient. Call observe() after backward and before zero_grad(); an optimizer that steps inside "
            "backward cannot be used."
        )
    norm = torch.nn.utils.get_total_norm([_values(gradient) for gradient in gradients.values()])
    if any(is_sharded(gradient) for gradient in gradients.values()):
        norm = summed(norm)
    if bool(torch.isfinite(norm)):
        return []
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(_values(whole(gradient))).all())]


def _values(gradient: Tensor) -> Tensor:
    """What of a gradient is on this rank, and of a sparse one (`nn.Embedding(sparse=True)`) the rows that it has."""
    return gradient.coalesce().values() if gradient.is_sparse else local(gradient)


def _note(norms: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """The hook of a parameter whose gradient is there."""
    if parameter.grad is not None:
        norms[name] = torch.linalg.vector_norm(_values(parameter.grad.detach()))


def _detach(handles: list[RemovableHandle], criteria: list[Criterion]) -> None:
    """Take all hooks off a model."""
    for criterion in criteria:
        criterion.detach()
    for handle in handles:
        handle.remove()


def _under(state: Mapping[str, Tensor], prefix: str, device: torch.device) -> dict[str, Tensor]:
    """The entries of a state whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value.to(device) for key, value in state.items() if key.startswith(prefix)}


def _placed(state: Mapping[str, Tensor], prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state that belong to parameters, where those are."""
    named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {name: placed_like(value.to(parameters[name].device), parameters[name]) for name, value in named.items()}
