"""A study: many arms that differ in a few keys, each a run of its own, compared on the same questions.

Arms share what they have in common: a stage that an earlier arm finished with the same settings is linked, not made
again. Started again, the command goes on where it stopped, arm by arm and inside an arm. Leaves `arms/<name>/`, of each
that is finished the small file `finished/<name>.json`, and `study.json` (as `results.json`, `docs/evaluation.md`) and
`study.csv` of all of them. Those of other sittings and machines (`--also`) join the table.
"""

import argparse
import csv
import glob
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dsdm_jax import pipeline
from dsdm_jax.bench import config_file
from dsdm_jax.config.validate import flatten, validate
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.runner import Runner
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import compute, results, terminal
from dsdm_jax.evaluation.comparisons import BASELINES
from dsdm_jax.study import arm_file
from dsdm_jax.study.arm_file import ArmFile

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
  parser.add_argument('--also', default='', help='pattern of arms that other sittings finished: FOLDER/*.json')


def run(flags: argparse.Namespace) -> None:
  module, workdir = _load(flags.config), Path(flags.workdir).absolute()
  arms = [arm for arm in flags.arms.split(',') if arm] or list(module.ARMS)
  for arm in arms:
    if arm not in module.ARMS:
      raise UserError(f'--arms={arm} is no arm of {flags.config}; arms are {", ".join(module.ARMS)}')
  others = [arm_file.read(Path(path)) for path in sorted(glob.glob(flags.also))]
  if flags.also and not others:
    raise UserError(f'--also={flags.also} matches no file; give a pattern of files that an earlier sitting left')
  if BASE not in (*arms, *(arm.name for arm in others)):
    raise UserError(
      f'--arms={flags.arms} lacks {BASE}, which trains what the others are compared with; add it, or --also'
    )
  configs = {arm: module.get_config(arm) for arm in sorted(arms, key=lambda arm: arm != BASE)}
  finished = workdir / 'finished'
  finished.mkdir(parents=True, exist_ok=True)
  for config in configs.values():  # all of them before the first is begun
    config.pretraining.models_at_once = flags.models_at_once or config.pretraining.models_at_once
    validate(config)
  for number, (arm, config) in enumerate(configs.items(), 1):
    print(f'== {arm} ({number} of {len(configs)})', flush=True)
    folder, began = workdir / 'arms' / arm, time.monotonic()
    share(config, folder, [workdir / 'arms' / other for other in configs if other != arm])
    for name in pipeline.needed(LAST):
      pipeline.run(config, folder, name)
    arm_file.write(folder, arm, flatten(config), finished / f'{arm}.json')
    done = [arm_file.read(finished / f'{name}.json') for name in list(configs)[:number]]
    found = compare([*done, *(arm for arm in others if arm.name not in configs)])
    save(found, workdir)
    print(f'== {arm}: {time.monotonic() - began:.0f} s', flush=True)
  print(terminal.table(found))
  print(f'study: {workdir / "study.json"}')


def _load(path: str) -> ModuleType:
  module = config_file.load(path, 'configs/study.py')
  if BASE not in getattr(module, 'ARMS', {}):
    raise UserError(f'--config={path} has no ARMS with an arm {BASE!r}; see configs/study.py')
  return module


def share(config: Any, workdir: Path, others: Sequence[Path]) -> list[str]:
  """Links into `workdir` every finished stage of `others` that this config would make likewise; their names."""
  linked: list[str] = []
  runner = Runner(pipeline.STAGES, pipeline.runner_config(config), workdir)
  done = runner.done
  for stage in pipeline.STAGES:
    if stage.name not in pipeline.needed(LAST):
      continue
    if any(name not in done for name in stage.reads):
      break
    wanted = runner.identity(stage).as_json()
    here = artifacts.open_stage(workdir, stage.name)
    if here is None:
      for other in others:
        there = artifacts.open_stage(other, stage.name)
        if there is not None and there.identity == wanted:
          artifacts.link(there, workdir)
          linked.append(stage.name)
          here = artifacts.open_stage(workdir, stage.name)
          break
    if here is not None and here.identity == wanted:
      done[stage.name] = here
  return linked


