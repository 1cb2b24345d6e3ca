#!/usr/bin/env bash
# Install what the tests need and run them; arguments are passed on to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
# One worker a core; a file stays on one, since tests in it share what was costly to make.
exec python -m pytest -q -n auto --dist loadfile "$@"
