"""Unit costs of the host's work for features, scores and selection: `python -m dsdm_jax.bench host --rows 5000000`.

Reads tokens, writes and reads shards, looks for finished shards, adds Gram matrices, reduces and writes scores, and
runs the selection stage on synthetic scores, with the code of the stages. Prints one line of JSON: seconds for each
row, shard, byte or entry, and the memory of the selection stage for each row. Seconds are those of processors, which
hardly change when others use the machine too. `plan/host.py` has these numbers, and the plan multiplies them.
"""

import argparse
import functools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.attribution import accumulators, score_arrays, scores
from dsdm_jax.attribution.accumulators import Chunk
from dsdm_jax.attribution.quantization import Encoded, Quantizer
from dsdm_jax.attribution.solve import TargetWeights
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.bench import stages
from dsdm_jax.bench.load import resident_bytes
from dsdm_jax.configs import base
from dsdm_jax.core import prng, storage
from dsdm_jax.core.artifacts import Artifact, Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.order.batches import row_range_batches
from dsdm_jax.data.pool import pool as pool_lib
from dsdm_jax.selection import select

_LENGTH, _TOKEN_ROWS, _VOCABULARY = 1_024, 16_384, 50_277  # too large to stay in memory
_SHARD = 2_048, 16_384  # rows and columns, 64 MiB in bfloat16
_SMALL_SHARDS = 1_000
_MEMBERS, _SCORE_ROWS = 4, 65_536
_REPEATS = 3
_STAGES = 'pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel', 'selection'


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--rows', type=int, default=5_000_000, help='of the selection (default: 5e6)')
  parser.add_argument('--folder', default=None, help='for temporary files; default: that of the system')


def run(flags: argparse.Namespace) -> None:
  result: dict[str, float] = {}
  with tempfile.TemporaryDirectory(prefix='dsdm_host_', dir=flags.folder) as folder:
    for part in (_selection, _tokens, _shards, _sums, _columns):
      result |= part(Path(folder) / part.__name__, flags.rows)
  print(json.dumps({**{key: float(f'{value:.3g}') for key, value in result.items()}, 'rows': flags.rows}))


def _seconds(work: Callable[[], object]) -> float:
  def once() -> float:
    began = time.process_time()
    work()
    return time.process_time() - began

  return statistics.median(once() for _ in range(_REPEATS))


def _tokens(folder: Path, rows: int) -> dict[str, float]:
  del folder, rows
  pool = stages.make_pool(_TOKEN_ROWS, _LENGTH, _VOCABULARY)

  def read() -> None:
    for _ in row_range_batches(pool, 0, pool.num_rows, 32):
      pass

  return {'token_seconds_per_row': _seconds(read) / pool.num_rows}


def _shards(folder: Path, rows: int) -> dict[str, float]:
  del rows
  (size, j), rng = _SHARD, prng.numpy_stream(0, 'bench', 'shards')
  codes_BJ = rng.integers(0, 2**15, _SHARD, np.uint16).view('bfloat16')
  encoded = Encoded(codes_BJ, None, np.full(size, -1, np.int32))
  store = FeatureStore(folder / 'large.zarr', size, j, size, 'bfloat16')
  written = _seconds(lambda: store.write(0, encoded)) / codes_BJ.nbytes
  read = _seconds(lambda: store.read(0)) / codes_BJ.nbytes
  blocks = tuple((start, start + 512) for start in range(0, j, 512))
  quantizer, scale_BK = Quantizer('int8', blocks), np.ones((size, len(blocks)), np.float32)
  coarse = Encoded(codes_BJ.view(np.int8)[:, :j], scale_BK, None)
  decoded = _seconds(lambda: quantizer.decode(coarse)) / codes_BJ.size
  small = FeatureStore(folder / 'small.zarr', _SMALL_SHARDS, 1, 1, 'float32')
  began = time.process_time()
  for shard in range(_SMALL_SHARDS):
    small.write(shard, np.ones((1, 1), np.float32))
  per_shard = (time.process_time() - began) / _SMALL_SHARDS
  looked = _seconds(lambda: small.missing(verify=False)) / _SMALL_SHARDS
  chunk = folder / 'large.zarr' / 'c' / '0' / '0'
  hashed = _seconds(lambda: storage.sha256(chunk)) / codes_BJ.nbytes
  return {
    'write_seconds_per_byte': written,
    'read_seconds_per_byte': read,
    'hash_seconds_per_byte': hashed,
    'decode_seconds_per_entry': decoded,
    'write_seconds_per_shard': per_shard,
    'look_seconds_per_shard': looked,
  }


