"""Features and training steps beside those of other packages, with the same shapes and batch, in one run.

`python -m dsdm_jax.bench peers --python=.venv-peers/bin/python` (launch/test.sh makes that environment from
requirements-peers.txt). Rounds are interleaved. Each case is one JSON line with its median and minimum seconds, its
processor time where it is known, and the median over rounds of the peers' seconds over its own. Peers run on the CPU.

Features with the same J: traker 0.3.2 with its CPU projector, and bergson 2.5.1 with a two-sided projection of each
linear layer, in memory. bergson requires CUDA builds of packages that it does not use here, so it is installed by hand
(docs/features.md).

Training steps: GPT-2 of transformers 5.23.0 on PyTorch 2.13.0 in float32, with its own attention (`gpt2_eager`) and
with PyTorch's (`gpt2_sdpa`):
`--peers=gpt2_eager,gpt2_sdpa --batch=16 --repeats=9`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from dsdm_jax.bench import features
from dsdm_jax.configs import base
from dsdm_jax.errors import UserError

PEERS = {'traker': 'features', 'bergson': 'features', 'gpt2_eager': 'training', 'gpt2_sdpa': 'training'}


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--python', required=True, help='a Python with the packages of requirements-peers.txt')
  parser.add_argument('--peers', default='traker', help=f'comma-separated names from {", ".join(PEERS)}')
  parser.add_argument('--model', choices=features.MODELS, default='small')
  parser.add_argument('--batch', type=int, default=4, help='examples')
  parser.add_argument('--length', type=int, default=256, help='tokens of an example')
  parser.add_argument('--j', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=1, help='rounds; one round of traker takes at least 10 seconds')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  wanted = flags.peers.split(',')
  for peer in wanted:
    if peer not in PEERS:
      raise UserError(f'--peers={flags.peers}: {peer} is unknown; peers are {", ".join(PEERS)}')
  known = {'train_step': 'training', f'dense_j{flags.j}': 'features', f'two_sided_j{flags.j}': 'features'}
  names = {name: kind for name, kind in known.items() if kind in {PEERS[peer] for peer in wanted}}
  ours = features.cases(names, argparse.Namespace(**vars(flags), devices='1x1', dtype='float32', remat=False))
  with contextlib.ExitStack() as stack:
    peers = {peer: stack.enter_context(_peer(peer, flags)) for peer in wanted}
    timed: dict[str, list[float]] = {name: [] for name in (*names, *wanted)}
    used: dict[str, list[float]] = {name: [] for name in timed}
    for case in ours:
      case.run()
    for run_peer in peers.values():
      run_peer()
    for _ in range(flags.repeats):
      for case in ours:
        began, began_cpu = time.perf_counter(), time.process_time()
        case.run()
        timed[case.name].append(time.perf_counter() - began)
        used[case.name].append(time.process_time() - began_cpu)
      for peer, run_peer in peers.items():
        spent = run_peer()
        timed[peer].append(spent['seconds'])
        used[peer] += [spent['cpu_s']] if 'cpu_s' in spent else []
  for name, kind in {**names, **{peer: PEERS[peer] for peer in wanted}}.items():
    line = {'case': name, 'seconds': round(statistics.median(timed[name]), 5), 'least_s': round(min(timed[name]), 5)}
    line['cpu_s'] = round(statistics.median(used[name]), 5) if used[name] else None
    for peer in wanted:
      if PEERS[peer] == kind:
        ratios = [theirs / this for theirs, this in zip(timed[peer], timed[name], strict=True)]
        line[f'{peer}_seconds_over_this'] = round(statistics.median(ratios), 3)
    shape = {'model': flags.model, 'batch': flags.batch, 'length': flags.length}
    print(json.dumps(line | {'j': flags.j if kind == 'features' else None} | shape), flush=True)


@contextlib.contextmanager
def _peer(name: str, flags: argparse.Namespace) -> Iterator[Callable[[], dict[str, float]]]:
  """Starts a peer in a process of its own; yields a function that runs one batch and returns its seconds."""
  layers, width, heads, vocab = features.MODELS[flags.model]
  config = {'layers': layers, 'width': width, 'heads': heads, 'vocab': vocab, 'length': flags.length}
  config |= {'batch': flags.batch, 'threads': len(os.sched_getaffinity(0))}
  if PEERS[name] == 'features':
    config |= {'j': flags.j, 'repeats': flags.repeats + 1}
  else:
    keys = ('learning_rate', 'weight_decay', 'adam_b1', 'adam_b2', 'adam_eps', 'gradient_clip')
    config |= {key: base.training()[key] for key in keys} | {'attention': name.partition('_')[2]}
  python = flags.python
  command = [python, str(Path(__file__).with_name('peer_process.py')), name, json.dumps(config)]
  environment = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES'}  # tuned for JAX only
  try:
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  except OSError as error:
    raise UserError(f'--python={python} cannot be started ({error.strerror}); use the path of a Python') from error
  assert process.stdin is not None and process.stdout is not None
  output, requests = process.stdout, process.stdin

  def run_one() -> dict[str, float]:
    with contextlib.suppress(BrokenPipeError):  # a process that ended writes no line
      requests.write('\n')
      requests.flush()
    line = output.readline()
    if not line:
      raise UserError(
        f'{name} under --python={python} ended with exit code {process.wait()}; see its output above, and install '
        'requirements-peers.txt there (bergson by hand, docs/features.md)'
      )
    return json.loads(line)

  try:
    yield run_one
  finally:
    with contextlib.suppress(BrokenPipeError):
      requests.close()
    process.wait()
    output.close()
