"""The pool stage: from sources to a TFDS dataset, through the passes of `passes` and the decisions of `layout`.

Sources → units → scan (hashes, bad input) → selected documents → vocabulary → encode → rows → dataset.
The same documents and settings give the same bytes on any number of processes.
"""

import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import prng, storage
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import beam, layout, passes, pretokenized, readers, sources, vocabulary
from dsdm_jax.data.pool.layout import Selected
from dsdm_jax.data.pool.passes import Job, Plan
from dsdm_jax.data.pool.pool import log_card, write_dataset
from dsdm_jax.data.pool.readers import Place, Problem
from dsdm_jax.data.pool.sources import Entry, Unit
from dsdm_jax.data.targets import targets
from dsdm_jax.errors import UserError

PLANTED = 'planted'  # source of planted target examples
_SAMPLED_UNITS = 64  # a vocabulary is trained on text of at most so many units
_SAMPLED_SHARE = 32  # a document gives at most 1/32 of that text
_TRIED, _LEAST_TRIED = 2**20, 2**14  # characters of all units and of each whose round trip is tried
_FEW_BYTES = 4_000_000  # reading less text is faster than starting processes


def run(context: Context) -> dict[str, Any]:
  """The stage: writes the dataset, the vocabulary, the origin of each row, and what was dropped.

  Raises:
    UserError: the pool is empty or holds less than one row; bad sources, input, tasks or vocabulary.
  """
  if context.config.host.beam and not isinstance(context.out, Path):
    raise UserError(
      f'host.beam is set and the workdir is the address {context.out}, but the workers of Beam exchange files through '
      'a folder; use a --workdir that all of them mount, or leave host.beam out'
    )
  with storage.uploading(context.out) as out:
    return (pretokenized.run if pretokenized.wanted(context.config.pool) else _build)(context, out)


def _build(context: Context, out: Path) -> dict[str, Any]:
  began = time.monotonic()
  for abandoned in out.glob('work-*'):
    shutil.rmtree(abandoned)
  work = out / f'work-{uuid.uuid4().hex[:8]}'
  work.mkdir()
  builder = Builder(context, out, work)
  try:
    builder.copy_vocabulary()
    entries, units, missing = builder.units()
    jobs, scanned = builder.scan(units)
    jobs, selected = builder.decide(entries, jobs, scanned)
    encoder, trips = builder.prepare_vocabulary(jobs, selected, scanned)
    jobs, selected, tokens = builder.encode(jobs, selected)
  except UserError:
    shutil.rmtree(work, ignore_errors=True)  # other settings or files are needed, which cannot reuse this
    raise
  selected.lost['bad_input']['documents'] += len(missing)
  read = {
    'documents': sum(s.documents + s.problems for s in scanned) + len(missing),
    'bytes': sum(s.bytes for s in scanned),
  }
  check_sum(read, selected)
  plan, planted, rows_S, unfilled = builder.rows(jobs, selected, encoder, tokens)
  names = [*selected.names, PLANTED] if planted else selected.names
  extra = [
    {
      'id': f'{PLANTED}/{p["task"]}/{p["id"]}',
      'source': PLANTED,
      'bytes': len(p['text'].encode()),
      'characters': len(p['text']),
      'tokens': p['tokens'],
      'text': p['text'],
    }
    for p in planted
  ]
  if extra:
    passes.write_table(out / 'documents' / f'{len(jobs):06d}.parquet', extra)
  storage.write_json(out / 'planted.json', [{k: p[k] for k in ('task', 'index', 'id')} for p in planted])
  storage.write_json(out / 'sources.json', names)
  problems = [problem.listed() for problem in missing] + selected.problems
  lines = ''.join(json.dumps(record, sort_keys=True) + '\n' for record in problems)
  storage.write_text(out / 'skipped.jsonl', lines)
  card = {
    'rows': plan.rows + plan.planted,
    'length': plan.length,
    'vocab_size': encoder.size,
    'documents': selected.count + len(extra),
    'bytes': selected.bytes + sum(e['bytes'] for e in extra),
    'tokens': tokens + sum(e['tokens'] for e in extra),
    'sources': _per_source(jobs, selected, rows_S, extra),
    'planted': plan.planted,
    'read': read,
    'lost': selected.lost,
    'unfilled_row': unfilled,
    'packed': context.config.pool.packed,
    'tables': {'text': len(jobs), 'packages': [j.index for j in jobs if j.unit.entry.kind == 'installed_packages']},
    'special_ids': {'pad': encoder.pad, 'eos': encoder.eos},
    'end_marks': 1,
    'vocabulary': trips,
  }
  card['bytes_per_token'] = round(card['bytes'] / card['tokens'], 4)
  storage.write_json(out / 'card.json', card)
  shutil.rmtree(work)
  context.log.describe(f'{card["rows"]:,} rows of {card["length"]} tokens, {card["documents"]:,} documents')
  log_card(context, card, time.monotonic() - began)
  return {
    'rows': card['rows'],
    'length': card['length'],
    'vocab_size': card['vocab_size'],
    'special_ids': card['special_ids'],
    'row_order': 'an id is the row of the dataset; documents in a seeded order are joined, cut, and the rows shuffled',
  }


