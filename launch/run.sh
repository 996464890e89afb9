#!/usr/bin/env bash
# Runs the pipeline: bash launch/run.sh [--config=configs/x.py] [--workdir=DIR] [--stage=STAGE] [--config.key=value …]
#
# The first call makes .venv and installs requirements.txt; a later call does so again if that file has changed. A
# machine with a TPU or an NVIDIA GPU also gets requirements-tpu.txt or requirements-cuda.txt; set
# DSDM_JAX_ACCELERATOR=cpu|cuda|tpu to choose. A workdir at gs:// or s3:// gets gcsfs or s3fs. The default config is the
# quickstart, and the default workdir is runs/<name of the config>. With --install alone it installs and stops.

# shellcheck source-path=SCRIPTDIR source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

here=$root/
if [[ $PWD -ef $root ]]; then
  here=
fi

if [[ $* == --install ]]; then
  prepare
  exit
fi

config='' workdir='' previous=''
for argument in "$@"; do
  case $previous in
    --config | -config) config=$argument ;;
    --workdir | -workdir) workdir=$argument ;;
  esac
  case $argument in
    --config=* | -config=*) config=${argument#*=} ;;
    --workdir=* | -workdir=*) workdir=${argument#*=} ;;
  esac
  previous=$argument
done

defaults=()
if [[ -z $config ]]; then
  config=${here}configs/quickstart.py
  defaults+=("--config=$config")
fi
if [[ -z $workdir ]]; then
  file=${config%%.py:*} # --config may be x.py:argument
  workdir=${here}runs/$(basename "$file" .py)
  defaults+=("--workdir=$workdir")
fi

prepare
"$root/.venv/bin/python" -m dsdm_jax.main "${defaults[@]+"${defaults[@]}"}" "$@"

if [[ -f $workdir/report/index.html ]]; then
  printf '\nOpen %s in a browser.\n' "$workdir/report/index.html" >&2
fi
