#!/usr/bin/env bash
# The command dsdm of this checkout: bash launch/dsdm.sh run|plan|export|sample|verify|study|bench [ARGUMENTS]
#
# It installs like run.sh. In an environment of your own, pip install -e . makes the command dsdm.

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
prepare
exec "$root/.venv/bin/python" -m dsdm_jax.cli "$@"
