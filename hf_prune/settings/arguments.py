"""The config as flat command line arguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .checks import SCHEDULES
from .config import CRITERIA, SCOPES, PruningConfig, _with_pairs
from .errors import ConfigError


@dataclass
class PruningArguments:
    """[`PruningConfig`] as flat command line arguments beside `TrainingArguments`; rules come from `--pruning_config file.json`."""

    do_prune: bool = field(default=False, metadata={"help": "Prune the model while it trains."})
    pruning_config: str | None = field(
        default=None,
        metadata={"help": "A JSON file with a PruningConfig, rules included; arguments given beside it win over it."},
    )
    pruning_pattern: str | None = field(
        default=None, metadata={"help": "NxM (4x1), N:M (2:4), 1xchannel, channelx1, auto, head, kv_group, neuron, block or layer."}
    )
    target_sparsity: float | None = field(default=None, metadata={"help": "Share of zeros at the end, in [0, 1)."})
    initial_sparsity: float | None = field(default=None, metadata={"help": "Share of zeros at the first update."})
    pruning_criterion: str | None = field(default=None, metadata={"help": f"One of {', '.join(sorted(CRITERIA))}."})
    pruning_scope: str | None = field(default=None, metadata={"help": f"One of {', '.join(SCOPES)}."})
    pruning_schedule: str | None = field(default=None, metadata={"help": f"One of {', '.join(SCHEDULES)}."})
    pruning_frequency: int | None = field(
        default=None, metadata={"help": "Optimizer steps between mask updates; by default 50, or fewer in a short run."}
    )
    pruning_warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps before pruning starts; below 1, a ratio of the run; by default a tenth of it."}
    )
    pruning_warmup_epochs: float | None = field(
        default=None, metadata={"help": "Epochs before pruning starts.", "aliases": ["--sparsity_warm_epochs"]}
    )
    pruning_cooldown_steps: float | None = field(
        default=None, metadata={"help": "Steps at the end with frozen masks; below 1, a ratio of the run; by default 0.3."}
    )
    pruning_cooldown_epochs: float | None = field(
        default=None, metadata={"help": "Epochs at the end with frozen masks.", "aliases": ["--cooldown_epochs"]}
    )
    pruning_target_modules: str | None = field(
        default=None, metadata={"help": "Regular expression that matches whole module names."}
    )
    pruning_exclude_modules: str | None = field(default=None, metadata={"help": "Modules left out, in the same form."})
    min_sparsity_per_module: float | None = field(default=None, metadata={"help": "Floor per module under global scope."})
    max_sparsity_per_module: float | None = field(default=None, metadata={"help": "Cap per module under global scope."})

    def to_config(self) -> PruningConfig | None:
        """The config these arguments describe, or None when pruning was not asked for.

        Raises:
            ConfigError: a value cannot be used, or pruning arguments were given without `--do_prune`.
        """
        given = {
            name.removeprefix("pruning_"): value
            for name, value in asdict(self).items()
            if value is not None and name not in ("do_prune", "pruning_config")
        }
        if not self.do_prune:
            if given or self.pruning_config:
                name = next(iter(given), "pruning_config")
                raise ConfigError("do_prune", False, f"must be set, since {name} was given.")
            return None
        data = PruningConfig.from_json_file(self.pruning_config).to_dict() if self.pruning_config else {}
        return PruningConfig.from_dict({**data, **_with_pairs(given)})
