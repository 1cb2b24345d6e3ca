"""Schedules equal their formulas, at first, last and every update step."""

from __future__ import annotations

import math

import pytest

from hf_prune.pruning.schedules import SCHEDULES, Stages, Timeline, phases, spacing, stages
from hf_prune.settings.checks import SCHEDULES as NAMES

FORMULAS = {
    "constant": lambda p, a, b: b,
    "linear": lambda p, a, b: a + (b - a) * p,
    "cubic": lambda p, a, b: b + (a - b) * (1 - p) ** 3,
    "exp": lambda p, a, b: 1 - (1 - a) * ((1 - b) / (1 - a)) ** p,
    "lottery": lambda p, a, b: 1 - (1 - a) * ((1 - b) / (1 - a)) ** p,
    "cos": lambda p, a, b: a + (b - a) * (1 - math.cos(p * math.pi / 2)),
    "cube": lambda p, a, b: a + (b - a) * p**3,
    "polynomial(2)": lambda p, a, b: b + (a - b) * (1 - p) ** 2,
    "polynomial(3)": lambda p, a, b: b + (a - b) * (1 - p) ** 3,
}


def test_the_config_knows_every_schedule() -> None:
    assert set(NAMES) - {"polynomial(k)"} == set(SCHEDULES) == {name for name in FORMULAS if not name.startswith("polynomial")}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("begin", "end", "frequency"), [(0, 100, 10), (20, 95, 10), (0, 7, 50), (3, 4, 1), (50, 100, 7)])
def test_every_update(name: str, begin: int, end: int, frequency: int) -> None:
    timeline = Timeline(begin, end, frequency, name, initial=0.1, target=0.9, total=end + 5)
    updates = [step for step in range(1, 201) if timeline.is_due(step)]
    first = max(begin, 1)
    if name == "constant":
        assert updates == [first]
    else:
        assert updates == sorted({*(s for s in range(begin, end, frequency) if s >= first), end})
    assert timeline.updates == updates
    for step in range(0, 201):
        if step < first:
            wanted = 0.0
        elif step >= end or name == "constant":
            wanted = 0.9
        else:
            wanted = FORMULAS[name]((step - begin) / (end - begin), 0.1, 0.9)
        assert timeline.sparsity(step) == pytest.approx(wanted, abs=1e-12)
    assert timeline.sparsity(updates[-1]) == 0.9
    values = [timeline.sparsity(step) for step in range(201)]
    assert values == sorted(values)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    ("total", "warmup", "cooldown", "number"), [(100, 10, 30, 3), (101, 0, 0, 4), (50, 7, 5, 2), (12, 3, 3, 3)]
)
def test_stages_follow_one_another(name: str, total: int, warmup: int, cooldown: int, number: int) -> None:
    """Each step of each stage is that of a timeline of its own, from the sparsity before it to its own."""
    parts = stages(total, warmup, cooldown, number)
    targets = [0.2 + 0.7 * (place + 1) / number for place in range(number)]
    timelines = [
        Timeline(start + (place > 0 and name == "constant"), end, 3.5, name, initial=0.1, target=0.5, total=last)
        for place, (start, end, last) in enumerate(parts)
    ]
    whole = Stages(tuple(timelines)).aimed_at(targets)
    assert [last for _, _, last in parts] == whole.ends
    assert (whole.begin, whole.total, whole.target, whole.schedule) == (warmup, total, targets[-1], name)
    lengths = {last - start for start, _, last in parts}
    assert max(lengths) - min(lengths) <= 1
    assert sum(last - end for _, end, last in parts) == cooldown
    due = [step for step in range(1, total + 20) if whole.is_due(step)]
    assert due == whole.updates
    assert set(due).isdisjoint(whole.ends) or cooldown < number
    for place, (start, end, last) in enumerate(parts):
        own = [step for step in due if start < step <= last] if place else [step for step in due if step <= last]
        assert own[-1] == (own[0] if name == "constant" else end)
        assert [whole.sparsity(step) for step in range(own[-1], last + 1)] == [targets[place]] * (last + 1 - own[-1])
    assert (whole.last_update, whole.recovery) == (due[-1], total - due[-1])
    for step in range(total + 20):
        assert whole.last_due(step) == max((found for found in due if found <= step), default=0)
        assert whole.next_due(step) == min((found for found in due if found > step), default=due[-1])
    values = [whole.sparsity(step) for step in range(total + 20)]
    assert values == sorted(values)
    assert len(set(values)) > number


@pytest.mark.parametrize(("begin", "end", "updates"), [(46, 598, 12), (0, 7, 3), (5, 30, 4)])
def test_updates_are_as_many_as_asked_for_and_evenly_spread(begin: int, end: int, updates: int) -> None:
    timeline = Timeline(begin, end, (end - begin) / updates, "exp", 0.0, 0.8, total=end)
    due = [step for step in range(begin + 1, end + 10) if timeline.is_due(step)]
    assert (len(due), due[-1]) == (updates, end)
    assert timeline.updates == due  # at the beginning nothing is asked for yet
    gaps = {later - earlier for earlier, later in zip([begin, *due], due)}
    assert max(gaps) - min(gaps) <= 1
    assert [timeline.last_due(step) for step in due] == due
    # geometric: each update removes as large a share of what is left, to within the rounding of steps
    left = [1 - timeline.sparsity(step) for step in [max(begin, 1), *due]]
    for number, share in enumerate(left[1:], start=1):
        assert share == pytest.approx((1 - 0.8) ** (number / updates), rel=0.25)


@pytest.mark.parametrize(
    ("total", "warmup", "cooldown", "phases_wanted"),
    [
        (1, None, None, (0, 0)),
        (3, None, None, (0, 1)),
        (75, None, None, (7, 22)),
        (1000, None, None, (100, 300)),
        (1000, 0, None, (0, 333)),
        (1000, 900, None, (900, 33)),
        (1000, None, 950, (5, 950)),
        (1000, None, 0, (100, 0)),
        (1000, 20, 30, (20, 30)),
        (5, None, 9, (0, 9)),
    ],
)
def test_what_is_derived_of_the_phases(
    total: int, warmup: int | None, cooldown: int | None, phases_wanted: tuple[int, int]
) -> None:
    assert phases(total, warmup, cooldown) == phases_wanted


@pytest.mark.parametrize(
    ("steps", "schedule", "frequency", "updates", "wanted"),
    [
        (1, "cubic", None, None, 1),
        (46, "cubic", None, None, 2.3),
        (600, "linear", None, None, 30),
        (7000, "cubic", None, None, 50),
        (7000, "lottery", None, None, 1400),
        (46, "cubic", 100, None, 100),
        (46, "cubic", 100, 2, 23),
        (3, "cubic", None, 12, 1),
    ],
)
def test_steps_between_updates(steps: int, schedule: str, frequency: int | None, updates: int | None, wanted: float) -> None:
    assert spacing(steps, schedule, frequency, updates) == pytest.approx(wanted)
