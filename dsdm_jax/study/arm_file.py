"""A finished arm of a study as one small JSON file, so that arms of several sittings and machines add up to one table.

Such a file holds what every model of the arm did on every held-out item and benchmark item (to a thousandth of a nat),
what it cost, what was selected, and the settings. It stands alone: no pool, no model and no workdir is needed to read
it, and files can be put together where their arms were asked the same questions.
"""

import base64
import binascii
import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts, storage
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import multiplier, results

FORMAT = 1
_UNIT = 1e-3  # of values; answers to a thousandth of a nat
_MOST = 10**8  # values in one array; what a hostile file may make us allocate
# What the evaluation stage depends on that makes questions other ones; where their files lie is none of it.
_QUESTIONS = (
  'evaluation.tasks', 'evaluation.max_items', 'evaluation.file_', 'evaluation.generate_tokens',
  'evaluation.begin_with_end_mark', 'targets.seed', 'SHA-256 of ',
)  # fmt: skip
_CARD = ('name', 'method', 'target', 'distinct', 'tokens', 'documents', 'duplicates', 'sources')


@dataclasses.dataclass(frozen=True)
class ArmFile:
  """A finished arm.

  Attributes:
    name: in the study.
    asked: what its models were asked; equal where two arms can be compared.
    runs: as `evaluation/runs.json`.
    items: `<metric>__<task>__<split>` → float64 [runs, items], of held-out items and benchmarks.
    documents, categories: (task, split) → of each item.
    tasks: as in `results.json`.
    ladder: index and items of the ladder's models; None where none was run.
    cost: stage → 'flop' and 'seconds'.
    choices: selection → what it took by itself, 'flop' and 'seconds'; empty in files of before that was measured.
    final: 'flop' and 'seconds' of one training.
    cards: of its selections, as `selection/cards.json`, without overlaps.
    pool: 'rows' and 'sources' (share of rows) of the pool that was chosen from.
    config: flat.
    versions: package → version.
  """

  name: str
  asked: Mapping[str, Any]
  runs: Sequence[Mapping[str, Any]]
  items: Mapping[str, np.ndarray]
  documents: Mapping[tuple[str, str], Sequence[str]]
  categories: Mapping[tuple[str, str], Sequence[str]]
  tasks: Sequence[Mapping[str, Any]]
  ladder: tuple[Sequence[Mapping[str, Any]], Mapping[str, np.ndarray]] | None
  cost: Mapping[str, Mapping[str, float]]
  choices: Mapping[str, Mapping[str, float]]
  final: Mapping[str, float]
  cards: Sequence[Mapping[str, Any]]
  pool: Mapping[str, Any]
  config: Mapping[str, Any]
  versions: Mapping[str, str]


def write(workdir: Path, name: str, config: Mapping[str, Any], path: Path) -> None:
  """Puts what the finished run in `workdir` did into the file `path`.

  Args:
    name: of the arm.
    config: flat.
  """
  done = {stage: artifacts.open_stage(workdir, stage) for stage in pipeline.needed('evaluation')}
  stages = {stage: found for stage, found in done.items() if found is not None}
  evaluation, selection, pool = (stages[stage].path for stage in ('evaluation', 'selection', 'pool'))
  index = json.loads((stages['ladder'].path / 'index.json').read_text())
  card = json.loads((pool / 'card.json').read_text())
  cards = json.loads((selection / 'cards.json').read_text())
  storage.write_json(path, {
    'format': FORMAT, 'arm': name, 'asked': _asked(stages),
    'runs': json.loads((evaluation / 'runs.json').read_text()),
    'items': _packed_items(evaluation / 'items.npz'),
    **{kind: _packed_names(evaluation / f'{kind}.json') for kind in ('documents', 'categories')},
    'tasks': json.loads((evaluation / 'results.json').read_text())['tasks'],
    'ladder': {'index': index, 'items': _packed_items(evaluation / 'ladder_items.npz')} if index else None,
    'cost': {stage: found.manifest['cost'] for stage, found in stages.items()},
    'choices': stages['selection'].semantics.get('cost', {}),
    'final': multiplier.final_cost(stages['pretraining']),
    'cards': [{key: found[key] for key in _CARD} for found in cards],
    'pool': {'rows': card['rows'], 'sources': {s: n['rows'] / card['rows'] for s, n in card['sources'].items()}},
    'config': config, 'versions': stages['evaluation'].manifest['versions'],
  })  # fmt: skip


def _asked(stages: Mapping[str, artifacts.Artifact]) -> dict[str, Any]:
  """The questions, and checksums of the targets' files (what these were made from holds times, which differ)."""
  questions = {k: v for k, v in stages['evaluation'].settings.items() if k.startswith(_QUESTIONS)}
  files = {f'targets/{name}': entry['sha256'] for name, entry in stages['targets'].manifest['files'].items()}
  return json.loads(json.dumps(questions | files))


def _packed_items(path: Path) -> dict[str, Any]:
  with np.load(path, allow_pickle=False) as arrays:
    return {
      key: _packed(np.rint(arrays[key] / _UNIT)) for key in arrays.files
      if key.rpartition('__')[2] in results.COMPARED_SPLITS
    }  # fmt: skip


def _packed_names(path: Path) -> dict[str, Any]:
  """Names by their numbers: which items share one is all that counts."""
  found = {}
  for key, names in json.loads(path.read_text()).items():
    if key.rpartition('__')[2] in results.COMPARED_SPLITS:
      found[key] = _packed(np.unique(names, return_inverse=True)[1])
  return found


def _packed(values: np.ndarray) -> dict[str, Any]:
  whole = np.ascontiguousarray(values, '<i4')
  data = base64.b64encode(zlib.compress(whole.tobytes(), 9)).decode('ascii')
  return {'shape': list(whole.shape), 'data': data}


def read(path: Path) -> ArmFile:
  """Opens what `write` left.

  Raises:
    UserError: the file is not there, is not whole, or is of another format.
  """
  try:
    found = json.loads(path.read_text('utf-8'))
    if found['format'] != FORMAT:
      raise UserError(f'{path} is of format {found["format"]}, and this version reads {FORMAT}; make the arm anew')
    ladder = found['ladder']
    return ArmFile(
      found['arm'], found['asked'], found['runs'], _items(found['items']), _names(found['documents']),
      _names(found['categories']), found['tasks'], ladder and (ladder['index'], _items(ladder['items'])),
      found['cost'], found.get('choices', {}),
      *(found[key] for key in ('final', 'cards', 'pool', 'config', 'versions')),
    )  # fmt: skip
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror}); give files that bench study left') from error
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, zlib.error, binascii.Error) as error:
    raise UserError(f'{path} is no finished arm of a study, or not whole ({error}); make the arm anew') from error


def _items(packed: Mapping[str, Any]) -> dict[str, np.ndarray]:
  return {key: _unpacked(value) * _UNIT for key, value in packed.items()}


def _names(packed: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
  found = {}
  for key, value in packed.items():
    task, _, split = key.rpartition('__')
    found[task, split] = [str(number) for number in _unpacked(value)]
  return found


def _unpacked(packed: Mapping[str, Any]) -> np.ndarray:
  count = math.prod(packed['shape'])
  if not 0 <= count <= _MOST:
    raise ValueError(f'an array of {count} values')
  data = zlib.decompressobj().decompress(base64.b64decode(packed['data'], validate=True), 4 * count + 1)
  if len(data) != 4 * count:
    raise ValueError(f'an array of shape {packed["shape"]} has other than {4 * count} bytes')
  return np.frombuffer(data, '<i4').reshape(packed['shape'])
