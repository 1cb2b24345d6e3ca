"""`hf-prune`: look at, prune, shrink, measure, export, describe and publish pruned models from the command line.

Every command takes a folder or a Hub id of a model with any task head, and prints a table, or with `--json` a single JSON object on
stdout. Exit codes: 0 success, 1 failure, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import hf_prune

from .compat import when_imported
from .files import check_new_file, check_new_folder, read_object
from .settings.config import CONFIG_NAME, PruningConfig
from .settings.errors import closest_path

if TYPE_CHECKING:  # importing torch takes seconds, so what needs it is imported where it is used, and `--help` is fast
    from transformers import PreTrainedModel

stderr = Console(stderr=True, markup=False)


class Commands(TyperGroup):
    """The commands; an error about their input becomes one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        when_imported("transformers.utils.logging", only_bars_of_downloads)
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            stderr.print(Text.assemble(("Error:", "red"), " ", " ".join(str(error).split())), soft_wrap=True)
            raise typer.Exit(1) from None


def only_bars_of_downloads(logging: ModuleType) -> None:
    """Leave out the bars that transformers draws while it reads and writes files, which takes seconds."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars  # type: ignore[attr-defined]

    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown:
        enable_progress_bars()


app = typer.Typer(
    cls=Commands,
    help=__doc__,
    invoke_without_command=True,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def print_version(requested: bool) -> None:
    """Print the version and exit, if requested."""
    if requested:
        print(f"hf-prune {hf_prune.__version__}")
        raise typer.Exit


Model = Annotated[str, typer.Argument(metavar="PATH", help="A model's folder, or its id on the Hub.")]
Folder = Annotated[Path, typer.Argument(metavar="PATH", help="A model's folder.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; created if it does not exist.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Pad = Annotated[
    int | None,
    typer.Option(min=1, help="Pad each block's neurons to a multiple of this with dead ones; odd sizes can be slow."),
]
Against = Annotated[str | None, typer.Option(help="The dense model; default: a random one of the original sizes.")]
Rows = Annotated[int, typer.Option(min=1, help="Batch size.")]
Tokens = Annotated[int, typer.Option(min=1, help="Sequence length.")]
Repeats = Annotated[int, typer.Option(min=1, help="Turns of each model, of one forward or more.")]
Data = Annotated[Path, typer.Option(metavar="FILE", help="Text: .txt, .csv, .json or .jsonl.")]
TextColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--text-column",
        metavar="COLUMN",
        help="A column with text; give it twice for pairs. By default the only one, or those of usual names.",
    ),
]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a row. By default what model and tokenizer allow, at most 512.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Some = Annotated[
    int | None, typer.Option(min=1, help="Rows to take, at random. By default enough for 32,768 tokens, at most 2,048.")
]
Best = Annotated[str | None, typer.Option(help="Where to compute. By default cuda where there is one, else cpu.")]
Version = Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")]
Device = Annotated[str, typer.Option(help="Device to measure on, such as cpu or cuda.")]


@app.callback()
def options(version: Version = False) -> None:
    """Options of `hf-prune` itself."""


@app.command()
def inspect(path: Model, pad_to_multiple_of: Pad = None, as_json: Json = False) -> None:
    """Report a model's sparsity and size, and what `condense` would do."""
    from .condense import is_condensed, smaller
    from .measure.memory import megabytes
    from .measure.sparsity import original_blocks, total_sparsity

    folder = local(path)
    model = load(folder)
    report, blocks = hf_prune.sparsity_report(model), original_blocks(model)
    saved = hf_prune.condense_plan(model, pad_to_multiple_of).parameters if blocks else 0
    facts = {
        "path": path,
        "class": type(model).__name__,
        "model_type": model.config.model_type,
        "condensed": is_condensed(model.config),
        "smaller": {name: {"now": now, "before": before} for name, (now, before) in smaller(model.config).items()},
        "total_sparsity": total_sparsity(model),
        "bytes_on_disk": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "parameters_after_condense": report.parameters - saved,
        **report.to_dict(),
        "original_blocks": [vars(block) for block in blocks],
    }
    if as_json:
        return emit(facts)
    title = f"{facts['class']}, {facts['model_type']}{', condensed' if facts['condensed'] else ''}"
    table = Table("", "", title=title, show_header=False)
    table.add_row("weights removed since pruning started", f"{facts['total_sparsity']:.2%}")
    table.add_row("zeros among the remaining weights", f"{report.sparsity:.2%}")
    table.add_row("parameters", f"{report.parameters:,}")
    table.add_row("weights on disk", megabytes(facts["bytes_on_disk"]))
    for name, sizes in facts["smaller"].items():
        table.add_row(name, f"{sizes['now']:,} of {sizes['before']:,}")
    table.add_row("parameters after condense", f"{facts['parameters_after_condense']:,} (-{saved:,})")
    for reason, names in report.left_out.items():
        table.add_row(f"not pruned: {', '.join(names)}", reason)
    show(table, blocks_table(blocks) if blocks else report)
    return None


