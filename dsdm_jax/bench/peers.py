"""Features and training steps side by side with other people's packages: the same shapes and batch, in one run.

`python -m dsdm_jax.bench peers --python=.venv-peers/bin/python` (launch/test.sh makes that environment from
requirements-peers.txt). Rounds are interleaved; each case is one JSON line with its median, its least, its processor
time where it is known, and how many times as long the peers took, round by round in the median. Peers run on the CPU.

Features, of the same J: traker 0.3.2 with the projector that it has where there is no CUDA, bergson 2.5.1 with a
two-sided projection of each linear layer, kept in memory. bergson asks for CUDA builds of packages that it does not use
here, so it is installed by hand (docs/features.md).

Training steps: GPT-2 of transformers 5.23.0 on PyTorch 2.13.0 in float32, with the attention that it has written out
(`gpt2_eager`) and with PyTorch's own (`gpt2_sdpa`):
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
from typing import Any

from dsdm_jax.bench import features
from dsdm_jax.configs import base
from dsdm_jax.errors import UserError

PEERS = {'traker': 'features', 'bergson': 'features', 'gpt2_eager': 'training', 'gpt2_sdpa': 'training'}


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--python', required=True, help='a Python with the packages of requirements-peers.txt')
  parser.add_argument('--peers', default='traker', help=f'some of {", ".join(PEERS)}, joined by commas')
  parser.add_argument('--model', choices=features.MODELS, default='small')
  parser.add_argument('--batch', type=int, default=4, help='examples')
  parser.add_argument('--length', type=int, default=256, help='tokens of an example')
  parser.add_argument('--j', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=1, help='rounds; one of traker is 10 seconds and more')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  wanted = flags.peers.split(',')
  for peer in wanted:
    if peer not in PEERS:
      raise UserError(f'--peers={flags.peers}: {peer} is no peer; peers are {", ".join(PEERS)}')
  names = {name: kind for kind in dict.fromkeys(PEERS[peer] for peer in wanted) for name in _ours(kind, flags.j)}
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
    print(json.dumps({
      'case': name, 'seconds': round(statistics.median(timed[name]), 5), 'least_s': round(min(timed[name]), 5),
      'cpu_s': round(statistics.median(used[name]), 5) if used[name] else None,
      **{f'{peer}_seconds_over_this': _ratio(timed[peer], timed[name]) for peer in wanted if PEERS[peer] == kind},
      'j': flags.j if kind == 'features' else None, 'model': flags.model, 'batch': flags.batch, 'length': flags.length,
    }), flush=True)  # fmt: skip


def _ours(kind: str, j: int) -> tuple[str, ...]:
  return ('train_step',) if kind == 'training' else (f'dense_j{j}', f'two_sided_j{j}')


def _ratio(theirs: list[float], these: list[float]) -> float:
  return round(statistics.median(a / b for a, b in zip(theirs, these, strict=True)), 3)


def _given(peer: str, flags: argparse.Namespace) -> dict[str, Any]:
  layers, width, heads, vocab = features.MODELS[flags.model]
  given = {
    'layers': layers, 'width': width, 'heads': heads, 'vocab': vocab, 'length': flags.length, 'batch': flags.batch,
    'threads': len(os.sched_getaffinity(0)),
  }  # fmt: skip
  if PEERS[peer] == 'features':
    return given | {'j': flags.j, 'repeats': flags.repeats + 1}
  train = base.training()
  of_step = ('learning_rate', 'weight_decay', 'adam_b1', 'adam_b2', 'adam_eps', 'gradient_clip')
  return given | {'attention': peer.partition('_')[2]} | {key: train[key] for key in of_step}


@contextlib.contextmanager
def _peer(name: str, flags: argparse.Namespace) -> Iterator[Callable[[], dict[str, float]]]:
  """What puts one batch through a peer, in a process of its own, and tells the seconds, maybe the processor's too."""
  python = flags.python
  script = Path(__file__).with_name(f'peer_{name.partition("_")[0]}.py')
  command = [python, str(script), json.dumps(_given(name, flags))]
  environment = {key: value for key, value in os.environ.items() if key != 'GLIBC_TUNABLES'}  # set for ours alone
  try:
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
  except OSError as error:
    raise UserError(f'--python={python} cannot be started ({error.strerror}); give a Python') from error
  assert process.stdin is not None and process.stdout is not None
  said, asked = process.stdout, process.stdin

  def run_one() -> dict[str, float]:
    with contextlib.suppress(BrokenPipeError):  # an ended process is told by what it no longer says
      asked.write('\n')
      asked.flush()
    line = said.readline()
    if not line:
      raise UserError(
        f'{name} under --python={python} ended with exit code {process.wait()}; see what it said above, and install '
        'requirements-peers.txt there (bergson by hand, docs/features.md)'
      )
    return json.loads(line)

  try:
    yield run_one
  finally:
    with contextlib.suppress(BrokenPipeError):  # of what an ended process has not read
      asked.close()
    process.wait()
    said.close()
