"""A finished arm of a study as one small JSON file, so that arms from several machines can be compared in one table.

The file holds the result of every model of the arm on every held-out item and benchmark item (to a thousandth of a
nat), the cost, a summary of the selections, and the config. Reading it needs no pool, model or workdir. Arms can be
compared where they were evaluated on the same items.
"""

import base64
import binascii
import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import multiplier, results

FORMAT = 2
_UNIT = 1e-3  # values are stored as multiples of a thousandth of a nat
_MOST = 10**8  # values of one array: bounds the memory that a malicious file can make us allocate
# Settings of the evaluation stage that decide which items it has. The place of their files does not.
_EVALUATION = ('tasks', 'max_items', 'file_', 'generate_tokens', 'begin_with_end_mark')
_QUESTIONS = (*(f'evaluation.{key}' for key in _EVALUATION), 'targets.seed')
_CARD = ('name', 'method', 'target', 'distinct', 'tokens', 'documents', 'duplicates', 'sources')


@dataclasses.dataclass(frozen=True)
class ArmFile:
  """A finished arm.

  Attributes:
    name: in the study.
    questions: settings and checksums that decide the evaluation items; equal where two arms can be compared.
    runs: as `evaluation/runs.json`.
    items: `<metric>__<task>__<split>` → float64 [runs, items], of held-out items and benchmarks.
    documents, categories: (task, split) → document or category of each item.
    tasks: as in `results.json`.
    lines: as `items`, of the reference lines; empty where there are none.
    ladder: index and items of the ladder's models; None without a ladder.
    cost: stage → 'flop' and 'seconds'.
    choices: selection → 'flop' and 'seconds' of this selection alone.
    final: 'flop' and 'seconds' of training one final model.
    cards: the summaries in `selection/cards.json`, without overlaps.
    pool: 'rows' and 'sources' (share of rows) of the pool.
    config: flat.
    versions: package → version.
  """

  name: str
  questions: Mapping[str, Any]
  runs: Sequence[Mapping[str, Any]]
  items: Mapping[str, np.ndarray]
  documents: Mapping[tuple[str, str], Sequence[str]]
  categories: Mapping[tuple[str, str], Sequence[str]]
  tasks: Sequence[Mapping[str, Any]]
  lines: Mapping[str, np.ndarray]
  ladder: tuple[Sequence[Mapping[str, Any]], Mapping[str, np.ndarray]] | None
  cost: Mapping[str, Mapping[str, float]]
  choices: Mapping[str, Mapping[str, float]]
  final: Mapping[str, float]
  cards: Sequence[Mapping[str, Any]]
  pool: Mapping[str, Any]
  config: Mapping[str, Any]
  versions: Mapping[str, str]


def write(workdir: Location, name: str, config: Mapping[str, Any], path: Location) -> None:
  """Writes the finished run in `workdir` to the file `path`.

  Args:
    name: of the arm.
    config: flat.
  """
  stages = artifacts.read(workdir, *pipeline.needed('evaluation', config))
  evaluation, selection, pool = (stages[stage].path for stage in ('evaluation', 'selection', 'pool'))
  index = storage.read_json(stages['ladder'].path / 'index.json')
  card = storage.read_json(pool / 'card.json', dict)
  cards = storage.read_json(selection / 'cards.json', list)
  content = {
    'format': FORMAT,
    'arm': name,
    'asked': _questions(stages),
    'runs': storage.read_json(evaluation / 'runs.json', list),
    'items': _packed_items(evaluation / 'items.npz'),
    'lines': _packed_items(evaluation / 'lines.npz'),
    **{kind: _packed_names(evaluation / f'{kind}.json') for kind in ('documents', 'categories')},
    'tasks': storage.read_json(evaluation / 'results.json', dict)['tasks'],
    'ladder': {'index': index, 'items': _packed_items(evaluation / 'ladder_items.npz')} if index else None,
    'cost': {stage: artifact.manifest['cost'] for stage, artifact in stages.items()},
    'choices': stages['selection'].semantics['cost'],
    'final': multiplier.final_cost(stages['pretraining']),
    'cards': [{key: summary[key] for key in _CARD} for summary in cards],
    'pool': {'rows': card['rows'], 'sources': {s: n['rows'] / card['rows'] for s, n in card['sources'].items()}},
    'config': config,
    'versions': stages['evaluation'].manifest['versions'],
  }
  storage.write_bytes(path, artifacts.seal(content))


