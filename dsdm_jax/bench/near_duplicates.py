"""What SemDeDup catches: `python -m dsdm_jax.bench near_duplicates --pool FILES --copies SOURCE --originals SOURCE`.

From a pool of JSONL documents (`source`, `id`, `text`) whose source COPIES holds other versions of some documents of
ORIGINALS, takes the copies, their originals and `--others` further originals, trains one proxy of the quickstart's size
on them, and drops near duplicates by its embeddings as the selector `semdedup` does.

The truth is counted in tokens: the share of a row's runs of eight tokens that stand in one other row too. Rows are cut
anew in every document, so a copy's row mostly lies across two rows of the original; hence figures for rows that share
at least half of their runs with one other row, and at least 0.8. Prints a line of JSON for each similarity: `dropped`
rows, `precision` (share of the dropped that share so much with another row), `recall` (share of the copies' rows with
such a partner among the originals of which either was dropped), `false` (share of rows that share no run with any other
that were dropped).
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
from dsdm_jax.configs import quickstart
from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.selection import ngrams, semdedup, summaries
from dsdm_jax.selection.proxy_signals import Proxies

SIMILARITIES = (0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
SHARES = (0.5, 0.8)
_RUN = 8  # words of a document, or tokens of a row, that count as the same text
_MATCH = 0.3  # share of a copy's runs of words in one original, by which that is taken for its original


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--pool', required=True, help='JSONL files, by glob')
  parser.add_argument('--copies', default='wikipedia_near_duplicates', help='source of the other versions')
  parser.add_argument('--originals', default='wikipedia', help='source of what they are versions of')
  parser.add_argument('--others', type=int, default=1_000, help='further originals in the pool')
  parser.add_argument('--workdir', type=Path, help='folder of the run; default: one that is removed again')
  parser.add_argument('--epochs', type=float, default=1.0, help='of the proxy; 0 leaves it as initialised')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  with tempfile.TemporaryDirectory() as made:
    workdir = (flags.workdir or Path(made) / 'run').absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    _write(flags, workdir / 'documents.jsonl')
    config = _config(workdir / 'documents.jsonl', flags.epochs)
    for stage in ('pool', 'targets', 'proxies'):
      pipeline.run(config, workdir, stage)
    measure(config, workdir, flags.copies)


def _write(flags: argparse.Namespace, file: Path) -> None:
  """Writes the copies that have an original, these originals, and other originals."""
  texts: dict[str, dict[str, str]] = collections.defaultdict(dict)
  for source, id, text in _documents(flags.pool):
    if source in (flags.copies, flags.originals):
      texts[source][id] = text
  copies, originals = texts[flags.copies], texts[flags.originals]
  if not copies or not originals:
    raise UserError(
      f'--pool={flags.pool} has {len(copies)} documents of {flags.copies} and {len(originals)} of the other'
    )
  found = _originals(list(copies.values()), list(originals.values()))
  names = list(originals)
  kept = [(id, names[at]) for id, (at, share) in zip(copies, found, strict=True) if share >= _MATCH]
  taken = {original for _, original in kept}
  others = [name for name in names if name not in taken][: flags.others]
  print(json.dumps({
    'copies': len(copies), 'with_original': len(kept), 'others': len(others), 'originals_in_pool': len(originals),
  }), flush=True)  # fmt: skip
  lines = [(flags.copies, id, copies[id]) for id, _ in kept]
  lines += [(flags.originals, name, originals[name]) for name in [*sorted(taken), *others]]
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
  """Of each copy the original that has most of its runs of words, and the share of them."""
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
  """How many runs each of `rows` and each of `columns` have in common; of a run's repeats one counts."""
  both = [*map(np.unique, rows), *map(np.unique, columns)]
  at = np.repeat(np.arange(len(both)), [len(runs) for runs in both])
  _, run = np.unique(np.concatenate(both), return_inverse=True)
  held = scipy.sparse.csr_matrix((np.ones(len(run), np.int32), (at, run)))
  return held[: len(rows)] @ held[len(rows) :].T


def _config(file: Path, epochs: float) -> ConfigDict:
  config = quickstart.get_config()
  config.pool.sources, config.pool.max_bytes, config.pool.max_document_bytes = (f'jsonl:{file}',), 0, 0
  config.pool.vocab_size = 4_096
  config.pool.leakage_guard = config.pool.drop_duplicates = False  # copies to the byte are what is looked for, too
  config.targets.tasks, config.targets.max_examples = ('cs_algorithms',), 16
  config.proxies.count, config.proxies.subset_share, config.proxies.epochs = 1, 1.0, epochs
  return config


def measure(config: ConfigDict, workdir: Path, copies: str) -> None:
  """Prints what each similarity catches of the rows of the source `copies`."""
  inputs = {
    stage: made for stage in ('pool', 'targets', 'proxies')
    if (made := artifacts.open_stage(workdir, stage)) is not None
  }  # fmt: skip
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
  for similarity in SIMILARITIES:
    dropped_N = semdedup.near_duplicates(x_ND, 0, similarity)
    found: dict[str, Any] = {'similarity': similarity, 'rows': pool.num_rows, 'dropped': int(dropped_N.sum())}
    found['false'] = float(dropped_N[most_N == 0].mean())
    for least in SHARES:
      pairs = (across >= least).tocoo()
      caught = np.zeros(across.shape[0], bool)
      either = dropped_N[is_copy_N][pairs.row] | dropped_N[~is_copy_N][pairs.col]
      caught[pairs.row[either]] = True
      there = np.unique(pairs.row)
      found[f'recall_{least}'] = float(caught[there].mean()) if len(there) else None
      found[f'pairs_{least}'] = len(there)
      found[f'precision_{least}'] = float((most_N[dropped_N] >= least).mean()) if dropped_N.any() else None
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
