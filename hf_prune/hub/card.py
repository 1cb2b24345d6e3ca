"""Model cards: what was pruned, the metrics before and after, and the speedup, in the Hub's format.

Most of a card is read off the model. [`CardFacts`] hold the rest; they are saved with the model as `pruning_facts.json`, so that
the card can be made again after the model was condensed or measured.
"""

from __future__ import annotations

import html
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import PreTrainedModel
from yaml import YAMLError

from ..compat import auto_classes
from ..condense import condense_plan, is_condensed, needs_hf_prune, smaller
from ..files import read_object, write_text
from ..measure.latency import Comparison, Cost
from ..measure.memory import megabytes
from ..measure.plots import plot_family, plot_history, plot_kept, plot_latency
from ..measure.sparsity import BlockSize, evaluated, original_blocks, sparsity_report, stock_twin, total_sparsity
from ..model import SPECS
from ..model.wrappers import transformers_model
from ..settings.checks import check_types, dataclass_from_json_file
from ..settings.config import WHILE_TRAINING, WITHOUT_TRAINING, PruningConfig
from ..settings.errors import ConfigError, within
from ..version import __version__
from .family import Family, number
from .files import MODULES_NAME

CARD_NAME = "README.md"
FACTS_NAME = "pruning_facts.json"
#: What `Trainer.save_metrics("eval", ...)` writes.
RESULTS_NAME = "eval_results.json"
PICTURES = "pictures"

#: The card's template, in Jinja.
TEMPLATE = Path(__file__).with_name("model_card_template.md")

_CAPTIONS = {
    "kept.png": "Heads and neurons kept in each layer",
    "history.png": "Sparsity and metric over the optimizer steps",
    "latency.png": "Metric against latency",
    "family.png": "Metric against speed or size over the family",
}
#: Auto classes that load a model for what hardly anybody wants.
_ENCODERS = ("AutoModelForPreTraining", "AutoModelForTextEncoding")
_VERSIONS = ("torch", "transformers", "datasets")


