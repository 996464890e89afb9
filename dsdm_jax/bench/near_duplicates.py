"""What SemDeDup catches: `python -m dsdm_jax.bench near_duplicates --pool FILES --copies SOURCE --originals SOURCE`.

The pool is JSONL documents (`source`, `id`, `text`); the source COPIES has other versions of some documents of
ORIGINALS. Takes the copies, their originals and `--others` further originals, trains one proxy of the quickstart's size
on them, and drops near duplicates by its embeddings, as the selector `semdedup` does, and by text, as `minhash`.

The truth is the share of a row's runs of eight tokens that are also in one other row. Each document is cut into rows
from its start, so a copy's row mostly overlaps two rows of the original: results are for rows that share at least 0.5
and at least 0.8 of their runs with one other row. Prints a line of JSON for each similarity: `dropped` rows,
`precision` (share of dropped rows that share so much with another row), `recall` (share of the copies' rows with such a
partner among the originals where either was dropped), `false` (share of the rows without a shared run that were
dropped).
"""

import argparse
import collections
import glob
import gzip
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from ml_collections import ConfigDict

from dsdm_jax import pipeline
from dsdm_jax.configs import quickstart_full
from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.selection import minhash, ngrams, semdedup, summaries
from dsdm_jax.selection.proxy_signals import Proxies

