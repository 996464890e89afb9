#!/usr/bin/env bash
# Runs the checks and tests: bash launch/test.sh [--fast | --all | --faults] [ARGUMENTS OF PYTEST]
#
#   (nothing)  what CI runs: format, lint, types, known vulnerabilities, tests
#   --fast     for the inner loop: the same checks without the audit, and tests that need a second or so
#   --all      everything: also libtpu at full effort, Beam, long kill and soak suites, study, notebook
#   --faults   the long fault, load and hostile-input suites alone (docs/failures.md)
#
# docs/testing.md says which test runs when. Other arguments go to pytest: bash launch/test.sh --fast -k datamodel
#
# The tools live in .venv-test, which imports everything else from .venv: the quickstart's pool is the text of the
# packages in .venv, so tools must not be installed there. Some tests start processes in environments of their own:
# .venv-peers (packages to compare with), .venv-tpu (compiles for TPUs) and .venv-beam (Apache Beam, --all).

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

tier=default
case ${1:-} in
  --fast | --all | --faults)
    tier=${1#--}
    shift
    ;;
esac

look_into_venv() { # lets environment $1 import the packages of .venv
  local site='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$root/.venv/bin/python" -c "$site" >"$("$1/bin/python" -c "$site")/environment.pth"
}

python=$(base_python)
# Environments are installed side by side, and while checks and tests run; a test that needs one waits
# for its lock, where there is flock.
if [[ $tier != fast ]]; then
  ({ flock 8 2>/dev/null || true; } && make_environment "$root/.venv-peers" "$python" &&
    install "$root/.venv-peers" "$root/requirements-peers.txt" &&
    "$root/.venv-peers/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps kronfluence==1.0.1 \
      dolma==1.2.1 mosaicml-streaming==0.13.0 megatron-core==0.16.1) 8>"$root/.venv-peers.lock" ||
    printf '%s: no .venv-peers, so tests that compare with other packages are skipped\n' "$self" >&2 &
fi
make_environment "$root/.venv-test" "$python"
if [[ ! -f $root/.venv/installed.txt ]]; then # uv installs these packages in half of pip's processor time
  "$root/.venv-test/bin/python" -m pip install --quiet --disable-pip-version-check \
    "$(grep -o '^uv==[^ ]*' "$root/requirements-test.txt")" >&2 && uv=$root/.venv-test/bin/uv ||
    printf '%s: no uv, so pip installs all packages\n' "$self" >&2
fi
prepare
uv=''
python=$root/.venv/bin/python
if [[ $tier != fast ]]; then
  ({ flock 8 2>/dev/null || true; } && make_environment "$root/.venv-tpu" "$python" &&
    look_into_venv "$root/.venv-tpu" &&
    install "$root/.venv-tpu" "$root/requirements-tpu.txt") 8>"$root/.venv-tpu.lock" ||
    printf '%s: no .venv-tpu, so tests that compile for TPUs are skipped\n' "$self" >&2 &
fi
if [[ $tier == all ]]; then
  ({ flock 8 2>/dev/null || true; } && lock=$root/requirements-beam.lock &&
    make_environment "$root/.venv-beam" "$python" &&
    install "$root/.venv-beam" "$root/requirements-beam.txt") 8>"$root/.venv-beam.lock" ||
    printf '%s: no .venv-beam, so the test of Apache Beam is skipped\n' "$self" >&2 &
fi
look_into_venv "$root/.venv-test"
install "$root/.venv-test" "$root/requirements-test.txt"

if [[ $tier != fast && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  packages=()
  command -v chromium >/dev/null || packages+=(chromium)
  command -v chromedriver >/dev/null || packages+=(chromium-driver)
  command -v shellcheck >/dev/null || packages+=(shellcheck)
  if ((${#packages[@]})); then
    printf '%s: installing %s\n' "$self" "${packages[*]}" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
      "${packages[@]}"; } >/dev/null 2>&1 ||
      printf '%s: cannot install %s, so tests that need them are skipped\n' "$self" "${packages[*]}" >&2
  fi
fi

cd "$root"
python=$root/.venv-test/bin/python
audit() { # looks for known vulnerabilities in the packages that requirements.lock pins
  local output
  output=$(timeout 120 "$python" -m pip_audit -r requirements.lock --no-deps --disable-pip \
    --progress-spinner off 2>&1) || true
  if grep -qE '^Found [0-9]+ known' <<<"$output"; then
    printf '%s\n' "$output" >&2
    return 1
  fi
  if ! grep -q '^No known vulnerabilities found' <<<"$output"; then
    printf '%s: cannot audit packages: %s\n' "$self" "$(tail -n 1 <<<"$output")" >&2
  elif grep -q 'could not be audited' <<<"$output"; then
    printf '%s: not audited, as the package index has no advisories for them: %s packages\n' \
      "$self" "$(grep -c 'could not be audited' <<<"$output")" >&2
  fi
}

status=0 # every check runs, even after one has failed
if [[ $tier != fast ]]; then # mostly waits for the network
  audit &
  audit=$!
fi
"$python" -m ruff format --check --quiet . || { printf '%s: fix with: ruff format\n' "$self" >&2 && status=1; }
"$python" -m ruff check --output-format=concise . || status=1
"$python" -m mypy || status=1
[[ -z ${audit:-} ]] || wait "$audit" || status=1

case $tier in
  fast) set -- -m 'not slow and not full' "$@" ;;
  default) set -- -m 'not full' "$@" ;;
  all) export DSDM_FAULTS=1 DSDM_JAX_FULL_PLANS=1 ;;
  faults)
    export DSDM_FAULTS=1
    set -- tests/faults tests/test_security.py tests/core/test_lock.py tests/core/test_artifacts.py "$@"
    ;;
esac
"$python" -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@" || status=1
wait # for environments that no test needed
exit "$status"
