#!/usr/bin/env bash
# Runs what CI runs: format, lint, types, known vulnerabilities, tests. Arguments go to pytest: bash launch/test.sh -k datamodel
# With --faults as the first: the long version of the fault, load and hostile input suite alone (docs/failures.md).
#
# The tools live in .venv-test, which looks into .venv for everything else: the pool is the text of the packages in
# .venv, and running the tests must not change what a run is made of. Peers that some tests compare with live in
# .venv-peers, what compiles for TPUs in .venv-tpu and Apache Beam in .venv-beam, which those tests start as processes of
# their own.

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

look_into_venv() { # lets environment $1 import what .venv holds
  local site='import sysconfig; print(sysconfig.get_path("purelib"))'
  "$root/.venv/bin/python" -c "$site" >"$("$1/bin/python" -c "$site")/environment.pth"
}

prepare
python=$root/.venv/bin/python
# Side by side with the tools, format, lint and types: tests wait for them.
(make_environment "$root/.venv-peers" "$python" && install "$root/.venv-peers" "$root/requirements-peers.txt") ||
  printf '%s: could not, so tests that need peers are skipped\n' "$self" >&2 &
(make_environment "$root/.venv-tpu" "$python" && look_into_venv "$root/.venv-tpu" &&
  install "$root/.venv-tpu" "$root/requirements-tpu.txt") ||
  printf '%s: could not, so tests that compile for TPUs are skipped\n' "$self" >&2 &
(lock=$root/requirements-beam.lock && make_environment "$root/.venv-beam" "$python" &&
  install "$root/.venv-beam" "$root/requirements-beam.txt") ||
  printf '%s: could not, so the test that needs Apache Beam is skipped\n' "$self" >&2 &

make_environment "$root/.venv-test" "$python"
look_into_venv "$root/.venv-test"
install "$root/.venv-test" "$root/requirements-test.txt"

if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  packages=()
  command -v chromium >/dev/null || packages+=(chromium)
  command -v chromedriver >/dev/null || packages+=(chromium-driver)
  command -v shellcheck >/dev/null || packages+=(shellcheck)
  if ((${#packages[@]})); then
    printf '%s: installing %s for the tests that need them\n' "$self" "${packages[*]}" >&2
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
      "${packages[@]}"; } >/dev/null 2>&1 ||
      printf '%s: could not, so these tests are skipped\n' "$self" >&2
  fi
fi

cd "$root"
python=$root/.venv-test/bin/python
audit() { # known vulnerabilities of what requirements.lock pins, as far as the package index knows of any
  local said
  said=$(timeout 120 "$python" -m pip_audit -r requirements.lock --no-deps --disable-pip --progress-spinner off 2>&1) || true
  if grep -qE '^Found [0-9]+ known' <<<"$said"; then
    printf '%s\n' "$said" >&2
    return 1
  fi
  if ! grep -q '^No known vulnerabilities found' <<<"$said"; then
    printf '%s: could not audit packages: %s\n' "$self" "$(tail -n 1 <<<"$said")" >&2
  elif grep -q 'could not be audited' <<<"$said"; then
    printf '%s: the package index has no advisories for %s of the pinned packages, which were not audited\n' \
      "$self" "$(grep -c 'could not be audited' <<<"$said")" >&2
  fi
}

status=0 # all five have their say, whatever the first ones find
"$python" -m ruff format --check --quiet . || { printf '%s: mend with: ruff format\n' "$self" >&2 && status=1; }
"$python" -m ruff check --output-format=concise . || status=1
"$python" -m mypy || status=1
audit || status=1
wait # for the environments
if [[ ${1:-} == --faults ]]; then
  shift
  export DSDM_FAULTS=1
  set -- tests/faults tests/test_security.py tests/core/test_lock.py tests/core/test_artifacts.py "$@"
fi
"$python" -m pytest -n 2 --dist loadscope "$@" || status=1
exit "$status"
