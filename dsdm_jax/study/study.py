"""Runs a study: many arms that differ in a few config keys, compared on the same evaluation items.

Each arm is a run with a workdir of its own. A stage that an earlier arm finished with the same settings is linked, not
recomputed. The command resumes where it stopped, arm by arm and inside an arm. It writes `arms/<name>/`, a run with its
report, a small file `finished/<name>.json` for each finished arm, and `study.json` (same layout as `results.json`, see
`docs/evaluation.md`) and `study.csv` for all of them. Arms that finished elsewhere join the table with `--also`.

A config may name its primary comparisons before it is run: `PRIMARY = (('dsdm', 'random'), ('dsdm', 'lsa/lsa'))`.
"""

import argparse
import glob
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax import configs, pipeline
from dsdm_jax.config.methods import method_name
from dsdm_jax.config.validate import flatten, validate
from dsdm_jax.config.values import BREADTH, MIX
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.runner import Runner
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError, visible, visible_lines
from dsdm_jax.evaluation import comparisons, multiplier, results
from dsdm_jax.evaluation.comparisons import BASELINES, Options
from dsdm_jax.evaluation.suite import HOLDOUT
from dsdm_jax.selection import mixture
from dsdm_jax.study import arm_file
from dsdm_jax.study.arm_file import ArmFile

BASE, AGAIN = 'base', 'again_'
LAST_SHARED = 'evaluation'
_COLUMNS = 'task split metric method target_mix baseline difference low high p_value p_holm verdict conditional'.split()


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--config', default='study', help='file or packaged config with ARMS and get_config(arm)')
  parser.add_argument('--workdir', required=True, help='folder of the study')
  parser.add_argument('--arms', default='', help=f'comma-separated subset of ARMS that includes {BASE}; default: all')
  parser.add_argument('--models-at-once', type=int, default=0, help='overrides pretraining.models_at_once of all arms')
  parser.add_argument('--also', default='', help='glob of arm files that finished elsewhere: FOLDER/*.json')


def run(flags: argparse.Namespace) -> None:
  """Trains the arms that are not finished and compares all of them; see the module.

  Raises:
    UserError: a flag is wrong, or a run fails.
  """
  workdir = storage.check_location(flags.workdir, '--workdir')
  module = configs.load(flags.config, 'configs/study.py')
  known = getattr(module, 'ARMS', {})

  def get_config(arm: str) -> ConfigDict:
    try:
      return module.get_config(arm)
    except Exception as error:  # a config is a program and may raise anything
      raise UserError(f'--config={flags.config}:{arm}: {type(error).__name__}: {error}; correct it') from error

  if BASE not in known:
    raise UserError(f'--config={flags.config} has no ARMS that include {BASE!r}; see configs/study.py')
  arms = [arm for arm in flags.arms.split(',') if arm] or list(known)
  for arm in arms:
    if arm not in known:
      raise UserError(f'--arms={arm} is not an arm of {flags.config}; its arms are {", ".join(known)}')
  others = [arm_file.read(Path(path)) for path in sorted(glob.glob(flags.also))]
  if flags.also and not others:
    raise UserError(
      f'--also={flags.also} matches no file; give a glob of the files that `dsdm_jax.study run` writes to finished/'
    )
  if BASE not in (*arms, *(arm.name for arm in others)):
    raise UserError(
      f'--arms={flags.arms} lacks {BASE}, which trains the baselines of all arms; add it, or its file with --also'
    )
  pairs = primary_pairs(module)
  named = {name for arm in known for name in _named(arm, get_config(arm))}
  named |= {f'dsdm/{AGAIN.rstrip("_")}' for arm in known if arm.startswith(AGAIN)}
  for pair in pairs:
    if unknown := sorted({*pair} - named):
      raise UserError(f'PRIMARY of --config names {unknown[0]!r}, which no arm has; an arm has METHOD, or METHOD/ARM')
    if not {*pair} & {*BASELINES, 'dsdm'}:
      raise UserError(f'PRIMARY of --config has {pair}, and one of the two must be {", ".join((*BASELINES, "dsdm"))}')
  arm_configs = {arm: get_config(arm) for arm in sorted(arms, key=lambda arm: arm != BASE)}
  finished = workdir / 'finished'
  for config in arm_configs.values():  # all arms before the first one starts
    config.pretraining.models_at_once = flags.models_at_once or config.pretraining.models_at_once
    validate(config)
  for number, (arm, config) in enumerate(arm_configs.items(), 1):
    print(visible(f'== {arm} ({number} of {len(arm_configs)})'), flush=True)
    folder, began = workdir / 'arms' / arm, time.monotonic()
    share(config, folder, [workdir / 'arms' / other for other in arm_configs if other != arm])
    pipeline.run(config, folder)
    arm_file.write(folder, arm, flatten(config), finished / f'{arm}.json')
    done = [arm_file.read(finished / f'{name}.json') for name in list(arm_configs)[:number]]
    comparison = compare([*done, *(arm for arm in others if arm.name not in arm_configs)])
    storage.write_text(workdir / 'study.csv', as_csv(comparison))
    storage.write_json(workdir / 'study.json', comparison | {'primary': []})  # should `primary` refuse
    comparison['primary'] = primary(comparison, pairs)
    storage.write_json(workdir / 'study.json', comparison)
    print(visible(f'== {arm}: {time.monotonic() - began:.0f} s'), flush=True)
  print(visible_lines(results.text_tables(comparison)))
  if pairs and not comparison['primary']:
    print('Primary comparisons follow when all their arms are finished.')
  print(visible(f'study: {workdir / "study.json"}'))