@dataclass
class CardFacts:
    """What a card says that cannot be read off the model.

    Args:
        model_name: the model's name, for a card without the id of a repository.
        base_model: id (or path, of which the last part is shown) of the model that pruning started from.
        dataset: id on the Hub of the data that the metrics are of; without it they are in the card but not in its metadata.
        dataset_name: its display name; by default the id and the config.
        dataset_config, dataset_split: as `load_dataset` takes them.
        language, license: for the card's metadata.
        metrics_before, metrics: of the dense model and of this one, without `eval_`.
        metric: the one that plots show; by default the first that is not a loss.
        training: settings of the run to list.
        calibration: what to list of a model that `prune()` pruned, without training; empty for one that was pruned while it was
            trained.
        history: `step`, with `sparsity`, `reached_sparsity`, `target_sparsity` and metrics where they were logged.
        comparison: a [`Comparison`] as a dictionary.
        budget: of a target in costs its field as `target`, and what was `asked`, what that became as `predicted` by the costs of
            what was pruned, and as `measured` of the condensed model, as far as that is known.
        runtimes: the fastest file that was measured, see [`runtime_facts`].
        family: of a run to several targets, what it made: a [`Family`] as a dictionary.
        vocabulary: of a model that lacks tokens, the `data` that they were chosen from, and a [`VocabularyReport`] of held-back
            rows of it as a dictionary.

    Raises:
        ConfigError: a value is not of its field's type.
    """

    model_name: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    language: str | None = None
    license: str | None = None
    metrics_before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    metric: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    runtimes: dict[str, Any] = field(default_factory=dict)
    family: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if self.comparison is not None:
            with within("comparison."):
                Comparison.from_dict(self.comparison)
        if self.family:
            with within("family."):
                Family.from_dict(self.family)

    @property
    def main_metric(self) -> str | None:
        """The metric that pictures show."""
        names = [*self.metrics, *self.metrics_before, *(Family.from_dict(self.family).metrics if self.family else ())]
        return self.metric or next((name for name in names if name != "loss"), next(iter(names), None))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> CardFacts:
        """Read `pruning_facts.json` from a folder, and what that does not say from what a Trainer left there.

        The metrics are then those in `eval_results.json`; see also [`CardFacts.complete_from`].

        Raises:
            ConfigError: it is not JSON, or a key is not one of the fields, or a value not of its type.
            ValueError: `eval_results.json` holds no JSON object; names the file.
        """
        path, results = Path(folder, FACTS_NAME), Path(folder, RESULTS_NAME)
        with within(f"{FACTS_NAME}: "):
            facts = dataclass_from_json_file(cls, path) if path.is_file() else cls()
        if not facts.metrics and results.is_file():
            measured = evaluated(read_object(results))
            facts.metrics = {name: value for name, value in measured.items() if isinstance(value, (int, float))}
        facts.complete_from(folder)
        return facts

    def complete_from(self, folder: str | os.PathLike[str]) -> None:
        """Take what is not known of base model, language and license from the metadata of the card that lies in a folder."""
        path = Path(folder, CARD_NAME)
        try:
            metadata = (metadata_load(path) if path.is_file() else None) or {}
        except (ValueError, YAMLError):  # somebody's own README
            return
        for name in ("base_model", "language", "license"):
            value = metadata.get(name)
            known = value[0] if isinstance(value, list) and len(value) == 1 else value
            if getattr(self, name) is None and isinstance(known, str):
                setattr(self, name, known)

    def of_child(self, base_model: str | None, **changes: Any) -> CardFacts:
        """The facts of a model that was made from this one without training.

        What was measured of this one counts as measured before; what lies beside it stays there.

        Args:
            base_model: id (or path, of which the last part is kept) of this one.
            changes: further fields.
        """
        own: dict[str, Any] = {
            "model_name": None,
            "base_model": without_folders(base_model) or self.base_model,
            "metrics_before": self.metrics_before or self.metrics,
            "metrics": {},
            "history": [],
            "comparison": None,
            "runtimes": {},
            "family": {},
        }
        return replace(self, **own | changes)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `pruning_facts.json` into a folder, which is made if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_text(Path(folder, FACTS_NAME), json.dumps(asdict(self), indent=2) + "\n")


def budget_facts(config: PruningConfig, predicted: float | None) -> dict[str, Any]:
    """[`CardFacts.budget`] of a model that was pruned to the last target of a config; empty where that is no target in costs."""
    if config.cost_target is None:
        return {}
    return {"target": config.cost_target, "asked": config.cost_targets[-1], "predicted": predicted}


def runtime_facts(report: Mapping[str, Any]) -> dict[str, Any]:
    """[`CardFacts.runtimes`]: the best row of what `hf-prune benchmark --runtimes … --json` prints, and where it was measured.

    Raises:
        ConfigError: it is something else, or no row is good enough.
    """
    try:
        best = {name: report["best"][name] for name in ("runtime", "dtype", "bytes", "speedup", "command")}
        machine = {name: report["machine"][name] for name in ("name", "flags")}
        return {**best, **machine, "protocol": report["protocol"]}
    except (KeyError, TypeError):
        allowed = "must be what `hf-prune benchmark --runtimes … --json` prints, with a best row."
        raise ConfigError("runtimes", sorted(report), allowed) from None


