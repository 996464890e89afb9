"""Speed and memory of selecting: `python -m dsdm_jax.bench selection --rows 10000000 --megabytes 8`.

Top-k, Gumbel top-k, top-k under a document cap and `dsdm_boltzmann` on random scores, with seconds and memory scaled to
1e8 rows. Then n-grams of DSIR and of the classifier over words and over token ids of the standard library's text, in MB
of UTF-8 per second. Prints one line of JSON.
"""

import argparse
import json
import os
import resource
import sys
import sysconfig
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.configs.base import get_config
from dsdm_jax.core import prng
from dsdm_jax.data.pool import vocabulary
from dsdm_jax.errors import UserError
from dsdm_jax.selection import dsdm_sampled, ngrams, ranking
from dsdm_jax.selection.candidates import Budget

_LENGTH = 1_024
_WANTED = 100_000_000


class TextPool:
  """The part of a pool that the measured functions use."""

  def __init__(self, tokens_NL: np.ndarray, encoder: vocabulary.Encoder):
    self.tokens_NL, self.encoder = tokens_NL, encoder
    self.num_rows, self.length = tokens_NL.shape
    self.packed = True

  def tokens(self, rows: np.ndarray) -> np.ndarray:
    return self.tokens_NL[rows].astype(np.int32)


class Capped:
  """Rows with documents and a document cap."""

  def __init__(self, rows: int):
    self.options = get_config().selection
    self.options.document_cap, self.masked_N = 2, np.zeros(rows, np.bool_)
    self.unscored_N = self.masked_N
    self.document_N = prng.numpy_stream(0, 'bench', 'documents').integers(0, max(1, rows // 4), rows, np.int32)


class Scored:
  """Rows with scores, the same for every target."""

  def __init__(self, score_N: np.ndarray):
    self.options, self.num_rows, self.scores, self._score_N = get_config().selection, len(score_N), self, score_N
    self.masked_N = self.unscored_N = np.zeros(len(score_N), np.bool_)

  def score_N(self, target: str) -> np.ndarray:
    del target
    return self._score_N


def _seconds(work: Callable[[], object]) -> float:
  began = time.perf_counter()
  work()
  return time.perf_counter() - began


def _peak_gib() -> float:
  scale = 1 if sys.platform == 'darwin' else 1_024  # ru_maxrss is in bytes there and in KiB here
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def ranks(rows: int) -> dict[str, float]:
  """Selects a quarter of the rows, a twentieth under a cap, and draws a quarter with replacement.

  Returns seconds, and the increase in peak memory, which includes the steps before.
  """
  before = _peak_gib()
  score_N = prng.numpy_stream(0, 'bench', 'scores').standard_normal(rows, np.float32)
  result: dict[str, float] = {'rows': rows}
  result['top_seconds'] = _seconds(lambda: ranking.top(score_N, rows // 4))
  result['top_gib'] = _peak_gib() - before

  def noisy() -> None:
    key_N = ranking.gumbel(rows, 0, 'bench')
    key_N += score_N
    ranking.top(key_N, rows // 4)

  result['gumbel_seconds'] = _seconds(noisy)
  result['gumbel_gib'] = _peak_gib() - before
  capped: Any = Capped(rows)
  result['capped_seconds'] = _seconds(lambda: ranking.capped_order(score_N, rows // 20, capped))
  result['capped_gib'] = _peak_gib() - before
  scored: Any = Scored(score_N)
  target: Any = types.SimpleNamespace(name='mix')
  budget = Budget(rows // 4, 1, 16)
  result['draws_seconds'] = _seconds(lambda: dsdm_sampled.dsdm_boltzmann(scored, target, budget, 0))
  result['draws_gib'] = _peak_gib() - before
  # Sorting takes n log n, the rest is linear.
  more = _WANTED / rows * np.log(_WANTED) / np.log(rows)
  for name in ('top', 'gumbel', 'capped', 'draws'):
    result[f'{name}_seconds_at_1e8'] = result[f'{name}_seconds'] * max(more, 1.0)
    result[f'{name}_gib_at_1e8'] = result[f'{name}_gib'] * max(_WANTED / rows, 1.0)
  return result


def text(megabytes: float) -> dict[str, float]:
  """MB/s of the n-grams that DSIR and the classifier compute for every row, by words and by token ids.

  Raises:
    UserError: the standard library has less text.
  """
  texts, size = [], 0
  for file in sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py')):
    if 'site-packages' not in file.parts and size < megabytes * 1e6:
      texts.append(file.read_bytes().decode('utf-8', 'replace'))
      size += len(texts[-1].encode())
  if size < megabytes * 1e6:
    raise UserError(f'--megabytes={megabytes}: the standard library has {size / 1e6:.1f} MB of text; use less')
  encoder = vocabulary.SentencePieceEncoder(vocabulary.train(texts, 8_192))
  flat = np.concatenate([np.array(encoder.encode(t), np.uint16) for t in texts])
  tokens_NL = flat[: len(flat) // _LENGTH * _LENGTH].reshape(-1, _LENGTH)
  mega = sum(len(t.encode()) for t in encoder.decode_batch(tokens_NL)) / 1e6
  pool: Any = TextPool(tokens_NL, encoder)
  weight = prng.numpy_stream(0, 'bench', 'weights').standard_normal(65_536)
  result: dict[str, float] = {'text_mb': mega}
  for kind in ('words', 'tokens'):
    for name, mean in (('dsir', False), ('classifier', True)):
      grams = ngrams.PoolGrams(pool, kind, len(weight))
      grams.rows(np.arange(8))  # builds tables that are cached
      result[f'{name}_{kind}_mb_per_second'] = mega / _seconds(lambda: grams.sums(weight, mean))  # noqa: B023 at once
    grams = ngrams.PoolGrams(pool, kind, len(weight))
    result[f'counts_{kind}_mb_per_second'] = mega / _seconds(grams.counts)
  return result


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--rows', type=int, default=10_000_000, help='number of scores (default: 1e7)')
  parser.add_argument('--megabytes', type=float, default=8.0, help='of text (default: 8)')


def run(flags: argparse.Namespace) -> None:
  result = {**ranks(flags.rows), **text(flags.megabytes)}
  rounded = {key: value if isinstance(value, int) else float(f'{value:.4g}') for key, value in result.items()}
  print(json.dumps({**rounded, 'cpus': os.cpu_count()}))
