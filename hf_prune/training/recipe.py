"""Fine-tune, prune attention, distil, prune the feed-forward blocks, distil: one job that resumes where it was interrupted.

A [`Recipe`] is a list of [`Stage`]s. Each starts from the model that the previous one saved, trains it with a new Trainer and
optimizer, condenses what was pruned, and saves the model with its metrics. This is the process of NNI's "Pruning Transformer"
example, whose hyperparameters are in `scripts/recipes/nni_bert_mnli.json`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..condense import condense, condense_plan, layer_counts
from ..distillation import DistillationConfig, add_teacher_logits
from ..distillation.cache import IGNORED_FIELDS
from ..files import read_object, write_text
from ..measure.latency import compare
from ..measure.sparsity import count_zeros, evaluated
from ..measure.tables import as_text
from ..model import find_blocks, spec_for
from ..model.targets import Target, body_prefixes, projection_target
from ..oneshot.calibration import calibration
from ..pruning import recover
from ..pruning.criteria import CRITERIA
from ..settings.checks import check_share, check_type, check_types, dataclass_from_dict, dataclass_from_json_file
from ..settings.config import PruningConfig, PruningRule
from ..settings.errors import ConfigError, closest, within
from ..shrink.depth import check_depth, drop_layers, remove_first, shrink_depth
from ..shrink.expert_neurons import check_expert_neurons, shrink_expert_neurons
from ..shrink.experts import check_experts, shrink_experts
from ..shrink.hidden import shrink_hidden
from ..shrink.vocabulary import prune_vocabulary
from .callback import PruningCallback
from .stage import described, dropouts, make_trainer, pruning_callback, set_dropout, train

logger = logging.getLogger(__name__)

RESULT_NAME = "stage_result.json"
RECOVER = ("before", "trained")


@dataclass
class Stage:
    """One stage of a recipe.

    Args:
        name: the name of its folder and of its row in the table.
        training: fields of `TrainingArguments` that override the recipe's.
        pruning: fields of a [`PruningConfig`]; nothing is pruned without it.
        distillation: fields of a [`DistillationConfig`]; the teacher is the recipe's dense model.
        num_layers: how many layers stay, before the stage trains; see [`shrink_depth`]. Training rows say which.
        hidden_size: how wide the hidden stream becomes, before the stage trains; see [`shrink_hidden`].
        num_experts: how many experts stay in each layer, before the stage trains; see [`shrink_experts`].
        moe_intermediate_size: how many neurons stay in each expert, before the stage trains; see [`shrink_expert_neurons`].
        dropout: every dropout probability of the model, see [`set_dropout`]; 0 suits a student that copies a teacher.
        recover: after block pruning by role (pattern `"auto"`), restore all weights of every head (or neuron) that still has some
            blocks: `"before"` restores the values from before the stage, for the whole model; `"trained"` keeps the trained ones.
            Needs criteria whose weights can come back (movement).
        neurons_per_head: density of each layer's neurons relative to the share of heads that it has left; NNI uses 0.5.
            `pruning` then needs no target.
        drop_layers: remove layers without any heads left. This changes what the model computes, so train afterwards.
        pad_to_multiple_of: see [`condense`].

    Raises:
        ConfigError: a field is invalid.
    """

    name: str
    training: dict[str, Any] = field(default_factory=dict)
    pruning: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    num_layers: int | dict[str, int] | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None
    dropout: float | None = None
    recover: str | None = None
    neurons_per_head: float | None = None
    drop_layers: bool = False
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not self.name or Path(self.name).name != self.name:
            raise ConfigError("name", self.name, "must be a valid name for a folder.")
        _check_training(self.training)
        if self.dropout is not None:
            check_share("dropout", self.dropout)
        if self.distillation is not None:
            with within("distillation."):
                DistillationConfig.from_dict(self.distillation)
        if self.neurons_per_head is not None and (not 0 < self.neurons_per_head <= 1 or self.pruning is None):
            raise ConfigError("neurons_per_head", self.neurons_per_head, "must be in (0, 1], in a stage with pruning.")
        with within("pruning."):
            config = self.config({"layer": 0.5})
        if self.recover is not None:
            _check_recover(self.recover, config)

    @property
    def shrinks(self) -> bool:
        """Whether the model is smaller after it."""
        return self.pruning is not None or self.reshapes

    @property
    def reshapes(self) -> bool:
        """Whether it takes something from the whole model before it trains."""
        sizes = (self.num_layers, self.hidden_size, self.num_experts, self.moe_intermediate_size)
        return any(size is not None for size in sizes)

    def config(self, sparsity: Mapping[str, float]) -> PruningConfig | None:
        """The stage's pruning config; under `neurons_per_head` one rule for each block's neurons. `sparsity`: block → share."""
        if self.pruning is None or self.neurons_per_head is None:
            return None if self.pruning is None else PruningConfig.from_dict(self.pruning)
        rules = [PruningRule(target_modules=[name], pattern="neuron", target_sparsity=share) for name, share in sparsity.items()]
        return PruningConfig.from_dict({"scope": "local", **self.pruning, "rules": rules})


@dataclass
class Vocabulary:
    """Which tokens stay, before anything is tokenized; see [`prune_vocabulary`].

    Args:
        min_count: how often the training texts have a token that stays.
        keep: tokens that stay in any case.

    Raises:
        ConfigError: a field is invalid.
    """

    min_count: int = 1
    keep: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_types(self)
        if self.min_count < 1:
            raise ConfigError("min_count", self.min_count, "must be a whole number, 1 or more.")


@dataclass
class Recipe:
    """Stages that run one after the other.

    Args:
        stages: the stages, in order.
        metric: the metric of the table, without `eval_`.
        training: fields of `TrainingArguments` for all stages.
        vocabulary: fields of a [`Vocabulary`], for [`Recipe.prepare`]; all tokens stay without it.

    Raises:
        ConfigError: a field is invalid; the message names stage and field.
    """

    stages: list[Stage]
    metric: str = "loss"
    training: dict[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None

    def __post_init__(self) -> None:
        given: Any = self.vocabulary
        if isinstance(given, dict):
            with within("vocabulary."):
                self.vocabulary = dataclass_from_dict(Vocabulary, given)
        check_types(self)
        _check_training(self.training)
        stages = []
        for index, stage in enumerate(self.stages):
            with within(f"stages[{index}]."):
                stages.append(stage if isinstance(stage, Stage) else dataclass_from_dict(Stage, stage))
        self.stages = stages
        names = [stage.name for stage in stages]
        if not names or len(set(names)) < len(names):
            raise ConfigError("stages", names, "must be one or more, with distinct names.")

    @classmethod
    def from_json_file(cls, path: str | Path) -> Recipe:
        """Read a recipe; unknown keys are errors."""
        return dataclass_from_json_file(cls, path)

    def only(self, names: Sequence[str]) -> Recipe:
        """The recipe with only these stages.

        Raises:
            ConfigError: a stage does not exist.
        """
        known = [stage.name for stage in self.stages]
        for name in names:
            if name not in known:
                raise ConfigError("stages", name, f"must be one of {', '.join(known)}.", closest(name, known))
        return replace(self, stages=[stage for stage in self.stages if stage.name in names])

    def prepare(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Tensor | None]:
        """The model and the tokenizer that the recipe starts from; with it the data are tokenized.

        The model still computes the same for what the texts are made of, so as a teacher it reads what its students read.

        Args:
            model: the model; its vocabulary is cut in place.
            tokenizer: its tokenizer.
            texts: the training texts.

        Returns:
            The model; its tokenizer; and the new id of each old token, -1 for those that left, or None if the recipe leaves all.

        Raises:
            ConfigError: the texts need all tokens, or see [`prune_vocabulary`].
        """
        if self.vocabulary is None:
            return model, tokenizer, None
        with within("vocabulary: "):
            model, tokenizer, ids = prune_vocabulary(model, tokenizer, texts, **asdict(self.vocabulary))
            if not bool((ids < 0).any()):
                raise ConfigError("min_count", self.vocabulary.min_count, f"leaves all {len(ids)} tokens; the texts need them.")
        return model, tokenizer, ids

    def without_distillation(self) -> Recipe:
        """The recipe with only the task loss, as a baseline."""
        return replace(self, stages=[replace(stage, distillation=None) for stage in self.stages])


@dataclass(frozen=True)
class StageResult:
    """The results of a stage.

    Attributes:
        name: the name of the stage.
        sparsity: share of the dense model's attention and feed-forward weights that are removed or zero.
        metrics: metrics on the evaluation data, in float32, without `eval_`.
        parameters: number of parameters of the model.
        latency_ratio: CPU time of the dense model divided by that of this one, for 8 full rows of 128 tokens; see [`compare`].
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
    """The results of all stages, dense model first. Prints as a table with one row per stage, like NNI's."""

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

    Each stage has a folder `NN-name` in `args.output_dir` with its model and `stage_result.json`. A stage with a result is not run
    again; one that was killed resumes from its last complete checkpoint. `00-start` holds the model that the recipe started from,
    written all or nothing; the run cannot be resumed with a different model or different data (see [`described`]). The dense model,
    which is the teacher and the reference for metrics, is the result of the leading stages after which the model is no smaller, or
    the given model if the first stage makes it smaller.

    Args:
        recipe: the stages to run.
        model: the model to start from; it is saved, not changed.
        args: the training arguments, which the recipe's and the stage's override; `output_dir` is the pipeline's.
        train_dataset, eval_dataset: tokenized data.
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
        """Run the remaining stages; return the results of all.

        Every remaining stage is first set up with the model to start from, and that model is evaluated, so that a recipe that
        cannot run fails before anything is trained.

        Raises:
            ConfigError: a stage does not fit the model or the data, the metric does not exist, or the folder holds stages that
                were run with different settings, a different model or different data.
            ValueError: a result in the folder cannot be read; names the file.
        """
        self._check_vocabulary()
        dense = folder = self.begin()
        self._check_data(folder)
        for index, stage in enumerate(self.recipe.stages):
            if not (self._folder(index + 1, stage.name) / RESULT_NAME).is_file():
                with within(f"stages[{index}]."):
                    self._check(stage, folder)
        results = [self._start(folder)]
        if self.recipe.metric not in (known := results[0].metrics):
            allowed = f"must be one of {', '.join(known)}."
            raise ConfigError("metric", self.recipe.metric, allowed, closest(self.recipe.metric, known))
        pruned = False
        for number, stage in enumerate(self.recipe.stages, start=1):
            before, folder = folder, self._folder(number, stage.name)
            pruned |= stage.shrinks
            results.append(self._stage(stage, before, folder, dense if pruned or stage.distillation else folder))
            if not pruned:
                dense, results = folder, results[-1:]
        return PipelineResult(tuple(results), self.recipe.metric)

    # ---------------------------------------------------------------------------------------------------------------- stages

    def begin(self) -> Path:
        """The folder of the model to start from; written if it does not exist.

        Raises:
            ConfigError: it holds a different model.
        """
        folder = self._folder(0, "start")
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.unfinished")  # a fixed name, so that a later run removes it
            shutil.rmtree(unfinished, ignore_errors=True)
            self._save(self.model, unfinished)
            unfinished.replace(folder)
        elif differing := _differing(self._load(folder), self.model):
            message = f"is not the one that this recipe started from: {', '.join(differing[:3])} differ"
            if any(name.startswith(("config.", *body_prefixes(self.model))) for name in differing):
                allowed = f"{message}. Choose another output_dir, or pass the model in {folder}."
                raise ConfigError("model", type(self.model).__name__, allowed)
            # A new task head is initialised differently each time.
            logger.warning("The given model %s. The recipe continues with the one in %s.", message, folder)
        return folder

    def _check(self, stage: Stage, start: Path) -> None:
        """Set a stage up with the model in `start`, without training.

        Raises:
            ConfigError: the stage cannot run.
        """
        model = self._load(start, stage.dropout)
        if stage.drop_layers:
            with within("drop_layers: "):
                layer_counts(spec_for(model.config.model_type))
        if stage.pruning is not None:
            with _refused("pruning", stage.pruning):
                condense_plan(model, stage.pad_to_multiple_of)
        training = self._training(stage)
        with _refused("training", training):
            args = self._arguments(start, training)
        self._check_shrinking(stage, model, args)
        with _refused("training", training):
            teacher = {} if stage.distillation is None else {"teacher": self._load(start)}
            trainer = self._trainer(stage, args, model, [], teacher)
            batches = trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(num_training_steps=len(batches))
        if (config := self._pruning(stage, model)) is not None:
            with _refused("pruning", stage.pruning), within("pruning."):
                PruningCallback(config).check(args, model, batches)

    def _check_shrinking(self, stage: Stage, model: PreTrainedModel, args: TrainingArguments) -> None:
        """Raise unless what a stage takes away before it trains can go; bring the model to the shape that it will have.

        Raises:
            ConfigError: it cannot.
        """
        if stage.num_layers is not None:
            remove_first(model, check_depth(model, stage.num_layers))
        if stage.hidden_size is not None:
            with within("hidden_"):
                shrink_hidden(model, stage.hidden_size)
        if stage.num_experts is not None:
            check_experts(model, stage.num_experts)
        if stage.moe_intermediate_size is not None:
            check_expert_neurons(model, stage.moe_intermediate_size)
        if stage.reshapes:
            with _refused("train_dataset", len(self.train_dataset)):
                calibration(model, self._calibration(model, args), None, 0.0, labels=False, seed=args.seed)

    def _check_vocabulary(self) -> None:
        """Raise unless the model's vocabulary is as small as the recipe wants it: data come tokenized.

        Raises:
            ConfigError: it was not cut.
        """
        original = (getattr(self.model.config, "hf_prune", None) or {}).get("original", {})
        if self.recipe.vocabulary is not None and "vocab_size" not in original:
            allowed = (
                "is cut before anything is tokenized; pass model and tokenizer that recipe.prepare(model, tokenizer, texts) gives."
            )
            raise ConfigError("vocabulary", self.recipe.vocabulary, allowed)

    def _check_data(self, start: Path) -> None:
        """Raise unless the datasets are those that the recipe started with, as far as [`described`] can tell.

        Raises:
            ConfigError: a dataset differs.
        """
        if (start / RESULT_NAME).is_file():
            before = _result(start)["settings"]
            for name, now in self._datasets().items():
                if before.get(name) != now:
                    allowed = f"is not the data that this recipe started with, {before.get(name)!r}; choose another output_dir."
                    raise ConfigError(name, now, allowed)

    def _datasets(self) -> dict[str, str]:
        return {"train_dataset": described(self.train_dataset), "eval_dataset": described(self.eval_dataset)}

    def _start(self, folder: Path) -> StageResult:
        settings = {"name": "start", **self._datasets()}
        return _read(folder, settings) if (folder / RESULT_NAME).is_file() else self._finish(folder, settings, folder)

    def _stage(self, stage: Stage, before: Path, folder: Path, dense: Path) -> StageResult:
        settings = asdict(stage) | {"training": self._training(stage)}
        if (folder / RESULT_NAME).is_file():
            return _read(folder, settings)
        args = self._arguments(folder, settings["training"])
        set_seed(args.seed)
        model = self._load(before, stage.dropout)
        if stage.num_layers is not None:
            shrink_depth(model, stage.num_layers, self._calibration(model, args))
        if stage.hidden_size is not None:
            shrink_hidden(model, stage.hidden_size, self._calibration(model, args))
        if stage.num_experts is not None:
            shrink_experts(model, stage.num_experts, self._calibration(model, args))
        if stage.moe_intermediate_size is not None:
            shrink_expert_neurons(model, stage.moe_intermediate_size, self._calibration(model, args))
        config = self._pruning(stage, model)
        callbacks = [] if config is None else [PruningCallback(config)]
        trainer = self._trainer(stage, args, model, callbacks, self._teaching(stage, args, dense))
        train(trainer)
        if (callback := pruning_callback(trainer)) is not None and callback.pruner is not None:
            if stage.recover is not None:
                trained = stage.recover == "trained"
                recover(model, callback.pruner.unmasked_weights() if trained else self._load(before).state_dict())
            if stage.drop_layers:
                drop_layers(model)
            condense(model, pad_to_multiple_of=stage.pad_to_multiple_of)
        self._save(model, folder)
        return self._finish(folder, settings, dense)

    def _pruning(self, stage: Stage, model: PreTrainedModel) -> PruningConfig | None:
        if stage.neurons_per_head is None:
            return stage.config({})
        heads = max(block.num_units for block in find_blocks(self.model) if block.unit == "head")
        return stage.config(neuron_sparsity(model, heads, stage.neurons_per_head))

    def _calibration(self, model: PreTrainedModel, args: TrainingArguments) -> DataLoader[Any]:
        """Batches of training rows at random, on which what can go is measured."""
        rows = self.train_dataset.shuffle(seed=args.seed)
        return Trainer(**self._evaluating(model, args)).get_test_dataloader(rows)

    def _evaluating(self, model: PreTrainedModel, args: TrainingArguments) -> dict[str, Any]:
        """The arguments of a Trainer that only evaluates."""
        return {
            "model": model,
            "args": args,
            "eval_dataset": self.eval_dataset,
            "processing_class": self.processing_class,
            "data_collator": self.data_collator,
            "compute_metrics": self.compute_metrics,
        }

    def _trainer(
        self,
        stage: Stage,
        args: TrainingArguments,
        model: PreTrainedModel,
        callbacks: list[PruningCallback],
        teaching: Mapping[str, Any],
    ) -> Trainer:
        settings = {"train_dataset": self.train_dataset, "callbacks": callbacks, **self._evaluating(model, args), **teaching}
        return make_trainer(stage.distillation, settings.pop("teacher", None), **settings)

    def _teaching(self, stage: Stage, args: TrainingArguments, dense: Path) -> dict[str, Any]:
        """The additional arguments for distillation: the teacher, or training data with the teacher's logits."""
        if stage.distillation is None:
            return {}
        teacher = self._load(dense)
        if DistillationConfig.from_dict(stage.distillation).needs_teacher:
            return {"teacher": teacher}
        batch, cache = args.per_device_eval_batch_size, Path(str(self.args.output_dir), "teacher_logits")
        return {"train_dataset": add_teacher_logits(self.train_dataset, teacher, self.data_collator, batch, cache_dir=cache)}

    def _finish(self, folder: Path, settings: Mapping[str, Any], dense: Path) -> StageResult:
        """Evaluate and measure the saved model; write the result, which marks the stage as done, and delete its checkpoints."""
        model, reference = self._load(folder), self._load(dense)
        args = self._arguments(folder, {**self.recipe.training, "bf16": False, "fp16": False, "report_to": "none"})
        metrics = evaluated(Trainer(**self._evaluating(model, args)).evaluate())
        blocks = find_blocks(model)
        (zeros, weights), (_, dense_weights) = (count_zeros(_weights(each)) for each in (model, reference))
        result = StageResult(
            name=str(settings["name"]),
            sparsity=1 - (weights - zeros) / dense_weights,
            metrics=metrics,
            parameters=model.num_parameters(),
            latency_ratio=compare(model.cpu(), reference).latency_ratio,
            heads=[block.num_units for block in blocks if block.unit == "head"],
            neurons=[block.num_units for block in blocks if block.unit == "neuron"],
        )
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        written = {"result": asdict(result), "settings": dict(settings)}
        write_text(folder / RESULT_NAME, json.dumps(written, indent=2) + "\n")
        return result

    # ---------------------------------------------------------------------------------------------------------------- files

    def _folder(self, number: int, name: str) -> Path:
        return Path(str(self.args.output_dir), f"{number:02}-{name}")

    def _training(self, stage: Stage) -> dict[str, Any]:
        return {**self.recipe.training, **stage.training}

    def _arguments(self, folder: Path, training: Mapping[str, Any]) -> TrainingArguments:
        kept = {"save_strategy": "epoch", "save_total_limit": 1, "load_best_model_at_end": False, "resume_from_checkpoint": None}
        return replace(self.args, **{**kept, **training, "output_dir": str(folder)})

    def _load(self, folder: Path, dropout: float | None = None) -> PreTrainedModel:
        config = type(self.model.config).from_pretrained(folder)
        if dropout is not None:
            set_dropout(config, dropout)
        model: PreTrainedModel = type(self.model).from_pretrained(folder, config=config)
        return model

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        model.config.update(dropouts(self.model.config))  # a stage's dropout ends with the stage
        model.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------- sizes and rates


