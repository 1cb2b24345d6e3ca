"""Fine-tune, prune attention, distil, prune the feed-forward blocks, distil: as one job that goes on where it was stopped.

A [`Recipe`] is a list of [`Stage`]s. Each starts from the model that the one before saved, trains it with a Trainer and an
optimizer of its own, condenses what was pruned, and saves the model with its figures. It is the process of NNI's "Pruning
Transformer"; its hyperparameters are in `scripts/recipes/nni_bert_mnli.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from torch import Tensor
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from .architectures import AttentionBlock, FeedForwardBlock, find_blocks, spec_for
from .callback import PruningCallback
from .checkpoints import last_complete_checkpoint
from .condense import condense, condense_plan
from .condense.layers import layer_counts, remove_layers
from .config import PruningConfig, PruningConfigError, PruningRule, closest, dataclass_from_dict, parse_pattern
from .distillation import DistillationConfig, DistillationTrainer, add_teacher_logits
from .patterns import build_groups
from .pruner import Pruner
from .report import benchmark
from .tables import as_text
from .targets import weight_target

RESULT_NAME = "stage_result.json"
RECOVER = ("before", "trained")


@dataclass
class Stage:
    """One stage of a recipe.

    Args:
        name: of its folder and its row in the table.
        training: fields of `TrainingArguments` that differ from the recipe's.
        pruning: fields of a [`PruningConfig`]; without, nothing is pruned.
        distillation: fields of a [`DistillationConfig`]; the teacher is the recipe's dense model.
        dropout: every dropout probability of the model; 0 suits a student that copies a teacher.
        recover: after pruning blocks by role, what becomes of a head (or neuron) of which some blocks are left: it gets all its
            weights back, as they were `"before"` the stage, like all others of the model, or as `"trained"`. Needs a criterion
            whose weights come back (movement).
        neurons_per_head: prune the neurons of each layer to this share of the share of its heads that are left, as NNI does
            with 0.5. `pruning` then needs no target.
        drop_layers: remove layers that have no head left. This changes what the model computes, so train after it.
        pad_to_multiple_of: see [`condense`].

    Raises:
        PruningConfigError: a field cannot be used.
    """

    name: str
    training: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    dropout: float | None = None
    recover: str | None = None
    neurons_per_head: float | None = None
    drop_layers: bool = False
    pad_to_multiple_of: int | None = 16

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name:
            raise PruningConfigError("name", self.name, "must be a name that can be a folder's.")
        _check_training(self.training)
        if self.distillation is not None:
            DistillationConfig.from_dict(self.distillation)
        if self.recover is not None and self.recover not in RECOVER:
            raise PruningConfigError(
                "recover", self.recover, f"must be one of {', '.join(RECOVER)}.", closest(self.recover, RECOVER)
            )
        if self.recover is not None and (self.pruning or {}).get("criterion") not in ("movement", "soft_movement"):
            raise PruningConfigError("recover", self.recover, "needs pruning by criterion 'movement' or 'soft_movement'.")
        if self.neurons_per_head is not None:
            if not 0 < self.neurons_per_head <= 1 or self.pruning is None:
                raise PruningConfigError("neurons_per_head", self.neurons_per_head, "must be in (0, 1], in a stage with pruning.")
            self.layered(dict.fromkeys(["layer"], 0.5))
        elif self.pruning is not None:
            PruningConfig.from_dict(self.pruning)

    def layered(self, sparsity: Mapping[str, float]) -> PruningConfig:
        """The stage's pruning with a rule for the neurons of each block. `sparsity`: by block name."""
        rules = [PruningRule([name], pattern="neuron", target_sparsity=share) for name, share in sparsity.items()]
        return PruningConfig.from_dict({"scope": "local", **(self.pruning or {}), "rules": rules})


