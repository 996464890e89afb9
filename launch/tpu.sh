#!/usr/bin/env bash
# A run on Cloud TPUs, from creation to deletion:
# bash launch/tpu.sh COMMAND NAME --zone=ZONE --type=TYPE [options] [-- ARGUMENTS]
#
# Commands:
#   create   create the TPU and wait until it is ready
#   setup    send the committed files of this checkout to every worker and install them
#   run      start launch/run.sh with ARGUMENTS on every worker, in the background
#   watch    show progress until the run ends; with --spot, a preempted TPU is created again as soon as there is
#            capacity, and the run resumes with ARGUMENTS, which are those of run
#   resume   delete the TPU if it still exists, then create, setup, run with the same ARGUMENTS, and watch
#   all      create, setup, run and watch
#   logs     fetch every worker's log into logs/NAME
#   delete   delete the TPU and the files on its disks
#
# Options:
#   --zone=us-west4-a    --project=PROJECT (gcloud's default)    --version=RUNTIME (by type)
#   --type=v5litepod-16  accelerator type, as a plan prints it
#   --slices=1           number of slices that train together; more than one implies --queued
#   --queued             wait in a queue (queued resource) instead of failing when there is no capacity
#   --spot               cheaper, but can be preempted at any time; a preemption loses a workdir on the TPU's disk
#   --nfs=SERVER:/SHARE  mount it on every worker at /mnt/dsdm_jax; several workers need a workdir there, or an address
#   --network=NAME --subnetwork=NAME   by default gcloud's
#   --internal-ips       no external addresses; the network needs Cloud NAT, from which workers install packages
#   --tunnel-through-iap reach workers through the Identity-Aware Proxy, as from outside a private network
#   --service-account=EMAIL   of the workers; by default the project's
#   --labels=KEY=VALUE,...    for bills and filters
#   --reserved           use the project's reservation; --reservation=NAME names one
#   --startup-script=FILE     that each worker runs when it starts
#   --poll=60            seconds between checks
#   --dry-run            print the commands, but do not run them
#
# With --workdir=gs://BUCKET/RUN (or s3://), each worker also copies its log to RUN/logs, every minute.
#
# Example: bash launch/tpu.sh all mine --zone=us-west4-a --type=v5litepod-16 --spot -- \
#   --config=configs/v5e_8.py --workdir=gs://bucket/mine

set -euo pipefail

fail() { # one line on stderr, exit code 2
  printf 'launch/tpu.sh: %s\n' "$*" >&2
  exit 2
}

say() { printf 'launch/tpu.sh: %s\n' "$*" >&2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
resume="bash launch/tpu.sh resume$( (($# < 2)) || printf ' %q' "${@:2}")"
command=${1:-} name=${2:-}
case $command in
  create | setup | run | watch | resume | all | logs | delete) ;;
  '' | -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "unknown command $command; commands are create, setup, run, watch, resume, all, logs, delete" ;;
esac
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "the second argument must name the TPU in lower case letters, digits and -"
shift 2

zone='' type='' project='' version='' slices=1 queued='' spot='' nfs='' poll=60 dry_run='' arguments=()
made_with=() tunnel='' reservation=''
while (($#)); do
  case $1 in
    --zone=* | --type=* | --project=* | --version=* | --slices=* | --nfs=* | --poll=*)
      option=${1%%=*}
      printf -v "${option#--}" %s "${1#*=}"
      ;;
    --network=* | --subnetwork=* | --service-account=* | --labels=* | --internal-ips | --reserved) made_with+=("$1") ;;
    --reservation=*) reservation=${1#*=} && made_with+=("$1") ;;
    --startup-script=*)
      [[ -r ${1#*=} ]] || fail "$1 cannot be read; give the path of a script"
      made_with+=("--metadata-from-file=startup-script=${1#*=}")
      ;;
    --tunnel-through-iap) tunnel=$1 ;;
    --queued) queued=yes ;;
    --spot) spot=yes ;;
    --dry-run) dry_run=yes ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    *) fail "unknown option $1; arguments of the run come after --" ;;
  esac
  shift
done
[[ -n $zone ]] || fail "--zone is missing; give one, such as --zone=us-west4-a"
[[ -n $type ]] || fail "--type is missing; give one, such as --type=v5litepod-8"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices=$slices must be a whole number of at least 1"
[[ $poll =~ ^[0-9]+$ ]] || fail "--poll=$poll must be a whole number of seconds"
((slices == 1)) || queued=yes

# Prints the number of workers of a slice. A worker has four chips, or all eight of an eight-chip slice. The number in a
# v4 or v5p type counts cores, two a chip.
hosts() {
  local count=${type##*-}
  [[ $count =~ ^[1-9][0-9]*$ ]] || fail "--type=$type must end in a number, such as v5litepod-16"
  case $type in
    v5litepod-8 | v6e-8) echo 1 ;;
    v5litepod-* | v6e-*) echo $(((count + 3) / 4)) ;;
    v4-* | v5p-*) echo $(((count + 7) / 8)) ;;
    *) fail "unknown --type=$type; types begin with v4-, v5litepod-, v5p- or v6e-" ;;
  esac
}

