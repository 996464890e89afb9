"""Features side by side with other people's packages: the same shapes, the same batch, the same J, in one run.

`python -m dsdm_jax.bench peers --python=.venv-peers/bin/python` (launch/test.sh makes that environment from
requirements-peers.txt). Rounds are interleaved; each case is one JSON line with its median. Peers run on the CPU:
traker 0.3.2 with the projector that it has where there is no CUDA, bergson 2.5.1 with a two-sided projection of each
linear layer, kept in memory. bergson asks for CUDA builds of packages that it does not use here, so it is installed
by hand (docs/features.md).
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
from dsdm_jax.core.errors import UserError

PEERS = ('traker', 'bergson')


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
  layers, width, heads, vocab = features.MODELS[flags.model]
  given = {
    'layers': layers, 'width': width, 'heads': heads, 'vocab': vocab, 'length': flags.length, 'batch': flags.batch,
    'j': flags.j, 'repeats': flags.repeats + 1, 'threads': len(os.sched_getaffinity(0)),
  }  # fmt: skip
  names = (f'dense_j{flags.j}', f'two_sided_j{flags.j}')
  ours = features.cases(names, argparse.Namespace(**vars(flags), devices='1x1', dtype='float32', remat=False))
  with contextlib.ExitStack() as stack:
    peers = {peer: stack.enter_context(_peer(peer, flags.python, given)) for peer in wanted}
    timed: dict[str, list[float]] = {name: [] for name in (*names, *wanted)}
    for case in ours:
      case.run()
    for featurize in peers.values():
      featurize()
    for _ in range(flags.repeats):
      for case in ours:
        began = time.perf_counter()
        case.run()
        timed[case.name].append(time.perf_counter() - began)
      for peer, featurize in peers.items():
        timed[peer].append(featurize())
  medians = {name: statistics.median(seconds) for name, seconds in timed.items()}
  for name, median in medians.items():
    print(json.dumps({
      'case': name, 'seconds': round(median, 5),
      **{f'{peer}_seconds_over_this': round(medians[peer] / median, 2) for peer in wanted},
      'j': flags.j, 'model': flags.model, 'batch': flags.batch, 'length': flags.length,
    }), flush=True)  # fmt: skip


@contextlib.contextmanager
def _peer(name: str, python: str, given: dict[str, int]) -> Iterator[Callable[[], float]]:
  """What featurizes one batch with a peer, in a process of its own, and tells the seconds."""
  script = Path(__file__).with_name(f'peer_{name}.py')
  try:
    process = subprocess.Popen(
      [python, str(script), json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
  except OSError as error:
    raise UserError(f'--python={python} cannot be started ({error.strerror}); give a Python') from error
  assert process.stdin is not None and process.stdout is not None
  said, asked = process.stdout, process.stdin

  def featurize() -> float:
    with contextlib.suppress(BrokenPipeError):  # an ended process is told by what it no longer says
      asked.write('\n')
      asked.flush()
    line = said.readline()
    if not line:
      raise UserError(
        f'{name} under --python={python} ended with exit code {process.wait()}; see what it said above, and install '
        'requirements-peers.txt there (bergson by hand, docs/features.md)'
      )
    return json.loads(line)['seconds']

  try:
    yield featurize
  finally:
    asked.close()
    process.wait()