def neuron_sparsity(model: PreTrainedModel, heads: int, factor: float) -> dict[str, float]:
    """The sparsity of each feed-forward block whose layer keeps k of its `heads`: 1 − factor·k/heads, at most 0.98.

    Args:
        model: the model, its attention condensed.
        heads: how many heads a layer had originally.
        factor: `neurons_per_head` of the [`Stage`].
    """
    found = find_blocks(model)
    left: dict[str, list[float]] = {}
    for block in found:
        if block.unit == "head":
            left.setdefault(block.layer, []).append(block.num_units / heads)
    shares = {layer: sum(values) / len(values) for layer, values in left.items()}
    # No layer loses all its neurons: even without heads it may be needed.
    return {block.name: min(1 - factor * shares.get(block.layer, 1.0), 0.98) for block in found if block.unit == "neuron"}


def _differing(model: PreTrainedModel, other: PreTrainedModel) -> list[str]:
    """The config's fields (`config.hidden_size`) and the tensors in which two models differ."""
    differing = []
    one, two = (json.loads(each.config.to_json_string(use_diff=False)) for each in (model, other))
    for name in sorted((one.keys() | two.keys()) - IGNORED_FIELDS):
        if one.get(name) != two.get(name):
            differing.append(f"config.{name}")
    mine, others = model.state_dict(), other.state_dict()
    for name in sorted(mine.keys() | others.keys()):
        tensor, given = mine.get(name), others.get(name)
        if tensor is None or given is None or tensor.shape != given.shape or not torch.equal(tensor, given.to(tensor)):
            differing.append(name)
    return differing


