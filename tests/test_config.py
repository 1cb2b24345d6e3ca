"""Settings: JSON there and back, rules, command line arguments, and an error for everything that cannot be used."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_equal, snapshot, tiny_bert
from transformers import HfArgumentParser, TrainingArguments

from hf_prune import (
    ConfigError,
    DistillationArguments,
    DistillationConfig,
    Pruner,
    PruningArguments,
    PruningConfig,
    PruningRule,
)
from hf_prune.settings.config import CONFIG_NAME, UPDATES
from hf_prune.settings.patterns import parse_pattern

#: Every field that the config and a rule share, none at its default.
EVERY_FIELD: dict[str, Any] = {
    "target_sparsity": 0.8,
    "pattern": "4x1",
    "criterion": "taylor",
    "scope": "local",
    "schedule": "linear",
    "initial_sparsity": 0.1,
    "warmup_steps": 0.25,
    "cooldown_epochs": 1.5,
    "frequency": 7,
    "target_modules": ["query", "key"],
    "exclude_modules": r".*layer\.0\..*",
    "min_sparsity_per_module": 0.2,
    "max_sparsity_per_module": 1.0,
}

CONFIGS = {
    "least": PruningConfig(pattern="1x1"),
    "every field": PruningConfig(**EVERY_FIELD),
    "rules": PruningConfig(
        pattern="2:4", rules=[PruningRule(pattern="head", target_sparsity=0.25), PruningRule(**EVERY_FIELD | {"pattern": "8x8"})]
    ),
    "rules alone": PruningConfig(rules=[PruningRule(pattern="neuron")]),
}


# ---------------------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", CONFIGS)
def test_json_there_and_back(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    config.to_json_file(tmp_path / "config.json")
    assert PruningConfig.from_json_file(tmp_path / "config.json") == config
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_save_pretrained(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    config = CONFIGS["rules"]
    config.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == [CONFIG_NAME] == ["pruning_config.json"]
    assert PruningConfig.from_pretrained(str(folder)) == config
    text = (folder / CONFIG_NAME).read_text(encoding="utf-8")
    PruningConfig.from_pretrained(folder).save_pretrained(folder)
    assert (folder / CONFIG_NAME).read_text(encoding="utf-8") == text


def test_what_a_rule_inherits_is_not_written() -> None:
    assert CONFIGS["rules"].to_dict()["rules"][0] == {"pattern": "head", "target_sparsity": 0.25}


def test_two_configs_share_nothing() -> None:
    first, second = PruningConfig(pattern="1x1"), PruningConfig(pattern="1x1")
    first.rules.append(PruningRule(pattern="head"))
    assert second.rules == []


def test_the_config_needs_neither_torch_nor_transformers() -> None:
    script = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
from hf_prune import PruningConfig
PruningConfig(pattern="1x1")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ------------------------------------------------------------------------------------------------------------- patterns and rules


@pytest.mark.parametrize(
    ("text", "level", "max_sparsity"),
    [
        ("1x1", 0, 1),
        ("4x1", 0, 1),
        ("32x16", 0, 1),
        ("2:4", 0, 0.5),
        ("3:4", 0, 0.75),
        ("1xchannel", 1, 1),
        ("channelx1", 1, 1),
        ("head", 2, 1),
        ("neuron", 2, 1),
    ],
)
def test_patterns_parse(text: str, level: int, max_sparsity: float) -> None:
    pattern = parse_pattern(text)
    assert (pattern.level, pattern.max_sparsity) == (level, max_sparsity)


def test_a_rule_wins_over_the_config() -> None:
    config = PruningConfig(pattern="1x1", target_sparsity=0.3, max_sparsity_per_module=0.9, frequency=3, rules=[EVERY_FIELD])
    resolved = config.resolved_rules()
    assert list(resolved) == ["rules[0]", "config"]
    assert {name: getattr(resolved["rules[0]"], name) for name in EVERY_FIELD} == EVERY_FIELD
    assert resolved["config"] == replace(config, rules=[])


def test_a_rule_inherits_what_it_leaves_open_except_the_modules() -> None:
    config = PruningConfig(**EVERY_FIELD, rules=[{"pattern": "head"}])
    rule = config.resolved_rules()["rules[0]"]
    assert rule == replace(config, pattern="head", target_modules=None, rules=[])


def test_a_frequency_wins_over_inherited_updates() -> None:
    config = PruningConfig(
        updates=12, rules=[PruningRule(pattern="head", frequency=7), PruningRule(pattern="neuron", frequency=7, updates=3)]
    )
    rules = config.resolved_rules()
    assert (rules["rules[0]"].frequency, rules["rules[0]"].updates) == (7, None)
    assert rules["rules[1]"].updates == 3


def test_a_frequency_on_the_command_line_wins_over_updates_in_the_file(tmp_path: Path) -> None:
    PruningConfig(pattern="head", updates=12).to_json_file(tmp_path / "pruning.json")
    given = PruningArguments(do_prune=True, pruning_config=str(tmp_path / "pruning.json"), pruning_frequency=7).to_config()
    assert given is not None
    assert (given.frequency, given.updates) == (7, None)


@pytest.mark.parametrize("phase", ["warmup", "cooldown"])
@pytest.mark.parametrize(("outer", "inner"), [("steps", "epochs"), ("epochs", "steps")])
def test_steps_and_epochs_are_inherited_as_a_pair(phase: str, outer: str, inner: str) -> None:
    config = PruningConfig(pattern="1x1", **{f"{phase}_{outer}": 5}, rules=[{"pattern": "head", f"{phase}_{inner}": 2}])
    rule = config.resolved_rules()["rules[0]"]
    assert (getattr(rule, f"{phase}_{outer}"), getattr(rule, f"{phase}_{inner}")) == (None, 2)


def test_without_a_pattern_only_the_rules_count() -> None:
    assert list(CONFIGS["rules alone"].resolved_rules()) == ["rules[0]"]


# --------------------------------------------------------------------------------------------------------- command line arguments


def parse(*arguments: str) -> PruningConfig | None:
    """What a script makes of its command line, with TrainingArguments beside ours."""
    parser = HfArgumentParser([TrainingArguments, PruningArguments])
    training, pruning = parser.parse_args_into_dataclasses(["--output_dir", "out", "--warmup_steps", "3", *arguments])
    assert training.warmup_steps == 3
    return pruning.to_config()


def test_arguments_do_not_collide_with_those_of_training() -> None:
    assert not {item.name for item in fields(PruningArguments)} & {item.name for item in fields(TrainingArguments)}


#: Each field of the configs, as text on a command line and as the config written in Python has it; none is at its default.
PRUNING_TEXTS: dict[str, tuple[str, Any]] = {
    "target_sparsity": ("0.8", 0.8),
    "pattern": ("neuron", "neuron"),
    "criterion": ("soft_movement", "soft_movement"),
    "reduction": ("sum", "sum"),
    "normalization": ("l2", "l2"),
    "regularization": (".5", 0.5),
    "score_learning_rate": ("2e-2", 0.02),
    "scope": ("local", "local"),
    "threshold": ("0.1", 0.1),
    "update": ("mine", "mine"),
    "schedule": ("polynomial(4)", "polynomial(4)"),
    "initial_sparsity": ("from_model", "from_model"),
    "warmup_steps": ("0.25", 0.25),
    "warmup_epochs": ("2", 2.0),
    "cooldown_steps": ("7", 7),
    "cooldown_epochs": ("1.5", 1.5),
    "frequency": ("7", 7),
    "updates": ("3", 3),
    "target_modules": ("query key", ["query", "key"]),
    "exclude_modules": (r".*layer\.0\..*", r".*layer\.0\..*"),
    "min_sparsity_per_module": ("0.2", 0.2),
    "max_sparsity_per_module": ("1", 1.0),
    "keep_zeros": ("", True),
    "target_speedup": ("2", 2.0),
    "target_parameters": ("1e6", 1e6),
    "target_flops": (".5", 0.5),
    "target_bytes": ("0.25", 0.25),
    "latency_table": ("table.json", "table.json"),
    "latency_batch_size": ("1", 1),
    "latency_length": ("32", 32),
}
DISTILLATION_TEXTS: dict[str, tuple[str, Any]] = {
    "temperature": ("3", 3.0),
    "alpha_task": ("0", 0.0),
    "alpha_logits": ("0.5", 0.5),
    "alpha_hidden": ("5", 5.0),
    "alpha_hidden_layers": ("1", 1.0),
    "alpha_attention": ("0.7", 0.7),
    "alpha_simkd": ("2", 2.0),
    "layer_map": ("[[0,1],[2,5]]", [[0, 1], [2, 5]]),
    "teacher_dtype": ("bfloat16", "bfloat16"),
}


def is_bare(name: str) -> bool:
    """Whether an argument says by itself that it is about pruning."""
    return "sparsity" in name or "latency" in name or (name.startswith("target_") and name != "target_modules")


ARGUMENTS: dict[type[Any], tuple[type[Any], Callable[[str], str], dict[str, tuple[str, Any]]]] = {
    PruningConfig: (PruningArguments, lambda name: name if is_bare(name) else f"pruning_{name}", PRUNING_TEXTS),
    DistillationConfig: (DistillationArguments, "distill_{}".format, DISTILLATION_TEXTS),
}
#: What has to be there for a setting to be of use.
COMPANIONS: dict[str, dict[str, Any]] = {
    "regularization": {"criterion": "soft_movement"},
    "threshold": {"scope": "threshold"},
    "min_sparsity_per_module": {"target_sparsity": 0.5},
    "latency_table": {"pattern": "neuron", "target_speedup": 2.0},
    **{name: {"pattern": "neuron"} for name in ("target_speedup", "target_parameters", "target_flops", "target_bytes")},
}


@pytest.mark.parametrize("config", ARGUMENTS)
def test_arguments_reach_every_field_that_can_be_flat(config: type[Any]) -> None:
    arguments, named, texts = ARGUMENTS[config]
    flat = {item.name: item for item in fields(arguments)}
    for item in fields(config):
        if reason := item.metadata.get("not_flat"):
            assert (item.name, named(item.name) in flat, "--pruning_config" in reason) == ("rules", False, True)
        else:
            assert flat[named(item.name)].default is None
            assert item.metadata["help"].replace("%", "%%") in flat[named(item.name)].metadata["help"]
            assert item.name in texts
    assert "rules" not in texts
    HfArgumentParser(arguments).format_help()  # a stray percent sign ends it


@pytest.mark.parametrize(("config", "name"), [(config, name) for config, (*_, texts) in ARGUMENTS.items() for name in texts])
def test_arguments_make_the_config_that_is_written_in_python(config: type[Any], name: str) -> None:
    UPDATES.add("mine")
    arguments, named, texts = ARGUMENTS[config]
    given = {"pattern": "1x1"} if config is PruningConfig else {}
    given |= COMPANIONS.get(name, {})
    flags = [text for key, value in given.items() for text in (f"--{named(key)}", str(value))]
    text, value = texts[name]
    do_prune = ["--do_prune"] if config is PruningConfig else []
    (parsed,) = HfArgumentParser(arguments).parse_args_into_dataclasses([*do_prune, *flags, f"--{named(name)}", *text.split()])
    try:
        assert parsed.to_config() == config(**given | {name: value})
        assert value != next(item.default for item in fields(config) if item.name == name)
    finally:
        UPDATES.discard("mine")


@pytest.mark.parametrize(
    ("given", "modules"),
    [(["query"], ["query"]), (["a.b", "c"], ["a.b", "c"]), ([".*query"], ".*query"), (["3"], ["3"]), (['["a", "b"]'], ["a", "b"])],
)
def test_one_module_is_a_name_or_a_regular_expression(given: list[str], modules: str | list[str]) -> None:
    config = parse("--do_prune", "--pruning_pattern", "1x1", "--pruning_target_modules", *given)
    assert config == PruningConfig(pattern="1x1", target_modules=modules)


@pytest.mark.parametrize(("given", "value"), [(["2"], 2.0), (["1.5", "2", "3"], [1.5, 2.0, 3.0])])
def test_several_targets_are_a_family_and_one_is_none(given: list[str], value: float | list[float]) -> None:
    config = parse("--do_prune", "--pruning_pattern", "head", "--target_speedup", *given)
    assert config == PruningConfig(pattern="head", target_speedup=value)
    assert config is not None
    assert (config.is_family, config.cost_targets) == (len(given) > 1, [float(text) for text in given])
    assert PruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_shares_and_numbers_of_a_family_may_be_mixed() -> None:
    """Which of them asks for more, the model tells."""
    assert PruningConfig(pattern="head", target_parameters=[0.5, 1e6, 0.25]).cost_targets == [0.5, 1e6, 0.25]


def test_defaults_of_arguments_are_those_of_the_config(tmp_path: Path) -> None:
    assert parse("--do_prune", "--pruning_pattern", "1x1") == PruningConfig(pattern="1x1")
    (parsed,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses(["--teacher_model_name_or_path", "teacher"])
    assert parsed.to_config() == DistillationConfig()
    (parsed,) = HfArgumentParser(DistillationArguments).parse_args_into_dataclasses([])
    assert parsed.to_config() is None


def test_arguments_from_a_file_have_the_types_of_the_config(tmp_path: Path) -> None:
    given = {"do_prune": True, "pruning_pattern": "1x1", "pruning_target_modules": ["query"], "initial_sparsity": 0.25}
    (tmp_path / "arguments.json").write_text(json.dumps(given | {"distill_layer_map": [[0, 1]], "distill_alpha_hidden_layers": 1}))
    pruning, distillation = HfArgumentParser([PruningArguments, DistillationArguments]).parse_json_file(
        str(tmp_path / "arguments.json")
    )
    assert pruning.to_config() == PruningConfig(pattern="1x1", target_modules=["query"], initial_sparsity=0.25)
    assert distillation.to_config() == DistillationConfig(layer_map=[[0, 1]], alpha_hidden_layers=1)


@pytest.mark.parametrize("config", [PruningConfig, PruningRule, DistillationConfig])
def test_docstrings_list_every_field(config: type[Any]) -> None:
    for item in fields(config):
        default = [] if item.name == "rules" else item.default
        assert f"        {item.name} (`{item.type}`, default `{default!r}`): " in (config.__doc__ or "")
        assert item.metadata["help"]
    assert (config.__doc__ or "").count("    Args:") == (config.__doc__ or "").count("    Raises:") == 1


def test_a_rule_has_the_fields_of_the_config_all_open() -> None:
    whole = ("keep_zeros", "rules", *(name for name in PRUNING_TEXTS if is_bare(name) and "sparsity" not in name))
    shared = [item for item in fields(PruningConfig) if item.name not in whole]
    assert [(item.name, item.metadata) for item in fields(PruningRule)] == [(item.name, item.metadata) for item in shared]
    assert all(item.default is None for item in fields(PruningRule))


def test_arguments_make_a_config() -> None:
    assert parse() is None
    assert parse("--do_prune", "--pruning_pattern", "2:4") == PruningConfig(pattern="2:4")
    given = EVERY_FIELD | {"target_modules": ".*(query|key)"}
    prefixed = {item.name.removeprefix("pruning_"): item.name for item in fields(PruningArguments)}
    flags = [text for name, value in given.items() for text in (f"--{prefixed[name]}", str(value))]
    assert parse("--do_prune", *flags) == PruningConfig(**given)


def test_arguments_win_over_the_file(tmp_path: Path) -> None:
    config = PruningConfig(pattern="1x1", frequency=9, warmup_steps=10, rules=[{"pattern": "head", "target_sparsity": 0.25}])
    config.to_json_file(tmp_path / "config.json")
    file = ("--do_prune", "--pruning_config", str(tmp_path / "config.json"))
    assert parse(*file) == config
    assert parse(*file, "--target_sparsity", "0.8", "--pruning_pattern", "4x1") == replace(
        config, target_sparsity=0.8, pattern="4x1"
    )
    assert parse(*file, "--pruning_warmup_epochs", "2") == replace(config, warmup_steps=None, warmup_epochs=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pruning_pattern", "2:4"], "do_prune=False: must be set, since pattern was given."),
        (["--pruning_config", "file.json"], "do_prune=False: must be set, since pruning_config was given."),
        (["--do_prune", "--pruning_pattern", "heads"], "pattern='heads': * Did you mean 'head'?"),
        (
            ["--do_prune", "--pruning_pattern", "1x1", "--target_sparsity", "1.5"],
            "target_sparsity=1.5: must be a number in [0, 1).",
        ),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*arguments)
    assert_says(error.value, message)


# ----------------------------------------------------------------------------------------------------------- what cannot be used


def assert_says(error: Exception, message: str) -> None:
    """Assert that the error's message is `message`, in which `*` stands for anything."""
    pattern = ".+".join(re.escape(part) for part in message.split("*"))
    assert re.fullmatch(pattern, str(error)), f"\n  {error}\nis not\n  {message}"