SIMILARITIES = (0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
SHARES = (0.5, 0.8)
_RUN = 8  # consecutive words of a document, or tokens of a row, that count as the same text
_MATCH = 0.3  # least share of a copy's runs of words that its original contains


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--pool', required=True, help='glob of JSONL files')
  parser.add_argument('--copies', default='wikipedia_near_duplicates', help='source of the other versions')
  parser.add_argument('--originals', default='wikipedia', help='source of the originals')
  parser.add_argument('--others', type=int, default=1_000, help='number of further originals')
  parser.add_argument('--workdir', type=Path, help='of the run; default: a temporary folder')
  parser.add_argument('--epochs', type=float, default=1.0, help='of the proxy; 0 for an untrained one')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  with tempfile.TemporaryDirectory() as folder:
    workdir = (flags.workdir or Path(folder) / 'run').absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    _write(flags, workdir / 'documents.jsonl')
    config = _config(workdir / 'documents.jsonl', flags.epochs)
    for stage in ('pool', 'targets', 'proxies'):
      pipeline.run(config, workdir, stage)
    measure(config, workdir, flags.copies)


def _write(flags: argparse.Namespace, file: Path) -> None:
  """Writes the copies that have an original, their originals, and other originals."""
  texts: dict[str, dict[str, str]] = collections.defaultdict(dict)
  for source, id, text in _documents(flags.pool):
    if source in (flags.copies, flags.originals):
      texts[source][id] = text
  copies, originals = texts[flags.copies], texts[flags.originals]
  if not copies or not originals:
    raise UserError(
      f'--pool={flags.pool} has {len(copies)} documents of {flags.copies} and {len(originals)} of the other'
    )
  best = _originals(list(copies.values()), list(originals.values()))
  names = list(originals)
  pairs = [(id, names[index]) for id, (index, share) in zip(copies, best, strict=True) if share >= _MATCH]
  paired = {original for _, original in pairs}
  others = [name for name in names if name not in paired][: flags.others]
  counts = {'copies': len(copies), 'with_original': len(pairs), 'others': len(others)}
  print(json.dumps(counts | {'originals_in_pool': len(originals)}), flush=True)
  lines = [(flags.copies, id, copies[id]) for id, _ in pairs]
  lines += [(flags.originals, name, originals[name]) for name in [*sorted(paired), *others]]
  with open(file, 'w', encoding='utf-8') as out:
    for source, id, text in lines:
      out.write(json.dumps({'source': source, 'id': id, 'text': text}) + '\n')


def _documents(pattern: str) -> Iterator[tuple[str, str, str]]:
  for name in sorted(glob.glob(pattern)):
    with (gzip.open if name.endswith('.gz') else open)(name, 'rt', encoding='utf-8', newline='\n') as file:
      for line in file:
        record = json.loads(line)
        yield record['source'], record['id'], record['text']


def _originals(copies: list[str], originals: list[str]) -> list[tuple[int, float]]:
  """For each copy, the original that contains most of its runs of words, and the share of the runs."""
  runs_C, runs_O = (_runs_of_words(texts) for texts in (copies, originals))
  shared = _matrix(runs_C, runs_O)
  best = np.asarray(shared.argmax(axis=1)).reshape(-1)
  sizes = np.array([len(np.unique(runs)) for runs in runs_C])
  return [(int(at), float(shared[c, at]) / max(1, int(sizes[c]))) for c, at in enumerate(best)]


def _runs_of_words(texts: list[str]) -> list[np.ndarray]:
  """A hash of each run of words, for each text."""
  grams = ngrams.of_texts(texts, 1 << 31)
  return [_hashes(part) for part in np.split(grams.uni_M, grams.first_B[1:-1])]


def _hashes(unit_M: np.ndarray) -> np.ndarray:
  if len(unit_M) < _RUN:
    return np.zeros(0, np.uint64)
  return summaries.run_hashes(unit_M[None])[0]


def _matrix(rows: list[np.ndarray], columns: list[np.ndarray]) -> scipy.sparse.csr_matrix:
  """Number of distinct runs that each of `rows` and each of `columns` have in common."""
  both = [*map(np.unique, rows), *map(np.unique, columns)]
  at = np.repeat(np.arange(len(both)), [len(runs) for runs in both])
  _, run = np.unique(np.concatenate(both), return_inverse=True)
  held = scipy.sparse.csr_matrix((np.ones(len(run), np.int32), (at, run)))
  return held[: len(rows)] @ held[len(rows) :].T


def _config(file: Path, epochs: float) -> ConfigDict:
  config = quickstart_full.get_config()
  config.pool.sources, config.pool.max_bytes, config.pool.max_document_bytes = (f'jsonl:{file}',), 0, 0
  config.pool.vocab_size = 4_096
  config.leakage.guard = config.pool.drop_duplicates = False  # exact copies must stay in the pool
  config.targets.tasks, config.targets.max_examples = ('cs_algorithms',), 16
  config.proxies.count, config.proxies.subset_share, config.proxies.epochs = 1, 1.0, epochs
  return config


def measure(config: ConfigDict, workdir: Path, copies: str) -> None:
  """Prints precision and recall of each similarity for the rows of the source `copies`."""
  stages = {stage: artifacts.open_stage(workdir, stage) for stage in ('pool', 'targets', 'proxies')}
  inputs = {stage: artifact for stage, artifact in stages.items() if artifact is not None}
  pool = Pool(inputs['pool'])
  scratch = workdir / 'scratch'
  scratch.mkdir(exist_ok=True)
  context = Context(config, scratch, inputs, Log(workdir, 'near_duplicates'), Cost(scratch))
  x_ND = Proxies(context, pool).embeddings()
  shutil.rmtree(scratch)
  hashes = summaries.run_hashes(pool.tokens(np.arange(pool.num_rows)))
  runs = [np.unique(row) for row in hashes]
  shared = _matrix(runs, runs).tolil()
  shared.setdiag(0)
  share = (scipy.sparse.diags_array(1 / np.array([len(r) for r in runs])) @ shared.tocsr()).tocsr()
  most_N = share.max(axis=1).toarray().reshape(-1)
  is_copy_N = pool.source_N == list(pool.sources).index(copies)
  across = share[np.flatnonzero(is_copy_N)][:, np.flatnonzero(~is_copy_N)]
  near_N = semdedup.nearest_earlier(x_ND, 0)
  by_text_N = minhash.duplicates(ngrams.PoolGrams(pool, 'words', 1 << 31))
  for similarity, dropped_N in [*((s, near_N > s) for s in SIMILARITIES), ('minhash', by_text_N)]:
    line: dict[str, Any] = {'similarity': similarity, 'rows': pool.num_rows, 'dropped': int(dropped_N.sum())}
    line['false'] = float(dropped_N[most_N == 0].mean())
    for least in SHARES:
      pairs = (across >= least).tocoo()
      caught = np.zeros(across.shape[0], bool)
      either = dropped_N[is_copy_N][pairs.row] | dropped_N[~is_copy_N][pairs.col]
      caught[pairs.row[either]] = True
      there = np.unique(pairs.row)
      line[f'recall_{least}'] = float(caught[there].mean()) if len(there) else None
      line[f'pairs_{least}'] = len(there)
      line[f'precision_{least}'] = float((most_N[dropped_N] >= least).mean()) if dropped_N.any() else None
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}), flush=True)
