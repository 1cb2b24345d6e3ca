#!/usr/bin/env bash
# Install what the tests need and run them; arguments are passed on to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_setup.sh" dev
# One worker a core. Each begins with a row of whole files, whose tests share what was costly to make, and takes from the others' ends
# when it is done, so that no slow file keeps one worker busy at last.
exec python -m pytest -q -n auto --dist worksteal "$@"
