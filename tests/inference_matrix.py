"""Every family without its record, under names that nobody knows, as one table: `python tests/inference_matrix.py [FAMILY ...]`

Tiny random models (`models.py`) whose config, `model_type`, and classes have other names; all records are removed. The columns:

- result: proven, or where the inference or its proof failed
- same: whether its blocks, sizes and removable layers are those of the family's record
- seconds: of proposal and proof
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import models
from rich.table import Table

from hf_prune import infer_architecture
from hf_prune.condense.layers import depths
from hf_prune.measure.tables import as_text
from hf_prune.model import SPECS, blocks
from hf_prune.model.blocks import outlines
from hf_prune.model.spelled import as_json

Row = dict[str, object]


def infer(family: str) -> Row:
    """The row of one family."""
    known = SPECS[models.EVERY_FAMILY[family]().model_type]
    records = dict(SPECS)
    SPECS.clear()
    try:
        with models.disguised(family) as model:
            started = time.perf_counter()
            try:
                spec = infer_architecture(model)
            except ValueError as error:
                return {"result": str(error), "seconds": time.perf_counter() - started}
            seconds = time.perf_counter() - started
            same = outlines(blocks(model, spec)) == outlines(blocks(model, known))
            same = same and spec.pre_norm == bool(depths(model, known))
            return {"result": "proven", "same": same, "seconds": seconds, "spec": as_json(spec)}
    finally:
        SPECS.update(records)


def main() -> int:
    """Print the table; return 1 if a family is not inferred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default all: {', '.join(models.EVERY_FAMILY)}")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    table = Table("family", "result", "same", "seconds", title="inferred without a record")
    rows = {family: infer(family) for family in arguments.families or models.EVERY_FAMILY}
    for family, row in rows.items():
        same = {True: "same", False: "DIFFERS", None: ""}[row.get("same")]  # type: ignore[index]
        table.add_row(family, str(row["result"]), same, f"{row['seconds']:.1f}", style="" if row["result"] == "proven" else "red")
    proven = sum(row["result"] == "proven" for row in rows.values())
    print(as_text(table))
    print(f"{proven} of {len(rows)} proven")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=2) + "\n")
    return int(proven < len(rows))


if __name__ == "__main__":
    sys.exit(main())