def check_sum(read: dict[str, int], selected: Selected) -> None:
  """Checks that all text that was read is in the pool or counted as lost.

  Raises:
    RuntimeError: it is not, which is a bug.
  """
  for unit, remain in (('documents', selected.count), ('bytes', selected.bytes)):
    lost = {name: of[unit] for name, of in selected.lost.items() if (unit, name) != ('documents', 'cut')}
    if read[unit] != remain + sum(lost.values()):
      raise RuntimeError(f'the pool read {read[unit]} {unit}, but {remain} remain and {lost} are counted as lost')


def _per_source(
  jobs: Sequence[Job], selected: Selected, rows_S: np.ndarray, extra: Sequence[dict]
) -> dict[str, dict[str, int]]:
  bytes_S = np.zeros(len(selected.names), np.int64)
  for i, job in enumerate(jobs):
    with storage.load(job.file('scan', 'npz')) as arrays:
      size_K = arrays['bytes_M'][selected.keep_M[job.begin : job.end]]
    source_K = selected.source_K[selected.first[i] : selected.first[i + 1]]
    bytes_S += np.bincount(source_K, size_K, len(selected.names)).astype(np.int64)
  documents_S = np.bincount(selected.source_K, minlength=len(selected.names))
  result = {
    name: {'documents': int(documents_S[s]), 'bytes': int(bytes_S[s]), 'rows': int(rows_S[s])}
    for s, name in enumerate(selected.names)
  }
  if extra:
    result[PLANTED] = {'documents': len(extra), 'bytes': sum(e['bytes'] for e in extra), 'rows': int(rows_S[-1])}
  return result


