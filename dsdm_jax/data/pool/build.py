"""The pool stage from sources to a dataset: the passes of `prepare` in turn, and what is decided between them.

Sources → units → scan (hashes, leaks, bad input) → what is kept → vocabulary → encode → rows → a TFDS dataset.
The same documents and settings give the same bytes, whatever the number of processes.
"""

import collections
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from dsdm_jax.core import prng, storage
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool import dataset, encoders, layout, passes, readers, sources, vocabulary, workers
from dsdm_jax.data.pool.layout import Kept
from dsdm_jax.data.pool.passes import Plan, Task
from dsdm_jax.data.pool.readers import Problem
from dsdm_jax.data.pool.sources import Unit
from dsdm_jax.data.targets import leakage, targets, tasks
from dsdm_jax.errors import UserError

PLANTED = 'planted'  # the source that planted target examples are counted under
_SAMPLED_UNITS = 64  # a vocabulary is trained on text of no more units
_FEW_BYTES = 4_000_000  # text that other processes would take longer to start for than to read


class Builder:
  """One run of the stage.

  Args:
    context: of the stage.
  """

  def __init__(self, context: Context):
    self.context, self.config, self.out = context, context.config, context.out
    self.pool_config = context.config.pool
    self.work = context.out / 'work'
    self.workers = workers.count(context.config.host.workers)
    self.bytes = 0
    shutil.rmtree(self.work, ignore_errors=True)
    self.work.mkdir()
    passes.forget()

  def execute(self, function: Callable, given: Sequence, desc: str, unit: str, total: int | None) -> list:
    """Runs `function` on each of `given` and gives results in their order; the bar counts `unit` up to `total`."""
    few = 0 < self.bytes < _FEW_BYTES
    with tqdm.tqdm(disable=True) if few else self.context.log.bar(total=total, desc=desc, unit=unit) as bar:
      return workers.run(function, given, 1 if few else self.workers, bar)

  def scan(self) -> tuple[list[sources.Entry], list[Task], list[passes.Scanned]]:
    """Reads everything once."""
    entries = [sources.parse(line) for line in self.pool_config.sources]
    skip = self.pool_config.on_error == 'skip'
    units, missing = [], []
    for index, entry in enumerate(entries):
      found = self._spilled(entry, index) if entry.generated else sources.units(entry)
      if not found:
        missing.append(Problem(entry.target, 'matches no file'))
        if not skip:
          raise passes.fail(missing[-1])
      units += found
    if not units:
      raise UserError('the pool is empty: no pattern of pool.sources matches a file; mend the patterns')
    common = Task(
      Unit(entries[0], ()), 0, self.work, self.pool_config.max_document_bytes, skip, self._guard(units), out=self.out
    )
    given = [dataclasses.replace(common, unit=unit, index=index) for index, unit in enumerate(units)]
    scanned = self.execute(passes.scan, given, 'read', 'B', None)
    begin = layout.bounds(scanned)
    given = [dataclasses.replace(task, begin=begin[i], end=begin[i + 1]) for i, task in enumerate(given)]
    self.missing = missing
    return entries, given, scanned

  def _spilled(self, entry: sources.Entry, index: int) -> list[Unit]:
    path = str(self.work / f'source-{index}.arrow')
    readers.spill(self._sound(readers.whole(entry, self.pool_config, self.config.seed)), path)
    self.bytes = Path(path).stat().st_size if len(self.pool_config.sources) == 1 else 0
    return [Unit(entry, (path,))]

  def _sound(self, found: Iterator[readers.Record | Problem]) -> Iterator[readers.Record | Problem]:
    """What is `found`, up to the first problem where they are errors: the rest may be long."""
    for item in found:
      if isinstance(item, Problem) and self.pool_config.on_error != 'skip':
        raise passes.fail(item)
      yield item

  def _guard(self, units: Sequence[Unit]) -> str:
    self.boilerplate = 0
    if not self.pool_config.leakage_guard:
      return ''
    texts = tasks.raw_texts(self.config.targets) + tasks.benchmark_texts(
      self.pool_config.leakage_benchmarks, self.config.targets.folder or '.'
    )
    licences = (
      found
      for unit in units
      if unit.entry.kind == 'installed_packages'
      for found in readers.read(unit)
      if not isinstance(found, Problem) and found.source in leakage.BOILERPLATE_KINDS
    )
    guard = leakage.Guard(texts, self.pool_config.leakage_ngram, licences)
    self.boilerplate = guard.boilerplate_runs
    guard.save(self.work / 'guard.npz')
    return str(self.work / 'guard.npz')

  def decide(self, entries: list[sources.Entry], given: list[Task], scanned: list) -> tuple[list[Task], Kept]:
    """What stays; leaves the lists of what does not."""
    c = self.pool_config
    kept = layout.decide(entries, given, scanned, c.drop_duplicates, c.drop_leaks, c.max_bytes, self.config.seed)
    if not kept.count:
      raise UserError(
        f'the pool is empty: pool.sources {tuple(c.sources)} with pool.kinds {tuple(c.kinds)} gave '
        f'{sum(s.documents for s in scanned)} documents and the leakage guard dropped '
        f'{len(kept.leaks) if c.drop_leaks else 0}; '
        'take other kinds or raise pool.max_bytes'
      )
    np.save(self.work / 'keep.npy', kept.keep_M)
    self.bytes = kept.bytes
    return [dataclasses.replace(task, first=kept.first[i]) for i, task in enumerate(given)], kept

  def vocabulary(self, given: list[Task], kept: Kept) -> encoders.Encoder:
    """Trains or copies the vocabulary into the pool."""
    if self.pool_config.vocabulary == 'train':
      texts = self._sample(given, kept)
      storage.write_bytes(self.out / encoders.MODEL, vocabulary.train(texts, self.pool_config.vocab_size))
    else:
      encoders.save(self.pool_config.vocabulary, self.out, self.pool_config.end_piece)
    return encoders.open_encoder(self.out)

  def _sample(self, given: list[Task], kept: Kept) -> list[str]:
    """Texts to train on, in a seeded order, as many as are looked at; of a large pool, from some units."""
    seed = self.config.seed
    chosen = list(range(len(given)))
    if len(given) > _SAMPLED_UNITS:
      chosen = sorted(prng.numpy_stream(seed, 'vocabulary', 'units').permutation(len(given))[:_SAMPLED_UNITS].tolist())
      number_K = np.concatenate([np.arange(kept.first[i], kept.first[i + 1]) for i in chosen])
      order_K = number_K[vocabulary.sample_order(len(number_K), seed)]
    else:
      documents = layout.document_order(kept.count, seed)
      order_K = vocabulary.sample_order(kept.count, seed)
      order_K = documents.at(order_K) if documents.stored else order_K
    size_K = np.zeros(kept.count, np.int64)
    for i in chosen:
      with np.load(given[i].file('scan', 'npz')) as arrays:
        mine = kept.keep_M[given[i].begin : given[i].end]
        size_K[kept.first[i] : kept.first[i + 1]] = arrays['bytes_M'][mine]
    enough = int(np.searchsorted(np.cumsum(size_K[order_K]), vocabulary.sample_bytes(self.pool_config.vocab_size))) + 1
    order_K = order_K[:enough]
    unit_K = np.searchsorted(kept.first, order_K, side='right') - 1
    wanted = [(given[i], np.sort(order_K[unit_K == i]) - kept.first[i]) for i in np.unique(unit_K)]
    found = self.execute(passes.texts, wanted, 'sample', 'B', None)
    text_of = {
      number + task.first: text
      for (task, numbers), texts in zip(wanted, found, strict=True)
      for number, text in zip(numbers.tolist(), texts, strict=True)
    }
    return [text_of[number] for number in order_K.tolist()]

  def encode(self, given: list[Task], kept: Kept) -> tuple[list[Task], Kept, int]:
    """Makes ids of what is kept; gives what has any, and the number of tokens."""
    tokens = sum(self.execute(passes.encode, given, 'tokens', 'B', self.bytes))
    given, kept = layout.without_tokens(given, kept)
    if not kept.count:
      raise UserError('the pool is empty: no document has a token of pool.vocabulary; take another vocabulary')
    return given, kept, tokens

  def rows(self, given: list[Task], kept: Kept, encoder: encoders.Encoder, tokens: int) -> tuple[Plan, list[dict]]:
    """Cuts and writes the rows; gives their plan and what was planted."""
    c, seed = self.pool_config, self.config.seed
    order = layout.join(given, kept.count, seed, self.work)
    total = int(order.begin[-1])
    if total < c.length:
      raise UserError(
        f'the pool is empty: its {tokens} tokens do not fill one row of pool.length {c.length}; '
        'raise pool.max_bytes or lower pool.length'
      )
    planted, sequences = self._planted(encoder) if c.plant_targets else ([], [])
    dtype = encoders.dtype_of(encoder.size)
    plan = Plan(total // c.length, len(sequences), c.length, dtype.name, encoder.eos, seed)
    # Planted examples are repeated until the row is full, so that the row holds nothing else.
    last = [np.resize(np.asarray(ids, dtype), c.length) for ids in sequences]
    self.write_rows(given, plan, last)
    self._origins(order, kept, plan)
    for index, (entry, ids) in enumerate(zip(planted, sequences, strict=True)):
      entry['document'] = kept.count + index
      entry['tokens'], entry['text'] = len(ids), encoder.decode(ids)
    return plan, planted

  def write_rows(self, given: list[Task], plan: Plan, last: Sequence[np.ndarray]) -> None:
    """Writes the dataset: the rows of the stream where they belong, and behind them the rows `last`."""
    flat = plan.flat(self.work, 'w+')
    flat[plan.rows * plan.length :] = np.concatenate([*last, np.empty(0, plan.dtype)])
    flat.flush()  # type: ignore[attr-defined] # a memmap
    total = plan.length * (plan.rows + plan.planted)
    self.execute(passes.scatter, [(task, plan) for task in given], 'rows', 'tokens', total)

    def write_shards(files: Sequence[tuple[str, int, int]], head: bytes) -> list[int]:
      shards = [passes.Shard(path, first, stop, head, self.work, plan) for path, first, stop in files]
      return self.execute(passes.write_shard, shards, 'write', 'tokens', total)

    dataset.write(self.out / 'dataset', plan.rows + plan.planted, plan.length, np.dtype(plan.dtype), write_shards)

  def _planted(self, encoder: encoders.Encoder) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The first target-split examples of each task: what they are and their ids."""
    c = self.pool_config
    examples, _ = targets.build(self.config.targets, encoder, c.length, most=c.plant_targets)
    planted, sequences = [], []
    for (task, split), made in examples.items():
      if split != 'target':
        continue
      for index in range(len(made)):
        stop = int(np.flatnonzero(made.weights_TL[index])[-1]) + 1
        planted.append({'task': task, 'index': index, 'id': made.records[index]['id']})
        sequences.append(made.tokens_TL[index][:stop].tolist())
    return planted, sequences

  def _origins(self, order: layout.Order, kept: Kept, plan: Plan) -> None:
    """Leaves where each row came from, as arrays that are read without loading them."""
    folder = self.out / 'rows'
    folder.mkdir(exist_ok=True)
    total, stop = plan.rows + plan.planted, plan.rows
    kinds = {'document': np.int32 if kept.count + plan.planted < 2**31 else np.int64, 'offset': np.int32,
             'source': np.int8 if len(kept.names) < 127 else np.int16, 'planted': np.int32}  # fmt: skip
    files = {k: np.lib.format.open_memmap(folder / f'{k}.npy', 'w+', dtype, (total,)) for k, dtype in kinds.items()}
    files['planted'][:stop] = -1
    files['planted'][stop:] = np.arange(plan.planted)
    files['document'][stop:] = kept.count + np.arange(plan.planted)
    files['source'][stop:] = len(kept.names)
    self.rows_of = np.zeros(len(kept.names) + 1, np.int64)
    for to_B, document_B, offset_B, source_B in layout.origins(order, kept.source_K, len(kept.names), plan):
      files['document'][to_B], files['offset'][to_B], files['source'][to_B] = document_B, offset_B, source_B
      self.rows_of += np.bincount(source_B, minlength=len(self.rows_of))
    self.rows_of[-1] = plan.planted
    at = np.lib.format.open_memmap(folder / 'order.npy', 'w+', np.int64, (kept.count + plan.planted,))
    at[kept.count :] = kept.count + np.arange(plan.planted)
    for first in range(0, kept.count, 2**20):
      number = np.arange(first, min(first + 2**20, kept.count))
      at[order.shuffle.place(number)] = number
    for array in (*files.values(), at):
      array.flush()


def run(context: Context) -> dict[str, Any]:
  """The stage; see `dsdm_jax.data.pool.pool`."""
  began = time.monotonic()
  builder = Builder(context)
  if context.config.host.beam:
    from dsdm_jax.data.pool import beam

    builder = beam.BeamBuilder(context)
  try:
    entries, given, scanned = builder.scan()
    given, kept = builder.decide(entries, given, scanned)
    encoder = builder.vocabulary(given, kept)
    given, kept, tokens = builder.encode(given, kept)
  except UserError:
    # Other settings or other files are needed, and nothing of this would serve them.
    shutil.rmtree(builder.work, ignore_errors=True)
    raise
  plan, planted = builder.rows(given, kept, encoder, tokens)
  out = context.out
  names = [*kept.names, PLANTED] if planted else kept.names
  extra = [
    {
      'id': f'{PLANTED}/{p["task"]}/{p["id"]}',
      'source': PLANTED,
      'bytes': len(p['text'].encode()),
      'tokens': p['tokens'],
    }
    for p in planted
  ]
  if extra:
    passes.write_table(out / 'documents' / f'{len(given):06d}.parquet', extra)
  storage.write_json(out / 'planted.json', [{k: p[k] for k in ('task', 'index', 'id')} for p in planted])
  storage.write_json(out / 'sources.json', names)
  leaks = [{k: leak[k] for k in ('id', 'task', 'words')} for leak in kept.leaks]
  dropped, leaking = (leaks, []) if context.config.pool.drop_leaks else ([], leaks)
  _write_jsonl(out / 'dropped.jsonl', dropped)
  _write_jsonl(out / 'leaking.jsonl', leaking)
  problems = [dataclasses.asdict(problem) for problem in builder.missing] + kept.problems
  _write_jsonl(out / 'skipped.jsonl', problems)
  card = {
    'rows': plan.rows + plan.planted,
    'length': plan.length,
    'vocab_size': encoder.size,
    'documents': kept.count + len(extra),
    'bytes': kept.bytes + sum(e['bytes'] for e in extra),
    'tokens': tokens + sum(e['tokens'] for e in extra),
    'sources': _per_source(given, kept, builder.rows_of, names, extra),
    'planted': plan.planted,
    'dropped_for_leakage': len(dropped),
    'dropped_by_task': dict(collections.Counter(leak['task'] for leak in dropped)),
    'leaks_kept': len(leaking),
    'boilerplate_runs': builder.boilerplate,
    'exact_duplicates': kept.duplicates,
    'above_caps': kept.over_cap,
    'skipped': kept.problem_count + len(builder.missing),
    'special_ids': {'pad': encoder.pad, 'eos': encoder.eos},
  }
  card['bytes_per_token'] = round(card['bytes'] / card['tokens'], 4)
  storage.write_json(out / 'card.json', card)
  shutil.rmtree(builder.work)
  tell(context, card, time.monotonic() - began)
  return {
    'rows': card['rows'],
    'length': card['length'],
    'vocab_size': card['vocab_size'],
    'special_ids': card['special_ids'],
    'row_order': 'an id is the row of the dataset; documents in a seeded order are joined, cut, and the rows shuffled',
  }


def _per_source(
  given: Sequence[Task], kept: Kept, rows_of: np.ndarray, names: Sequence[str], extra: Sequence[dict]
) -> dict[str, dict[str, int]]:
  bytes_S = np.zeros(len(kept.names), np.int64)
  for i, task in enumerate(given):
    with np.load(task.file('scan', 'npz')) as arrays:
      size_K = arrays['bytes_M'][kept.keep_M[task.begin : task.end]]
    source_K = kept.source_K[kept.first[i] : kept.first[i + 1]]
    bytes_S += np.bincount(source_K, size_K, len(kept.names)).astype(np.int64)
  documents_S = np.bincount(kept.source_K, minlength=len(kept.names))
  found = {
    name: {'documents': int(documents_S[s]), 'bytes': int(bytes_S[s]), 'rows': int(rows_of[s])}
    for s, name in enumerate(kept.names)
  }
  if extra:
    found[names[-1]] = {'documents': len(extra), 'bytes': sum(e['bytes'] for e in extra), 'rows': int(rows_of[-1])}
  return found


def tell(context: Context, card: dict[str, Any], seconds: float) -> None:
  """The card, for the person at the terminal and for programs."""
  rate = card['bytes'] / seconds / 1e6
  context.log.event('pool', **card, seconds=round(seconds, 3), megabytes_per_second=round(rate, 3))
  context.log.say(
    f'  {card["rows"]:,} rows of {card["length"]} tokens from {card["documents"]:,} documents '
    f'({card["bytes"] / 1e6:,.1f} MB, {card["tokens"]:,} tokens, {card["bytes_per_token"]:.2f} bytes a token)\n'
    f'  {card["exact_duplicates"]:,} exact duplicates and {card["dropped_for_leakage"]:,} leaks dropped'
    f'{", " + format(card["leaks_kept"], ",") + " leaks listed and kept" if card["leaks_kept"] else ""}, '
    f'{card["above_caps"]:,} above caps, {card["skipped"]:,} bad inputs skipped; {seconds:.1f} s, {rate:.1f} MB/s'
  )
  for name, s in sorted(card['sources'].items(), key=lambda item: -item[1]['rows'])[:20]:
    context.log.say(f'  {name:32} {s["documents"]:>12,} documents {s["bytes"] / 1e6:>12,.2f} MB {s["rows"]:>12,} rows')


def _write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
  storage.write_bytes(path, ''.join(json.dumps(r, sort_keys=True) + '\n' for r in records).encode())