@dataclass
class Recipe:
    """Stages in their order.

    Args:
        stages: the stages.
        metric: the metric of the table, without `eval_`.
        training: fields of `TrainingArguments` for all stages.

    Raises:
        PruningConfigError: a field cannot be used; the message names stage and field.
    """

    stages: list[Stage]
    metric: str = "loss"
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_training(self.training)
        stages = []
        for index, stage in enumerate(self.stages):
            try:
                stages.append(stage if isinstance(stage, Stage) else dataclass_from_dict(Stage, stage))
            except PruningConfigError as error:
                raise error.within(f"stages[{index}].") from None
        self.stages = stages
        names = [stage.name for stage in stages]
        if not names or len(set(names)) < len(names):
            raise PruningConfigError("stages", names, "must be one or more, each with a name of its own.")

    @classmethod
    def from_json_file(cls, path: str | Path) -> Recipe:
        """Read a recipe; unknown keys are errors."""
        try:
            return dataclass_from_dict(cls, json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise PruningConfigError("recipe", str(path), f"is not valid JSON ({error}).") from None

    def only(self, names: Sequence[str]) -> Recipe:
        """The recipe with these stages alone.

        Raises:
            PruningConfigError: there is no such stage.
        """
        known = [stage.name for stage in self.stages]
        for name in names:
            if name not in known:
                raise PruningConfigError("stages", name, f"must be one of {', '.join(known)}.", closest(name, known))
        return replace(self, stages=[stage for stage in self.stages if stage.name in names])

    def without_distillation(self) -> Recipe:
        """The recipe with the task loss alone, to compare with."""
        return replace(self, stages=[replace(stage, distillation=None) for stage in self.stages])


@dataclass(frozen=True)
class StageResult:
    """What a stage ended with.

    Attributes:
        name: the stage's.
        sparsity: share of the dense model's attention and feed-forward weights that are gone or zero.
        metrics: of the evaluation data, in float32, without `eval_`.
        parameters: of the model.
        latency_ratio: CPU time of the dense model over that of this one, see [`benchmark`].
        heads, neurons: how many each attention and feed-forward block has.
    """

    name: str
    sparsity: float
    metrics: dict[str, float]
    parameters: int
    latency_ratio: float
    heads: list[int]
    neurons: list[int]


@dataclass(frozen=True)
class PipelineResult:
    """The results of all stages, dense model first. Prints as a table in the row format of NNI's."""

    rows: tuple[StageResult, ...]
    metric: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(title=f"{self.metric} against the dense model")
        for column in ("stage", "total sparsity", self.metric, "drop", "parameters", "latency ratio"):
            table.add_column(column, justify="left" if column == "stage" else "right")
        dense = self.rows[0].metrics[self.metric]
        for row in self.rows:
            value = row.metrics[self.metric]
            cells = (
                f"{row.sparsity:.2%}",
                f"{value:.4f}",
                f"{value - dense:+.4f}",
                f"{row.parameters:,}",
                f"x{row.latency_ratio:.2f}",
            )
            table.add_row(row.name, *cells)
        return table

    def __str__(self) -> str:
        return as_text(self.__rich__())


@dataclass
class Pipeline:
    """Runs a recipe.

    Each stage has a folder `NN-name` in `args.output_dir` with its model and `stage_result.json`. A stage that has its result is
    not run again; one that was killed goes on from its last complete checkpoint. The dense model, which figures are compared with
    and which teaches, is the one after the first stages without pruning, or the one given when the first stage prunes.

    Args:
        recipe: what to do.
        model: the model to start from; it is saved, not changed.
        args: the training arguments that the recipe's and the stages' are laid over; `output_dir` is the pipeline's.
        train_dataset, eval_dataset: tokenized.
        data_collator, processing_class, compute_metrics: as for the Trainer.
    """

    recipe: Recipe
    model: PreTrainedModel
    args: TrainingArguments
    train_dataset: Dataset
    eval_dataset: Dataset
    data_collator: Callable[[list[Any]], dict[str, Any]]
    processing_class: PreTrainedTokenizerBase | None = None
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None

    def run(self) -> PipelineResult:
        """Run what is left to do; return the figures of all stages.

        Raises:
            PruningConfigError: the folder holds stages that were run with other settings, or the metric does not exist.
        """
        dense = folder = self._folder(0, "start")
        if not (folder / "config.json").is_file():
            self._save(self.model, folder)
        results = [self._start(folder)] if self.recipe.stages[0].pruning is not None else []
        pruned = False
        for number, stage in enumerate(self.recipe.stages, start=1):
            before, folder = folder, self._folder(number, stage.name)
            pruned |= stage.pruning is not None
            results.append(self._stage(stage, before, folder, dense if pruned or stage.distillation else folder))
            if not pruned:
                dense, results = folder, results[-1:]
        return PipelineResult(tuple(results), self.recipe.metric)

    # ---------------------------------------------------------------------------------------------------------------- stages

    def _start(self, folder: Path) -> StageResult:
        settings = {"name": "start"}
        return _read(folder, settings) if (folder / RESULT_NAME).is_file() else self._finish(folder, settings, folder)

    def _stage(self, stage: Stage, before: Path, folder: Path, dense: Path) -> StageResult:
        settings = asdict(stage) | {"training": {**self.recipe.training, **stage.training}}
        if (folder / RESULT_NAME).is_file():
            return _read(folder, settings)
        args = self._arguments(folder, settings["training"])
        set_seed(args.seed)
        model = self._load(before, stage.dropout)
        config = self._pruning(stage, model)
        callback = None if config is None else PruningCallback(config)
        trainer = self._trainer(stage, args, model, dense, [] if callback is None else [callback])
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        if callback is not None:
            if stage.recover is not None:
                weights = _whole_weights(callback.pruner) if stage.recover == "trained" else self._load(before).state_dict()
                recover(model, weights)
            if stage.drop_layers:
                drop_layers(model)
            model = condense(model, pad_to_multiple_of=stage.pad_to_multiple_of)
        self._save(model, folder)
        return self._finish(folder, settings, dense)

    def _pruning(self, stage: Stage, model: PreTrainedModel) -> PruningConfig | None:
        if stage.pruning is None or stage.neurons_per_head is None:
            return None if stage.pruning is None else PruningConfig.from_dict(stage.pruning)
        heads = max(block.num_heads for block in find_blocks(self.model) if isinstance(block, AttentionBlock))
        return stage.layered(neuron_sparsity(model, heads, stage.neurons_per_head))

    def _trainer(
        self, stage: Stage, args: TrainingArguments, model: PreTrainedModel, dense: Path, callbacks: list[PruningCallback]
    ) -> Trainer:
        settings: dict[str, Any] = {
            "model": model,
            "args": args,
            "train_dataset": self.train_dataset,
            "eval_dataset": self.eval_dataset,
            "processing_class": self.processing_class,
            "data_collator": self.data_collator,
            "compute_metrics": self.compute_metrics,
            "callbacks": callbacks,
        }
        if stage.distillation is None:
            return Trainer(**settings)
        distillation = DistillationConfig.from_dict(stage.distillation)
        teacher = self._load(dense)
        weights = distillation.weights()
        if any(weight for name, weight in weights.items() if name not in ("task", "logits")):
            return DistillationTrainer(**settings, teacher=teacher, distillation=distillation)
        batch, cache = args.per_device_eval_batch_size, Path(str(self.args.output_dir), "teacher_logits")
        settings["train_dataset"] = add_teacher_logits(self.train_dataset, teacher, self.data_collator, batch, cache_dir=cache)
        return DistillationTrainer(**settings, distillation=distillation)

    def _finish(self, folder: Path, settings: Mapping[str, Any], dense: Path) -> StageResult:
        """Evaluate and measure the saved model; write the result, which says that the stage is done, and drop its checkpoints."""
        model, reference = self._load(folder), self._load(dense)
        args = self._arguments(folder, {**self.recipe.training, "bf16": False, "fp16": False, "report_to": "none"})
        trainer = Trainer(
            model=model,
            args=args,
            eval_dataset=self.eval_dataset,
            data_collator=self.data_collator,
            processing_class=self.processing_class,
            compute_metrics=self.compute_metrics,
        )
        scores = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        metrics = {name: value for name, value in scores.items() if not name.endswith(("runtime", "_per_second", "_time", "epoch"))}
        if self.recipe.metric not in metrics:
            match = closest(self.recipe.metric, metrics)
            raise PruningConfigError("metric", self.recipe.metric, f"must be one of {', '.join(metrics)}.", match)
        blocks = find_blocks(model)
        result = StageResult(
            name=str(settings["name"]),
            sparsity=1 - _weights_left(model) / _weights_left(reference, count_zeros=True),
            metrics=metrics,
            parameters=model.num_parameters(),
            latency_ratio=self._latency_ratio(model, reference),
            heads=[block.num_heads for block in blocks if isinstance(block, AttentionBlock)],
            neurons=[block.num_neurons for block in blocks if isinstance(block, FeedForwardBlock)],
        )
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        written = {"result": asdict(result), "settings": dict(settings)}
        temporary = folder / f"{RESULT_NAME}.part"
        temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / RESULT_NAME)
        return result

    def _latency_ratio(self, model: PreTrainedModel, dense: PreTrainedModel) -> float:
        """On a batch of evaluation rows, the longest first."""
        rows = sorted(self.eval_dataset, key=lambda row: -len(row["input_ids"]))[:8]
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = self.data_collator([{name: row[name] for name in names if name in row} for row in rows])
        times = benchmark({"dense": dense.cpu(), "model": model.cpu()}, dict(batch), repeats=15)
        return times["dense"] / times["model"]

    # ---------------------------------------------------------------------------------------------------------------- files

    def _folder(self, number: int, name: str) -> Path:
        return Path(str(self.args.output_dir), f"{number:02}-{name}")

    def _arguments(self, folder: Path, training: Mapping[str, Any]) -> TrainingArguments:
        kept = {"save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": False}
        return replace(self.args, **{**kept, **training, "output_dir": str(folder)})

    def _load(self, folder: Path, dropout: float | None = None) -> PreTrainedModel:
        config = type(self.model.config).from_pretrained(folder)
        if dropout is not None:
            rates = (name for name, value in config.to_dict().items() if "dropout" in name and isinstance(value, float))
            config.update(dict.fromkeys(rates, dropout))
        model: PreTrainedModel = type(self.model).from_pretrained(folder, config=config)
        return model

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        dropouts = {name: value for name, value in self.model.config.to_dict().items() if "dropout" in name}
        model.config.update(dropouts)  # a stage's dropout is its own
        model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------- heads and layers


