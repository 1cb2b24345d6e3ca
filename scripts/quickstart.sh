#!/usr/bin/env bash
# Prune, condense, save and reload a small model on a small task, offline; see quickstart.py for what it does.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" demo
# So small a model gains nothing from a second thread, and loses much when the other core is busy.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python scripts/quickstart.py
