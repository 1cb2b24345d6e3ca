"""Every family, masked and condensed, as one table: `python tests/architecture_matrix.py [FAMILY ...]`

On tiny random models (`models.py`): heads, neurons and whole blocks masked at random, unevenly by layer, non-zero biases
everywhere, ragged padded batches. The columns:

- eager, sdpa: largest difference between masked and condensed, of all hidden states and outputs
- gradient: the same of the gradients of surviving parameters, without dropout, relative to a parameter's largest above one
- greedy, beams: tokens and logits for a left-padded batch, nothing left of the attention in the first layer of each stack
- LoRA: every third family under adapters of all projections with random values: largest difference of all outputs, of what is
  condensed, and of what is merged afterwards, from the masked model, relative to the largest above one
- parameters: after, before
- import, remote code: largest difference after loading in a fresh process; the second loads what the first saved again
- saved twice: both files equal, and the weights and sizes that a loaded model saves
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import condensing
import models
import peft
import reloading
import torch
import transformers
from helpers import prune_at_once
from rich.table import Table
from safetensors.torch import load_file

from hf_prune import PruningConfig, PruningRule, condense
from hf_prune.measure.tables import as_text
from hf_prune.model import find_blocks

Row = dict[str, object]


def compare(family: str, folder: Path) -> Row:
    """Compare masked and condensed in this process, and save the condensed model twice, in `first` and `second` of `folder`."""
    model = models.tiny(family)
    models.prune_randomly(model)
    before = {attention: condensing.outputs(model, attention) for attention in models.attentions_of(model)}
    parameters = model.num_parameters()
    condense(model)
    row: Row = {attention: condensing.gap(wanted, condensing.outputs(model, attention)) for attention, wanted in before.items()}
    row["gradient"] = condensing.gradient_gap(models.tiny(family))
    row["parameters"] = (model.num_parameters(), parameters)
    for name, beams in BEAMS.items():
        row[name] = generates(family, beams) if family in models.GENERATORS else None
    if list(models.EVERY_FAMILY).index(family) % 3 == 0:
        row["LoRA"] = adapted_gap(family)
    name = f"{family}-{models.HEADS[models.classifier_of(family)].__name__}"
    for copy in ("first", "second"):
        model.save_pretrained(folder / copy / name)
    reloading.save_expected(model, folder / "first" / name)
    return row


#: How many beams a column is of.
BEAMS = {"greedy": 1, "beams": 3}


def adapted_gap(family: str) -> float:
    """How far a condensed model under LoRA adapters, and what it is merged into, are from the masked one."""
    model = models.tiny(family, models.heads_of(family)[-1])
    found = find_blocks(model)
    modules = sorted({part.name for block in found for part in block.projections})
    settings = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(model, settings).eval()
    patterns = {"attention": PruningRule(pattern="head"), "feed_forward": PruningRule(pattern="neuron")}
    rules = [patterns[kind] for kind in dict.fromkeys(block.kind for block in found)]
    prune_at_once(adapted, PruningConfig(rules=rules, criterion="magnitude", schedule="constant"))
    masked = condensing.outputs(model)
    parameters = adapted.num_parameters()
    condense(adapted)
    assert adapted.num_parameters() < parameters
    gaps = [condensing.gap(masked, condensing.outputs(model))]
    gaps.append(condensing.gap(masked, condensing.outputs(adapted.merge_and_unload())))
    return max(gaps) / max(1.0, *(float(value.abs().max()) for value in masked))


def generates(family: str, beams: int) -> bool:
    """Whether the condensed model generates what the masked one does."""
    model = models.tiny(family, models.GENERATORS[family])
    models.prune_randomly(model)
    for block in find_blocks(model):
        if block.kind == "attention" and block.layer.endswith(".0"):
            models.zero_units(block, list(range(block.num_units)), "out")
    try:
        condensing.check_generation(model, family, beams)
    except AssertionError:
        return False
    return True


def same_files(first: Path, second: Path, loaded: Path) -> bool:
    """Whether two saves are equal byte for byte, and what a loaded model saved has the same weights and sizes."""
    names = ("config.json", "model.safetensors", "modeling_hf_prune.py")
    twice = all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    weights = [load_file(folder / "model.safetensors") for folder in (first, loaded)]
    sizes = [json.loads((folder / "config.json").read_text())["hf_prune"] for folder in (first, loaded)]
    equal = weights[0].keys() == weights[1].keys() and all(value.equal(weights[1][name]) for name, value in weights[0].items())
    return twice and equal and sizes[0] == sizes[1]


def matrix(families: list[str], folder: Path) -> dict[str, Row]:
    """The rows of the table. Two fresh processes load all checkpoints, one by import, then one by remote code."""
    rows = {family: compare(family, folder) for family in families}
    by_import = reloading.reload("import", folder / "first", folder / "by-import")
    by_remote = reloading.reload("remote", folder / "by-import", folder / "by-remote")
    for name, report in by_import.items():
        row = rows[name.rpartition("-")[0]]
        row["import"], row["remote code"] = report["gap"], by_remote[name]["gap"]
        row["saved twice"] = same_files(*(folder / part / name for part in ("first", "second", "by-remote")))
    return rows


def holds(row: Row) -> bool:
    """Whether everything in a row is as it must be."""
    gaps = [value for value in row.values() if isinstance(value, float)]
    return max(gaps) <= 1e-5 and all(row[name] is not False for name in (*BEAMS, "saved twice"))


def main() -> int:
    """Print the table; return 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"default those that are not in --output of {', '.join(models.EVERY_FAMILY)}"
    )
    parser.add_argument("--output", type=Path, help="where the JSON goes; rows of other families that are there stay")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known = json.loads(arguments.output.read_text()) if arguments.output and arguments.output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        rows = matrix(arguments.families or [family for family in models.EVERY_FAMILY if family not in known], Path(folder))
    table = Table(title="masked and condensed")
    columns = ("eager", "sdpa", "gradient", *BEAMS, "LoRA", "parameters", "import", "remote code", "saved twice")
    for column in ("family", *columns):
        table.add_column(column, justify="left" if column == "family" else "right")
    for family, row in rows.items():
        cells = [f"{value:.0e}" if isinstance(value := row.get(column), float) else "" for column in columns]
        after, before = row["parameters"]  # type: ignore[misc]
        cells[columns.index("parameters")] = f"{after:,} of {before:,}"
        for column in (*BEAMS, "saved twice"):
            cells[columns.index(column)] = {None: "", True: "equal", False: "DIFFERS"}[row[column]]  # type: ignore[index]
        table.add_row(family, *cells, style="" if holds(row) else "red")
    print(as_text(table))  # wide, whatever it is printed to
    if arguments.output:
        known |= rows
        ordered = {family: known[family] for family in models.EVERY_FAMILY if family in known}
        arguments.output.write_text(json.dumps(ordered, indent=2) + "\n")
    return int(not all(map(holds, rows.values())))


if __name__ == "__main__":
    sys.exit(main())