@app.command()
def prune(
    path: Model,
    out: Out,
    data: Data,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON file with a PruningConfig.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the weights that goes, instead of --config.")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="How many times faster the model shall be, instead of --sparsity.", metavar="FACTOR")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(help="How many parameters it shall keep at most, or which share of them, instead of --sparsity.")
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="A file of hf-prune latency, for --speedup elsewhere. By default measured here.")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="What is removed together, such as neuron or 2:4. By default heads and neurons, one budget.")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="How units are scored. By default obs.")] = None,
    update: Annotated[str | None, typer.Option(help="What the weights that stay do. By default least_squares.")] = None,
    text_column: TextColumns = None,
    max_length: Length = None,
    batch_size: Batch = 16,
    rows: Some = None,
    device: Best = None,
    seed: Annotated[int, typer.Option(help="Of all that is chosen at random.")] = 0,
    search: Annotated[int, typer.Option(min=0, help="How many ways to divide the budget among blocks are tried out.")] = 0,
    condense: Annotated[bool, typer.Option(help="Cut out what was pruned, where that can be.")] = True,
    as_json: Json = False,
) -> None:
    """Prune a model without training, from a file of unlabelled text, condense it, and save it with its card."""
    from .oneshot.calibration import complete
    from .oneshot.data import calibration_batches, check_file, load_tokenizer
    from .oneshot.folder import heads_and_neurons, prune_to_folder

    targets = {"target_sparsity": sparsity, "target_speedup": speedup, "target_parameters": parameters}
    table = None if latency_table is None else str(latency_table)
    pruning = complete(one_config(config, targets, pattern=pattern, criterion=criterion, update=update, latency_table=table))
    folder, device = local(path), device or best_device()
    check_new_folder(out)
    check_file(data)
    check_device(device)
    model: Any = load(folder)
    if config is None and pattern is None:
        pruning = replace(pruning, pattern=None, rules=heads_and_neurons(model))
    batches = calibration_batches(model, load_tokenizer(folder), data, text_column or (), max_length, batch_size, rows, seed)
    with Progress(console=stderr, disable=not stderr.is_terminal) as bar:
        made = prune_to_folder(
            model.to(device),
            folder,
            out,
            pruning,
            batches,
            cut=condense,
            seed=seed,
            search=search,
            base_model=path,
            settings={"data": data.name, "tokens of a row": max(len(batch["input_ids"][0]) for batch in batches)},
            progress=partial(bar.track, description="pruning"),
        )
    if as_json:
        return emit({"path": str(out), **made.to_dict()})
    show(made, *left_out(made.left_out), *filter(None, [made.note]), f"Written to {out}.")
    return None


