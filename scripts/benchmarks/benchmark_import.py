"""The cost of importing: CPU seconds of a fresh process, compared with transformers alone.

    python scripts/benchmarks/benchmark_import.py --output runs/benchmark_import.json

Each row is measured in separate processes, in turn with the others; medians of user and system time, interpreter startup included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import rich
from rich.table import Table

PROCESSES = {
    "python": ["-c", ""],
    "import transformers": ["-c", "import transformers"],
    "from transformers import Trainer": ["-c", "from transformers import Trainer"],
    "import hf_prune": ["-c", "import hf_prune"],
    "from hf_prune import PruningCallback": ["-c", "from hf_prune import PruningCallback"],
    "from hf_prune import *": ["-c", "from hf_prune import *"],
    "hf-prune --help": ["-m", "hf_prune.cli", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """User and system time of a Python process with these arguments."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="processes of each kind, after one that warms up")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_import.json"), help="JSON file to write")
    arguments = parser.parse_args()
    rounds = [{name: cpu_seconds(process) for name, process in PROCESSES.items()} for _ in range(arguments.repeats + 1)][1:]
    medians = {name: statistics.median(each[name] for each in rounds) for name in PROCESSES}
    table = Table("", "CPU s", title="A fresh process")
    for name, seconds in medians.items():
        table.add_row(name, f"{seconds:.2f}")
    rich.print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"cpu_seconds": medians, "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
