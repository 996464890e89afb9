"""Features side by side with other people's packages: the same shapes, the same batch, the same J, in one run.

`python -m dsdm_jax.bench peers --traker-python=.venv-peers/bin/python` (launch/test.sh makes that environment from
requirements-peers.txt). Rounds are interleaved; each case is one JSON line with its median.

traker 0.3.2 is measured on the CPU with its own projector, which is what it has where there is no CUDA.
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

_TRAKER = Path(__file__).with_name('peer_traker.py')


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--traker-python', required=True, help='a Python with the packages of requirements-peers.txt')
  parser.add_argument('--model', choices=features.MODELS, default='small')
  parser.add_argument('--batch', type=int, default=4, help='examples')
  parser.add_argument('--length', type=int, default=256, help='tokens of an example')
  parser.add_argument('--j', type=int, default=512)
  parser.add_argument('--repeats', type=int, default=1, help='rounds; one of traker is 10 seconds and more')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  layers, width, heads, vocab = features.MODELS[flags.model]
  given = {
    'layers': layers, 'width': width, 'heads': heads, 'vocab': vocab, 'length': flags.length, 'batch': flags.batch,
    'j': flags.j, 'repeats': flags.repeats + 1, 'threads': len(os.sched_getaffinity(0)),
  }  # fmt: skip
  names = (f'dense_j{flags.j}', f'two_sided_j{flags.j}')
  ours = features.cases(names, argparse.Namespace(**vars(flags), devices='1x1', dtype='float32', remat=False))
  with _traker(flags.traker_python, given) as (parameters, traker):
    timed: dict[str, list[float]] = {name: [] for name in (*names, 'traker')}
    for case in ours:
      case.run()
    for _ in range(flags.repeats):
      for case in ours:
        began = time.perf_counter()
        case.run()
        timed[case.name].append(time.perf_counter() - began)
      timed['traker'].append(traker())
  slowest = statistics.median(timed['traker'])
  for name, seconds in timed.items():
    median = statistics.median(seconds)
    print(json.dumps({
      'case': name, 'seconds': round(median, 5), 'traker_seconds_over_this': round(slowest / median, 2), 'j': flags.j,
      'model': flags.model, 'parameters': parameters, 'batch': flags.batch, 'length': flags.length,
    }), flush=True)  # fmt: skip


@contextlib.contextmanager
def _traker(python: str, given: dict[str, int]) -> Iterator[tuple[int, Callable[[], float]]]:
  """Its parameter count, and what featurizes one batch and tells the seconds."""
  try:
    process = subprocess.Popen(
      [python, str(_TRAKER), json.dumps(given)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
  except OSError as error:
    raise UserError(f'--traker-python={python} cannot be started ({error.strerror}); give a Python') from error
  assert process.stdin is not None and process.stdout is not None
  said, asked = process.stdout, process.stdin

  def hear(key: str) -> float:
    line = said.readline()
    if not line:
      raise UserError(
        f'--traker-python={python} ended with exit code {process.wait()}; see what it said above, and install '
        'requirements-peers.txt there'
      )
    return json.loads(line)[key]

  def featurize() -> float:
    asked.write('\n')
    asked.flush()
    return hear('seconds')

  try:
    yield int(hear('parameters')), featurize
  finally:
    asked.close()
    process.wait()
