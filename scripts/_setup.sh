# Sourced by the other scripts: enter the repository, a virtual environment, and install what is missing.
# Usage: . "$(dirname "$0")/_setup.sh" EXTRAS
# An active environment (venv or conda) is used as it is; otherwise .venv is made in the repository root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    . .venv/bin/activate
fi

# Nothing here needs a model hub, and nothing should wait for one.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

installed_from_here() { # whether this environment's hf_prune is this checkout, not another one
    python -I -c 'import importlib.util as u, sys; s = u.find_spec("hf_prune"); sys.exit(not (s and s.origin.startswith(sys.argv[1])))' \
        "$(pwd -P)/"
}

install() { # install EXTRAS: once for each state of the files that say what to install
    local stamp
    stamp="$(python -c 'import sys; print(sys.prefix)')/.hf_prune-$1-$(cat setup.cfg pyproject.toml constraints.txt | cksum | tr ' ' -)"
    [ -e "$stamp" ] && installed_from_here && return
    # torch goes first: with it in place no other package picks a build of its own.
    python -m pip install --quiet "$(grep '^torch==' constraints.txt)"
    python -m pip install --quiet -c constraints.txt -e ".[$1]"
    touch "$stamp"
}

install "$1"
