#!/usr/bin/env bash
# Install the wheel with the oldest and with the newest libraries that it claims to work with, on each Python, and run the tests marked `core`.
#
#   bash scripts/test_versions.sh                  every combination; about 5 GB at a time, some minutes each
#   bash scripts/test_versions.sh 3.12             the oldest and the newest on one Python
#   bash scripts/test_versions.sh 3.12 5.20.2      one combination: `oldest`, `newest`, or a release of transformers
#
# Writes model_cards/results/versions.json and the table of docs/versions.md. Python 3.10 to 3.13 have to be installed (uv gets them where
# it may); with UV_TORCH_BACKEND=cpu, torch comes without CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Where pyenv keeps its interpreters, of which only one is on the path.
PATH="$PATH:$(printf '%s:' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin)"
export PATH HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/uv"
"$work/uv/bin/python" -m pip install --quiet uv
UV="$work/uv/bin/uv" UV_CACHE_DIR="${UV_CACHE_DIR:-$work/cache}" python3 scripts/results/versions.py "$work" "$@"