@app.command()
def condense(
    path: Model,
    out: Out,
    pad_to_multiple_of: Pad = None,
    verify: Annotated[bool, typer.Option(help="Compare outputs before and after.")] = True,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Fail unless the result is a stock model, with layers of equal sizes.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove dead heads, neurons and layers from a model, verify that its outputs are unchanged, and save it with its card."""
    from .condense import nothing_to_cut
    from .hub import save_made_from

    folder = local(path)
    check_new_folder(out)
    model = load(folder)
    before = model.num_parameters()
    if hf_prune.condense_plan(model, pad_to_multiple_of).empty:
        found = f"{hf_prune.sparsity_report(model).sparsity:.2%} of its weights are zero"
        raise ValueError(f"PATH={path}: {found}. {nothing_to_cut(model, pad_to_multiple_of)}")
    with stderr.status("condensing and comparing outputs" if verify else "condensing"):
        hf_prune.condense(model, verify=verify, pad_to_multiple_of=pad_to_multiple_of, uniform=uniform)
    saved_to(out, model, before, save_made_from(model, folder, out), as_json)


@app.command()
def vocabulary(
    path: Model,
    out: Out,
    data: Data,
    text_column: Annotated[
        list[str] | None,
        typer.Option(help="A column with text; give it for each. By default the only one, or those of usual names."),
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="How often a token has to occur in the text.")] = 1,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="TOKEN", help="A token that stays in any case, as the tokenizer calls it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows that are held back.")] = 0,
    as_json: Json = False,
) -> None:
    """Take the tokens that a text does not need out of a model and its tokenizer, and save both with their card.

    One row of ten is held back: the tokens are chosen from the others, and what becomes of the words of these is reported."""
    from .oneshot.data import check_file
    from .shrink.vocabulary_folder import prune_vocabulary_to_folder, rows_of_text

    folder = local(path)
    check_new_folder(out)
    check_file(data)
    model = load(folder)
    with stderr.status("choosing tokens and comparing outputs"):
        rows = rows_of_text(model, data, text_column or ())
        made = prune_vocabulary_to_folder(
            model, folder, out, rows, keep=keep or (), min_count=min_count, seed=seed, base_model=path, data=data.name
        )
    if as_json:
        return emit({"path": str(out), **made.to_dict()})
    show(made, *left_out(made.left_out), f"Written to {out}.")
    return None


@app.command()
def shrink(
    path: Model,
    out: Out,
    data: Data,
    num_layers: Annotated[
        list[str] | None,
        typer.Option(metavar="NUMBER", help="How many layers stay; of several lists LIST=NUMBER, such as encoder.block=4."),
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1, help="How wide the hidden stream becomes.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="How many experts stay in each layer.")] = None,
    moe_intermediate_size: Annotated[int | None, typer.Option(min=1, help="How many neurons stay in each expert.")] = None,
    criterion: Annotated[
        str, typer.Option(help="How layers are chosen: greedy_removal, removal, consecutive or block_influence.")
    ] = "greedy_removal",
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Keep the principal directions of the hidden stream instead of channels.")
    ] = False,
    text_column: TextColumns = None,
    max_length: Length = None,
    batch_size: Batch = 16,
    rows: Some = None,
    device: Best = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Take layers, experts, neurons of experts or channels of the hidden stream out of a model, judged by unlabelled text, and save
    it with its card.

    This changes what the model computes; train it afterwards."""
    from .oneshot.data import calibration_batches, check_file, load_tokenizer
    from .shrink.folder import shrink_to_folder

    folder, device = local(path), device or best_device()
    check_new_folder(out)
    check_file(data)
    check_device(device)
    wanted = depth_of(num_layers or ())
    model: Any = load(folder)
    batches = calibration_batches(model, load_tokenizer(folder), data, text_column or (), max_length, batch_size, rows, seed)
    with stderr.status("shrinking"):
        made = shrink_to_folder(
            model.to(device),
            folder,
            out,
            batches,
            num_layers=wanted,
            hidden_size=hidden_size,
            num_experts=num_experts,
            moe_intermediate_size=moe_intermediate_size,
            criterion=criterion,
            rotate=rotate,
            base_model=path,
            settings={"data": data.name, "rows": sum(len(batch["input_ids"]) for batch in batches), "seed": seed},
        )
    if as_json:
        return emit({"path": str(out), **made.to_dict()})
    show(made, *left_out(made.left_out), f"Written to {out}.")
    return None


@app.command()
def export(
    path: Model,
    out: Out,
    format: Annotated[
        str, typer.Option(help="What to write: onnx, openvino, gguf for llama.cpp, or per-layer-config for vLLM.")
    ] = "onnx",
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="What weights and activations become, by default float32. onnx, openvino: int8, with scales from --data. "
            "onnx: int8-dynamic. "
            "gguf: f16 or q8_0.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text of the task, for scales and to compare on: .txt, .csv, .json or .jsonl."),
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators. By default what the exporter recommends.")] = None,
    text_column: TextColumns = None,
    max_length: Length = None,
    batch_size: Batch = 16,
    rows: Some = None,
    seed: Annotated[int, typer.Option(help="Of the choice of rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Write a model for another runtime, and compare it there with PyTorch; a file that computes something else is not kept."""
    from .export import check_export, export_model
    from .oneshot.data import calibration_batches, check_file, load_tokenizer

    check_export(format, quantize, data is not None, opset)
    folder = local(path)
    check_new_folder(out)
    if data is not None:
        check_file(data)
    model: Any = load(folder)
    batches = (
        []
        if data is None
        else calibration_batches(model, load_tokenizer(folder), data, text_column or (), max_length, batch_size, rows, seed)
    )
    with stderr.status("exporting and comparing outputs"):
        made = export_model(model, folder, out, format, quantize=quantize, batches=batches, opset=opset)
    if as_json:
        return emit({"path": str(out), **made.to_dict()})
    show(made, *left_out(made.left_out), f"Written to {out}.")
    return None


@app.command()
def convert(path: Model, out: Out, as_json: Json = False) -> None:
    """Convert a checkpoint pruned by transformers 4 or CoFi, which transformers 5 refuses, into one that loads."""
    from .condense.legacy import converted
    from .hub import save_made_from

    folder = local(path)
    check_new_folder(out)
    model, changed = converted(folder)
    if not changed:
        raise ValueError(f"PATH={path}: there is nothing to convert, so nothing was written; the checkpoint loads as it is.")
    saved_to(out, model, None, save_made_from(model, folder, out), as_json)


@app.command()
def benchmark(
    path: Model,
    against: Against = None,
    batch_size: Rows = 8,
    tokens: Tokens = 128,
    repeats: Repeats = 10,
    device: Device = "cpu",
    runtimes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Measure in these runtimes, on the CPU: torch, compile, onnx, openvino, with commas; also batch 1, length 32.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU, for --runtimes.")] = 1,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Text to find the scales of int8 by, for --runtimes.")] = None,
    evaluate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text with a column of labels, to measure accuracy on, for --runtimes.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw accuracy against latency, for --evaluate.")] = None,
    text_column: TextColumns = None,
    as_json: Json = False,
) -> None:
    """Measure latency and memory of a model and of the dense one, in turn, on one thread; or in several runtimes and types."""
    from .measure.latency import compare

    check_device(device)
    for name, value in (("--data", data), ("--evaluate", evaluate), ("--picture", picture)):
        if value is not None and (runtimes is None or (name == "--picture" and evaluate is None)):
            raise typer.BadParameter(f"{name} goes with {'--runtimes' if runtimes is None else '--evaluate'}.")
    if runtimes is not None:
        shapes = {1, batch_size}, {32, tokens}
        return in_runtimes(
            path, against, runtimes.split(","), shapes, threads, repeats, data, evaluate, picture, text_column, as_json
        )
    model: Any = load(local(path))
    dense = load(local(against)) if against else None
    comparison = compare(model.to(device), dense, None, batch_size, tokens, repeats, progress)
    if as_json:
        return emit({"path": path, "against": against, **comparison.to_dict()})
    show(comparison)
    return None


@app.command()
def latency(
    path: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The JSON file to write.")],
    batch_size: Rows = 8,
    length: Tokens = 128,
    dtype: Annotated[str, typer.Option(help="Of weights and computation: float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU. One is measured in CPU time, more in time.")] = 1,
    runtime: Annotated[
        str, typer.Option(help="How the model runs: torch, compile (torch.compile), or onnx (ONNX Runtime).")
    ] = "torch",
    repeats: Annotated[int, typer.Option(min=1, help="How often each size has its turn.")] = 5,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure what heads and neurons cost at each size of a block, for pruning to a speed on this machine."""
    check_new_file(out)
    check_device(device)
    model: Any = load(local(path))
    table = hf_prune.latency_table(
        model.to(device), batch_size, length, dtype, threads, runtime, repeats=repeats, progress=progress
    )
    table.save(out)
    if as_json:
        return emit({"path": str(out), **table.to_dict()})
    show(table, f"Written: {out}")
    return None


@app.command()
def evaluate(
    path: Model,
    data: Data,
    text_column: TextColumns = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window. By default what model and tokenizer allow, at most 2,048.")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows. By default the length.")] = None,
    device: Best = None,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of a causal language model on a text."""
    from .measure.perplexity import perplexity
    from .oneshot.data import check_file, load_tokenizer, row_length, text_tokens

    folder, device = local(path), device or best_device()
    check_file(data)
    check_device(device)
    model: Any = load(folder)
    tokenizer = load_tokenizer(folder)
    length = row_length(model, tokenizer, length, most=2048, name="length")
    found = perplexity(model.to(device), text_tokens(tokenizer, data, text_column or ()), length, stride, progress)
    if as_json:
        return emit({"path": path, "data": str(data), **found.to_dict()})
    show(found)
    return None


@app.command()
def plan(
    path: Model,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A JSON file with a PruningConfig.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the run.")] = 1_000_000,
    steps_per_epoch: Annotated[int, typer.Option(min=1, help="Optimizer steps per epoch.")] = 1000,
    as_json: Json = False,
) -> None:
    """Report what a pruning config would do to each module of a model, and what it leaves out and why."""
    pruning = PruningConfig.from_json_file(config)
    planned = hf_prune.Pruner(load(local(path)), pruning, steps, steps_per_epoch).plan()
    if as_json:
        return emit(planned.to_dict())
    show(planned)
    return None


@app.command()
def card(
    path: Folder,
    measure: Annotated[bool, typer.Option(help="Measure the latency ratio of a condensed model.")] = True,
    runtimes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What benchmark --runtimes --json printed; the card says its best row.")
    ] = None,
    against: Against = None,
    batch_size: Rows = 8,
    tokens: Tokens = 128,
    repeats: Repeats = 10,
    as_json: Json = False,
) -> None:
    """Write the model card, with pictures, into a model's folder, from the files that are there."""
    from .hub.card import CARD_NAME, runtime_facts, write_card
    from .measure.latency import compare

    folder = local(str(path), download=False)
    best = None if runtimes is None else runtime_facts(read_object(runtimes))
    model, facts = load(folder), hf_prune.CardFacts.load(folder)
    facts.runtimes = best or facts.runtimes
    facts.model_name = facts.model_name or folder.resolve().name
    if measure and (against or getattr(model.config, "hf_prune", None) is not None):
        dense = load(local(against)) if against else None
        published = None if against is None or Path(against).exists() else against
        facts.comparison = compare(model, dense, published, batch_size, tokens, repeats, progress).to_dict()
    write_card(folder, model, config_of(folder), facts)
    written(folder / CARD_NAME, as_json)


@app.command()
def push(
    path: Folder,
    repo_id: Annotated[str, typer.Argument(metavar="ID", help="The repository, such as name/model.")],
    private: Annotated[bool | None, typer.Option(help="Make a new repository private or public.")] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit message.")] = None,
    new_card: Annotated[bool, typer.Option(help="Write a new card for this id, or publish README.md as it is.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and what would not and why; upload nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish a model's folder on the Hub: weights, configs, modelling file, tokenizer, card and pictures, and nothing else."""
    from .hub import write_card
    from .hub.files import files_to_publish

    folder = local(str(path), download=False)
    model = load(folder)  # a folder that does not load is not published
    if dry_run:
        with tempfile.TemporaryDirectory() as beside:
            if new_card:
                write_card(beside, model, config_of(folder), hf_prune.CardFacts.load(folder), repo_id)
            (names, left), (anew, _) = files_to_publish(folder), files_to_publish(beside)
        names = sorted({*names, *anew})
        if as_json:
            return emit({"repo_id": repo_id, "files": names, "left_out": left})
        show(*names, *left_out(left), f"{len(names)} files would be uploaded to {repo_id}.")
        return None
    if new_card:
        write_card(folder, model, config_of(folder), hf_prune.CardFacts.load(folder), repo_id)
    commit = hf_prune.push_to_hub(folder, repo_id, private=private, revision=revision, commit_message=message)
    if as_json:
        return emit({"repo_id": repo_id, "commit": commit.oid, "url": str(commit.repo_url)})
    show(f"Published as {commit.repo_url}, commit {commit.oid[:8]}.")
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always raises `SystemExit`."""
    app(args=None if arguments is None else list(arguments), prog_name="hf-prune")


# -------------------------------------------------------------------------------------------------------------- models and files


def local(path: str, download: bool = True) -> Path:
    """The folder of a model: `path` itself, or the downloaded snapshot of the Hub id `path`.

    Args:
        path: folder or Hub id.
        download: whether Hub ids are allowed.

    Raises:
        ValueError: there is no model; names the closest match.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(f"PATH={path}: holds a PEFT adapter; merge it first (`merge_and_unload()`), then save the model.")
        if not (folder / "config.json").is_file():
            below = sorted(file.parent.name for file in folder.glob("*/config.json"))
            hint = f"; there are models in its subfolders {', '.join(below)}" if below else ""
            raise ValueError(f"PATH={path}: has no config.json, so it is not a model's folder{hint}.")
        return folder
    close = closest_path(folder, [one.parent for one in folder.parent.glob("*/config.json")])
    hint = f" Did you mean {close!r}?" if close else ""
    if not download:
        raise ValueError(f"PATH={path}: is not a folder.{hint}")
    try:
        return Path(snapshot_download(path))
    except HFValidationError:
        raise ValueError(f"PATH={path}: is not a folder.{hint}") from None
    except OSError as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise ValueError(f"PATH={path}: is not a folder, and no model was found on the Hub ({reason}).{hint}") from None


def load(folder: Path) -> PreTrainedModel:
    """The model in a folder; see [`load_model`]."""
    from .model.loading import load_model

    return load_model(folder)


def check_device(device: str) -> None:
    """Raise unless torch can create a tensor on a device.

    Raises:
        ValueError: it cannot; gives the reason.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # not built in, no driver, or an unknown name
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r}: must be a device that is available here, such as 'cpu' ({reason}).") from None


def one_config(file: Path | None, targets: Mapping[str, float | None], **settings: str | None) -> PruningConfig:
    """The config in a file, or that of a target and settings of which some are given; without a pattern for heads.

    Raises:
        BadParameter: it is not said which, or several are.
    """
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    target = {name: value for name, value in targets.items() if value is not None}
    if (file is not None) + len(target) != 1:
        options = ", ".join(f"--{name.removeprefix('target_')}" for name in targets)
        raise typer.BadParameter(f"Give --config, {options}: one of them.")
    if file is not None and given:
        name = next(iter(given)).replace("_", "-")
        raise typer.BadParameter(f"--{name} goes with a target; write it into the file of --config.")
    if file is not None:
        return PruningConfig.from_json_file(file)
    return PruningConfig.from_dict({"pattern": "head", **target, **given})


def depth_of(given: Sequence[str]) -> int | dict[str, int] | None:
    """The numbers of layers in options such as `4`, or `encoder.block=4` and `decoder.block=2`."""
    found: dict[str, int] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        if not number.isdecimal() or name in found or (len(given) > 1 and not name):
            raise typer.BadParameter(f"{text!r} is no number of layers; give NUMBER, or LIST=NUMBER once for each list.")
        found[name] = int(number)
    return found.get("", found or None)


def best_device() -> str:
    """`"cuda"` where there is one, else `"cpu"`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def config_of(folder: Path) -> PruningConfig | None:
    """The config that a model was pruned with, if it was saved."""
    return PruningConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None


def in_runtimes(
    path: str,
    against: str | None,
    runtimes: Sequence[str],
    shapes: tuple[set[int], set[int]],
    threads: int,
    repeats: int,
    data: Path | None,
    evaluate: Path | None,
    picture: Path | None,
    text_column: list[str] | None,
    as_json: bool,
) -> None:
    """Measure a model and the dense one in several runtimes, and say which file is best."""
    from .export.runtimes import benchmark_runtimes, check_runtimes, labelled_batches
    from .measure.plots import plot_latency
    from .oneshot.data import calibration_batches, check_file, load_tokenizer

    check_runtimes(runtimes)
    for file in filter(None, (data, evaluate)):
        check_file(file)
    if picture is not None:
        check_new_file(picture)
    folder = local(path)
    model: Any = load(folder)
    dense: Any = load(local(against)) if against else None
    tokenizer: Any = load_tokenizer(folder) if data or evaluate else None
    made = benchmark_runtimes(
        model,
        dense,
        runtimes,
        batch_sizes=sorted(shapes[0]),
        lengths=sorted(shapes[1]),
        calibration=() if data is None else calibration_batches(model, tokenizer, data, text_column or (), rows=256),
        labelled=() if evaluate is None else labelled_batches(model, tokenizer, evaluate, text_column or ()),
        threads=threads,
        repeats=repeats,
        track=progress,
    )
    if picture is not None:
        plot_latency(made.points(), str(made.metric)).savefig(picture)
    if as_json:
        return emit({"path": path, "against": against, **made.to_dict(), "advice": made.advice(path)})
    show(made, *(f"Left out: {name}, {reason}" for name, reason in made.left_out.items()), made.advice(path))
    return None


# ------------------------------------------------------------------------------------------------------------------------ output


def progress(rounds: range) -> Iterable[int]:
    """Show a progress bar on stderr."""
    from rich.progress import track

    return track(rounds, description="measuring", console=stderr, disable=not stderr.is_terminal)


def blocks_table(blocks: Iterable[Any]) -> Table:
    """A table of the heads and neurons kept in each block."""
    from .measure.tables import table_of_modules

    table = table_of_modules("Heads and neurons of the model that pruning started from", "block", "kept")
    for block in blocks:
        table.add_row(block.name, f"{block.alive:,} of {block.units:,} {block.kind}")
    return table


def saved_to(out: Path, model: PreTrainedModel, before: int | None, left: dict[str, str], as_json: bool) -> None:
    """Report a model that was written, and the files that were left out."""
    from .measure.sparsity import original_blocks

    after, blocks = model.num_parameters(), original_blocks(model)
    if as_json:
        entries = [vars(block) for block in blocks]
        return emit(
            {"path": str(out), "parameters_before": before, "parameters": after, "original_blocks": entries, "left_out": left}
        )
    show(blocks_table(blocks), *left_out(left), f"{f'{before:,} → ' if before else ''}{after:,} parameters, written to {out}.")
    return None


def left_out(left: Mapping[str, str]) -> list[str]:
    """One line for each file that was left out."""
    return [f"Left out: {name}, {reason}." for name, reason in left.items()]


def written(file: Path, as_json: bool) -> None:
    """Report a file that was written."""
    if as_json:
        return emit({"path": str(file)})
    show(f"Written: {file}")
    return None


def show(*parts: object) -> None:
    """Print for humans: tables as wide as the terminal, or as wide as they need if there is none."""
    console = Console(width=None if sys.stdout.isatty() else 200, soft_wrap=True, markup=False)
    for part in parts:
        console.print(part)


def emit(data: dict[str, Any]) -> None:
    """Print for programs: one JSON object."""
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