def model_card(
    model: Any,
    config: PruningConfig | None = None,
    facts: CardFacts | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    library: str | None = None,
) -> ModelCard:
    """The card of a pruned or condensed model.

    Args:
        model: a transformers model, or a wrapper around it.
        config: what it was pruned with.
        facts: what cannot be read off the model.
        pictures: path in the repository → caption.
        repo_id: where the model will be, for the lines that load it; by default its name.
        library: which the Hub says loads the model; by default the one that its class is of, sentence-transformers or transformers.

    Returns:
        A `huggingface_hub.ModelCard`; `str(card)` is the Markdown, `card.data` the metadata.
    """
    stock: Any = transformers_model(model)
    facts = facts or CardFacts()
    report, twin = sparsity_report(model), stock_twin(stock, "meta")
    name = (repo_id or "").rpartition("/")[2] or facts.model_name or f"{stock.config.model_type}-pruned"
    condensed, less = is_condensed(stock.config), smaller(stock.config)
    comparison = None if facts.comparison is None else Comparison.from_dict(facts.comparison)
    library = library or library_of(model)
    card: ModelCard = ModelCard.from_template(
        card_metadata(stock, facts, name, library),
        template_path=str(TEMPLATE),
        text=as_text,
        code=as_code,
        name=name,
        repo=json.dumps(as_line(repo_id or name), ensure_ascii=False),
        class_name=type(stock).__name__,
        load=_loader(stock, library),
        condensed=condensed,
        shape=[(name, *sizes) for name, sizes in less.items() if name != "tokens"],
        tokens=less.get("tokens"),
        vocabulary=_vocabulary_row(facts.vocabulary),
        needs_hf_prune=needs_hf_prune(stock.config),
        remote_code=any(auto_classes(stock.config.model_type)),
        total_sparsity=total_sparsity(stock),
        sparsity=report.sparsity,
        parameters=stock.num_parameters(),
        parameters_before=twin.num_parameters(),
        size=_size(stock),
        size_before=_size(twin),
        removable=0 if condensed or stock.config.model_type not in SPECS else condense_plan(stock).parameters,
        comparison=comparison,
        runtimes=facts.runtimes,
        budget=_budget_row(facts.budget),
        family=None if not facts.family else _family_rows(Family.from_dict(facts.family)),
        costs=[] if comparison is None else [_cost("dense", comparison.dense), _cost("this model", comparison.model)],
        base_model=(without_folders(facts.base_model) or "").removeprefix("./"),
        metrics=_metric_rows(facts),
        dataset_name=_dataset_name(facts),
        dataset_split=facts.dataset_split,
        pictures=[{"path": path, "caption": caption} for path, caption in (pictures or {}).items()],
        rules=_rule_rows(config, trained=not facts.calibration),
        training=facts.training,
        calibration=facts.calibration,
        blocks=original_blocks(stock),
        modules=report.modules,
        versions=_versions(),
    )
    return card


