"""Exports a selection in formats that other programs read.

    python -m dsdm_jax.selection.export --workdir RUN --arm dsdm--mix--0 --format parquet --out FOLDER

Formats:
  parquet, jsonl: one record per row: place, row, document, source, score (by which the method ranks), datamodel, low
    and high (the datamodel's score for the arm's target and its interval), weight (1; visits in a mixture), text and
    tokens. If the arm selected documents, a record is one whole document, without a row. The sign and scale of scores
    are in the schema of a Parquet file, and in metadata.json beside JSONL.
  datasets: a folder that Hugging Face's `datasets.load_dataset(FOLDER)` opens: Parquet files and a card.
  arrayrecord: tf.train.Example in ArrayRecord, as Grain and MaxText read: tokens and row (int64), weight, id.
  megatron: <arm>.bin and <arm>.idx of Megatron-LM, one document per row; they have neither weights nor loss_mask.
  mds: shards of MosaicML's streaming: id, row, tokens (int32), weight.
  tfds: a TFDS dataset in TFRecord files, `selection:1.0.0`, that tfds and seqio open without this package. Records have
    tokens, row and weight, in the order of the selection.
In a pool of completions, of conversations, or of a document per row, all but megatron also have loss_mask: for each
token 1 if the loss counts it, else 0. Predictions are shifted: its first value belongs to the first token.
Beside the formats of trainers and tfds is the vocabulary: vocabulary.model, tokenizer.json or bytes.json, as in the
pool.
"""

import argparse
import contextlib
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.attribution import calibration
from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts, storage, tensorflow_start
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.storage import Address, Location
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.pool.vocabulary import FILES
from dsdm_jax.errors import UserError, visible
from dsdm_jax.selection import trainers

FORMATS = ('parquet', 'jsonl', 'datasets', 'arrayrecord', 'megatron', 'mds', 'tfds')
SUCCESS = '_SUCCESS'  # last object of an export at an address
METADATA = b'dsdm_jax'  # key of the schema of a Parquet file
_BLOCK = 4_096  # rows that are read and written together
_SHARD_ROWS = 65_536  # of one Parquet or TFRecord file


