"""What becomes of each architecture in each runtime: a condensed tiny model with uneven layers, exported and compared with PyTorch.

    python tests/runtime_matrix.py [FAMILY ...] --output model_cards/results/runtimes.json

A row a family, with one task head; what is in the file already is kept, so it can be filled in pieces. `--table` prints the table
of the docs from the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch

from hf_prune import ConfigError, condense, export_model
from hf_prune.export import openvino
from hf_prune.export.compare import ExportError, compare
from hf_prune.export.graphs import has_cache, joined
from hf_prune.export.inputs import example_batches, outputs_of
from hf_prune.measure.running import as_exported

FORMATS = ("onnx", "openvino")
#: One head of each family: the one that writes, else the last in the table.
HEADS = {family: models.GENERATORS.get(family) or models.heads_of(family)[-1] for family in models.EVERY_FAMILY}


def outcomes(family: str, head: str) -> dict[str, Any]:
    """How a family fares in each format: the largest difference, or the reason why there is none."""
    model = models.tiny(family, head)
    models.prune_randomly(model)
    condense(model, verify=False)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "model").mkdir()
        try:
            made = export_model(model, folder / "model", folder / "out", "onnx")
        except (ConfigError, ExportError) as error:
            return {name: {"reason": str(error)} for name in FORMATS}
        with as_exported(model) as plain:
            kind = "with its cache" if has_cache(plain, example_batches(plain)[0]) else made.file
            try:
                for source in (folder / "out" / "onnx").iterdir():
                    openvino.write(source, folder / f"openvino_{source.stem}.xml")
                run = joined(folder / f"openvino_{Path(made.file).stem}.xml", openvino.open_file)
                other: Any = {"difference": compare(run, partial(outputs_of, plain), example_batches(plain), False).difference}
            except ExportError as error:
                other = {"reason": str(error)}
    return {"files": kind, "onnx": {"difference": made.agreement.difference}, "openvino": other}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| family | head | ONNX Runtime | OpenVINO |", "| --- | --- | --- | --- |"]
    for family, row in sorted(results["families"].items()):
        cells = [f"{row[name]['difference']:.0e}" if "difference" in row[name] else row[name]["reason"] for name in FORMATS]
        lines.append(f"| `{family}` | {row['head']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the families that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="Names in tests/models.py; default: those that the file lacks.")
    parser.add_argument("--output", type=Path, required=True, help="The JSON file.")
    parser.add_argument("--table", action="store_true", help="Print the table, and measure nothing.")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {"families": {}}
    if options.table:
        print(table(results))
        return
    torch.set_num_threads(1)
    names = ("torch", "transformers", "onnx", "onnxruntime", "openvino")
    results["versions"] = {name: importlib.metadata.version(name) for name in names}
    for family in options.families or [name for name in HEADS if name not in results["families"]]:
        head = HEADS[family]
        row = {"head": head} | outcomes(family, head)
        results["families"][family] = row
        print(family, row, flush=True)
        options.output.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