def write_card(
    folder: str | os.PathLike[str],
    model: Any,
    config: PruningConfig | None = None,
    facts: CardFacts | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """Write a model's card into a folder, with its pictures (where matplotlib is), `pruning_config.json` and its facts."""
    facts = facts or CardFacts()
    pictures = write_pictures(Path(folder), original_blocks(model), facts)
    card = model_card(model, config, facts, pictures, repo_id, library_of(model, folder))
    facts.save(folder)
    if config is not None:
        config.save_pretrained(folder)
    write_text(Path(folder, CARD_NAME), str(card))
    return card


def write_pictures(folder: Path, blocks: tuple[BlockSize, ...], facts: CardFacts) -> dict[str, str]:
    """Draw the plots into `pictures/`; none without matplotlib.

    Returns:
        Path in the folder → caption.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    metric, figures = facts.main_metric, {}
    if blocks:
        figures["kept.png"] = plot_kept(blocks)
    if any("sparsity" in entry for entry in facts.history):
        history = [{"step": 0, **facts.metrics_before}, *facts.history]
        figures["history.png"] = plot_history(history, metric if any(metric in entry for entry in facts.history) else None)
    if facts.comparison is not None and metric in facts.metrics and metric in facts.metrics_before:
        costs = ("dense", facts.metrics_before), ("model", facts.metrics)
        points = {name: (facts.comparison[name]["milliseconds"], values[metric]) for name, values in costs}
        figures["latency.png"] = plot_latency(points, metric)
    if facts.family and metric is not None and (points := (family := Family.from_dict(facts.family)).points(metric)):
        dense = {"dense": (family.dense, facts.metrics_before[metric])} if metric in facts.metrics_before else {}
        figures["family.png"] = plot_family(dense | points, metric, family.cost)
    target = folder / PICTURES
    if figures:
        target.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(target / name)
    return {f"{PICTURES}/{name}": _CAPTIONS[name] for name in figures}


# ------------------------------------------------------------------------------------------------------------------- metadata


def library_of(model: Any, folder: str | os.PathLike[str] | None = None) -> str:
    """The library that a model is of: sentence-transformers, by its class or the list of modules in its folder, or transformers."""
    listed = folder is not None and Path(folder, MODULES_NAME).is_file()
    return "sentence-transformers" if listed or type(model).__module__.startswith("sentence_transformers.") else "transformers"


def card_metadata(model: PreTrainedModel, facts: CardFacts, name: str, library: str) -> ModelCardData:
    """The metadata of a card: what the Hub files the model under, and its metrics as a model index.

    The index needs a task and a dataset with an id; without them it is left out. A base model that is a local path is left out too.
    """
    task = "sentence-similarity" if library == "sentence-transformers" else pipeline_tag(model)
    metrics = {metric: value for metric, value in facts.metrics.items() if metric != "loss"}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset,
            dataset_name=_dataset_name(facts) or facts.dataset,
            dataset_config=facts.dataset_config,
            dataset_split=facts.dataset_split,
            metric_type=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if task is not None and facts.dataset is not None
    ]
    kinds = ["condensed"] * is_condensed(model.config) + ["smaller-vocabulary"] * ("tokens" in smaller(model.config))
    return ModelCardData(
        model_name=name,
        base_model=_repo_id(facts.base_model),
        datasets=_repo_id(facts.dataset),
        language=facts.language,
        license=facts.license,
        library_name=library,
        pipeline_tag=task,
        tags=["hf_prune", "pruning", *(kinds or ["sparse"])],
        metrics=list(metrics) or None,
        eval_results=results or None,
    )


def auto_class(model: PreTrainedModel) -> str:
    """The Auto class that loads a model, by name: of those that do, one that a pipeline uses; `AutoModel` if there is none."""
    names = [auto for auto, classes in auto_classes(model.config.model_type) if type(model).__name__ in classes]
    used = [name for name in names if name in _tasks()]
    return next(iter(used + [name for name in names if name not in _ENCODERS]), "AutoModel")


def pipeline_tag(model: PreTrainedModel) -> str | None:
    """The task that transformers' `pipeline` has for a model's class."""
    return _tasks().get(auto_class(model))


def _tasks() -> dict[str, str]:
    """Auto class → the first task of transformers' `pipeline` that uses it."""
    from transformers.pipelines import SUPPORTED_TASKS  # it imports every pipeline there is

    found: dict[str, str] = {}
    tasks: dict[str, Any] = SUPPORTED_TASKS
    for task, entry in tasks.items():
        for cls in entry["pt"]:
            found.setdefault(cls.__name__, task)
    return found


def without_folders(name: str | None) -> str | None:
    """An id on the Hub as it is; of a local path the last part alone, as `./part`: where a model lay is nobody's business."""
    return f"./{Path(name).resolve().name}" if name is not None and Path(name).exists() else name


def _repo_id(name: str | None) -> str | None:
    """A name that can be an id on the Hub, or None."""
    if name is None or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# ------------------------------------------------------------------------------------------------------------------- Markdown


def as_line(value: object) -> str:
    """A value in one line, so that it can start neither a heading nor a table row."""
    return " ".join(str(value).split())


def as_text(value: object) -> str:
    """A value as Markdown that shows it literally: names of metrics and datasets must not become links, markup or HTML."""
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", as_line(value)), quote=False)


def as_code(value: object) -> str:
    """A value as a code span, in a table too."""
    return "`" + as_line(value).replace("`", "'").replace("|", "\\|") + "`"


# ----------------------------------------------------------------------------------------------------------------------- rows


def _loader(model: PreTrainedModel, library: str) -> dict[str, str]:
    """What loads the model: the name to import from a module, and what to call with a path."""
    if library == "sentence-transformers":
        return {"module": "sentence_transformers", "name": "SentenceTransformer", "call": "SentenceTransformer"}
    name = auto_class(model)
    return {"module": "transformers", "name": name, "call": f"{name}.from_pretrained"}


def _metric_rows(facts: CardFacts) -> list[dict[str, str]]:
    rows = []
    for name in dict.fromkeys([*facts.metrics_before, *facts.metrics]):
        before, after = facts.metrics_before.get(name), facts.metrics.get(name)
        change = "" if before is None or after is None else f"{after - before:+.4f}"
        values = {"before": before, "after": after}
        rows.append(
            {"name": name, "change": change} | {key: "" if value is None else f"{value:.4f}" for key, value in values.items()}
        )
    return rows


def _rule_rows(config: PruningConfig | None, trained: bool) -> list[list[str]]:
    """The rules of a config: with their schedule where a model was pruned while it was trained, else with their update."""
    rows = []
    choices, how = (WHILE_TRAINING, "schedule") if trained else (WITHOUT_TRAINING, "update")
    for name, rule in (config.filled(**choices).resolved_rules() if config else {}).items():
        modules = rule.target_modules or "all that the pattern fits"
        shown = modules if isinstance(modules, str) else ", ".join(modules)
        cells = [name, str(rule.pattern), _target(rule), rule.criterion, rule.scope, getattr(rule, how), shown]
        rows.append([as_text(cell) for cell in cells])
    return rows


def _target(rule: PruningConfig) -> str:
    """What a rule is to reach, in words."""
    if rule.scope == "threshold":
        return f"score at most {rule.threshold}"
    cost = rule.cost_target
    values = ", ".join(f"{value:g}" for value in rule.cost_targets)
    return f"{rule.sparsity:g}" if cost is None else f"{cost.removeprefix('target_')} {values}, shared"


def _budget_row(budget: Mapping[str, Any]) -> dict[str, str] | None:
    """A target in costs, in words: what it is of, and what became of it."""
    if not budget:
        return None
    asked, cost = budget["asked"], str(budget["target"]).removeprefix("target_")
    share = " of what the dense model has" if cost != "speedup" and asked < 1 else ""
    became = [f"{name} {number(budget[name])}" for name in ("predicted", "measured") if budget.get(name) is not None]
    return {"name": cost, "words": "; ".join([f"asked for {asked:,.6g}{share}", *became])}


def _vocabulary_row(vocabulary: Mapping[str, Any]) -> str | None:
    """What a smaller vocabulary does to text that it was not chosen from, in words."""
    if not vocabulary:
        return None
    return (
        f"{vocabulary['unknown']:.2%} of the tokens are unknown ({vocabulary['unknown_before']:.2%} before), "
        f"{vocabulary['lengthening']:+.2%} tokens, {vocabulary['changed']:.2%} of the texts changed"
    )


def _family_rows(family: Family) -> dict[str, Any]:
    """The table of a family: its header and its rows."""
    return {
        "header": [as_text(name) for name in family.header],
        "rows": [[as_code(folder), *values] for folder, *values in family.rows],
    }


def _cost(name: str, cost: Cost) -> dict[str, str]:
    return {
        "name": name,
        "parameters": f"{cost.parameters:,}",
        "weights": megabytes(cost.weight_bytes),
        "activations": megabytes(cost.activation_bytes),
        "latency": f"{cost.milliseconds:.2f} ms",
    }


def _size(model: PreTrainedModel) -> str:
    return megabytes(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))


def _dataset_name(facts: CardFacts) -> str | None:
    return facts.dataset_name or " ".join(part for part in (facts.dataset, facts.dataset_config) if part) or None


def _versions() -> dict[str, str]:
    return {"hf_prune": __version__} | {name: importlib.metadata.version(name) for name in _VERSIONS}
