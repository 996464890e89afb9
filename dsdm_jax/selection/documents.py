"""Scores of whole documents under the ids of their source, in layouts that other programs join with their data.

    dsdm export documents --workdir RUN --format parquet --out FOLDER

Formats:
  parquet: documents-*.parquet, one record for each record of the sources, in the order in which they were read.
  dolma: for each JSONL file of the sources (.jsonl, .json or .ndjson, also compressed) a file of the same name with a
    line for each document, whose attributes are spans [start, end, score] of characters. Name the folder
    …/attributes/NAME beside …/documents.
  datakit: for each file of the sources a flat Parquet file with the columns id, partition_id, status and scores.

Columns: id, source, status ('kept'; 'cut', its end is lost; 'leaks', it has text of a target and no arm takes its rows;
or why the document has no score: 'duplicates', 'above_caps', 'without_tokens', 'bad_input', 'unfilled_row'), file,
number (line or row in the file, from 1), begin and end (bytes in the decompressed file), bytes, characters, tokens,
row_tokens (those in rows, with the end mark); for each target sum_T, score_T, low_T and high_T; and selected_A, the
share of row_tokens that the arm A selected.
"""

import argparse
import bz2
import contextlib
import gzip
import io
import itertools
import json
import lzma
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import counted
from dsdm_jax.core.storage import Location
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.passes import KEPT
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError, visible
from dsdm_jax.selection import export

if TYPE_CHECKING:
  import pyarrow

FORMATS = ('parquet', 'dolma', 'datakit')
_SHARD = 2**20  # records of one Parquet file
_BLOCK = 1_024  # rows whose token scores are computed between reports


