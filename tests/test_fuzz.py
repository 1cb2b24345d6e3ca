"""Random cases from fixed seeds: training, condensing, and settings that nobody means.

Whatever is drawn either works, by an oracle that counts and compares for itself, or is refused with an error that names the field.
`pytest -m slow tests/test_fuzz.py -k "training and 17"` runs one case again.
"""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_equal, pruner_of, snapshot, trainer_for
from models import MATRIX, PRE_NORM, empty_layers, prune_randomly, ragged_batch, tiny, zero_units
from tables import CRITERIA, PATTERNS, SCHEDULES
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune import ConfigError, Pruner, PruningConfig, condense
from hf_prune.measure.sparsity import original_blocks
from hf_prune.model import find_blocks
from hf_prune.settings.config import NORMALIZATIONS, REDUCTIONS, SCOPES

pytestmark = pytest.mark.slow

TRAINED = ("bert", "distilbert", "modernbert", "gpt2", "llama", "t5", "bart", "vit")
STEPS = 8


@torch.no_grad()
def output(model: PreTrainedModel) -> Tensor:
    """What a model gives in evaluation for a ragged batch, in float32."""
    first = model.eval()(**ragged_batch(model) if model.dtype == torch.float32 else _cast(model))[0]
    return first.float()


def _cast(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in ragged_batch(model).items()}


# ----------------------------------------------------------------------------------------------------------------------- training


def random_settings(draw: random.Random) -> dict[str, Any]:
    """Settings of a config or a rule, most of which go together; short enough for a run of `STEPS` steps."""
    settings: dict[str, Any] = {
        "pattern": draw.choice(PATTERNS),
        "criterion": draw.choice(CRITERIA),
        "target_sparsity": draw.choice((0.1, 0.25, 0.5, 0.75, round(draw.uniform(0.05, 0.95), 3))),
        "scope": draw.choice(SCOPES),
        "schedule": draw.choice(SCHEDULES),
        "reduction": draw.choice(REDUCTIONS),
        "normalization": draw.choice(NORMALIZATIONS),
        "warmup_steps": draw.choice((0, 1, 0.2)),
        "cooldown_steps": draw.choice((0, 1, 0.2)),
        draw.choice(("updates", "frequency")): draw.randint(1, 3),
    }
    if draw.random() < 0.3:
        settings["min_sparsity_per_module"] = draw.choice((0.05, 0.2))
    if draw.random() < 0.3:
        settings["max_sparsity_per_module"] = draw.choice((0.8, 1.0))
    if settings["scope"] == "threshold":
        settings["threshold"] = draw.choice((0.01, 0.1, 0.5))
        if settings["criterion"] == "soft_movement" and draw.random() < 0.5:
            settings["regularization"] = draw.choice((0.0, 1.0))
    if draw.random() < 0.2:
        settings["exclude_modules"] = r".*\.0\..*"
    return settings


def random_config(draw: random.Random) -> PruningConfig:
    """A config that is accepted by itself; now and then with a rule, or with zeros kept."""
    while True:
        settings = random_settings(draw)
        if draw.random() < 0.25:
            settings["rules"] = [random_settings(draw)]
        if draw.random() < 0.1:
            settings["keep_zeros"] = True
        with suppress(ConfigError):
            return PruningConfig(**settings)


def rows_for(model: PreTrainedModel, count: int = 12) -> list[dict[str, Tensor]]:
    """Labelled rows of what the model reads."""
    batch = ragged_batch(model, rows=count, tokens=8)
    return [{name: value[row] for name, value in batch.items()} | {"labels": torch.tensor(row % 2)} for row in range(count)]


