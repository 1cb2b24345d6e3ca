#!/usr/bin/env bash
# Install what the tests need and run them; arguments are passed on to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
exec python -m pytest -q "$@"
