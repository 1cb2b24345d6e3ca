#!/usr/bin/env bash
# On a machine with CUDA: run the tests marked `cuda`, then the benchmarks; under nine minutes in all. Arguments are passed on to pytest.
#
# Prints the tables and writes runs/gpu.json, and runs/gpu.xml for the tests. Exits with 3 where there is no CUDA device, with pytest's code if
# a test failed, and with 124 if the benchmarks took longer than they may.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    version=$(python -c 'import torch; print(torch.__version__)')
    echo "gpu.sh: torch $version finds no CUDA device here, so there is nothing to run. On a machine with one, install a torch with CUDA first." >&2
    exit 3
fi
mkdir -p runs
timeout 300 python -m pytest -q -m cuda --junitxml=runs/gpu.xml tests/test_cuda.py "$@"
tested=$?
timeout 220 python scripts/benchmarks/benchmark_gpu.py --output runs/gpu.json || exit
exit "$tested"