def share(config: Any, workdir: Location, others: Sequence[Location]) -> list[str]:
  """Links finished stages of `others` into `workdir` where this config would compute the same; returns their names."""
  linked: list[str] = []
  runner = Runner(pipeline.STAGES, pipeline.runner_config(config), workdir)
  done = runner.done
  for name in pipeline.needed(LAST_SHARED, runner.settings):
    stage = runner.stages[name]
    if any(name not in done for name in stage.reads):
      break
    wanted = runner.identity(stage).as_json()
    here = artifacts.open_stage(workdir, stage.name)
    if here is None:
      for other in others:
        there = artifacts.open_stage(other, stage.name)
        if there is not None and there.identity == wanted:
          there.verify()
          artifacts.link(there, workdir)
          linked.append(stage.name)
          here = artifacts.open_stage(workdir, stage.name)
          break
    if here is not None and here.identity == wanted:
      done[stage.name] = here
  return linked


def compare(arms: Sequence[ArmFile]) -> dict[str, Any]:
  """Returns the content of `study.json`: models of all arms against the baselines and against DsDm of `base`.

  A method of another arm is named `<method>/<arm>`. The arms `base` and `again_…` together form the method
  `dsdm/again`, with one model and one seed from each, so that its interval covers new proxies too. Where `base` has a
  ladder, the result of every arm is also read as compute, net of the arm's own stages.

  Raises:
    UserError: `base` is missing, two arms have the same name, or an arm has other evaluation items than `base`.
  """
  by_name = {arm.name: arm for arm in arms}
  if BASE not in by_name or len(by_name) < len(arms):
    raise UserError(f'the arms {", ".join(arm.name for arm in arms)} must have distinct names and include {BASE}')
  base = by_name[BASE]
  runs: list[dict[str, Any]] = []
  dsdm: list[tuple[str, int]] = []  # arm and index into `runs`
  for arm in arms:
    different = sorted(
      key for key in {**base.questions, **arm.questions} if arm.questions.get(key) != base.questions.get(key)
    )
    if different:
      raise UserError(
        f'arm {arm.name} was evaluated on other items than {BASE}: {", ".join(different[:3])} differ; leave it out'
      )
    for run in arm.runs:
      name = run['method'] if arm is base else f'{run["method"]}/{arm.name}'
      selection = None if run['selection'] is None else f'{arm.name}/{run["selection"]}'
      runs.append({**run, 'method': name, 'selection': selection})
      if run['method'] == 'dsdm' and (arm is base or arm.name.startswith(AGAIN)):
        dsdm.append((arm.name, len(runs) - 1))
  items = {key: np.concatenate([arm.items[key] for arm in arms]) for key in base.items}
  lines = {key: np.concatenate([arm.lines[key] for arm in arms]) for key in base.lines if all(a.lines for a in arms)}
  # Of each target, the seed-th arm gives its model of that seed, as far as there are seeds.
  arm_names = sorted({name for name, _ in dsdm}, key=lambda name: (name != BASE, name))
  drawn = [(name, row) for name, row in dsdm if runs[row]['seed'] == arm_names.index(name)]
  again: list[int] = []
  for target in dict.fromkeys(runs[row]['target_mix'] for _, row in drawn):
    rows = {name: row for name, row in drawn if runs[row]['target_mix'] == target}
    again += sorted(rows.values()) if len(rows) > 1 else []
  if again:
    runs += [{**runs[row], 'method': 'dsdm/again'} for row in again]
    items, lines = ({key: np.concatenate([x, x[again]]) for key, x in some.items()} for some in (items, lines))
  keys = {key.removeprefix('evaluation.'): value for key, value in base.config.items()}
  options = Options(keys['confidence'], keys['paired_seeds'], keys['bootstrap'], baselines=(*BASELINES, 'dsdm'))
  known = results.Items(items, base.documents, base.categories, base.tasks, lines)
  comparison = results.results(known, runs, options) | {
    'cost': {f'{arm.name}/{stage}': spent for arm in arms for stage, spent in arm.cost.items()},
    'versions': base.versions,
    'config': base.config,
    'multiplier': None,
  }
  if base.ladder is None:
    return comparison

  def charge(name: str, selections: Sequence[str]) -> multiplier.Charge:
    method, _, of = name.partition('/')
    arm = by_name.get(of, base)  # all arms of 'dsdm/again' cost what `base` costs
    own = [selection for of, _, selection in (s.partition('/') for s in selections) if of == arm.name]
    return multiplier.charge(method, own, arm.final, arm.cost, arm.choices, arm.config['proxies.count'])

  index, ladder_items = base.ladder
  of_ladder = results.Items(ladder_items, base.documents, base.categories)
  tables, ladder_tables = multiplier.tables_of(known, runs, of_ladder, sum(entry['chosen'] for entry in index))
  comparison['multiplier'] = multiplier.multipliers(
    tables,
    runs,
    multiplier.Ladder(index, ladder_tables),
    charge,
    options.confidence,
    keys['selection_uses'],
  )
  return comparison


