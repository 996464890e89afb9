"""Reads what the report shows from the artifacts of the other stages. No other part of the report reads files."""

import contextlib
import dataclasses
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsdm_jax.attribution.scores import Scores
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact, inside
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool.pool import Documents
from dsdm_jax.errors import UserError

STAGES = (
  *('pool', 'leakage', 'targets', 'proxies', 'features', 'target_features', 'datamodel', 'selection'),
  *('pretraining', 'ladder', 'evaluation'),
)


@dataclasses.dataclass(frozen=True)
class Selected:
  """The rows that one arm and seed trained on."""

  method: str
  target_mix: str
  seed: int
  rows: np.ndarray  # int64 [k]
  epochs: float
  name: str  # of the selection; seeds of a deterministic method share one


@dataclasses.dataclass(frozen=True)
class TargetExample:
  """A target example, and the rows with the highest and the lowest scores for it alone.

  The first half of `rows_M` and `score_M` (in standard deviations of the example's own scores) is best first, the
  second half worst first.
  """

  context: str
  answer: str
  rows_M: np.ndarray
  score_M: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curve:
  """Training loss of one arm, in nats per token, at the logged steps `step_P` for each seed."""

  method: str
  target_mix: str
  step_P: np.ndarray
  loss_SP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Everything that the report shows, as read from the artifacts.

  Attributes:
    results: the content of `results.json` of the evaluation.
    sources: names of the kinds of documents.
    source_N: int, index into `sources` for each row of the pool.
    document_N: int, index into `documents` for each row.
    offset_N: int, position of the row's first token in its document.
    documents: one dict per document, with at least `id`.
    planted_N: int, the planted target example that covers the row, or -1.
    scores: target → float32 [N], higher = helps that target; NaN for rows that a prefilter left out.
    reach: target → float32 [N], half the length of each score's interval, for targets that have intervals.
    examples: task → its target examples that have scores of their own.
    selected: the rows that each arm and seed trained on.
    curves: training loss by arm.
    leaks: one dict per document that has text of a target or benchmark.
    leakage: content of `card.json` of the stage `leakage`, and under `trained` for each proxy how many of these rows it
      trained on.
    tokens: tokens that each final model was trained on.
    cost: stage → seconds, flop and bytes on disk; without the ladder if it has no rungs.
    versions: package → version.
    environment: the machine that wrote the report, in words.
    multiplier: content of `multiplier.json` of the evaluation, or None.
    lds: content of `lds.json` of the validation, or None.
    config: flat key → value.
    text: row → its text.
  """

  results: Mapping[str, Any]
  sources: tuple[str, ...]
  source_N: np.ndarray
  document_N: np.ndarray
  offset_N: np.ndarray
  documents: Sequence[Mapping[str, Any]]
  planted_N: np.ndarray
  scores: Mapping[str, np.ndarray]
  reach: Mapping[str, np.ndarray]
  examples: Mapping[str, list[TargetExample]]
  selected: list[Selected]
  curves: list[Curve]
  leaks: list[Mapping[str, Any]]
  leakage: Mapping[str, Any]
  tokens: int
  cost: Mapping[str, Mapping[str, float]]
  versions: Mapping[str, str]
  environment: Mapping[str, str]
  multiplier: Mapping[str, Any] | None
  lds: Mapping[str, Any] | None
  config: Mapping[str, Any]
  text: Callable[[int], str]

  def selected_for(self, method: str, target: str) -> Selected | None:
    """Of the first arm of a method that is for this target of `scores`: alone, or else with others."""
    every = self.scores.keys() - {'mix'}
    wanted = every if target == 'mix' else {target}
    own = [(every if s.target_mix == 'mix' else {*s.target_mix.split('+')}, s) for s in self.selected]
    suited = [(tasks != wanted, s) for tasks, s in own if s.method == method and tasks >= wanted]
    return min(suited, key=lambda pair: pair[0], default=(True, None))[1]


def load(inputs: Mapping[str, Artifact], config: Mapping[str, Any], text: Callable[[int], str]) -> Evidence:
  """Reads the artifacts of `STAGES`.

  Args:
    inputs: an artifact for each of `STAGES`, and that of `prefilter` in a run that has one.
    config: flat key → value.
    text: row of the pool → its text; called only for the rows that are shown.

  Raises:
    FileNotFoundError: a selection that the index names is missing.
    KeyError: an artifact lacks a part.
  """
  pool = inputs['pool'].path
  source_N, document_N, offset_N, planted_N = (
    storage.mapped(pool / 'rows' / f'{k}.npy') for k in ('source', 'document', 'offset', 'planted')
  )
  scores = Scores(inputs['datamodel'])
  targets, reach = (*scores.tasks, 'mix'), {}
  for target in targets:
    with contextlib.suppress(UserError):  # no resamples, or a mix of ranks: scores without intervals
      reach[target] = scores.reach_N(target)
  arrays = scores.arrays
  examples = {
    task: _examples(inputs['targets'].path, task, arrays[f'example_rows_{task}_EM'], arrays[f'example_score_{task}_EM'])
    for task in scores.tasks
    if f'example_rows_{task}_EM' in arrays
  }
  runs = storage.read_json(inputs['selection'].path / 'index.json', list)
  curve_list, tokens = curves(inputs['pretraining'].path, runs)
  multiplier = _optional(inputs, 'evaluation', 'multiplier.json')
  paid = [stage for stage in artifacts.STAGES if stage in inputs and stage in (*STAGES, 'prefilter')]
  paid = [stage for stage in paid if stage != 'ladder' or multiplier is not None]
  return Evidence(
    results=storage.read_json(inputs['evaluation'].path / 'results.json', dict),
    sources=tuple(storage.read_json(pool / 'sources.json', list)),
    source_N=source_N,
    document_N=document_N,
    offset_N=offset_N,
    documents=Documents(pool, inputs['pool'].manifest['files']),
    planted_N=planted_N,
    scores={target: scores.score_N(target) for target in targets},
    reach=reach,
    examples=examples,
    selected=list(_selected(inputs['selection'].path, runs)),
    curves=curve_list,
    leaks=storage.read_jsonl(inputs['leakage'].path / 'leaks.jsonl'),
    leakage=_leakage(inputs),
    tokens=tokens,
    cost={stage: dict(inputs[stage].manifest['cost']) | {'bytes': _bytes(inputs[stage])} for stage in paid},
    versions=inputs['evaluation'].manifest['versions'],
    environment=_environment(),
    multiplier=multiplier,
    lds=_optional(inputs, 'validation', 'lds.json'),
    config=config,
    text=text,
  )


def _selected(folder: Location, runs: list[Mapping[str, Any]]) -> Iterator[Selected]:
  for run in runs:
    # All seeds of a deterministic method train on one selection.
    with storage.load(inside(folder, f'{run["selection"]}.npz')) as arrays:
      rows = arrays['rows']
    yield Selected(run['method'], run['target'], run['seed'], rows, run['epochs'], run['selection'])


def _examples(folder: Location, task: str, rows_EM: np.ndarray, score_EM: np.ndarray) -> list[TargetExample]:
  records = storage.read_jsonl(folder / f'{task}.target.jsonl')
  return [
    TargetExample(record['context'], record['answer'], rows_M, score_M)
    for record, rows_M, score_M in zip(records, rows_EM, score_EM, strict=False)
  ]


def leaks(leakage: Artifact) -> dict[str, list[Mapping[str, Any]]]:
  """Documents with text of targets, which are `masked` (or `listed` alone), and those that share common `phrases`."""
  files = {'masked' if leakage.semantics['masked'] else 'listed': 'leaks.jsonl', 'phrases': 'phrases.jsonl'}
  return {name: storage.read_jsonl(leakage.path / file) for name, file in files.items()}


def _leakage(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
  folder, proxies = inputs['leakage'].path, inputs['proxies']
  mask_N = storage.load(folder / 'mask.npy')
  subsets = sorted(name for name in proxies.manifest['files'] if name.startswith('subset_'))
  trained = [int(mask_N[storage.load(proxies.path / name)].sum()) for name in subsets]
  return {**storage.read_json(folder / 'card.json', dict), 'trained': trained}


def _bytes(artifact: Artifact) -> int:
  return sum(entry['bytes'] for entry in artifact.manifest['files'].values())


def _environment() -> dict[str, str]:
  import jax

  devices = jax.devices()
  return {
    'system': platform.platform(),
    'processor': f'{platform.machine()}, {os.cpu_count()} cores',
    'devices': f'{len(devices)} × {devices[0].device_kind} ({devices[0].platform})',
  }


def _optional(inputs: Mapping[str, Artifact], stage: str, name: str) -> Any:
  """A JSON file, or None if its stage has none."""
  file = inputs[stage].file(name) if stage in inputs else None
  return None if file is None else storage.read_json(file)


def curves(folder: Location, runs: Sequence[Mapping[str, Any]]) -> tuple[list[Curve], int]:
  """Curves by arm, and the number of tokens of the longest run."""
  seeds: dict[tuple[str, str], list[dict[int, float]]] = {}
  tokens = 0
  for run in runs:
    records = storage.read_jsonl(inside(folder, f'{run["name"]}.jsonl'))
    # A resumed run can log a step twice; the later line counts.
    seeds.setdefault((run['method'], run['target']), []).append({r['step']: r['loss'] for r in records})
    tokens = max([tokens, *(int(r['tokens']) for r in records)])
  by_arm = []
  for (method, target), by_seed in seeds.items():
    steps = sorted(set.intersection(*(set(losses) for losses in by_seed)))
    loss_SP = np.array([[losses[s] for s in steps] for losses in by_seed], np.float64)
    by_arm.append(Curve(method, target, np.array(steps, np.int64), loss_SP))
  return by_arm, tokens