class Export:
  """One arm of a finished run.

  Args:
    inputs: finished stages: 'pool', 'datamodel' and 'selection'; with 'validation' scores are calibrated.
    arm: name of a selection, '<method>--<target>--<seed>', or '<method>' or '<method>--<target>' for its first seed.

  Raises:
    UserError: no such arm.
  """

  def __init__(self, inputs: Mapping[str, Artifact], arm: str):
    folder = inputs['selection'].path
    names = sorted(name.removesuffix('.npz') for name in inputs['selection'].manifest['files'] if name.endswith('.npz'))
    self.selection = Selection.load(folder, selection_named(arm, names))
    self.pool = Pool(inputs['pool'])
    target = self.selection.provenance['target']
    own = () if target == 'any' else (target,)
    about = {
      'score': 'what the method ranks by, higher first, on its own scale',
      'selection': self.selection.provenance,
    }
    self.metadata = metadata(inputs['datamodel'], inputs.get('validation'), own) | about
    self._columns = self._scores(inputs['datamodel'])

  def _scores(self, datamodel: Artifact) -> dict[str, np.ndarray]:
    """The datamodel's scores for the arm's target, of every row or document, and intervals if there are any."""
    scores, target = Scores(datamodel), self.selection.provenance['target']
    target = 'mix' if target == 'any' else target
    columns = {'datamodel': scores.score_N(target)}
    reach_N = None
    with contextlib.suppress(UserError):  # no resamples, or mean ranks: scores without intervals
      reach_N = scores.reach_N(target)
    if self.whole:
      columns['datamodel'] = self.pool.spans.means(columns['datamodel'])
      reach_N = None if reach_N is None else self.pool.spans.means(reach_N)
    if reach_N is not None:
      columns |= {'low': columns['datamodel'] - reach_N, 'high': columns['datamodel'] + reach_N}
    return columns

  @property
  def size(self) -> int:
    """Number of records: rows, or documents of an arm that selected documents."""
    return self.selection.size if self.selection.documents is None else len(self.selection.documents)

  @property
  def whole(self) -> bool:
    """Whether the arm selected documents."""
    return self.selection.documents is not None

  @property
  def count(self) -> str:
    """The number of records in words."""
    return f'{self.size} {"documents" if self.whole else f"rows of {self.pool.length} tokens"}'

  def records(self) -> Iterator[dict[str, list[Any]]]:
    """Columns of each block of rows, in the order of the selection; of documents, if the arm selected documents."""
    selection, pool = self.selection, self.pool
    sources, documents = pool.sources, pool.documents
    whole = selection.documents is not None
    items = selection.rows if selection.documents is None else selection.documents
    scores = selection.document_scores if whole else selection.scores
    end_mark = pool.encoder.eos  # is no part of a document's text
    for start in range(0, self.size, _BLOCK):
      here = slice(start, start + _BLOCK)
      at = items[here]
      missing = [None] * len(at)
      records = [documents[d] for d in (at if whole else pool.document_N[at])]
      tokens = pool.document_tokens(at) if whole else pool.texts(at)
      columns = {
        'place': list(range(start, start + len(at))),
        'row': missing if whole else at.tolist(),
        'document': [record['id'] for record in records],
        'source': [r['source'] for r in records] if whole else [sources[s] for s in pool.source_N[at]],
        'score': missing if scores is None else scores[here].tolist(),
      }
      for name in ('datamodel', 'low', 'high'):
        values = self._columns[name][at].tolist() if name in self._columns else missing
        columns[name] = [None if value != value else value for value in values]  # NaN: a prefilter left the row out
      columns['weight'] = [1.0] * len(at) if whole else selection.weights[here].tolist()
      alone = whole or not pool.packed
      columns['text'] = [pool.text_of(t[:-1] if alone and t[-1] == end_mark else t, alone) for t in tokens]
      columns['tokens'] = [t.tolist() for t in tokens]
      if pool.counts_some:
        columns['loss_mask'] = [mask_L.astype(np.int8).tolist() for mask_L in self._masks(at)]
      yield columns

  def _masks(self, at: np.ndarray) -> list[np.ndarray]:
    """What the loss counts of each token of rows, padding left out, or of documents."""
    if self.whole:
      return self.pool.document_counted(at)
    return [mask_L[:size] for mask_L, size in zip(self.pool.weights(at), self.pool.sizes(at), strict=True)]

  def lost(self, form: str) -> str:
    """What of this arm the files of a format have no place for, as the end of a message; '' if there is nothing."""
    if form != 'megatron':
      return ''
    items = self.selection.rows if self.selection.documents is None else self.selection.documents
    blocks = (items[start : start + _BLOCK] for start in range(0, self.size, _BLOCK))
    masked = self.pool.counts_some and any(not mask_L[1:].all() for at in blocks for mask_L in self._masks(at))
    weighted = not self.whole and bool((self.selection.weights != 1).any())
    names = ' and '.join(['loss_mask'] * masked + ['weight'] * weighted)
    return names and f'; without {names}, for which it has no place: Megatron-LM counts all tokens alike'

  def examples(self) -> Iterator[trainers.Example]:
    """Ids of each row or document, in the order of the selection."""
    for columns in self.records():
      rows = [-1 if row is None else row for row in columns['row']]
      masks = columns.get('loss_mask', [None] * len(rows))
      named = zip(columns['document'], rows, columns['weight'], columns['tokens'], masks, strict=True)
      for id, row, weight, tokens, mask in named:
        mask_L = None if mask is None else np.array(mask, np.uint8)
        yield trainers.Example(id, row, weight, np.array(tokens, np.int32), mask_L)

  def jsonl(self, out: Path) -> None:
    """Writes `<arm>.jsonl` in `out`."""
    with open(out / f'{self.selection.name}.jsonl', 'w', encoding='utf-8') as file:
      for columns in self.records():
        for values in zip(*columns.values(), strict=True):
          file.write(json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False) + '\n')
    storage.write_json(out / 'metadata.json', self.metadata)

  def parquet(self, out: Path, name: str | None = None) -> None:
    """Writes `<arm>-00000-of-0000n.parquet` in `out`."""
    import pyarrow

    kinds = dict.fromkeys(('place', 'row'), pyarrow.int64()) | dict.fromkeys(('document', 'source'), pyarrow.string())
    kinds |= dict.fromkeys(('score', 'datamodel', 'low', 'high', 'weight'), pyarrow.float32())
    about = {METADATA: json.dumps(self.metadata, ensure_ascii=False).encode()}
    lists = {'tokens': pyarrow.int32()} | ({'loss_mask': pyarrow.int8()} if self.pool.counts_some else {})
    kinds |= {'text': pyarrow.string()} | {name: pyarrow.list_(kind) for name, kind in lists.items()}
    schema = pyarrow.schema(kinds, about)
    shards, blocks = -(-self.size // _SHARD_ROWS), self.records()
    for shard in range(shards):
      path = out / f'{name or self.selection.name}-{shard:05d}-of-{shards:05d}.parquet'
      with storage.parquet_writer(path, schema) as writer:
        for _, columns in zip(range(_SHARD_ROWS // _BLOCK), blocks):  # noqa: B905 - the last shard is short
          writer.write_table(pyarrow.table(columns, schema=schema))

  def datasets(self, out: Path) -> None:
    """Writes `data/train-*.parquet` and a card from which `datasets` finds them."""
    (out / 'data').mkdir(parents=True)
    self.parquet(out / 'data', 'train')
    about = json.dumps(self.metadata, indent=2, ensure_ascii=False)
    card = (
      '---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---\n\n'
      f'# {self.selection.name}\n\n{self.count}, selected by dsdm_jax:\n\n'
      f'```json\n{about}\n```\n'
    )
    storage.write_text(out / 'README.md', card)

  def arrayrecord(self, out: Path) -> None:
    """Writes `<arm>-*.array_record` and the files of the vocabulary."""
    trainers.arrayrecord(self.examples(), self.size, out, self.selection.name)
    self._beside(out)

  def megatron(self, out: Path) -> None:
    """Writes `<arm>.bin`, `<arm>.idx` and the files of the vocabulary."""
    trainers.megatron(self.examples(), self.size, out, self.selection.name, self.pool.vocab_size)
    self._beside(out)

  def mds(self, out: Path) -> None:
    """Writes shards, their `index.json`, and the files of the vocabulary."""
    trainers.mds(self.examples(), out)
    self._beside(out)

  def _beside(self, out: Path) -> None:
    for name, data in read_vocabulary(self.pool.path).items():
      storage.write_bytes(out / name, data)
    storage.write_json(out / 'metadata.json', self.metadata)

  def tfds(self, out: Path) -> None:
    """Writes `selection/1.0.0/` (TFRecord, rows in the order of the selection) and the files of the vocabulary."""
    tensorflow_start.start()
    import tensorflow_datasets as tfds

    folder = out / 'selection' / '1.0.0'
    folder.mkdir(parents=True)
    length = None if self.whole or not self.pool.packed else self.pool.length
    lists = {'tokens': np.int32} | ({'loss_mask': np.uint8} if self.pool.counts_some else {})
    columns = {name: tfds.features.Tensor(shape=(length,), dtype=dtype) for name, dtype in lists.items()}
    columns |= {'row': np.int64, 'weight': np.float32}
    features = tfds.features.FeaturesDict(columns)
    info = tfds.core.DatasetInfo(
      builder=tfds.core.dataset_info.DatasetIdentity(
        name='selection', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='dsdm_jax.selection'
      ),
      description=json.dumps(self.metadata),
      features=features,
      disable_shuffling=True,  # the order is the selection's
    )
    writer = tfds.core.SequentialWriter(
      info, max_examples_per_shard=_SHARD_ROWS, file_format=tfds.core.FileFormat.TFRECORD
    )
    writer.initialize_splits(['train'])
    names = {'tokens': 'tokens_L', 'row': 'row', 'weight': 'weight', 'loss_mask': 'mask_L'}
    examples = ({name: getattr(example, names[name]) for name in columns} for example in self.examples())
    while part := list(itertools.islice(examples, _BLOCK)):
      writer.add_examples({'train': part})
    writer.close_splits(['train'])
    info.write_to_directory(str(folder))
    self._beside(out)


def selection_named(arm: str, names: Sequence[str]) -> str:
  """The one of `names` that is `arm`, or that of its first seed where `arm` has no seed, or no target either.

  Raises:
    UserError: there is none, or several.
  """
  firsts = [name for name in names if arm in (name.rpartition('--')[0], name.split('--')[0]) and name.endswith('--0')]
  found = [arm] if arm in names else firsts
  if len(found) != 1:
    raise UserError(f'--arm={arm}: the run has {", ".join(names)}; name one')
  return found[0]


def metadata(datamodel: Artifact, validation: Artifact | None = None, targets: Sequence[str] = ()) -> dict[str, Any]:
  """What the datamodel's scores mean: their sign and scale, and what they were computed with.

  Scores are calibrated for each task, their mix, and `targets`, which may be tasks joined by +.
  """
  semantics, scores = datamodel.semantics, Scores(datamodel)
  keys = ('sign', 'scale', 'output_fn', 'mix', 'confidence', 'damping', 'tasks')
  tasks_of = {target: target.split('+') for target in (*scores.tasks, *targets)} | {'mix': scores.tasks}
  of = {target: (scores.score_N(target), tasks) for target, tasks in tasks_of.items()}
  return {key: semantics[key] for key in keys} | calibration.describe(validation, of)


def validation_of(workdir: Location, opened: Mapping[str, Artifact]) -> dict[str, Artifact]:
  """The finished validation of the same pool, if there is one, under its name."""
  validation = artifacts.open_stage(workdir, 'validation')
  if validation is None or any(artifacts.mismatches(workdir, {**opened, 'validation': validation})):
    return {}
  validation.verify()
  return {'validation': validation}


def read_vocabulary(folder: Location) -> dict[str, bytes]:
  """Name → bytes of the vocabulary files in `folder`; `vocabulary.open_encoder` opens a folder with only these files.

  Raises:
    UserError: there are none.
  """
  files = {name: data for name in FILES if (data := storage.read_bytes(folder / name)) is not None}
  if not files:
    raise UserError(f'{folder} has no vocabulary; run --stage=pool')
  return files


def main(argv: Sequence[str] | None = None) -> int:
  """Exit code 0; or 2 after one line on stderr."""
  parser = argparse.ArgumentParser(
    prog='python -m dsdm_jax.selection.export', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', type=storage.locate, required=True, help='a run whose selection stage is finished')
  parser.add_argument('--arm', required=True, help='<method>[--<target>[--<seed>]]')
  parser.add_argument('--format', choices=FORMATS, required=True)
  parser.add_argument('--out', type=storage.locate, required=True, help='folder or address; missing or empty')
  flags = parser.parse_args(argv)
  try:
    sys.stdout.write(visible(write(flags.workdir, flags.arm, flags.format, flags.out)) + '\n')
  except UserError as error:
    sys.stderr.write(f'dsdm_jax: {error}\n')
    return 2
  return 0


def write(workdir: Location, arm: str, form: str, out: Location) -> str:
  """Writes an arm into the folder `out`, completely or not at all, and returns a message about it.

  Raises:
    UserError: as `new_folder` or `Export`; no such run, or an artifact is damaged or of another pool.
  """
  with new_folder(out) as part:
    inputs = artifacts.read(workdir, 'pool', 'datamodel', 'selection')
    export = Export(inputs | validation_of(workdir, inputs), arm)
    getattr(export, form)(part)
  return f'{export.selection.name}: {export.count} as {form} in {out}' + export.lost(form)


@contextlib.contextmanager
def new_folder(out: Location) -> Iterator[Path]:
  """Yields a folder to write into, which becomes `out` at the end; after an error there is none.

  At an address, the object `_SUCCESS` is written last: what has none was not uploaded whole.

  Raises:
    UserError: `out` is not empty, cannot be used, or is in a stage of a workdir; or another export writes it.
  """
  target = storage.check_location(out, '--out')
  target = target.resolve() if isinstance(target, Path) else target
  if storage.exists(target) and not (storage.is_folder(target) and not storage.children(target)):
    raise UserError(f'--out={out} exists and is not an empty folder; name a folder that is missing or empty')
  if (stage := artifacts.stage_around(target)) is not None:
    raise UserError(f'--out={out} is in {stage}, which belongs to a run; name a folder elsewhere')
  if isinstance(target, Address):
    with storage.uploading(target) as part:
      yield part
    storage.write_bytes(target / SUCCESS, b'')
    return
  part = target.with_name(f'.{target.name}.export.dsdm')
  part.parent.mkdir(parents=True, exist_ok=True)
  try:
    part.mkdir()
  except FileExistsError:
    raise UserError(f'{part} exists: another export writes it, or was killed; then delete it') from None
  try:
    yield part
    part.replace(target)
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


if __name__ == '__main__':
  sys.exit(main())