def _named(arm: str, config: ConfigDict) -> list[str]:
  """The names that the methods and other models of an arm have in the tables."""
  names = [*map(method_name, config.selection.methods), *([mixture.NAME] if config.mixture.parts else [])]
  names += [spec.partition('=')[0] for spec in config.evaluation.checkpoints]
  return [name if arm == BASE else f'{name}/{arm}' for name in names]


def primary_pairs(module: Any) -> list[tuple[str, str]]:
  """`PRIMARY` of a study's config: pairs of a method and what it is compared with, named as in the tables.

  Raises:
    UserError: it is something else.
  """
  pairs = getattr(module, 'PRIMARY', ())
  for pair in pairs:
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
      raise UserError(f"PRIMARY of --config has {pair!r}; give pairs of names such as ('dsdm', 'random')")
  return list(pairs)


def headline_task(comparison: Mapping[str, Any]) -> str:
  """The column that comes first: the targeted mix of some of the tasks, else the mean over all, else the only task."""
  averaged = [row['task'] for row in comparison['means']['summary'] if row['split'] == HOLDOUT]
  mixes = [task for task in averaged if '+' in task]
  if mixes or results.MEAN in averaged:
    return mixes[0] if mixes else results.MEAN
  held_out = (row['task'] for row in comparison['arms'] if row['split'] == HOLDOUT and row['task'] != BREADTH)
  return next(held_out, results.MEAN)


def headline_targets(comparison: Mapping[str, Any]) -> set[str]:
  """Values of `target_mix` that belong to the headline task: none, its own tasks, and 'mix' where it is over all.

  Breadth is no part of a headline, so a mix with it counts as the mix without.
  """
  task, arms = headline_task(comparison), comparison['arms']
  every = {row['task'] for row in arms if row['split'] == HOLDOUT} - {BREADTH}
  wanted = every if task == results.MEAN else set(task.split('+'))

  def tasks(target: str) -> set[str]:
    return every if target == MIX else set(target.split('+')) - {BREADTH}

  return {target for _, target in comparisons.arms(arms) if target == results.UNTARGETED or tasks(target) == wanted}


def primary(comparison: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
  """The primary comparisons of `study.json`: log-probability on the headline task, after Holm over these alone.

  Of a method that was selected for several targets, the arm of the headline task is compared.

  Args:
    comparison: see `compare`.
    pairs: see `primary_pairs`.

  Returns:
    A comparison for each pair; none before all their arms are finished, since Holm's rule needs all.

  Raises:
    UserError: a method of a pair has several targets, of which none or more than one is that of the headline.
  """
  task, arms = headline_task(comparison), comparisons.arms(comparison['arms'])
  headline, methods = headline_targets(comparison), [method for method, _ in arms]
  compared = [
    c
    for c in (*comparison['means']['comparisons'], *comparison['comparisons'])
    if (c['split'], c['metric']) == (HOLDOUT, 'logprob')
  ]
  known: dict[tuple[str, str], list[Mapping[str, Any]]] = {}  # of a pair, those of the headline's target
  for c in compared:
    if c['task'] != task:
      continue
    baseline = comparisons.baseline_arm(arms, c['baseline'], c['target_mix'])
    assert baseline is not None  # it was compared
    both = (c['method'], c['target_mix']), baseline
    fits = all(target in headline or methods.count(method) == 1 for method, target in both)
    known.setdefault((c['method'], c['baseline']), []).extend([c] * fits)
    known.setdefault((c['baseline'], c['method']), []).extend([comparisons.turned(c, baseline[1])] * fits)
  for pair in pairs:
    if pair in known and len(known[pair]) != 1:
      name = max(pair, key=methods.count)
      targets = ', '.join(target for method, target in arms if method == name)
      raise UserError(
        f'PRIMARY of --config names {pair}, and {name} has the targets {targets}, of which not exactly one is the '
        f'headline ({task}); name fewer in selection.targets of {name.partition("/")[2] or BASE}'
      )
  if not all(pair in known for pair in pairs):
    return []
  return comparisons.judged([known[pair][0] for pair in pairs], comparison['confidence'])


def as_csv(comparison: Mapping[str, Any]) -> str:
  """The comparisons of `study.json` as CSV."""
  records = *comparison['comparisons'], *comparison['accuracy_comparisons'], *comparison['means']['comparisons']
  return storage.csv_text(_COLUMNS, ([record.get(column, '') for column in _COLUMNS] for record in records))