def _sums(folder: Path, rows: int) -> dict[str, float]:
  del folder, rows
  total_JJ, part_JJ = np.zeros((4_096, 4_096)), np.ones((4_096, 4_096), np.float32)
  return {'gram_seconds_per_entry': _seconds(lambda: accumulators._add([total_JJ], [part_JJ])) / total_JJ.size}


def _columns(folder: Path, rows: int) -> dict[str, float]:
  """One task with the default numbers of groups, examples and resamples, at four checkpoints."""
  del rows
  options, rng = base.get_config().datamodel, prng.numpy_stream(0, 'bench', 'columns')
  documents = [str(i) for i in range(256)]
  weights = TargetWeights.of_documents(documents, options.groups, options.bootstrap, 0, 't', options.examples)
  columns = len(weights.weight_KT)
  score_CBK = rng.standard_normal((_MEMBERS, _SCORE_ROWS, columns), np.float32)
  seen_PN = rng.random((_MEMBERS, _SCORE_ROWS)) < 0.4
  reduce = functools.partial(scores._columns, weights, score_CBK, seen_PN, (scores.ALL, scores.UNSEEN), 0, _SCORE_ROWS)
  reduced = _seconds(reduce) / score_CBK.size
  chunk = Chunk.of([((0, _SCORE_ROWS), {f'0_{key}': array for key, array in reduce().items()})])
  task = scores.TaskColumns(0, weights, seen_PN, 1, scores.AUTO, [chunk], False)

  def write() -> None:
    arrays = task.block(0, _SCORE_ROWS)
    scores.ends(arrays.pop('examples_NE'))
    score_arrays.write(folder, 't', arrays)

  return {
    'reduce_seconds_per_score': reduced,
    'finish_seconds_per_row': _seconds(write) / _SCORE_ROWS,
    'partial_bytes_per_row': sum(x.nbytes for key, x in chunk.arrays.items() if 'sample' not in key) / _SCORE_ROWS,
  }


def _selection(folder: Path, rows: int) -> dict[str, float]:
  """The selection stage with the paper's share of rows, for methods that read scores or nothing of a row."""
  rng, length = prng.numpy_stream(0, 'bench', 'selection'), 8
  tokens_NL = rng.integers(0, 256, (rows, length), np.uint16)
  folder_of = {name: folder / name for name in _STAGES}
  pool = folder_of['pool']
  pool_lib.write_array(pool / 'dataset', tokens_NL)
  del tokens_NL
  storage.write_json(pool / 'card.json', {'rows': rows, 'length': length, 'vocab_size': 65_536})
  storage.write_json(pool / 'sources.json', ['a', 'b'])
  storage.save_npy(pool / 'rows' / 'source.npy', rng.integers(0, 2, rows, np.int8))
  storage.save_npy(pool / 'rows' / 'document.npy', np.arange(rows, dtype=np.int32) // 3)
  storage.save_npy(folder_of['leakage'] / 'mask.npy', rng.random(rows) < 1e-3)
  storage.write_json(folder_of['targets'] / 'tasks.json', ['a', 'b'])
  for task in ('a', 'b'):  # not read, but digested
    for kind in ('npz', 'jsonl'):
      storage.write_bytes(folder_of['targets'] / f'{task}.target.{kind}', b'')
  for start, stop in score_arrays.blocks(rows):
    for task in ('a', 'b', 'mix'):
      score_B = rng.standard_normal(stop - start, np.float32)
      score_arrays.write(folder_of['datamodel'], task, {'score_N': score_B}, start)
  semantics: dict[str, dict[str, Any]] = {
    'leakage': {'masked': True},
    'datamodel': {'tasks': ['a', 'b'], 'mix': 'zscore', 'half_width': {}},
  }
  units = {f'scores of {task}': {'of': task} for task in ('a', 'b')}
  inputs = {
    name: Artifact(
      path,
      {'semantics': semantics.get(name, {}), 'identity': {}, 'files': {}, 'models': [], 'units': units}
      | ({} if name != 'datamodel' else {'files': dict.fromkeys(storage.files(path))}),
    )
    for name, path in folder_of.items()
  }
  out, config = folder_of['selection'], base.get_config()
  out.mkdir(parents=True)
  config.selection.examples, config.selection.epochs = max(1, rows * 6_400_000 // 216_948_746), 4
  config.selection.methods = ('dsdm', 'bottom', 'random', 'random_one_epoch', 'dsdm_permuted')
  config.selection.targets, config.pretraining.seeds = ('a+b',), 1
  context = Context(config, out, inputs, Log(folder, 'selection', enabled=False), Cost(out))
  before, began = resident_bytes(), time.process_time()
  select.run(context)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024
  return {
    'selection_seconds_per_row': (time.process_time() - began) / rows,
    'selection_bytes_per_row': (peak - before) / rows,
  }
