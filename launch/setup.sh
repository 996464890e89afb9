# Sourced by run.sh and test.sh: finds Python, makes environments, installs pinned requirements.
# shellcheck shell=bash

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
self=launch/$(basename "$0")
lock=$root/requirements.lock # versions that `install` may use

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # so that scripts run from any folder
export PYTHONDONTWRITEBYTECODE=1 # no __pycache__ among the sources; pip compiles packages when it installs them
export PYTHONNOUSERSITE=1 # packages in ~/.local are not pinned, and would become part of the quickstart's pool
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-3}" # TensorFlow only reads data
export TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"

fail() { # one line on stderr, exit code 2
  printf '%s: %s\n' "$self" "$*" >&2
  exit 2
}

suits() { # whether Python $1 runs and has a version that the pins support
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() { # prints a supported Python: from uv if it is installed, else the first on the PATH
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
  local version='no Python'
  if command -v python3 >/dev/null; then
    version="python3, which is $(python3 --version 2>&1)"
  fi
  fail "needs Python 3.11, 3.12 or 3.13 but found $version;" \
    "install one (uv python install 3.12, or apt-get install python3.12-venv) and start again"
}

base_python() { # prints the Python to make environments with: that of .venv if it works, else find_python's
  if [[ -x $root/.venv/bin/python ]] && suits "$root/.venv/bin/python"; then
    printf '%s\n' "$root/.venv/bin/python"
  else
    find_python
  fi
}

make_environment() { # makes environment $1 with Python $2, unless it exists and works
  if [[ ! -x $1/bin/python ]] || ! suits "$1/bin/python" || ! "$1/bin/python" -m pip --version >/dev/null 2>&1; then
    printf '%s: making %s with %s\n' "$self" "$1" "$("$2" --version 2>&1)" >&2
    "$2" -m venv --clear "$1" >&2 ||
      fail "cannot make $1; see above (on Debian and Ubuntu: apt-get install python3-venv; else: disk full, read-only?)"
  fi
}

uv='' # the program that installs packages; if empty, pip does
install() { # installs requirements files $2 … into environment $1, unless they have not changed since the last time
  local environment=$1 stamp=$1/installed.txt file names='' arguments=()
  shift
  for file in "$@"; do
    names+=${names:+ and }$(basename "$file")
    arguments+=(-r "$file")
  done
  if cat "$@" "$lock" | cmp -s - "$stamp"; then
    return
  fi
  printf '%s: installing %s (the first time takes some minutes and 2 GB)\n' "$self" "$names" >&2
  rm -f "$stamp"
  [[ -n $uv ]] && "$uv" pip install --quiet --compile-bytecode --python "$environment/bin/python" \
    "${arguments[@]}" -c "$lock" 2>/dev/null ||
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
      "${arguments[@]}" -c "$lock" >&2 ||
    fail "installing $names failed; see above (no network, or a full disk?)"
  cat "$@" "$lock" >"$stamp"
}

client() { # installs the client $1 of an object store, at the version that the tests use, unless it is there
  local pins version
  ! "$root/.venv/bin/python" -c "import $1" 2>/dev/null || return 0
  pins=$(<"$root/requirements-test.txt")
  version=${pins#*$'\n'"$1=="}
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input \
    "$1==${version%%[[:space:]]*}" -c "$lock" >&2 || fail "installing $1 failed; see above (no network, or a full disk?)"
}

# A prefix for /sys and /dev, which tests set.
system=${DSDM_JAX_SYSTEM:-}

accelerator() { # prints tpu, cuda or cpu: DSDM_JAX_ACCELERATOR if it is set, else what this machine has
  local device vendor id
  case ${DSDM_JAX_ACCELERATOR:-} in
    tpu | cuda | cpu) printf '%s\n' "$DSDM_JAX_ACCELERATOR" && return ;;
    '') ;;
    *) fail "DSDM_JAX_ACCELERATOR=$DSDM_JAX_ACCELERATOR must be tpu, cuda or cpu" ;;
  esac
  for device in "$system"/sys/bus/pci/devices/*; do
    [[ -r $device/vendor && -r $device/device ]] || continue
    read -r vendor <"$device/vendor"
    read -r id <"$device/device"
    case $vendor:$id in
      # TPU v2 and v3, v4, v5p, v5e, v6e, 7x, as in jax/_src/hardware_utils.py
      0x1ae0:0x0027 | 0x1ae0:0x005e | 0x1ae0:0x006[23f] | 0x1ae0:0x0076) echo tpu && return ;;
    esac
  done
  for device in nvidia0 nvidiactl dxg; do
    [[ ! -e $system/dev/$device ]] || { echo cuda && return; }
  done
  echo cpu
}

prepare() { # makes .venv and installs requirements for the accelerator of this machine, and the client for $workdir
  local device files=("$root/requirements.txt")
  device=$(accelerator)
  [[ $device == cpu ]] || files+=("$root/requirements-$device.txt")
  if [[ $device == cpu && $OSTYPE == linux* ]]; then # huge pages for XLA's buffers: see docs/pretraining.md
    export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"
  fi
  if command -v flock >/dev/null; then # one at a time, because several nodes may share a checkout
    exec 9>"$root/.venv.lock"
    flock 9
  fi
  python=$(base_python)
  make_environment "$root/.venv" "$python"
  install "$root/.venv" "${files[@]}"
  case ${workdir:-} in
    gs://*) client gcsfs ;;
    s3://*) client s3fs ;;
  esac
  if command -v flock >/dev/null; then
    exec 9>&-
  fi
}