def _weights(model: PreTrainedModel) -> list[Target]:
    """The weights of the attention and feed-forward blocks, each once."""
    modules = {id(part.module): part for block in find_blocks(model) for part in block.projections}
    return [projection_target(part) for part in modules.values()]


# ----------------------------------------------------------------------------------------------------------------------- checks


def _check_recover(choice: str, config: PruningConfig | None) -> None:
    """Raise unless all pruned weights can come back."""
    if choice not in RECOVER:
        raise ConfigError("recover", choice, f"must be one of {', '.join(RECOVER)}.", closest(choice, RECOVER))
    used = {} if config is None else {name: rule.criterion for name, rule in config.resolved_rules().items()}
    others = [f"{name} has {criterion!r}" for name, criterion in used.items() if not CRITERIA[criterion].regrows]
    if others or not used:
        regrowing = " or ".join(repr(name) for name, criterion in CRITERIA.items() if criterion.regrows)
        raise ConfigError("recover", choice, f"needs pruning by criterion {regrowing}; {', '.join(others) or 'there is none'}.")


def _check_training(training: Mapping[str, Any]) -> None:
    """Raise unless names and types are those of `TrainingArguments`, which checks the values itself."""
    hints = get_type_hints(TrainingArguments)
    known = {item.name for item in fields(TrainingArguments)} - {"output_dir"}
    for name, value in training.items():
        if name not in known:
            raise ConfigError(f"training.{name}", value, "is not a field of TrainingArguments.", closest(name, known))
        check_type(f"training.{name}", value, hints[name])


@contextmanager
def _refused(name: str, value: object) -> Iterator[None]:
    """Turn any error inside into one that names the field."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # transformers and torch raise many kinds
        raise ConfigError(name, value, f"cannot be used: {error}") from error


def _result(folder: Path) -> dict[str, Any]:
    """The contents of `stage_result.json`: `settings` and `result`."""
    found = read_object(folder / RESULT_NAME)
    if not all(isinstance(found.get(name), dict) for name in ("settings", "result")):
        raise ValueError(f"{folder / RESULT_NAME} does not hold the result of a stage; delete it to run the stage again.")
    return found


def _read(folder: Path, settings: Mapping[str, Any]) -> StageResult:
    """The result of a stage that is already done, with the same settings."""
    written = _result(folder)
    requested = json.loads(json.dumps(dict(settings)))
    differing = sorted(name for name in requested if requested[name] != written["settings"].get(name))
    if differing:
        allowed = f"was run with different settings for {', '.join(differing)}; choose another output_dir or delete {folder}."
        raise ConfigError("stage", settings["name"], allowed)
    return StageResult(**written["result"])
