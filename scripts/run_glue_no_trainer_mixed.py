"""`run_glue_no_trainer.py` with Intel Neural Compressor's mixed example: single weights in some modules, 4x1 blocks in others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import run_glue_no_trainer

MIXED = Path(__file__).parent / "recipes" / "inc_mixed.json"


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the job that the arguments (by default the command line's) describe; pruning arguments override the example's."""
    given = sys.argv[1:] if arguments is None else arguments
    return run_glue_no_trainer.main(["--pruning_config", str(MIXED), *given])


if __name__ == "__main__":
    main()
