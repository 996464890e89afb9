"""Reads from the artifacts of the other stages what the report shows. The only part of the report that knows files."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core.artifacts import Artifact

STAGES = (
  'pool',
  'targets',
  'proxies',
  'features',
  'datamodel',
  'selection',
  'pretraining',
  'evaluation',
)
_SCORES = re.compile(r'score_(.+)_N')


@dataclasses.dataclass(frozen=True)
class Selected:
  """The rows that one arm and seed trained on."""

  method: str
  target_mix: str
  seed: int
  rows: np.ndarray  # int64 [k]
  epochs: float


@dataclasses.dataclass(frozen=True)
class Curve:
  """Training loss of one arm: nats per token at `step_P` (logged steps) for each seed."""

  method: str
  target_mix: str
  step_P: np.ndarray
  loss_SP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Evidence:
  """Everything that the report shows, read but not yet worded or drawn.

  Attributes:
    results: the content of `results.json` of the evaluation.
    sources: names of the kinds of document.
    source_N: int, index into `sources` for each row of the pool.
    document_N: int, index into `documents` for each row.
    documents: one dict per document, with at least `id`.
    planted_N: int, -1 or the planted target example that covers the row.
    scores: target → float32 [N], higher = helps that target.
    selected: what each arm and seed trained on.
    curves: training loss by arm.
    dropped: one dict per document that the leakage guard dropped.
    tokens: tokens that each final model was trained on.
    cost: stage → seconds and flop.
    versions: package → version.
    config: flat key → value.
    text: row → its text.
  """

  results: Mapping[str, Any]
  sources: tuple[str, ...]
  source_N: np.ndarray
  document_N: np.ndarray
  documents: list[Mapping[str, Any]]
  planted_N: np.ndarray
  scores: Mapping[str, np.ndarray]
  selected: list[Selected]
  curves: list[Curve]
  dropped: list[Mapping[str, Any]]
  tokens: int
  cost: Mapping[str, Mapping[str, float]]
  versions: Mapping[str, str]
  config: Mapping[str, Any]
  text: Callable[[int], str]

  def selections(self, method: str, target_mix: str) -> list[Selected]:
    """Of all seeds of one arm."""
    return [s for s in self.selected if (s.method, s.target_mix) == (method, target_mix)]


def load(inputs: Mapping[str, Artifact], config: Mapping[str, Any], text: Callable[[int], str]) -> Evidence:
  """Reads the artifacts of `STAGES`.

  Args:
    inputs: an artifact for each of `STAGES`.
    config: flat key → value, shown as it is.
    text: row of the pool → its text; called only for the rows that are shown.

  Raises:
    FileNotFoundError: a selection that the index names is not there.
    KeyError: an artifact lacks a part.
  """
  pool = inputs['pool'].path
  with np.load(pool / 'rows.npz') as rows:
    sources = tuple(str(name) for name in rows['sources'])
    source_N, document_N, planted_N = rows['source_N'], rows['document_N'], rows['planted_N']
  with np.load(inputs['datamodel'].path / 'scores.npz') as file:
    scores = {m[1]: file[key] for key in file.files if (m := _SCORES.fullmatch(key))}
  runs = _json(inputs['selection'].path / 'index.json')
  curves, tokens = _curves(inputs['pretraining'].path, runs)
  return Evidence(
    results=_json(inputs['evaluation'].path / 'results.json'),
    sources=sources,
    source_N=source_N,
    document_N=document_N,
    documents=list(_lines(pool / 'documents.jsonl')),
    planted_N=planted_N,
    scores=scores,
    selected=list(_selected(inputs['selection'].path, runs)),
    curves=curves,
    dropped=list(_lines(pool / 'dropped.jsonl')),
    tokens=tokens,
    cost={stage: inputs[stage].manifest['cost'] for stage in STAGES},
    versions=inputs['evaluation'].manifest['versions'],
    config=config,
    text=text,
  )


def _selected(folder: Path, runs: list[Mapping[str, Any]]) -> Iterator[Selected]:
  for run in runs:
    # A deterministic method has one selection, which all its seeds train on.
    with np.load(folder / f'{run["selection"]}.npz') as arrays:
      rows = arrays['rows']
    yield Selected(run['method'], run['target'], run['seed'], rows, run['epochs'])


def _curves(folder: Path, runs: list[Mapping[str, Any]]) -> tuple[list[Curve], int]:
  """Curves by arm, and the tokens of the longest run."""
  seeds: dict[tuple[str, str], list[dict[int, float]]] = {}
  tokens = 0
  for run in runs:
    records = list(_lines(folder / f'{run["name"]}.jsonl'))
    # A resumed run may have logged a step twice; the later line is the one that counts.
    seeds.setdefault((run['method'], run['target']), []).append({r['step']: r['loss'] for r in records})
    tokens = max([tokens, *(int(r['tokens']) for r in records)])
  curves = []
  for (method, target), by_seed in seeds.items():
    steps = sorted(set.intersection(*(set(losses) for losses in by_seed)))
    loss_SP = np.array([[losses[s] for s in steps] for losses in by_seed], np.float64)
    curves.append(Curve(method, target, np.array(steps, np.int64), loss_SP))
  return curves, tokens


def _json(path: Path) -> Any:
  return json.loads(path.read_bytes())


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
  # Text may hold U+2028 and the like: only "\n" ends a record.
  for line in path.read_text('utf-8').split('\n'):
    if line:
      yield json.loads(line)