def compare(arms: Sequence[ArmFile]) -> dict[str, Any]:
  """The content of `study.json`: all arms' models on the same items, each against the baselines and DsDm of `base`.

  An arm's methods are called `<method>/<arm>`. Of `base` and the arms `again_…` together the method `dsdm/again` is
  made, a model of its own seed for each: its interval holds for new proxies too. Where `base` has a ladder, every arm
  is read off it as compute and charged with its own stages.

  Raises:
    UserError: `base` is not among them, two have one name, or an arm was asked other questions than `base`.
  """
  by_name = {arm.name: arm for arm in arms}
  if BASE not in by_name or len(by_name) < len(arms):
    raise UserError(f'arms {", ".join(arm.name for arm in arms)}: each name once, and {BASE} among them')
  base = by_name[BASE]
  runs: list[dict[str, Any]] = []
  again: list[tuple[str, int]] = []
  for arm in arms:
    _check_same_questions(arm, base)
    for run in arm.runs:
      name = run['method'] if arm is base else f'{run["method"]}/{arm.name}'
      selection = None if run['selection'] is None else f'{arm.name}/{run["selection"]}'
      runs.append({**run, 'method': name, 'selection': selection})
      if run['method'] == 'dsdm' and (arm is base or arm.name.startswith(AGAIN)):
        again.append((arm.name, len(runs) - 1))
  items = {key: np.concatenate([arm.items[key] for arm in arms]) for key in base.items}
  chosen = _one_of_each(again, runs)
  if len(chosen) > 1:
    runs += [{**runs[row], 'method': 'dsdm/again'} for row in chosen]
    items = {key: np.concatenate([values, values[chosen]]) for key, values in items.items()}
  confidence = base.config['evaluation.confidence']
  found = results.results(
    items, runs, confidence=confidence, paired_seeds=base.config['evaluation.paired_seeds'],
    resamples=base.config['evaluation.bootstrap'], documents=base.documents, categories=base.categories,
    tasks=base.tasks, baselines=(*BASELINES, 'dsdm'),
    cost={f'{arm.name}/{stage}': spent for arm in arms for stage, spent in arm.cost.items()},
    versions=base.versions, config=base.config,
  )  # fmt: skip
  found['multiplier'] = None
  if base.ladder is not None:
    index, ladder_items = base.ladder
    names = base.documents, base.categories
    found['multiplier'] = compute.content(
      compute.tables_of(items, runs, *names), runs, compute.tables_of(ladder_items, runs, *names, len(index)), index,
      lambda name, selections: _charge(name, selections, by_name), confidence, base.config['evaluation.selection_uses'],
    )  # fmt: skip
  return found


def _charge(name: str, selections: Sequence[str], arms: Mapping[str, ArmFile]) -> compute.Charge:
  method, _, of = name.partition('/')
  arm = arms[of] if of in arms else arms[BASE]  # 'dsdm/again' is of several arms alike
  own = [made for of, _, made in (s.partition('/') for s in selections) if of == arm.name]
  return compute.charge(method, own, arm.final, arm.cost, arm.choices)


def _one_of_each(again: Sequence[tuple[str, int]], runs: Sequence[Mapping[str, Any]]) -> list[int]:
  """Of each arm one model, each of another seed and target, as far as there are seeds."""
  found = []
  for number, arm in enumerate(sorted({arm for arm, _ in again}, key=lambda name: (name != BASE, name))):
    found += [row for of, row in again if of == arm and runs[row]['seed'] == number]
  return found


def _check_same_questions(arm: ArmFile, base: ArmFile) -> None:
  differ = [key for key in {**base.asked, **arm.asked} if arm.asked.get(key) != base.asked.get(key)]
  if differ:
    told = ', '.join(sorted(differ)[:3])
    raise UserError(f'arm {arm.name} of the study was asked other questions than {BASE}: {told}; leave it out')


def save(found: Mapping[str, Any], folder: Path) -> None:
  """Leaves `study.json` and `study.csv`."""
  storage.write_json(folder / 'study.json', found)
  storage.write_text(folder / 'study.csv', as_csv(found))


def as_csv(found: Mapping[str, Any]) -> str:
  text = io.StringIO()
  table = csv.DictWriter(text, _COLUMNS, extrasaction='ignore', lineterminator='\n')
  table.writeheader()
  table.writerows([*found['comparisons'], *found['accuracy_comparisons'], *found['means']['comparisons']])
  return text.getvalue()
