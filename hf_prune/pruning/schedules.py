"""Schedules: sparsity as a function of progress, the steps at which masks change, and defaults that depend on the run's length.

Progress p runs from 0 at the end of warm-up to 1 at the start of cool-down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


def constant(progress: float, initial: float, target: float) -> float:
    """The target at once, at the end of warm-up."""
    return target


def linear(progress: float, initial: float, target: float) -> float:
    """s₀ + (s − s₀)·p."""
    return initial + (target - initial) * progress


def cubic(progress: float, initial: float, target: float) -> float:
    """s + (s₀ − s)·(1 − p)³ (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878, eq. 1)."""
    return target + (initial - target) * (1 - progress) ** 3


def exp(progress: float, initial: float, target: float) -> float:
    """1 − (1 − s₀)·((1 − s)/(1 − s₀))^p: density falls geometrically, as in Intel Neural Compressor and lottery tickets."""
    return 1 - (1 - initial) * math.pow((1 - target) / (1 - initial), progress)


def cos(progress: float, initial: float, target: float) -> float:
    """s₀ + (s − s₀)·(1 − cos(pπ/2)), as in Intel Neural Compressor."""
    return initial + (target - initial) * (1 - math.cos(progress * math.pi / 2))


def cube(progress: float, initial: float, target: float) -> float:
    """s₀ + (s − s₀)·p³, as in Intel Neural Compressor."""
    return initial + (target - initial) * progress**3


def polynomial(exponent: int) -> Callable[[float, float, float], float]:
    """s + (s₀ − s)·(1 − p)^k; k = 3 is `cubic`."""
    return lambda progress, initial, target: target + (initial - target) * (1 - progress) ** exponent


#: Name → function of (progress, initial sparsity, target sparsity). A lottery ticket's density falls geometrically; the pruner
#: rewinds its weights (Frankle and Carbin 2019, https://arxiv.org/abs/1803.03635).
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
    "exp": exp,
    "cos": cos,
    "cube": cube,
    "lottery": exp,
}


def schedule(name: str) -> Callable[[float, float, float], float]:
    """The function of a schedule's name; `polynomial(k)` is made on demand."""
    if name.startswith("polynomial("):
        return polynomial(int(name.removeprefix("polynomial(").removesuffix(")")))
    return SCHEDULES[name]


def phases(total_steps: int, warmup: int | None, cooldown: int | None) -> tuple[int, int]:
    """Steps of warm-up and cool-down; by default a tenth of the run, and a third of what is left after warm-up.

    If only one of them is given, the default of the other leaves steps for pruning.
    """
    if warmup is None:
        warmup = max(total_steps - (cooldown or 0), 0) // 10
    if cooldown is None:
        cooldown = max(total_steps - warmup, 0) // 3
    return warmup, cooldown


def spacing(steps: int, schedule: str, frequency: int | None, updates: int | None) -> float:
    """Steps between mask updates when pruning takes `steps` steps, 1 or more.

    If neither `frequency` nor `updates` is given, there are 20 updates, or more in a long run: one every 50 steps. A lottery draws
    5 tickets, since training starts again after each.
    """
    if updates is None and frequency is None:
        return min(max(steps / 20, 1), 50) if schedule != "lottery" else max(steps / 5, 1)
    return max(steps / updates, 1) if updates is not None else float(frequency or 1)