def _questions(stages: Mapping[str, artifacts.Artifact]) -> dict[str, Any]:
  """Settings of the items, and checksums of the targets' files."""
  questions = {k: v for k, v in stages['evaluation'].settings.items() if k.startswith(_QUESTIONS)}
  files = {f'targets/{name}': entry['sha256'] for name, entry in stages['targets'].manifest['files'].items()}
  return json.loads(json.dumps(questions | files))


def _packed_items(path: Location) -> dict[str, Any]:
  with storage.load(path) as arrays:
    keys = [key for key in arrays.files if key.rpartition('__')[2] in results.COMPARED_SPLITS]
    return {key: _packed(np.rint(arrays[key] / _UNIT)) for key in keys}


def _packed_names(path: Location) -> dict[str, Any]:
  """Names as numbers: only which items share a name matters, also those of two tasks."""
  names = {k: v for k, v in storage.read_json(path, dict).items() if k.rpartition('__')[2] in results.COMPARED_SPLITS}
  numbers = {name: number for number, name in enumerate(sorted({name for own in names.values() for name in own}))}
  return {key: _packed(np.array([numbers[name] for name in own])) for key, own in names.items()}


def _packed(values: np.ndarray) -> dict[str, Any]:
  whole = np.ascontiguousarray(values, '<i4')
  data = base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode('ascii')
  return {'shape': list(whole.shape), 'data': data}


def read(path: Location) -> ArmFile:
  """Reads a file that `write` wrote.

  Raises:
    UserError: the file is missing, damaged, or of another format.
  """
  try:
    if (data := storage.read_bytes(path)) is None:
      raise UserError(f'{path} does not exist; give files that `dsdm_jax.study run` wrote')
    content = artifacts.unseal(data)
    if content['format'] != FORMAT:
      raise UserError(f'{path} has format {content["format"]} and this version reads {FORMAT}; run the arm again')
    ladder = content['ladder']
    return ArmFile(
      name=content['arm'],
      questions=_of_items(content['asked']),
      items=_items(content['items']),
      lines=_items(content.get('lines', {})),
      documents=_names(content['documents']),
      categories=_names(content['categories']),
      ladder=ladder and (ladder['index'], _items(ladder['items'])),
      **{
        key: content[key]
        for key in ('runs', 'tasks', 'cost', 'choices', 'final', 'cards', 'pool', 'config', 'versions')
      },
    )
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); give files that `dsdm_jax.study run` wrote') from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error, binascii.Error) as error:
    raise UserError(f'{path} is not the file of a finished arm, or is damaged ({error}); run the arm again') from error


def _of_items(asked: Mapping[str, Any]) -> dict[str, Any]:
  """`asked` without the targets' counts, `targets/<task>.json`, which say nothing of the items."""
  return {key: value for key, value in asked.items() if f'{key.removesuffix(".json")}.holdout.jsonl' not in asked}


def _items(packed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return {key: _unpacked(value) * _UNIT for key, value in packed.items()}


def _names(packed: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
  names = {}
  for key, value in packed.items():
    task, _, split = key.rpartition('__')
    names[task, split] = [str(number) for number in _unpacked(value)]
  return names


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
  count = math.prod(packed['shape'])
  if not 0 <= count <= _MOST:
    raise ValueError(f'an array of {count} values')
  data = zlib.decompressobj().decompress(base64.b64decode(packed['data'], validate=True), 4 * count + 1)
  if len(data) != 4 * count:
    raise ValueError(f'an array of shape {packed["shape"]} does not have {4 * count} bytes')
  return np.frombuffer(data, '<i4').reshape(packed['shape'])
