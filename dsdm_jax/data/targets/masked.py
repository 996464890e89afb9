"""Stage `leakage`: which documents of the pool hold text of a target or benchmark, and the mask of their rows.

The pool does not depend on targets, so this compares its stored text with theirs. No selection takes a masked row, that
of random rows included. Proxies may have trained on some: they are used, and the report counts the rows.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool import passes
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.pool.sources import Document
from dsdm_jax.data.targets import breadth, leakage, tasks
from dsdm_jax.data.targets.leakage import Guard
from dsdm_jax.errors import visible

_FEW_BYTES = 4_000_000  # comparing less text is faster than starting processes
_READ = 256  # documents that are read at once
_SHOWN = 3  # leaks that are printed
_GUARD = 'guard.npz'  # for the workers


def run(context: Context) -> dict[str, Any]:
  """Writes `mask.npy`, `leaks.jsonl`, `phrases.jsonl` and `card.json`; docs/architecture.md says what they hold.

  With `targets.breadth` also `breadth.npy` and `held_out.npy`.

  Raises:
    UserError: a file of a task or benchmark is missing or malformed, or the pool has too few documents for breadth.
  """
  options, out, pool = context.config.leakage, context.out, Pool(context.inputs['pool'])
  tables = [pool.path / 'documents' / f'{index:06d}.parquet' for index in range(pool.card['tables']['text'])]
  found: list[dict[str, Any]] = []
  texts, boilerplate_runs = [], 0
  if options.guard and tables:
    targets = context.config.targets
    texts = tasks.raw_texts(targets) + tasks.benchmark_texts(options.benchmarks, targets.folder or '.')
    guard = Guard(texts, options.ngram, _licences([tables[index] for index in pool.card['tables']['packages']]))
    boilerplate_runs = guard.boilerplate_runs
    found = _search(context, tables, guard, pool.card['bytes'])
  # Common phrases are known only when all documents are compared.
  document = np.repeat(np.arange(len(found)), [len(leak['runs']) for leak in found])
  run_Q = np.array([run for leak in found for run in leak['runs']], np.int64)
  common = set(leakage.common_phrases(document, run_Q, options.common).tolist())
  aside = [leak for i, leak in enumerate(found) if i in common and not leak['whole']]
  leaks = [leak for i, leak in enumerate(found) if i not in common or leak['whole']]
  mask_N, rows_of = rows_with(pool, np.array([leak['document'] for leak in leaks], np.int64))
  for leak, rows in zip(leaks, rows_of, strict=True):
    leak['rows'] = rows
  storage.save_npy(out / 'mask.npy', mask_N)
  for name, records in (('leaks', leaks), ('phrases', aside)):
    lines = (json.dumps(_listed(record), sort_keys=True) + '\n' for record in records)
    storage.write_text(out / f'{name}.jsonl', ''.join(lines))
  by_task: dict[str, dict[str, int]] = {}
  for leak in leaks:
    of_task = by_task.setdefault(leak['task'], {'documents': 0, 'rows': 0})
    of_task['documents'] += 1
    of_task['rows'] += leak['rows']
  card = {
    'guarded': sorted({text.task for text in texts}),
    'masked': bool(options.mask),
    'documents': len(leaks),
    'rows': int(mask_N.sum()),
    'by_task': by_task,
    'short_texts': sum(leak['short'] for leak in leaks),
    'common_phrases': len(aside),
    'boilerplate_runs': boilerplate_runs,
  }
  storage.write_json(out / 'card.json', card)
  for name in storage.files(out):
    if name.startswith('found-') and not storage.is_mark(name):
      storage.unmark(out / name)
  storage.delete(out / _GUARD)
  context.log.event('leakage', **card)
  _say(context, card, leaks, pool, bool(tables))
  semantics = {'guarded': card['guarded'], 'masked': card['masked'], 'rows': card['rows']}
  if context.config.targets.breadth:
    documents = breadth.draw(pool, mask_N, context.config.targets.seed)
    held_out_N = np.zeros(pool.num_rows, bool)
    held_out_N[pool.spans.rows_of(documents)[1]] = True
    storage.save_npy(out / 'breadth.npy', documents)
    storage.save_npy(out / 'held_out.npy', held_out_N)
    semantics['held_out'] = int(held_out_N.sum())
    context.log.say(
      f'  breadth: {len(documents):,} documents are held out, and {semantics["held_out"]:,} rows with them'
    )
  return semantics


def _say(context: Context, card: dict[str, Any], leaks: list[dict[str, Any]], pool: Pool, has_text: bool) -> None:
  if not card['guarded']:
    why = 'the pool has token ids and no text' if not has_text else 'leakage.guard is off'
    context.log.say(f'  not checked for text of targets: {why}')
    return
  context.log.describe(f'{card["rows"]:,} of {pool.num_rows:,} rows have text of targets')
  context.log.say(
    f'  {card["documents"]:,} of {pool.card["documents"]:,} documents have text of {", ".join(card["guarded"])}; '
    f'{card["rows"]:,} of {pool.num_rows:,} rows are {"masked" if card["masked"] else "listed and not masked"}'
    + (f', {card["common_phrases"]:,} documents with common phrases are not' if card['common_phrases'] else '')
  )
  for leak in leaks[:_SHOWN]:
    (begin, end), (first, last) = leak['in_document'], leak['in_target']
    id, item, words = (visible(leak[key]) for key in ('id', 'item', 'words'))
    context.log.say(
      f'  leak: {id}, characters {begin} to {end}, is {leak["task"]} {item}, characters {first} to {last}: {words}'
    )


def _listed(leak: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in leak.items() if key not in ('document', 'whole', 'runs')}


def _licences(tables: Sequence[Location]) -> Iterator[Document]:
  kinds = leakage.BOILERPLATE_KINDS
  return (document for table in tables for _, document in _documents(table) if document.source in kinds)


def _documents(table: Location) -> Iterator[tuple[int, Document]]:
  """(number of the record, document) of the documents in the pool; others have no text."""
  number = 0
  for batch in storage.open_parquet(table).iter_batches(_READ, columns=['id', 'source', 'text']):
    for row in batch.to_pylist():
      if row['text'] is not None:
        yield number, Document(row['id'], row['source'], row['text'])
      number += 1


@dataclasses.dataclass(frozen=True)
class _Job:
  """A table of documents to compare, the number of its first record, guard and its checksum, where the result goes."""

  table: Location
  first: int
  guard: Location
  checksum: str
  out: Location


@functools.lru_cache(maxsize=1)
def _guard(path: Location, checksum: str) -> Guard:
  del checksum  # part of the key: another run may have written another guard
  return Guard.load(path)


def _compare(job: _Job) -> None:
  """Writes what the documents of one table share with targets: `Leak.record`, with number and runs."""
  guard, found = _guard(job.guard, job.checksum), []
  numbers: list[int] = []

  def documents() -> Iterator[Document]:
    for number, document in _documents(job.table):
      numbers.append(job.first + number)
      yield document

  first = 0
  for batch in leakage.batches(documents()):
    for index, leak in guard.leaks(batch).items():
      found.append({'document': numbers[first + index], **leak.record(), 'runs': leak.runs.tolist()})
    first += len(batch)
    passes.report_progress(sum(len(document.text) for document in batch))
  storage.write_json(job.out, found)
  storage.mark(job.out)


def _search(context: Context, tables: Sequence[Location], guard: Guard, size: int) -> list[dict[str, Any]]:
  """What the documents of all tables share with targets, in their order; tables of a killed attempt are kept."""
  file = context.out / _GUARD
  guard.save(file)
  counts = [storage.open_parquet(table).metadata.num_rows for table in tables]
  first = np.cumsum([0, *counts]).tolist()
  jobs = [
    _Job(table, first[i], file, storage.checksum(file), context.out / f'found-{i:06d}.json')
    for i, table in enumerate(tables)
  ]
  todo = [job for job in jobs if not storage.is_marked(job.out)]
  few = size < _FEW_BYTES
  with Bar(None, None, None, 'B') if few else context.log.bar(total=size, unit='B') as bar:
    workers = 1 if few else passes.worker_count(context.config.host.workers)
    passes.run_parallel(_compare, todo, workers, bar)
  context.cost.save()
  return [leak for job in jobs for leak in storage.read_json(job.out, list)]


def rows_with(pool: Pool, records: np.ndarray) -> tuple[np.ndarray, list[int]]:
  """(bool [N], the rows that have a token of one of these documents; how many rows each document is in).

  Args:
    pool: its rows are cut from the joined documents.
    records: numbers of the documents in the tables.
  """
  mask_N = np.zeros(pool.num_rows, np.bool_)
  rows: list[int] = []
  if len(records):
    order = storage.mapped(pool.path / 'rows' / 'order.npy')
    by_record = np.argsort(order, kind='stable')
    spans, places = pool.spans, by_record[np.searchsorted(order, records, sorter=by_record)]
    place_R, row_R = spans.rows_of(places)
    mask_N[row_R] = True
    rows = np.bincount(place_R, minlength=len(places)).tolist()
  return mask_N, rows


def masked_rows(artifact: Artifact) -> np.ndarray:
  """Whether no selection may take a row, bool [N]: it has text of a target, or is held out for breadth."""
  mask_N = storage.load(artifact.path / 'mask.npy')
  if not artifact.semantics['masked']:
    mask_N = np.zeros_like(mask_N)
  return mask_N | storage.load(artifact.path / 'held_out.npy') if 'held_out' in artifact.semantics else mask_N


def draw(masked_N: np.ndarray, count: int, rng: np.random.Generator, among: np.ndarray | None = None) -> np.ndarray:
  """`count` rows that are not masked, drawn without replacement, ascending: int64.

  Rows are drawn from all, and masked ones replaced by further draws: another mask changes only those.

  Args:
    masked_N: rows that must not be drawn.
    count: at most the number of the others.
    rng: of the draw.
    among: rows to draw from; None for all.
  """
  rows = rng.choice(len(masked_N) if among is None else len(among), count, replace=False)
  rows = np.asarray(rows if among is None else among[rows], np.int64)
  masked = masked_N[rows]
  if masked.any():
    free = np.flatnonzero(~masked_N) if among is None else among[~masked_N[among]]
    free = np.setdiff1d(free, rows, assume_unique=True)
    rows[masked] = rng.choice(free, int(masked.sum()), replace=False)
  return np.sort(rows)