runtime() { # prints the runtime version for a type
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

((${#arguments[@]})) || resume+=' -- ARGUMENTS'
workers=$(hosts)
version=${version:-$(runtime)}
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
kind=tpu-vm every=(--worker=all) first=(--worker=0)
if [[ -n $queued ]]; then
  kind=queued-resources every=(--node=all --worker=all) first=(--node=0 --worker=0)
fi
if [[ -n $tunnel ]]; then
  every+=("$tunnel") first+=("$tunnel")
fi

address='' shared=''
for argument in "${arguments[@]+"${arguments[@]}"}"; do
  case $argument in
    --workdir=gs://?* | --workdir=s3://?*) address=${argument#*=} ;;
    --workdir=/mnt/dsdm_jax/*) shared=$nfs ;;
  esac
done
starts_again='' # the command, if it starts a run that has begun
case $command$spot in
  resume*) starts_again=resume ;;
  watchyes) starts_again='watch --spot' ;;
esac
if [[ -n $starts_again ]] && ((${#arguments[@]} == 0)); then
  fail "$starts_again starts the run again, with the arguments that it had; give them after --, such as" \
    "-- --config=configs/quickstart.py"
fi
if [[ -z $address$shared && ($command =~ ^(run|all)$ || -n $starts_again) ]]; then
  ((workers * slices == 1)) || fail "$type with --slices=$slices has $((workers * slices)) workers, which must share a" \
    "workdir; add --nfs=SERVER:/SHARE, and --workdir=/mnt/dsdm_jax/$name, or --workdir=gs://BUCKET/$name, after --"
  [[ -z $spot || -n $nfs || $command == resume ]] ||
    say "the workdir is on the TPU's disk: a preemption loses the run; use --nfs or --workdir=gs://BUCKET/$name"
fi

tpus() { # gcloud compute tpus …, or its text under --dry-run
  local program=(gcloud compute tpus)
  # Only the alpha track knows a reservation's name, and the tunnel for a TPU that was not queued.
  if [[ $2 == create && -n $reservation ]] || [[ $1 == tpu-vm && $2 == s* && -n $tunnel ]]; then
    program=(gcloud alpha compute tpus)
  fi
  if [[ -n $dry_run ]]; then
    printf '%s' "${program[*]}"
    printf ' %q' "$@"
    printf '\n'
  else
    "${program[@]}" "$@"
  fi
}

state() { # prints READY, GONE (no such TPU), UNKNOWN (the request failed), or the state that gcloud reports
  local found error format='value(state)'
  [[ -z $queued ]] || format='value(state.state)'
  if [[ -n $dry_run ]]; then
    tpus "$kind" describe "$name" "${where[@]}" --format='value(state)' >&2
    echo READY
    return
  fi
  error=$(mktemp)
  # A failed request says nothing about the TPU, unless the error is NOT_FOUND.
  if ! found=$(tpus "$kind" describe "$name" "${where[@]}" --format="$format" 2>"$error"); then
    if grep -q NOT_FOUND "$error"; then
      found=GONE
    else
      found=UNKNOWN
      cat "$error" >&2
    fi
  fi
  rm -f "$error"
  [[ $found != ACTIVE ]] || found=READY
  printf '%s\n' "${found:-UNKNOWN}"
}

lost() { # whether a TPU in state $1 will never be ready again
  case $1 in
    GONE | PREEMPTED | TERMINATED | STOPPED | SUSPENDED | SUSPENDING | FAILED | DELETING) return 0 ;;
    *) return 1 ;;
  esac
}

request() { # requests the TPU; a queued request waits for capacity
  local options=("--accelerator-type=$type" "${made_with[@]+"${made_with[@]}"}")
  [[ -z $spot ]] || options+=(--spot)
  if [[ -z $queued ]]; then
    tpus tpu-vm create "$name" "${where[@]}" "${options[@]}" "--version=$version"
    return
  fi
  if ((slices > 1)); then
    options+=("--node-count=$slices" "--node-prefix=$name")
  else
    options+=("--node-id=$name")
  fi
  tpus queued-resources create "$name" "${where[@]}" "${options[@]}" "--runtime-version=$version"
}

create() {
  request
  [[ -n $queued ]] || return 0
  local found
  until found=$(state) && [[ $found == READY ]]; do
    case $found in
      FAILED | SUSPENDED | GONE)
        fail "the request for $name is $found; gcloud compute tpus queued-resources describe $name says why"
        ;;
    esac
    say "$name is $found"
    sleep "$poll"
  done
}

path="export PATH=\$HOME/.local/bin:\$PATH" # where pip and uv put programs of the user

on_first() { tpus "$kind" ssh "$name" "${where[@]}" "${first[@]}" --command="$1"; }

everywhere() { tpus "$kind" ssh "$name" "${where[@]}" "${every[@]}" --command="$1"; }

setup() {
  local archive=$root/.cache/$name.tar.gz
  if [[ -z $dry_run ]]; then
    mkdir -p "$root/.cache"
    git -C "$root" archive --format=tar.gz -o "$archive" HEAD || fail "cannot pack $root; it must be a git checkout"
  fi
  tpus "$kind" scp "$archive" "$name:dsdm_jax.tar.gz" "${where[@]}" "${every[@]}" || return
  local steps='mkdir -p dsdm_jax && tar -xzf dsdm_jax.tar.gz -C dsdm_jax'
  if [[ -n $nfs ]]; then
    # Ubuntu updates itself after the first start and holds the lock meanwhile.
    steps+=' && sudo apt-get -o DPkg::Lock::Timeout=900 install -qq -y nfs-common && sudo mkdir -p /mnt/dsdm_jax'
    steps+=" && (mountpoint -q /mnt/dsdm_jax || sudo mount $(printf %q "$nfs") /mnt/dsdm_jax)"
    steps+=' && sudo chmod 777 /mnt/dsdm_jax'
  fi
  # The images have Python 3.10, which is too old; uv installs one without root.
  steps+=" && $path && (python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' ||"
  steps+=' ({ command -v uv || python3 -m pip install --quiet --user uv ||'
  steps+=' curl -LsSf https://astral.sh/uv/install.sh | sh; } && uv python install 3.12))'
  everywhere "$steps && bash dsdm_jax/launch/run.sh --install"
}

run() {
  local all=("${arguments[@]+"${arguments[@]}"}")
  if ((workers * slices > 1)); then
    all+=(--config.distributed.coordinator=auto "--config.distributed.processes=$((workers * slices))")
  fi
  local line='bash launch/run.sh'
  ((${#all[@]} == 0)) || line+=$(printf ' %q' "${all[@]}")
  if [[ -n $address ]]; then
    local copy
    copy="gcloud storage cp --quiet run.log $(printf %q "${address%/}/logs/")\$HOSTNAME.log >/dev/null 2>&1"
    line="(while sleep 60; do $copy; done) & $line; code=\$?; kill \$!; $copy; (exit \$code)"
  fi
  line=$(printf %q "$line; echo \$? >exit_code")
  everywhere "cd dsdm_jax && $path && rm -f exit_code && (nohup bash -c $line >run.log 2>&1 </dev/null &)"
}

watch() { # ends with the run's own exit code
  local found code started=yes
  while :; do
    found=$(state)
    if lost "$found"; then
      [[ -n $spot ]] || fail "$name is $found; create it again with: $resume"
      started=''
      say "$name is $found; creating it again to resume the run"
      # Either may fail while the old TPU is being deleted or there is no capacity; the next check tries again.
      [[ $found == GONE ]] || delete || true
      request || say "cannot create $name now; trying again in $poll s"
    elif [[ $found == READY && -z $started ]]; then
      if setup; then
        run || fail "cannot start the run on every worker of $name; start again with: $resume"
        started=yes
      else
        say "cannot set up $name now; trying again in $poll s"
      fi
    elif [[ $found == READY ]]; then
      on_first 'tail -n 3 dsdm_jax/run.log' || true # the TPU may be lost since the last check
      [[ -z $dry_run ]] || return 0
      code=$(on_first 'cat dsdm_jax/exit_code 2>/dev/null' 2>/dev/null) || code=''
      if [[ $code =~ ^[0-9]+$ ]]; then
        say "the run on $name ended with exit code $code"
        return "$code"
      fi
    else
      say "$name is $found"
    fi
    sleep "$poll"
  done
}

again() { # replaces the TPU and resumes the run from its workdir
  delete || true
  create
  setup
  run
}

logs() {
  local folder=$root/logs/$name worker node
  [[ -n $dry_run ]] || mkdir -p "$folder"
  for ((node = 0; node < slices; node++)); do
    for ((worker = 0; worker < workers; worker++)); do
      local one=("--worker=$worker")
      [[ -z $queued ]] || one+=("--node=$node")
      [[ -z $tunnel ]] || one+=("$tunnel")
      tpus "$kind" scp "$name:dsdm_jax/run.log" "$folder/$node-$worker.log" "${where[@]}" "${one[@]}"
    done
  done
}

delete() {
  if [[ -n $queued ]]; then
    tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    tpus tpu-vm delete "$name" "${where[@]}" --quiet
  fi
}

case $command in
  all)
    create
    setup
    run
    watch
    ;;
  resume)
    again
    watch
    ;;
  *) "$command" ;;
esac
