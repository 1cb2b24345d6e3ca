#!/usr/bin/env bash
# Build the documentation into docs/_build/html, offline; any warning is an error. Arguments are passed on to Sphinx.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" docs
exec python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs docs/_build/html "$@"
