"""A study: many arms that differ in a few keys, each a run of its own, compared on the same questions.

Arms share what they have in common: a stage that an earlier arm finished with the same settings is linked, not made
again. Started again, the command goes on where it stopped, arm by arm and inside an arm. Leaves `arms/<name>/`, and
`study.json` (as `results.json`, `docs/evaluation.md`) and `study.csv` of all arms that are finished.
"""

import argparse
import csv
import importlib.util
import io
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dsdm_jax import pipeline
from dsdm_jax.core import artifacts, atomic
from dsdm_jax.core.config import flatten, validate
from dsdm_jax.core.errors import UserError
from dsdm_jax.evaluation import results, terminal
from dsdm_jax.evaluation.comparisons import BASELINES

BASE, AGAIN = 'base', 'again_'
LAST = 'evaluation'
_COLUMNS = (
  'task', 'split', 'metric', 'method', 'target_mix', 'baseline', 'difference', 'low', 'high', 'p_value', 'p_holm',
  'verdict', 'conditional',
)  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', default='configs/study.py', help='file with ARMS and get_config(arm)')
  parser.add_argument('--workdir', required=True, help='folder of the study')
  parser.add_argument('--arms', default='', help=f'some of ARMS, joined by commas, {BASE} among them; else all')
  parser.add_argument(
    '--models-at-once', type=int, default=0, help="final models trained side by side; default: as the arms' configs say"
  )


def run(flags: argparse.Namespace) -> None:
  module, workdir = _load(flags.config), Path(flags.workdir).absolute()
  arms = [arm for arm in flags.arms.split(',') if arm] or list(module.ARMS)
  for arm in arms:
    if arm not in module.ARMS:
      raise UserError(f'--arms={arm} is no arm of {flags.config}; arms are {", ".join(module.ARMS)}')
  if BASE not in arms:
    raise UserError(f'--arms={flags.arms} lacks {BASE}, which trains what the others are compared with; add it')
  configs = {arm: module.get_config(arm) for arm in [BASE, *(arm for arm in arms if arm != BASE)]}
  for config in configs.values():  # all of them before the first is begun
    config.pretraining.models_at_once = flags.models_at_once or config.pretraining.models_at_once
    validate(config)
  for number, (arm, config) in enumerate(configs.items(), 1):
    print(f'== {arm} ({number} of {len(configs)})', flush=True)
    folder, began = workdir / 'arms' / arm, time.monotonic()
    share(config, folder, [workdir / 'arms' / other for other in configs if other != arm])
    for name in pipeline.needed(LAST):
      pipeline.run(config, folder, name)
    found = compare({name: workdir / 'arms' / name for name in list(configs)[:number]}, configs[BASE])
    atomic.write_json(workdir / 'study.json', found)
    atomic.write_text(workdir / 'study.csv', _csv(found))
    print(f'== {arm}: {time.monotonic() - began:.0f} s', flush=True)
  print(terminal.table(found))
  print(f'study: {workdir / "study.json"}')