class Builder:
  """The steps of `run`.

  Args:
    context: of the stage.
    out: folder for the files of the pool.
    work: empty folder for files between the passes.
  """

  def __init__(self, context: Context, out: Path, work: Path):
    self.context, self.config, self.out, self.work = context, context.config, out, work
    self.pool_config = context.config.pool
    self.bytes = 0  # of text, as far as known; 0 if not

  def execute(self, function: Callable, jobs: Sequence, desc: str, unit: str, total: int | None) -> list:
    """Runs `function` on each job; results are in the order of jobs. The bar counts `unit` up to `total`."""
    if self.config.host.beam:
      return beam.execute(function, jobs, self.work, self.config.host.beam)
    few = 0 < self.bytes < _FEW_BYTES
    with Bar(None, None, None, unit) if few else self.context.log.bar(total=total, desc=desc, unit=unit) as bar:
      workers = 1 if few else passes.worker_count(self.config.host.workers)
      results = passes.run_parallel(function, jobs, workers, bar)
    self.context.cost.save()
    return results

  def units(self) -> tuple[list[Entry], list[Unit], list[Problem]]:
    """The sources, their units, and the patterns that match nothing."""
    entries = sources.entries(self.pool_config)
    some = not self.pool_config.packed or any(entry.completion or entry.messages for entry in entries)
    if some and self.config.host.beam:
      raise UserError('host.beam joins whole texts alone; leave it out for completions, conversations, or packed=False')
    units: list[Unit] = []
    missing: list[Problem] = []
    for index, entry in enumerate(entries):
      if entry.generated:
        path = str(self.work / f'source-{index}.arrow')
        records = readers.read_generated(entry, self.pool_config, self.config.seed)
        readers.spill(self._until_problem(records), path)
        self.bytes = Path(path).stat().st_size if len(entries) == 1 else 0
        units.append(Unit(entry, (path,)))
        continue
      of_entry = sources.units(entry)
      absent = [path for unit in of_entry for path in sources.missing_files(unit)]
      missing += [Problem(Place(path), f'is missing, though the index of {entry.target} lists it') for path in absent]
      if not of_entry:
        missing.append(Problem(Place(entry.target), 'matches no file'))
      if missing and self.pool_config.on_error != 'skip':
        raise passes.fail(missing[0])
      units += [unit for unit in of_entry if not set(absent) & {*unit.paths}]
    if not units:
      raise UserError('the pool is empty: no pattern of pool.sources matches a file; correct the patterns')
    return entries, sources.distinct(units), missing

  def _until_problem(self, records: readers.Records) -> Iterator[readers.Record | Problem]:
    """Raises at the first problem if problems are errors: reading the rest may take long."""
    for record in records:
      if isinstance(record, Problem) and self.pool_config.on_error != 'skip':
        raise passes.fail(record)
      yield record

  def scan(self, units: Sequence[Unit]) -> tuple[list[Job], list[passes.Scanned]]:
    """Reads everything once."""
    c = self.pool_config
    skip = c.on_error == 'skip'
    tried = 0 if c.vocabulary == 'train' else max(_TRIED // len(units), _LEAST_TRIED)
    row = 0 if c.packed else c.length
    jobs = [
      Job(unit, index, self.work, c.max_document_bytes, skip, out=self.out, tried=tried, row=row)
      for index, unit in enumerate(units)
    ]
    scanned = self.execute(passes.scan, jobs, 'read', 'B', None)
    begin = layout.bounds(scanned)
    return [dataclasses.replace(job, begin=begin[i], end=begin[i + 1]) for i, job in enumerate(jobs)], scanned

  def decide(self, entries: list[Entry], jobs: list[Job], scanned: list) -> tuple[list[Job], Selected]:
    """Selects documents; writes `lost.npy` for the passes."""
    c = self.pool_config
    selected = layout.decide(entries, jobs, scanned, c.drop_duplicates, c.max_bytes, self.config.seed)
    if not selected.count:
      bad = selected.lost['bad_input']['documents']
      raise UserError(
        f'the pool is empty: pool.sources {tuple(c.sources)} with pool.kinds {tuple(c.kinds)} gave '
        f'{sum(s.documents for s in scanned)} documents and {bad} bad inputs; choose other kinds or raise '
        'pool.max_bytes'
      )
    if c.plant_targets and PLANTED in selected.names:
      raise UserError(
        f'documents have the source {PLANTED!r}, which pool.plant_targets needs; name another field with | source=FIELD'
      )
    if same := layout.repeated_id(jobs, selected.keep_M):
      owner = [int(np.searchsorted([job.end for job in jobs], number, side='right')) for number in same]
      found = [passes.place((jobs[i], number - jobs[i].begin)) for i, number in zip(owner, same, strict=True)]
      (where, id), (again, other) = found
      if id == other:
        raise UserError(
          f'{where} and {again} have the same id {id!r}, and ids must be unique in the pool; name another field with '
          '| id=FIELD, or end the source with | id= to number documents by file and line'
        )
    storage.save_npy(self.work / 'lost.npy', selected.lost_M)
    self.bytes = selected.bytes
    return [dataclasses.replace(job, first=selected.first[i]) for i, job in enumerate(jobs)], selected

  def copy_vocabulary(self) -> None:
    """Copies a given vocabulary, before anything is read, because it may be malformed."""
    if self.pool_config.vocabulary != 'train':
      vocabulary.save(self.pool_config.vocabulary, self.out, self.pool_config.end_piece)

  def prepare_vocabulary(
    self, jobs: list[Job], selected: Selected, scanned: Sequence[passes.Scanned]
  ) -> tuple[vocabulary.Encoder, dict[str, Any]]:
    """The vocabulary of the pool, which is trained unless one was given, and its `vocabulary.summary`."""
    c = self.pool_config
    if c.vocabulary == 'train':
      texts = self._sample(jobs, selected)
      storage.write_bytes(self.out / vocabulary.MODEL, vocabulary.train(texts, c.vocab_size))
    encoder = vocabulary.open_encoder(self.out)
    if c.vocabulary == 'train':
      return encoder, vocabulary.summary(encoder, (vocabulary.round_trip(encoder, text) for text in texts))
    trips = vocabulary.summary(encoder, (unit.trips for unit in scanned))
    if trips['unknown'] > c.max_unknown_share:
      raise UserError(
        f'pool.vocabulary = {c.vocabulary!r} does not fit this pool: of the pieces in {trips["documents"]:,} sampled '
        f'documents {trips["unknown"]:.2%} are unknown text, more than pool.max_unknown_share = '
        f'{c.max_unknown_share:g}; take a vocabulary with byte fallback, or raise the limit'
      )
    return encoder, trips

  def _sample(self, jobs: list[Job], selected: Selected) -> list[str]:
    """Texts to train on, in a seeded order; of a large pool, from `_SAMPLED_UNITS` units."""
    seed = self.config.seed
    chosen = list(range(len(jobs)))
    if len(jobs) > _SAMPLED_UNITS:
      chosen = sorted(prng.numpy_stream(seed, 'vocabulary', 'units').permutation(len(jobs))[:_SAMPLED_UNITS].tolist())
      number_K = np.concatenate([np.arange(selected.first[i], selected.first[i + 1]) for i in chosen])
      order_K = number_K[vocabulary.sample_order(len(number_K), seed)]
    else:
      documents = layout.document_order(selected.count, seed)
      order_K = vocabulary.sample_order(selected.count, seed)
      order_K = documents.at(order_K) if documents.stored else order_K
    wanted_bytes = vocabulary.sample_bytes(self.pool_config.vocab_size)
    most = wanted_bytes // _SAMPLED_SHARE
    size_K = np.zeros(selected.count, np.int64)
    for i in chosen:
      with storage.load(jobs[i].file('scan', 'npz')) as arrays:
        mine = selected.keep_M[jobs[i].begin : jobs[i].end]
        size_K[selected.first[i] : selected.first[i + 1]] = np.minimum(arrays['bytes_M'][mine], most)
    enough = int(np.searchsorted(np.cumsum(size_K[order_K]), wanted_bytes)) + 1
    order_K = order_K[:enough]
    unit_K = np.searchsorted(selected.first, order_K, side='right') - 1
    wanted = [(jobs[i], np.sort(order_K[unit_K == i]) - selected.first[i], most) for i in np.unique(unit_K)]
    text_of = {
      number + job.first: text
      for (job, numbers, _), texts in zip(wanted, self.execute(passes.texts, wanted, 'sample', 'B', None), strict=True)
      for number, text in zip(numbers.tolist(), texts, strict=True)
    }
    return [text_of[number] for number in order_K.tolist()]

  def encode(self, jobs: list[Job], selected: Selected) -> tuple[list[Job], Selected, int]:
    """Encodes the selected documents; returns those with tokens, and the number of tokens."""
    tokens = sum(self.execute(passes.encode, jobs, 'tokens', 'B', self.bytes))
    jobs, selected = layout.without_tokens(jobs, selected)
    if not selected.count:
      raise UserError('the pool is empty: no document has a token of pool.vocabulary; choose another vocabulary')
    return jobs, selected, tokens

  def rows(
    self, jobs: list[Job], selected: Selected, encoder: vocabulary.Encoder, tokens: int
  ) -> tuple[Plan, list[dict], np.ndarray, int]:
    """Cuts and writes the rows.

    Returns:
      Their plan, the planted examples, the number of rows of each source, and the tokens after the last full row.
    """
    c, seed = self.pool_config, self.config.seed
    order = layout.join(jobs, selected.count, seed, self.work, 0 if c.packed else c.length)
    total = int(order.begin[-1])
    if c.packed and total != tokens + selected.count:
      raise RuntimeError(f'{selected.count} documents of {tokens} tokens and their end marks became {total} tokens')
    if total < c.length:
      raise UserError(
        f'the pool is empty: its {tokens} tokens do not fill one row of pool.length {c.length}; '
        'raise pool.max_bytes or lower pool.length'
      )
    planted, sequences = self._planted(encoder) if c.plant_targets else ([], [])
    dtype = vocabulary.dtype_of(encoder.size)
    plan = Plan(total // c.length, len(sequences), c.length, dtype.name, encoder.eos, seed)
    if not c.packed or any(job.file('counted', 'bin').is_file() for job in jobs):
      plan = dataclasses.replace(plan, pad=None if c.packed else encoder.pad, counts=True)
    # Planted examples are repeated until the row is full, so that the row holds nothing else.
    last = [np.resize(np.asarray(ids, dtype), c.length) for ids in sequences]
    if self.config.host.beam:
      beam.write_rows(jobs, plan, last, self.work, self.out / 'dataset', self.config.host.beam)
    else:
      self._write_rows(jobs, plan, last)
    rows_S = self._origins(order, jobs, selected, plan)
    for entry, ids in zip(planted, sequences, strict=True):
      entry['tokens'], entry['text'] = len(ids), encoder.decode(ids)
    return plan, planted, rows_S, total - plan.rows * c.length

  def _write_rows(self, jobs: list[Job], plan: Plan, last: Sequence[np.ndarray]) -> None:
    """Writes the dataset: the rows of the stream in the pool's order, followed by the rows `last`."""
    flat = plan.flat(self.work, 'w+')
    flat[plan.rows * plan.length :] = np.concatenate([*last, np.empty(0, plan.dtype)])
    flat.flush()  # type: ignore[attr-defined] # a memmap
    total = plan.length * (plan.rows + plan.planted)
    if plan.counts:
      counted = plan.counted(self.work, 'w+')
      counted[plan.rows * plan.length :] = True
      counted.flush()  # type: ignore[attr-defined] # a memmap
    self.execute(passes.scatter, [(job, plan) for job in jobs], 'rows', 'tokens', total)

    def write_shards(files: Sequence[tuple[str, int, int]], head: bytes) -> list[int]:
      shards = [passes.Shard(path, first, stop, head, self.work, plan) for path, first, stop in files]
      return self.execute(passes.write_shard, shards, 'write', 'tokens', total)

    write_dataset(self.out / 'dataset', plan.rows + plan.planted, plan.length, np.dtype(plan.dtype), write_shards)
    if plan.counts:
      self._write_counted(plan)

  def _write_counted(self, plan: Plan) -> None:
    """Writes which tokens of each row count, a bit each."""
    rows, columns = plan.rows + plan.planted, -(-plan.length // 8)
    (self.out / 'rows').mkdir(exist_ok=True)
    file = self.out / 'rows' / 'counted.npy'
    bits_NC = np.lib.format.open_memmap(file, 'w+', np.uint8, (rows, columns))
    marks_NL = plan.counted(self.work, 'r').reshape(rows, plan.length)
    for first in range(0, rows, 2**14):
      bits_NC[first : first + 2**14] = np.packbits(marks_NL[first : first + 2**14], axis=1)
    bits_NC.flush()

  def _planted(self, encoder: vocabulary.Encoder) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The first target-split examples of each task: task, index and id, and the ids of their tokens."""
    c = self.pool_config
    examples, _ = targets.build(self.config.targets, encoder, c.length, most=c.plant_targets)
    planted, sequences = [], []
    for (task, split), of_task in examples.items():
      if split != 'target':
        continue
      for index in range(len(of_task)):
        stop = int(np.flatnonzero(of_task.weights_TL[index])[-1]) + 1
        planted.append({'task': task, 'index': index, 'id': of_task.records[index]['id']})
        sequences.append(of_task.tokens_TL[index][:stop].tolist())
    return planted, sequences

  def _origins(self, order: layout.Order, jobs: Sequence[Job], selected: Selected, plan: Plan) -> np.ndarray:
    """Writes the origin of each row as arrays that can be memory-mapped; returns the number of rows of each source."""
    folder = self.out / 'rows'
    folder.mkdir(exist_ok=True)
    total, stop, count = plan.rows + plan.planted, plan.rows, selected.count
    types = {
      'document': np.int32 if count + plan.planted < 2**31 else np.int64,
      'offset': np.int32,
      'source': np.int8 if len(selected.names) < 127 else np.int16,
      'planted': np.int32,
    }
    arrays = {k: np.lib.format.open_memmap(folder / f'{k}.npy', 'w+', dtype, (total,)) for k, dtype in types.items()}
    arrays['planted'][:stop] = -1
    arrays['planted'][stop:] = np.arange(plan.planted)
    arrays['document'][stop:] = count + np.arange(plan.planted)
    arrays['source'][stop:] = len(selected.names)
    rows_S = np.zeros(len(selected.names) + 1, np.int64)
    for to_B, document_B, offset_B, source_B in layout.origins(order, selected.source_K, len(selected.names), plan):
      arrays['document'][to_B], arrays['offset'][to_B], arrays['source'][to_B] = document_B, offset_B, source_B
      rows_S += np.bincount(source_B, minlength=len(rows_S))
    rows_S[-1] = plan.planted
    at = np.lib.format.open_memmap(folder / 'order.npy', 'w+', np.int64, (count + plan.planted,))
    begin = 0  # of the unit's records in the document table
    for job in jobs:
      records_M = storage.load(job.file('records', 'npy'))
      at[order.shuffle.place(np.arange(job.first, job.first + len(records_M)))] = begin + records_M
      begin += passes.read_json(job.file('encode', 'json'))['records']
    at[count:] = begin + np.arange(plan.planted)
    for array in (*arrays.values(), at):
      array.flush()
    return rows_S