class DocumentScores:
  """Scores of the documents of a finished run.

  A row's score is spread over its tokens: evenly, or `by` tokens as `attribution.tokens` does. Of a document, `sum` is
  what its tokens have, so that sums over documents are sums over rows. `score` is the mean over its tokens, times the
  tokens of a row: it is on the scale of the rows' scores. `low` and `high` are the ends of its interval over the
  target's documents, which may be wider than `datamodel.confidence`: errors of rows are added as if they always agreed.

  Args:
    inputs: finished stages: 'pool' and 'datamodel'; with 'selection' the shares that arms selected; with 'proxies' and
      'features' scores by tokens.
    targets: names as in `selection.targets`; () for all tasks and, by rows, their mix.
    arms: names of selections, as `--arm` of `dsdm export`; None for all.
    by: 'rows' or 'tokens'.
    functions: as in `dsdm_jax.load`.

  Raises:
    UserError: no such target or arm, or no scores by tokens (see `attribution.tokens.TokenScores`).
  """

  def __init__(
    self,
    inputs: Mapping[str, Artifact],
    targets: Sequence[str] = (),
    arms: Sequence[str] | None = None,
    by: Literal['rows', 'tokens'] = 'rows',
    functions: Collection[str] = (),
  ):
    self.pool, self._scores, self._by = Pool(inputs['pool']), Scores(inputs['datamodel']), by
    tasks = self._scores.tasks
    self.targets = tuple(targets) or (tasks if by == 'tokens' else (*tasks, 'mix'))
    for target in self.targets:
      parts = target.split('+')
      if target != 'mix' and not set(parts) <= set(tasks):
        raise UserError(
          f'there are no scores for {target!r}; targets are {", ".join(tasks)}, mix, and tasks joined by +'
        )
      if by == 'tokens' and (target == 'mix' or len(parts) > 1):
        raise UserError(f'the score for {target!r} is no sum over tokens; name single tasks, or take scores by rows')
    self.metadata = export.metadata(inputs['datamodel'], inputs.get('validation'), self.targets) | {'by': by}
    self._leaks = _leaks(inputs.get('leakage'))
    spans = self.pool.spans
    self._tokens_D = spans.tokens_D
    self._values: dict[str, np.ndarray] = {}
    tokens = None
    for target in self.targets:
      if by == 'tokens':
        if tokens is None:
          from dsdm_jax.attribution.tokens import TokenScores

          tokens = TokenScores(inputs, functions=functions)
        sum_D = self._sums_by_token(tokens, target)
      else:
        sum_D = spans.sums(self._scores.score_N(target))
      mean_D = sum_D * self.pool.length / np.maximum(self._tokens_D, 1)
      self._values |= {f'sum_{target}': sum_D, f'score_{target}': mean_D}
      with contextlib.suppress(UserError):  # no resamples, or mean ranks: scores without intervals
        reach_D = spans.means(self._scores.reach_N(target))
        self._values |= {f'low_{target}': mean_D - reach_D, f'high_{target}': mean_D + reach_D}
    for selection in self._selections(inputs.get('selection'), arms):
      if selection.documents is not None:
        share_D = np.zeros(len(self._tokens_D))
        share_D[selection.documents] = 1
      else:
        chosen_N = np.zeros(self.pool.num_rows)
        chosen_N[selection.rows] = 1
        share_D = spans.means(chosen_N)
      self._values[f'selected_{selection.name}'] = share_D

  def _sums_by_token(self, tokens: Any, task: str) -> np.ndarray:
    spans, length = self.pool.spans, self.pool.length
    sum_D = np.zeros(len(self._tokens_D))
    for start in range(0, len(spans.row_S), _BLOCK):
      score_BL = tokens(task, spans.row_S[start : start + _BLOCK])
      token_B = np.arange(start * length, start * length + score_BL.size)
      document_B = np.searchsorted(spans.begin_D, token_B, side='right') - 1
      first = int(document_B[0])
      sums = np.bincount(document_B - first, score_BL.ravel())
      sum_D[first : first + len(sums)] += sums
    return sum_D

  @staticmethod
  def _selections(artifact: Artifact | None, arms: Sequence[str] | None) -> Iterator[Selection]:
    if artifact is None:
      if arms:
        raise UserError(f'the run has no finished selection, so no arm {arms[0]!r}; run it first')
      return
    index = storage.read_json(artifact.path / 'index.json', list)
    names = list(dict.fromkeys(entry['selection'] for entry in index))
    for arm in names if arms is None else arms:
      yield Selection.load(artifact.path, export.selection_named(arm, names))

  @property
  def schema(self) -> 'pyarrow.Schema':
    """Columns of `tables`, and the metadata under the key `export.METADATA`."""
    import pyarrow as pa

    texts, numbers = ('id', 'source', 'status', 'file'), ('number', 'begin', 'end', 'bytes', 'characters', 'tokens')
    fields = dict.fromkeys(texts, pa.string()) | dict.fromkeys((*numbers, 'row_tokens'), pa.int64())
    fields |= {name: pa.float64() if name.startswith('sum_') else pa.float32() for name in self._values}
    return pa.schema(fields, {export.METADATA: json.dumps(self.metadata, ensure_ascii=False).encode()})

  def tables(self) -> Iterator['pyarrow.Table']:
    """Blocks of records, in the order in which they were read. A document without a score has null there."""
    import pyarrow as pa

    schema = self.schema
    for document_B, table in self.pool.documents.read():
      inside_B = document_B >= 0
      at_B = np.where(inside_B, document_B, 0)
      tokens_B = np.where(inside_B, self._tokens_D[at_B], 0)
      status = table['status'].to_numpy(zero_copy_only=False)
      status = np.where((tokens_B == 0) & inside_B, 'unfilled_row', status)
      if self._leaks:
        leaks_B = np.array([id in self._leaks for id in table['id'].to_pylist()])
        status = np.where(leaks_B & np.isin(status, (KEPT, 'cut')), 'leaks', status)
      own_B = np.where(inside_B, self.pool.spans.own_D[at_B], 0)
      columns = {name: table[name] for name in table.column_names} | {'status': status, 'row_tokens': own_B}
      for name, value_D in self._values.items():
        value_B = value_D[at_B]
        columns[name] = pa.array(value_B, schema.field(name).type, mask=(tokens_B == 0) | np.isnan(value_B))
      yield pa.table(columns, schema=schema)

  def parquet(self, out: Path) -> str:
    """Writes `documents-0000i-of-0000n.parquet`."""
    shards = -(-self.pool.documents.records // _SHARD) or 1
    written, shard, writer = 0, 0, None
    for table in self.tables():
      if writer is None or written >= (shard + 1) * _SHARD:
        if writer is not None:
          writer.close()
          shard += 1
        writer = storage.parquet_writer(out / f'documents-{shard:05d}-of-{shards:05d}.parquet', self.schema)
      writer.write_table(table)
      written += len(table)
    if writer is not None:
      writer.close()
    return f'{written:,} documents'

  def dolma(self, out: Path) -> str:
    """Writes attributes beside the JSONL files of the sources, and `metadata.json`.

    Raises:
      UserError: there are no such files.
    """
    names = [name for name in self._values if name.startswith(('score_', 'selected_'))]
    files, count, others = 0, 0, set()
    for label, tables in self._by_file():
      if not _is_jsonl(label):
        others.add(label)
        continue
      with _open(out, label) as file:
        for table in tables:
          for record in table.select(['id', 'status', 'characters', *names]).to_pylist():
            whole = (0, record['characters'])
            spans = {f'dsdm__{n}': [] if record[n] is None else [[*whole, float(f'{record[n]:.9g}')]] for n in names}
            if record['status'] not in (KEPT, 'cut'):
              spans[f'dsdm__{record["status"]}'] = [[*whole, 1.0]]
            file.write(json.dumps({'id': record['id'], 'attributes': spans}) + '\n')
            count += 1
      files += 1
    if not files:
      raise UserError('no source of the pool is a JSONL file, which dolma has; choose --format=parquet or datakit')
    storage.write_json(out / 'metadata.json', self.metadata)
    left = f'; {counted(len(others), "file")} left out, which are not named as JSONL' if others else ''
    return f'{count:,} documents of {counted(files, "file")}{left}'

  def datakit(self, out: Path) -> str:
    """Writes a Parquet file for each file of the sources, with its records in their order.

    Raises:
      UserError: no source has files.
    """
    import pyarrow as pa

    labels = sorted({label for _, table in self.pool.documents.read(['file']) for label in table['file'].to_pylist()})
    partition = {label: number for number, label in enumerate(label for label in labels if label)}
    kind = pa.field('partition_id', pa.int64())
    own = [field for field in self.schema if field.name in ('status', *self._values)]
    schema = pa.schema([self.schema.field('id'), kind, *own], self.schema.metadata)
    count = 0
    for label, tables in self._by_file():
      path = _new_file(out, label if label.endswith('.parquet') else f'{label}.parquet')
      with storage.parquet_writer(path, schema) as writer:
        for table in tables:
          number = pa.array(np.full(len(table), partition[label]), pa.int64())
          writer.write_table(table.append_column(kind, number).select(schema.names).cast(schema))
          count += len(table)
    if not partition:
      raise UserError('no source of the pool has files; choose --format=parquet')
    return f'{count:,} documents of {len(partition):,} files'

  def _by_file(self) -> Iterator[tuple[str, Iterator['pyarrow.Table']]]:
    """(label, tables of its records) of each file; without records that stand for a whole file that cannot be read."""

    def parts() -> Iterator[tuple[tuple[str, int], 'pyarrow.Table']]:
      turn, last = 0, ('', -1)
      for table in self.tables():
        labels, number, one = table['file'].to_pylist(), table['number'].to_pylist(), _is_record(table).tolist()
        edges = []
        for row, label in enumerate(labels):
          # A file that two sources read begins again.
          if begins := label != last[0] or (one[row] and number[row] <= last[1]):
            turn += 1
          if begins or not row:
            edges.append((row, turn))
          last = label, number[row] if one[row] else -1 if begins else last[1]
        for (start, of), (stop, _) in itertools.pairwise([*edges, (len(labels), 0)]):
          if labels[start]:
            part = table.slice(start, stop - start)
            yield (labels[start], of), part.filter(_is_record(part))

    for (label, _), group in itertools.groupby(parts(), key=lambda part: part[0]):
      yield label, (table for _, table in group)


def _leaks(leakage: Artifact | None) -> frozenset[str]:
  """Ids of the documents with text of a target, whose rows no arm takes."""
  if leakage is None or not storage.read_json(leakage.path / 'card.json', dict)['masked']:
    return frozenset()
  return frozenset(leak['id'] for leak in storage.read_jsonl(leakage.path / 'leaks.jsonl'))


def _is_record(table: 'pyarrow.Table') -> np.ndarray:
  """Whether a record is a line or row of its file, or a whole file with text."""
  number, status = table['number'].to_numpy(), table['status'].to_numpy(zero_copy_only=False)
  return (number > 0) | (status != 'bad_input')


def _is_jsonl(label: str) -> bool:
  packed = ('', '.gz', '.zst', '.bz2', '.xz')
  return label.endswith(tuple(f'.{kind}{ending}' for kind in ('jsonl', 'json', 'ndjson') for ending in packed))


def _new_file(folder: Path, label: str) -> Path:
  """The place of the file `label` in `folder`, whose own folder exists then.

  Raises:
    UserError: it was written before.
  """
  path = artifacts.inside(folder, label)
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.exists():
    raise UserError(
      f'two files of the sources, or one that two sources read, would be written as {label}; choose --format=parquet'
    )
  return path


@contextlib.contextmanager
def _open(folder: Path, label: str) -> Iterator[IO[str]]:
  """A new text file with the name and compression of a file of the sources."""
  with contextlib.ExitStack() as stack:
    raw: Any = stack.enter_context(open(_new_file(folder, label), 'wb'))
    if label.endswith('.bz2'):
      raw = stack.enter_context(bz2.BZ2File(raw, 'wb'))
    elif label.endswith('.xz'):
      raw = stack.enter_context(lzma.LZMAFile(raw, 'wb'))
    elif label.endswith('.gz'):
      raw = stack.enter_context(gzip.GzipFile('', 'wb', 6, raw, mtime=0))
    elif label.endswith('.zst'):
      import zstandard

      raw = stack.enter_context(zstandard.ZstdCompressor().stream_writer(raw, closefd=False))
    yield stack.enter_context(io.TextIOWrapper(raw, encoding='utf-8', newline='\n'))


def write(
  workdir: Location,
  form: str,
  out: Location,
  targets: Sequence[str] = (),
  arms: Sequence[str] | None = None,
  by: Literal['rows', 'tokens'] = 'rows',
) -> str:
  """Writes the scores of a run's documents into the folder `out`, completely or not at all, and returns a message.

  Raises:
    UserError: as `export.new_folder` or `DocumentScores`, or the sources have no files of this format.
  """
  with export.new_folder(out) as part:
    inputs = artifacts.read(workdir, 'pool', 'datamodel', *(('proxies', 'features') if by == 'tokens' else ()))
    for name in ('leakage', 'selection'):
      if artifacts.open_stage(workdir, name) is not None:
        inputs |= artifacts.read(workdir, name, known=inputs)
    inputs |= export.validation_of(workdir, inputs)
    done = getattr(DocumentScores(inputs, targets, arms, by), form)(part)
  return f'{done} as {form} in {out}'


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(
    prog='dsdm export documents', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', type=storage.locate, required=True, help='a run whose datamodel stage is finished')
  parser.add_argument('--format', choices=FORMATS, required=True)
  parser.add_argument('--out', type=storage.locate, required=True, help='folder or address; missing or empty')
  parser.add_argument('--target', action='append', default=[], help='repeat for several (default: all)')
  parser.add_argument('--arm', action='append', help='a selection, repeat for several (default: all)')
  parser.add_argument('--by', choices=('rows', 'tokens'), default='rows', help='tokens: run the proxies on every row')
  flags = parser.parse_args(argv)
  try:
    done = write(flags.workdir, flags.format, flags.out, flags.target, flags.arm, flags.by)
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  sys.stdout.write(visible(done) + '\n')
  return 0