def _load(path: str) -> ModuleType:
  spec = importlib.util.spec_from_file_location('study_config', path)
  if not Path(path).is_file() or spec is None or spec.loader is None:
    raise UserError(f'--config={path} is no Python file; give one such as configs/study.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if BASE not in getattr(module, 'ARMS', {}) or not hasattr(module, 'get_config'):
    raise UserError(f'--config={path} has no ARMS with an arm {BASE!r}, or no get_config(arm); see configs/study.py')
  return module


def share(config: Any, workdir: Path, others: Sequence[Path]) -> list[str]:
  """Links into `workdir` every finished stage of `others` that this config would make likewise; their names."""
  settings, linked = pipeline.settings_of(config, workdir), []
  done: dict[str, artifacts.Artifact] = {}
  for stage in pipeline.STAGES:
    if stage.name not in pipeline.needed(LAST):
      continue
    if any(name not in done for name in stage.reads):
      break
    wanted = pipeline.identity(stage, settings, workdir, done).as_json()
    here = artifacts.open_stage(workdir, stage.name)
    if here is None:
      for other in others:
        there = artifacts.open_stage(other, stage.name)
        if there is not None and there.manifest['identity'] == wanted:
          _link(there.path, workdir / stage.name)
          linked.append(stage.name)
          here = artifacts.open_stage(workdir, stage.name)
          break
    if here is not None and here.manifest['identity'] == wanted:
      done[stage.name] = here
  return linked


def _link(source: Path, target: Path) -> None:
  """Puts `source` at `target` whole or not at all; its files have two names then, and neither is ever written to."""
  part = target.with_name(f'{target.name}.linked')
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(source, part, copy_function=_same_file)
  part.rename(target)


def _same_file(source: str, target: str) -> None:
  try:
    os.link(source, target)
  except OSError:  # a disk without hard links
    shutil.copy2(source, target)


def compare(folders: Mapping[str, Path], config: Any) -> dict[str, Any]:
  """The content of `study.json`: all arms' models on the same items, each against the baselines and DsDm of `base`.

  An arm's methods are called `<method>/<arm>`. Of `base` and the arms `again_…` together the method `dsdm/again` is
  made, a model of its own seed for each: its interval holds for new proxies too.

  Raises:
    UserError: an arm was asked other questions than `base`.
  """
  items: dict[str, list[np.ndarray]] = {}
  runs: list[dict[str, Any]] = []
  again: list[tuple[str, int]] = []
  base = folders[BASE] / LAST
  for arm, folder in folders.items():
    _check_same_questions(arm, folder, folders[BASE])
    own = json.loads((folder / LAST / 'runs.json').read_text())
    with np.load(folder / LAST / 'items.npz') as arrays:
      for key in arrays.files:
        items.setdefault(key, []).append(arrays[key])
    for run in own:
      name = run['method'] if arm == BASE else f'{run["method"]}/{arm}'
      selection = None if run['selection'] is None else f'{arm}/{run["selection"]}'
      runs.append({**run, 'method': name, 'selection': selection})
      if run['method'] == 'dsdm' and (arm == BASE or arm.startswith(AGAIN)):
        again.append((arm, len(runs) - 1))
  tables = {key: np.concatenate(parts) for key, parts in items.items()}
  chosen = _one_of_each(again, runs)
  if len(chosen) > 1:
    runs += [{**runs[row], 'method': 'dsdm/again'} for row in chosen]
    tables = {key: np.concatenate([values, values[chosen]]) for key, values in tables.items()}
  stated = json.loads((base / 'results.json').read_text())
  return results.results(
    tables, runs, confidence=config.evaluation.confidence, paired_seeds=config.evaluation.paired_seeds,
    resamples=config.evaluation.bootstrap, documents=_documents(base), tasks=stated['tasks'],
    baselines=(*BASELINES, 'dsdm'),
    cost={
      f'{arm}/{name}': found.manifest['cost']
      for arm, folder in folders.items() for name in pipeline.NAMES
      if (found := artifacts.open_stage(folder, name)) is not None
    },
    versions=artifacts.versions(), config=flatten(config),
  )  # fmt: skip


def _one_of_each(again: Sequence[tuple[str, int]], runs: Sequence[Mapping[str, Any]]) -> list[int]:
  """Of each arm one model, each of another seed and target, as far as there are seeds."""
  found = []
  for number, arm in enumerate(dict.fromkeys(arm for arm, _ in again)):
    found += [row for of, row in again if of == arm and runs[row]['seed'] == number]
  return found


def _check_same_questions(arm: str, folder: Path, base: Path) -> None:
  for name in ('targets', LAST):
    ours, theirs = artifacts.open_stage(folder, name), artifacts.open_stage(base, name)
    assert ours is not None and theirs is not None
    if name == 'targets':
      same = ours.digest == theirs.digest
    else:
      same = _questions(ours.settings) == _questions(theirs.settings)
    if not same:
      raise UserError(f'arm {arm} of the study was asked other questions than {BASE}: its {name} differ; leave it out')


def _questions(settings: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in settings.items() if key.startswith(('evaluation.', 'targets.', 'SHA-256'))}


def _documents(evaluation: Path) -> dict[tuple[str, str], list[str]]:
  found = json.loads((evaluation / 'documents.json').read_text())
  return {tuple(key.rsplit('__', 1)): names for key, names in found.items()}


def _csv(found: Mapping[str, Any]) -> str:
  text = io.StringIO()
  table = csv.DictWriter(text, _COLUMNS, extrasaction='ignore', lineterminator='\n')
  table.writeheader()
  table.writerows([*found['comparisons'], *found['accuracy_comparisons'], *found['means']['comparisons']])
  return text.getvalue()