@pytest.mark.parametrize("seed", range(300))
def test_training(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    config, model = random_config(draw), tiny(TRAINED[seed % len(TRAINED)], seed=seed)
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    before = snapshot(model)
    trainer = trainer_for(
        tmp_path,
        config,
        model,
        train_dataset=rows_for(model),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        weight_decay=draw.choice((0.0, 0.1)),
        optim=draw.choice(("adamw_torch", "sgd", "adafactor")),
        seed=seed,
    )
    refused = None
    try:
        trainer.train()
    except ConfigError as error:
        refused = error
    if refused is not None:
        assert refused.name in str(refused)
        assert_equal(snapshot(model), before)
        return
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    check_sparsity(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    again = type(model).from_pretrained(tmp_path / "saved")
    assert_equal(snapshot(again), snapshot(model))
    masked = output(model)
    torch.testing.assert_close(output(condense(again)), masked, rtol=0, atol=1e-5 * max(1.0, float(masked.abs().max())))


def check_sparsity(trainer: Any) -> None:
    """Each rule's weights have the zeros that were asked for, to within what the size of a unit and the other rules explain."""
    pruner = pruner_of(trainer)
    assert pruner.is_finished
    for rule in pruner.rules:
        settings, sizes = (
            rule.settings,
            {group.name: (group.num_units, group.unit_size, group.max_removable) for group in rule.groups},
        )
        total = sum(units * size for units, size, _ in sizes.values())
        zeros = sum(int((view.gather(view.target.weight()) == 0).sum()) for group in rule.groups for view in group.weights)
        largest = max(size for _, size, _ in sizes.values())
        if settings.scope == "local":
            exact = sum(min(round(settings.target_sparsity * units), most) * size for units, size, most in sizes.values())
            low, high = exact, exact
        elif settings.scope == "global":
            slack = largest + sum(size / 2 for _, size, _ in sizes.values()) * (settings.min_sparsity_per_module > 0)
            low, high = (settings.target_sparsity * total + sign * slack for sign in (-1, 1))
        else:
            low, high = 0, total
        assert zeros >= low, f"{rule.name}: {zeros} zeros of {total}, {low} at least"
        assert zeros <= high or len(pruner.rules) > 1, f"{rule.name}: {zeros} zeros of {total}, {high} at most"


# --------------------------------------------------------------------------------------------------------------------- condensing


@torch.no_grad()
def empty_at_random(model: PreTrainedModel, draw: random.Random, family: str) -> None:
    """Zero heads, neurons, layers and biases of a model, some by rows and some by columns."""
    if draw.random() < 0.3:
        prune_randomly(model, seed=draw.randrange(1000))
    for block in find_blocks(model):
        units = block.num_units
        gone = draw.sample(range(units), draw.choice((0, 0, 1, units // 2, units)) if units else 0)
        zero_units(block, gone, draw.choice(("in", "out", "query")) if _rows_are_its_own(block) else "out")
        for part in block.projections:
            if part.module.bias is not None and draw.random() < 0.2:
                part.module.bias.zero_()
    if family in PRE_NORM and draw.random() < 0.4:
        empty_layers(model, set(draw.sample(range(3), draw.randint(1, 3))), silent=draw.random() < 0.5)


def _rows_are_its_own(block: Any) -> bool:
    return block.kind == "feed_forward" or block.units_per_group == 1


@pytest.mark.parametrize("seed", range(200))
def test_condensing(seed: int, tmp_path: Path) -> None:
    draw = random.Random(10_000 + seed)
    family, head = MATRIX[draw.randrange(len(MATRIX))]
    model = tiny(family, head, seed=seed)
    if draw.random() < 0.2 and model.get_output_embeddings() is not None:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    dtype = draw.choice((torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    if dtype != torch.float32:  # a model that was only cast has other buffers than one that was loaded
        model.save_pretrained(tmp_path / "whole")
        model = type(model).from_pretrained(tmp_path / "whole", dtype=dtype)
    multiple = draw.choice((None, None, 1, 4, 16))
    for turn in range(2):
        if turn == 0 or draw.random() < 0.5:
            empty_at_random(model, draw, family)
        masked = output(model)
        condense(model, pad_to_multiple_of=multiple)
        rounding = 0.0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps * max(1.0, float(masked.abs().max()))
        torch.testing.assert_close(output(model), masked, rtol=0, atol=rounding or 1e-5 * max(1.0, float(masked.abs().max())))
        model.save_pretrained(tmp_path / str(turn))
        again = type(model).from_pretrained(tmp_path / str(turn), dtype=dtype)
        assert_equal(snapshot(again), snapshot(model))
        torch.testing.assert_close(output(again), output(model), rtol=0, atol=rounding)  # the kernels of a CPU vary with the place
        alive = original_blocks(model)
        entry, count = copy.deepcopy(getattr(model.config, "hf_prune", None)), model.num_parameters()
        condense(again, pad_to_multiple_of=multiple)
        assert (getattr(again.config, "hf_prune", None), again.num_parameters(), original_blocks(again)) == (entry, count, alive)
        model = again


# ------------------------------------------------------------------------------------------------------- settings nobody means

HOSTILE: tuple[Any, ...] = (
    *("head", "4x1", "2:4", "taylor", "wanda", "local", "cubic", "mean", "from_model", ["query"], ".*dense", 0.3, 5, [0, 1, 2]),
    *(None, True, False, 0, -1, 1, 2, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.0, 1e308, -1e-308, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "x",
        "x" * 10_000,
        "0.5",
        "nan",
        "true",
        "null",
        "\x00",
        "é",
        "(",
        "[",
        "*",
        "a{99999999999}",
        "([a-z.0-9]+)+!",
        "(.*)*x",
        "[red]",
        "x[/]y",
    ),
    *("1x0", "0:0", "4:2", "99999999999999999999x1", "1:99999999999999999999", "polynomial(99999)", "polynomial(-1)", "auto"),
    *([], [None], [[]], ["x"], [0, 1], [""], {}, {"x": 1}, {"": {}}, {"version": 1}, (), ("x",), b"x", 1j, object),
)


def mutated(value: Any, draw: random.Random) -> Any:
    """Plain data with one part replaced, removed, added, renamed, doubled or nested deeper."""
    value = copy.deepcopy(value)
    if isinstance(value, dict) and value and draw.random() < 0.97:
        key = draw.choice(list(value))
        how = draw.choice(("inside", "inside", "inside", "inside", "remove", "replace", "rename", "add"))
        if how == "inside":
            value[key] = mutated(value[key], draw)
        elif how == "replace":
            value[key] = copy.copy(draw.choice(HOSTILE))
        elif how == "rename":
            value[draw.choice((key[:-1], f"{key}s", key.upper(), " "))] = value.pop(key)
        elif how == "add":
            value[draw.choice((f"{key}_", "x", "rules", "hf_prune", "layers"))] = copy.copy(draw.choice(HOSTILE))
        else:
            del value[key]
        return value
    if isinstance(value, list) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        value[place : place + draw.randint(0, 1)] = [mutated(value[place], draw)]
        return value
    if isinstance(value, (int, float)) and draw.random() < 0.4:
        return draw.choice((value + 1, value - 1, 2 * value, -value, str(value)[:20]))
    if draw.random() < 0.05:
        for _ in range(100):
            value = [value]
        return value
    return copy.copy(draw.choice(HOSTILE))


@contextmanager
def bounded(seconds: int = 20, gigabytes: int = 4) -> Iterator[None]:
    """What takes longer, or more memory than there is now and this, fails."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, limits[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def faults(cases: Iterable[tuple[object, Callable[[], None]]], errors: type[Exception], field: str = "") -> str:
    """Do something with hostile data, case by case. What neither works nor raises an error that names the field is a fault.

    Returns:
        A line for each fault.
    """
    found = []
    for data, work in cases:
        try:
            with bounded():
                work()
        except errors as error:
            name = getattr(error, "name", field)
            if name is None or str(name) not in str(error):
                found.append(f"names no field: {error!s:.300}: {data!r:.300}")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error!s:.300}: {data!r:.300}")
    return "\n".join(found)


@pytest.mark.parametrize("batch", range(20))
def test_mutated_configs(batch: int) -> None:
    model = tiny(("bert", "llama")[batch % 2], num_hidden_layers=1)
    before = snapshot(model)

    def use(data: Any) -> None:
        config = PruningConfig.from_dict(data)
        assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        Pruner(model, config, total_steps=20, steps_per_epoch=5).release()

    def cases() -> Iterator[tuple[object, Callable[[], None]]]:
        for seed in range(50 * batch, 50 * batch + 50):
            draw = random.Random(20_000 + seed)
            data, other = random_config(draw).to_dict(), random_config(draw).to_dict()
            data |= {key: other[key] for key in draw.sample(sorted(data.keys() & other.keys()), draw.randint(0, 4))}
            for _ in range(draw.choice((0, 1, 1, 2))):
                data = mutated(data, draw)
            yield data, partial(use, data)

    assert faults(cases(), ConfigError) == ""
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("batch", range(20))
def test_mutated_entries(batch: int) -> None:
    model = condensed(tiny(("bert", "llama", "t5", "gpt2", "albert")[batch % 5]), batch)

    def use(entry: Any) -> None:
        config = copy.copy(model.config)
        config.hf_prune = entry
        again = type(model)(config)
        names = {block.layer for block in find_blocks(again)}
        assert set((entry or {}).get("layers", ())) <= names
        assert bool(output(again).isfinite().all())

    def cases() -> Iterator[tuple[object, Callable[[], None]]]:
        for seed in range(50 * batch, 50 * batch + 50):
            draw = random.Random(30_000 + seed)
            entry = model.config.hf_prune
            for _ in range(draw.choice((1, 1, 2))):
                entry = mutated(entry, draw)
            yield entry, partial(use, entry)

    assert faults(cases(), ValueError, "hf_prune") == ""


def condensed(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A condensed model that lacks heads, neurons and, where they can go, layers."""
    prune_randomly(model, seed)
    if model.config.model_type in PRE_NORM:
        empty_layers(model, {2}, silent=True)
    return condense(model, verify=False)