SHARE = "must be a number in [0, 1)."
STEPS = "must be a whole number of steps, or a ratio of the run in [0, 1)."
EPOCHS = "must be a number of epochs, 0 or more."
MODULES = "must be a regular expression that matches whole module names, or a list of module names or name suffixes."

#: Settings → message, in which `*` stands for anything. `pattern="1x1"` is there unless another one is given.
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    # keys
    ({"target_sparsty": 0.5}, "target_sparsty=0.5: is not a field of PruningConfig; known are *. Did you mean 'target_sparsity'?"),
    ({"lr": 1}, "lr=1: is not a field of PruningConfig; known are *."),
    (
        {"rules": [{"patern": "head"}]},
        "rules[0].patern='head': is not a field of PruningRule; known are *. Did you mean 'pattern'?",
    ),
    ({"rules": [{}, {"rules": []}]}, "rules[1].rules=[]: is not a field of PruningRule; known are *"),
    (
        {"rules": {"pattern": "head"}},
        "rules={'pattern': 'head'}: must be a list of PruningRule or of dictionaries with its fields.",
    ),
    ({"rules": ["head"]}, "rules[0].PruningRule='head': must be an object with the fields *."),
    # shares
    *(({"target_sparsity": value}, f"target_sparsity={value!r}: {SHARE}") for value in (1, 1.0, -0.1, 50, math.nan, math.inf)),
    *(({"target_sparsity": value}, f"target_sparsity={value!r}: {SHARE}") for value in (True, "0.5", [0.5])),
    *(({"initial_sparsity": value}, f"initial_sparsity={value!r}: {SHARE}") for value in (1, -0.1, math.nan, False)),
    *(({"min_sparsity_per_module": value}, f"min_sparsity_per_module={value!r}: {SHARE}") for value in (1, -0.1, math.nan, True)),
    *(
        ({"max_sparsity_per_module": value}, f"max_sparsity_per_module={value!r}: must be a number in [0, 1].")
        for value in (1.01, -0.1, math.nan, True, "all")
    ),
    ({"target_speedup": 1}, "target_speedup=1: must be greater than 1: how many times faster."),
    ({"target_parameters": 0}, "target_parameters=0: must be greater than 0."),
    ({"target_speedup": []}, "target_speedup=[]: must be a number, or a list with one or more."),
    ({"target_speedup": [2, 1]}, "target_speedup[1]=1: must be greater than 1: how many times faster."),
    ({"target_bytes": [0.5, "0.3"]}, "target_bytes[1]='0.3': must be greater than 0."),
    (
        {"target_speedup": [2, 3, 3]},
        "target_speedup=[2, 3, 3]: must rise from one to the next, since one model is pruned on; 3 follows 3.",
    ),
    (
        {"target_parameters": [0.5, 0.6]},
        "target_parameters=[0.5, 0.6]: must fall from one to the next, since one model is pruned on; 0.6 follows 0.5.",
    ),
    (
        {"target_flops": [10, 10]},
        "target_flops=[10, 10]: must fall from one to the next, since one model is pruned on; 10 follows 10.",
    ),
    (
        {"pattern": "head", "target_speedup": 2, "target_sparsity": 0.5},
        "target_speedup=2: is a second target beside target_sparsity; give one of them.",
    ),
    (
        {"pattern": "head", "target_bytes": 0.5, "scope": "local"},
        "target_bytes=0.5: is one budget for all modules, not with scope 'local'.",
    ),
    (
        {"pattern": "2:4", "target_flops": 0.5},
        "target_flops=0.5: needs units that make the model smaller, such as head and neuron, not pattern '2:4'.",
    ),
    (
        {"pattern": "head", "target_flops": 0.5, "initial_sparsity": 0.1},
        "initial_sparsity=0.1: does not go with target_flops; give 0 or 'from_model'.",
    ),
    ({"latency_table": 3}, "latency_table=3: must be a text."),
    ({"rules": [{"target_sparsity": 2}]}, f"rules[0].target_sparsity=2: {SHARE}"),
    # names
    *(
        ({"pattern": value}, f"pattern={value!r}: must be 'NxM' *")
        for value in ("", "4", "0x1", "4:2", "4:4", "0:4", "4x1x1", "-1x1", "4 x 1", 4, ("4", "1"), True)
    ),
    ({"pattern": "heads"}, "pattern='heads': must be 'NxM' *. Did you mean 'head'?"),
    ({"pattern": "chanelx1"}, "pattern='chanelx1': must be 'NxM' *. Did you mean 'channelx1'?"),
    ({"pattern": None}, "pattern=None: must be given unless rules are. It must be 'NxM' *"),
    ({"rules": [{"pattern": "neurons"}]}, "rules[0].pattern='neurons': must be 'NxM' *. Did you mean 'neuron'?"),
    ({"criterion": "magnitud"}, "criterion='magnitud': must be one of * magnitude, *. Did you mean 'magnitude'?"),
    ({"criterion": 3}, "criterion=3: must be one of *."),
    ({"scope": "locl"}, "scope='locl': must be one of row, local, global*. Did you mean 'local'?"),
    ({"schedule": "cubik"}, "schedule='cubik': must be one of constant, linear, *. Did you mean 'cubic'?"),
    ({"rules": [{"scope": "Global"}]}, "rules[0].scope='Global': must be one of row, local, global*. Did you mean 'global'?"),
    # durations
    *(
        ({f"{phase}_steps": value}, f"{phase}_steps={value!r}: {STEPS}")
        for phase in ("warmup", "cooldown")
        for value in (-1, 1.5, math.nan, math.inf, True, "10")
    ),
    *(
        ({f"{phase}_epochs": value}, f"{phase}_epochs={value!r}: {EPOCHS}")
        for phase in ("warmup", "cooldown")
        for value in (-1, math.nan, math.inf, True, "1")
    ),
    *(
        ({f"{phase}_steps": 10, f"{phase}_epochs": 1}, f"{phase}_epochs=1: give {phase}_steps or {phase}_epochs, not both.")
        for phase in ("warmup", "cooldown")
    ),
    *(({"frequency": value}, f"frequency={value!r}: must be a whole number of steps, 1 or more.") for value in (0, -1, 2.0, True)),
    # modules
    *(
        ({f"{which}_modules": value}, f"{which}_modules={value!r}: {MODULES}")
        for which in ("target", "exclude")
        for value in ([], [1], 3, {"query"}, True)
    ),
    (
        {"target_modules": "*query"},
        f"target_modules='*query': is not a valid regular expression (nothing to repeat *); it {MODULES}",
    ),
    ({"rules": [{"exclude_modules": "("}]}, f"rules[0].exclude_modules='(': is not a valid regular expression (*); it {MODULES}"),
    # numbers too large for a float, counts too large for anything, nesting without end
    *(
        ({name: 10**400}, f"{name}=1000*: must be *")
        for name in ("target_sparsity", "threshold", "warmup_steps", "cooldown_epochs", "frequency", "updates")
    ),
    ({"pattern": "9" * 5000 + "x1"}, "pattern='99* … 9*x1': must be 'NxM' *"),
    ({"schedule": f"polynomial({'9' * 5000})"}, "schedule='polynomial(99*: must be one of *"),
    *(
        ({"target_modules": value}, f"target_modules={value!r}: repeats something more than 1,000,000 times; it {MODULES}")
        for value in ("a{99999999999}", "a{2,99999999}", "((a{999}){999}){999}", "a{" + "9" * 200 + ",}")
    ),
    ({"target_modules": "(" * 5000 + ")" * 5000}, "target_modules='((* … *))': is not a valid regular expression (*); it *"),
    # fields that do not go together
    ({"target_sparsity": 0.3, "initial_sparsity": 0.4}, "initial_sparsity=0.4: must not exceed target_sparsity=0.3."),
    ({"target_sparsity": 0.3, "min_sparsity_per_module": 0.4}, "min_sparsity_per_module=0.4: must not exceed target_sparsity=0.3."),
    (
        {"target_sparsity": 0.99},
        "max_sparsity_per_module=0.98: makes target_sparsity=0.99 unreachable; it must be at least 0.99.",
    ),
    ({"pattern": "2:4", "target_sparsity": 0.6}, "target_sparsity=0.6: pattern '2:4' allows at most 0.5."),
    (
        {"target_sparsity": 0.9, "rules": [{"pattern": "2:4"}]},
        "rules[0].target_sparsity=0.9: pattern '2:4' allows at most 0.5.",
    ),
    (
        {"rules": [{}, {"warmup_steps": 3, "warmup_epochs": 1}]},
        "rules[1].warmup_epochs=1: give warmup_steps or warmup_epochs, not both.",
    ),
    ({"pattern": None, "rules": [{"target_sparsity": 0.3}]}, "rules[0].pattern=None: must be given * It must be 'NxM' *"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=lambda value: str(value)[:60])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        PruningConfig.from_dict({"pattern": "1x1"} | settings)
    assert_says(error.value, message)
    assert (error.value.name, isinstance(error.value, ValueError)) == (message.split("=", 1)[0], True)