@torch.no_grad()
def recover(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give every head and neuron that is not dead all its weights; what is dead becomes zero as a whole.

    Movement pruning by role leaves heads of which some blocks are masked. As in NNI, such a head stays as it is in `weights`, and
    a head goes when none of it is left; dead is what [`condense_plan`] says.

    Args:
        model: as pruned; changed in place.
        weights: its parameters without masks, by name.
    """
    dead = {plan.block.name: plan.dead for plan in condense_plan(model).changed}
    model.load_state_dict({**model.state_dict(), **weights})
    for kind in ("head", "neuron"):
        for group in build_groups(parse_pattern(kind), (), find_blocks(model))[0]:
            if group.name in dead:
                group.apply(~dead[group.name].to(group.device))


@torch.no_grad()
def drop_layers(model: PreTrainedModel) -> list[str]:
    """Remove the layers that have no living head. What the model computes changes: their feed-forward blocks and norms go too.

    Returns:
        The names of the layers that went; one always stays.

    Raises:
        ValueError: layers share their weights.
    """
    spec = spec_for(model.config.model_type)
    alive: dict[str, bool] = {}
    for plan in condense_plan(model).blocks:
        if isinstance(plan.block, AttentionBlock):
            alive[plan.block.layer] = alive.get(plan.block.layer, False) or bool(len(plan.kept))
    removed: dict[str, list[int]] = {}
    for path in layer_counts(spec):
        layers = {name: lives for name, lives in alive.items() if name.rpartition(".")[0] == path}
        gone = [int(name.rpartition(".")[2]) for name, lives in layers.items() if not lives]
        if gone:
            removed[path] = gone[1:] if len(gone) == len(layers) else gone
    remove_layers(model, spec, removed)
    return [f"{path}.{index}" for path, indices in removed.items() for index in indices]


def neuron_sparsity(model: PreTrainedModel, heads: int, factor: float) -> dict[str, float]:
    """The sparsity of each feed-forward block whose layer keeps k of its `heads`: 1 − factor·k/heads, at most 0.98.

    Args:
        model: with its attention condensed.
        heads: how many heads a layer had.
        factor: NNI's is ½.
    """
    found = find_blocks(model)
    left: dict[str, list[float]] = {}
    for block in found:
        if isinstance(block, AttentionBlock):
            left.setdefault(block.layer, []).append(block.num_heads / heads)
    shares = {layer: sum(values) / len(values) for layer, values in left.items()}
    # No layer loses all its neurons here: without heads it may still be needed.
    return {
        block.name: min(1 - factor * shares.get(block.layer, 1.0), 0.98) for block in found if isinstance(block, FeedForwardBlock)
    }


def _whole_weights(pruner: Pruner | None) -> dict[str, Tensor]:
    assert pruner is not None  # trained just now
    return pruner.unmasked_weights()


def _weights_left(model: PreTrainedModel, count_zeros: bool = False) -> int:
    """Weights of the attention and feed-forward blocks, zeros left out unless they count; a shared weight counts once."""
    modules = {id(part.module): part for block in find_blocks(model) for part in block.projections}
    weights = [weight_target(part.name, part.module).parameter.detach() for part in modules.values()]
    return sum(weight.numel() if count_zeros else int(torch.count_nonzero(weight)) for weight in weights)


def _check_training(training: Mapping[str, Any]) -> None:
    known = {item.name for item in fields(TrainingArguments)} - {"output_dir"}
    for name, value in training.items():
        if name not in known:
            raise PruningConfigError(f"training.{name}", value, "is not a field of TrainingArguments.", closest(name, known))


def _read(folder: Path, settings: Mapping[str, Any]) -> StageResult:
    """The result of a stage that was done before, with the same settings."""
    written = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(dict(settings)))
    differing = sorted(name for name in asked if asked[name] != written["settings"].get(name))
    if differing:
        allowed = f"was run with other settings for {', '.join(differing)}; choose another output_dir or delete {folder}."
        raise PruningConfigError("stage", settings["name"], allowed)
    return StageResult(**written["result"])