@dataclass(frozen=True)
class Timeline:
    """When masks change and to what sparsity. Steps count from 1: step t is the t-th optimizer step.

    Attributes:
        begin: last step of warm-up, after which the first update happens (after step 1 without warm-up).
        end: step of the last update; masks are frozen after it.
        frequency: steps between updates, 1 or more; a fraction spreads them as evenly as whole steps allow.
        schedule: a name for `schedule()`.
        initial, target: first and final sparsity.
        total: steps of the run; those after the last update are for recovery.
    """

    begin: int
    end: int
    frequency: float
    schedule: str
    initial: float
    target: float
    total: int

    @property
    def last_update(self) -> int:
        """The step of the last update."""
        return max(self.begin, 1) if self.schedule == "constant" else self.end

    @property
    def recovery(self) -> int:
        """Steps after the last update."""
        return self.total - self.last_update

    @property
    def updates(self) -> list[int]:
        """The steps after which masks change to a sparsity above 0, in order."""
        last = self.last_update
        counts = range(math.ceil((last - self.begin) / self.frequency) + 1)
        steps = {self.begin + math.floor(count * self.frequency + 0.5) for count in counts}
        due = {step for step in steps if max(self.begin, 1) <= step < last} | {last}
        return sorted(step for step in due if self.sparsity(step) > 0)

    def is_due(self, step: int) -> bool:
        """Whether masks change right after optimizer step `step`."""
        if step == self.last_update:
            return True
        return max(self.begin, 1) <= step < self.last_update and self._latest(step) == step

    def last_due(self, step: int) -> int:
        """The latest step up to `step` right after which masks change, 0 if none has come."""
        if step >= self.last_update:
            return self.last_update
        latest = self._latest(step)
        return latest if latest >= max(self.begin, 1) else 0

    def next_due(self, step: int) -> int:
        """The first step after `step` right after which masks change, or the last one of all."""
        first = max(step + 1, self.begin, 1)
        return next((later for later in range(first, self.last_update) if self.is_due(later)), self.last_update)

    def _latest(self, step: int) -> int:
        """The latest multiple of `frequency` after `begin`, in whole steps, up to `step`."""
        count = math.floor((step - self.begin + 0.5) / self.frequency)
        found = self.begin + math.floor(count * self.frequency + 0.5)
        return found if found <= step else self.begin + math.floor((count - 1) * self.frequency + 0.5)

    def sparsity(self, step: int) -> float:
        """The sparsity requested at `step`."""
        if step < max(self.begin, 1):
            return 0.0
        if step >= self.last_update:
            return self.target
        progress = (step - self.begin) / (self.end - self.begin)
        return schedule(self.schedule)(progress, self.initial, self.target)

    @property
    def ends(self) -> list[int]:
        """The last step of each stage, of which there is one."""
        return [self.total]

    def aimed_at(self, targets: Sequence[float]) -> Timeline:
        """The same for another final sparsity, one for each stage."""
        (target,) = targets
        return replace(self, target=target)


@dataclass(frozen=True)
class Stages:
    """Timelines one after another, for a family of models from one run: each begins with the sparsity with which the last ended.

    The last step of a stage belongs to it, and so to its target: the masks of the next change after it. Attributes and methods are
    those of a [`Timeline`].
    """

    timelines: tuple[Timeline, ...]

    @property
    def schedule(self) -> str:
        """How sparsity rises in each stage."""
        return self.timelines[0].schedule

    @property
    def begin(self) -> int:
        """The last step of warm-up."""
        return self.timelines[0].begin

    @property
    def target(self) -> float:
        """The final sparsity, of the last stage."""
        return self.timelines[-1].target

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.timelines[-1].total

    @property
    def last_update(self) -> int:
        """The step of the last update of all stages."""
        return self.timelines[-1].last_update

    @property
    def recovery(self) -> int:
        """Steps after the last update of all."""
        return self.timelines[-1].recovery

    @property
    def updates(self) -> list[int]:
        """The steps after which masks change to a sparsity above 0, in order."""
        return [step for start, timeline in self._started() for step in timeline.updates if step > start]

    @property
    def ends(self) -> list[int]:
        """The last step of each stage, at which the model has its target."""
        return [timeline.total for timeline in self.timelines]

    def is_due(self, step: int) -> bool:
        """Whether masks change right after optimizer step `step`."""
        return self._at(step).is_due(step)

    def last_due(self, step: int) -> int:
        """The latest step up to `step` right after which masks change, 0 if none has come."""
        latest = (timeline.last_due(step) for start, timeline in reversed(self._started()) if timeline.last_due(step) > start)
        return next(latest, 0)

    def next_due(self, step: int) -> int:
        """The first step after `step` right after which masks change, or the last one of all."""
        later = (timeline.next_due(max(step, start)) for start, timeline in self._started() if step < timeline.last_update)
        return next(later, self.last_update)

    def sparsity(self, step: int) -> float:
        """The sparsity requested at `step`."""
        return self._at(step).sparsity(step)

    def aimed_at(self, targets: Sequence[float]) -> Stages:
        """The same for other final sparsities, one for each stage."""
        begins = (self.timelines[0].initial, *targets)
        return Stages(tuple(replace(part, initial=low, target=high) for part, low, high in zip(self.timelines, begins, targets)))

    def _at(self, step: int) -> Timeline:
        """The stage that a step belongs to."""
        return next((timeline for timeline in self.timelines if step <= timeline.total), self.timelines[-1])

    def _started(self) -> list[tuple[int, Timeline]]:
        """Each stage with the last step before it."""
        return list(zip((0, *self.ends), self.timelines))


def stages(total_steps: int, warmup: int, cooldown: int, number: int) -> list[tuple[int, int, int]]:
    """What comes after warm-up in equal parts, each with an equal part of the cool-down at its end.

    Returns:
        For each stage the last step before it, the last step at which it prunes, and its last step.
    """
    ends = [warmup + (total_steps - warmup) * place // number for place in range(number + 1)]
    rests = [cooldown * place // number for place in range(number + 1)]
    return [(start, end - (after - before), end) for start, end, before, after in zip(ends, ends[1:], rests, rests[1:])]