@pytest.mark.parametrize("cls", [PruningConfig, PruningRule, DistillationConfig])
def test_an_argument_that_is_no_field(cls: type[Any]) -> None:
    field = next(iter(inspect.signature(cls).parameters))
    with pytest.raises(ConfigError) as error:
        cls(**{field + "s": 0.5})
    assert_says(error.value, f"{field}s=0.5: is not a field of {cls.__name__}; known are *. Did you mean {field!r}?")


@pytest.mark.parametrize("name", ["target_sparsity", "pattern", "criterion", "target_modules", "frequency", "keep_zeros", "rules"])
def test_values_that_python_cannot_print(name: str) -> None:
    nested = functools.reduce(lambda inner, _: {"": [inner]}, range(2_000), 10**5000)
    for value in (nested, [nested]):
        with pytest.raises(ConfigError) as error:
            PruningConfig.from_dict({"pattern": "1x1", name: value})
        assert name in str(error.value)
    with pytest.raises(ConfigError, match=r"target_sparsity=\(int\): must be a number in \[0, 1\)"):
        PruningConfig(pattern="1x1", target_sparsity=10**5000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"pattern": "1x1", "targt_sparsity": 0.5}', "targt_sparsity=0.5: is not a field *. Did you mean 'target_sparsity'?"),
        ('{"rules": [{"pattern": "head", "scop": "local"}]}', "rules[0].scop='local': is not a field *. Did you mean 'scope'?"),
        ('{"pattern": "1x1", "target_sparsity": NaN}', f"target_sparsity=nan: {SHARE}"),
        ('{"pattern": "1x1"', "PruningConfig file='*config.json': is not valid JSON (*)."),
        ('{"pattern": "\xff"}', "PruningConfig file='*config.json': is not valid JSON (*utf-8*)."),
        ('{"pattern": ' + "[" * 100_000, "PruningConfig file='*config.json': is not valid JSON (*)."),
        ('["1x1"]', "PruningConfig=['1x1']: must be an object with the fields *."),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as error:
        PruningConfig.from_json_file(tmp_path / "config.json")
    assert_says(error.value, message)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"PruningConfig file='.*confg.json': .* Did you mean '.*/config.json'"):
        PruningConfig.from_json_file(tmp_path / "confg.json")


