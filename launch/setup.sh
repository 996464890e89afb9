# Shared by run.sh and test.sh, which source it: finds Python, makes environments, installs what is pinned.
# shellcheck shell=bash

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=launch/$(basename "$0")

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # so that it runs from any folder
export PYTHONDONTWRITEBYTECODE=1 # no __pycache__ among the sources; packages are compiled when installed
export PYTHONNOUSERSITE=1 # what lies in ~/.local is not pinned, and would become part of the pool
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}" # TensorFlow only reads data here
export TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"

fail() { # one line on stderr, exit code 2
  printf '%s: %s\n' "$self" "$*" >&2
  exit 2
}

suits() { # whether Python $1 runs and is one that the pins exist for
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints a Python that suits: uv's where uv is installed, else the first on the PATH
  local candidate
  if command -v uv >/dev/null; then
    candidate=$(uv python find --system --no-project '>=3.11,<3.14' 2>/dev/null || true)
    if [[ -n $candidate ]] && suits "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  fi
  for candidate in python3.12 python3.11 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && suits "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  local found='no Python'
  if command -v python3 >/dev/null; then
    found="python3, which is $(python3 --version 2>&1)"
  fi
  fail "needs Python 3.11, 3.12 or 3.13 and found $found;" \
    "install one (uv python install 3.12, or apt-get install python3.12-venv) and start again"
}

make_environment() { # environment $1 with Python $2, unless it is there and works
  if [[ ! -x $1/bin/python ]] || ! suits "$1/bin/python" || ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    printf '%s: making %s with %s\n' "$self" "$1" "$("$2" --version 2>&1)" >&2
    "$2" -m venv --clear "$1" >&2 ||
      fail "cannot make $1; see above (on Debian and Ubuntu: apt-get install python3-venv; else: disk full, read-only?)"
  fi
}

install() { # into environment $1 the files of requirements $2, unless they are what was installed last
  local environment=$1 requirements=$2 stamp=$1/installed.txt
  if cat "$requirements" "$root/requirements.lock" | cmp -s - "$stamp"; then
    return
  fi
  printf '%s: installing %s (the first time takes some minutes and 2 GB)\n' "$self" "$(basename "$requirements")" >&2
  rm -f "$stamp"
  "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    -r "$requirements" -c "$root/requirements.lock" >&2 ||
    fail "installing $(basename "$requirements") failed; see above (no network, or a full disk?)"
  cat "$requirements" "$root/requirements.lock" >"$stamp"
}

prepare() { # makes and fills .venv
  if [[ ! -x $root/.venv/bin/python ]] || ! suits "$root/.venv/bin/python"; then
    base_python=$(find_python)
  else
    base_python=$root/.venv/bin/python
  fi
  make_environment "$root/.venv" "$base_python"
  install "$root/.venv" "$root/requirements.txt"
}