def freeze(*ends: str) -> Callable[[Any], None]:
    """Freezes the parameters whose names hold one of `ends`; all of them without."""

    def apply(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if not ends or any(end in name for end in ends):
                parameter.requires_grad = False

    return apply


QUERY = "bert.encoder.layer.0.attention.self.query"

#: Settings → message, for the tiny BERT, 20 steps, 5 an epoch.
BAD_FOR_THE_MODEL: list[tuple[dict[str, Any], str]] = [
    # names that match nothing
    (
        {"target_modules": ".*queri"},
        f"config.target_modules='.*queri': matches no module; a regular expression must match a whole name, such as '{QUERY}'. "
        "Did you mean '.*query'?",
    ),
    ({"target_modules": "query"}, "config.target_modules='query': matches no module; *. Did you mean '.*query'?"),
    (
        {"target_modules": ["query", "keys"]},
        "config.target_modules='keys': matches no module; a list item must be a name or its end, such as 'query'. "
        "Did you mean 'key'?",
    ),
    # what other families call it
    ({"target_modules": ["q_proj"]}, "config.target_modules='q_proj': matches no module; *. Did you mean 'query'?"),
    ({"target_modules": ["v_lin"]}, "config.target_modules='v_lin': matches no module; *. Did you mean 'value'?"),
    ({"target_modules": ["o_proj"]}, "config.target_modules='o_proj': *. Did you mean 'attention.output.dense'?"),
    ({"target_modules": ".*layer.0.*q_proj"}, "config.target_modules='.*layer.0.*q_proj': *. Did you mean '.*layer.0.*query'?"),
    # expressions that explode
    (
        {"exclude_modules": r"(.|[a-z]|\w)*[!?]"},
        r"config.exclude_modules='(.|[a-z]|\\w)*[!?]': takes more than 1 s to match against 'bert.*",
    ),
    ({"exclude_modules": ["pooler"]}, "config.exclude_modules='pooler': matches no module; *"),
    ({"rules": [{"target_modules": ".*valu"}]}, "rules[0].target_modules='.*valu': matches no module; *. Did you mean '.*value'?"),
    ({"target_modules": [f"{QUERY}s"]}, f"config.target_modules='{QUERY}s': matches no module; *. Did you mean '{QUERY}'?"),
    # everything left out
    ({"exclude_modules": ".*"}, "config.pattern='1x1': finds nothing to prune (*)."),
    ({"pattern": "head", "target_modules": ["intermediate.dense"]}, "config.pattern='head': finds nothing to prune (*)."),
    # shapes
    (
        {"pattern": "5x1", "target_modules": ["query"]},
        f"config.target_modules=['query']: names '{QUERY}', but its shape 32x32 is not divisible by 5x1.",
    ),
    (
        {"pattern": "1:3", "target_sparsity": 0.3, "target_modules": ["query"]},
        f"config.target_modules=['query']: names '{QUERY}', but its 32 inputs are not divisible by 3.",
    ),
    # caps
    (
        {"pattern": "head", "target_sparsity": 0.85, "max_sparsity_per_module": 0.9},
        "config.target_sparsity=0.85: cannot be reached: with max_sparsity_per_module=0.9 at most 0.75* of these modules can be *",
    ),
    # the run
    (
        {"warmup_steps": 12, "cooldown_steps": 8},
        "config.warmup_steps=12: warm-up (12 steps) and cool-down (8 steps) must leave at least one of the run's 20 steps.",
    ),
    ({"warmup_steps": 20}, "config.warmup_steps=20: warm-up (20 steps) and cool-down (0 steps) must leave *"),
    ({"cooldown_steps": 30}, "config.*: warm-up (0 steps) and cool-down (30 steps) must leave *"),
    ({"warmup_epochs": 3, "cooldown_epochs": 1}, "config.warmup_epochs=3: warm-up (15 steps) and cool-down (5 steps) must leave *"),
    (
        {"warmup_steps": 0.5, "cooldown_steps": 0.5},
        "config.warmup_steps=0.5: warm-up (10 steps) and cool-down (10 steps) must leave *",
    ),
    ({"rules": [{"pattern": "head", "warmup_steps": 99}]}, "rules[0].warmup_steps=99: warm-up (99 steps) *"),
    # two rules of one level on one module
    (
        {"pattern": None, "rules": [{"pattern": "1x1", "target_modules": ["query"]}, {"pattern": "2:4"}]},
        f"rules[1].target_modules=None: rules[0] already names '{QUERY}' with a pattern of the same level; "
        "exclude it from one of them.",
    ),
    (
        {"pattern": None, "rules": [{"pattern": "1xchannel", "target_modules": [QUERY]}, {"pattern": "channelx1"}]},
        f"rules[1].target_modules=None: rules[0] already names '{QUERY}' *",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_FOR_THE_MODEL, ids=lambda value: str(value)[:60])
def test_bad_for_the_model(settings: dict[str, Any], message: str) -> None:
    model = tiny_bert()
    before, names = snapshot(model), set(vars(model))
    with pytest.raises(ConfigError) as error:
        Pruner(model, PruningConfig.from_dict({"pattern": "1x1"} | settings), total_steps=20, steps_per_epoch=5)
    assert_says(error.value, message)
    assert_equal(snapshot(model), before)
    assert set(vars(model)) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for module in model.modules())
    Pruner(model, PruningConfig(pattern="1x1"), total_steps=20)


def test_epochs_need_their_length() -> None:
    with pytest.raises(ConfigError) as error:
        Pruner(tiny_bert(), PruningConfig(pattern="1x1", warmup_epochs=1), total_steps=20)
    assert_says(error.value, "config.warmup_epochs=1: needs steps_per_epoch; pass it, or give warmup_steps.")


@pytest.mark.parametrize("criterion", ["snip_momentum", "taylor"])
@pytest.mark.parametrize("pattern", ["1x1", "head"])
def test_frozen_modules_need_a_criterion_without_gradients(criterion: str, pattern: str) -> None:
    model = tiny_bert()
    freeze()(model)
    with pytest.raises(ConfigError) as error:
        Pruner(model, PruningConfig(pattern=pattern, criterion=criterion), total_steps=20)
    assert_says(
        error.value,
        f"config.pattern={pattern!r}: finds nothing to prune (*: it is frozen and criterion {criterion!r} needs its gradient*).",
    )
    Pruner(model, PruningConfig(pattern=pattern, criterion="magnitude"), total_steps=20)


def test_frozen_modules_are_left_out_with_the_reason() -> None:
    model = tiny_bert()
    freeze("layer.0.")(model)
    pruner = Pruner(model, PruningConfig(pattern="1x1"), total_steps=20)
    frozen = [name for name, reason in pruner.plan().left_out.items() if "is frozen" in reason]
    assert len(frozen) == 6
    assert all("layer.0." in name for name in frozen)
