"""The oracle of the validation against finite differences: `python -m dsdm_jax.bench derivative --workdir FOLDER`.

FOLDER holds the pool and the targets of a run with `configs/validation.py`. For both settings of its bank, at its own
size, takes the derivative of each task's mean output with respect to the weight of every row (float32, backwards
through training, as the bank does) and trains anew with the weights of a few rows, and of a few groups of 2 % of the
rows, a little higher and lower (float64, so that rounding is no part of the difference).

Prints a line of JSON for each setting, each size of change, and rows or groups: the `correlation` of derivative and
change over tasks and rows or groups, `relative_error`, the norm of their difference over the norm of the changes, and
that norm. `step` is by how much weights go up and down, so that the second order drops out; `dropped` are weights that
go from one to zero. What is left at the smallest step is rounding of the derivative, and what comes with larger ones is
what a derivative cannot say.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import validation
from dsdm_jax.bench.float64 import widened
from dsdm_jax.config.validate import load_callable
from dsdm_jax.core import artifacts, prng
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.differentiable import Metagradient, ScannedTraining, TargetOutputs
from dsdm_jax.validation.validate import METASMOOTH, PLAIN, Examples, examples_of, train_config

DROPPED = 'dropped'
_GROUP = 0.02  # of the rows


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', type=Path, required=True, help='run that has the stages pool and targets')
  parser.add_argument('--settings', nargs='+', choices=(PLAIN, METASMOOTH), default=[PLAIN, METASMOOTH])
  parser.add_argument('--rows', type=int, default=2_048, help='of the pool; validation.rows')
  parser.add_argument('--epochs', type=float, default=3.0, help='validation.epochs')
  parser.add_argument(
    '--directions', type=int, default=4, help='rows, and groups of rows, that are changed; at least 2'
  )
  parser.add_argument('--steps', type=float, nargs='+', default=[0.001, 0.3], help='by which weights go up and down')
  parser.add_argument('--models-at-once', type=int, default=4, help='trained in one program')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  config = validation.get_config()
  config.validation.rows, config.validation.epochs = flags.rows, flags.epochs
  examples = examples_of(
    config.validation, Pool(_stage(flags.workdir, 'pool')), Targets(_stage(flags.workdir, 'targets'))
  )
  for name in flags.settings:
    for line in compare(config, name, examples, flags.directions, flags.steps, flags.models_at_once):
      print(json.dumps({'setting': name, **line}), flush=True)


def _stage(workdir: Path, name: str) -> Artifact:
  found = artifacts.open_stage(workdir.absolute(), name)
  if found is None:
    raise UserError(f'--workdir={workdir} has no finished stage {name}; run it with --config=configs/validation.py')
  return found


def compare(
  config: ConfigDict, name: str, examples: Examples, count: int, steps: list[float], at_once: int
) -> Iterator[dict[str, Any]]:
  """Lines of one setting; `count` rows and as many groups are changed."""
  train, seed = train_config(config, name), config.seed
  tokens_NL, epochs = examples.tokens_NL, config.validation.epochs
  training = ScannedTraining(config.proxies.model, train, examples.vocab_size, tokens_NL, epochs, seed)
  outputs = TargetOutputs(training, load_callable(config.features.output_fn), examples.tokens_TL, examples.weights_TL)
  oracle = Metagradient(training, outputs, examples.member_KT)
  _, derivative_KN = oracle(0, np.ones(training.rows))
  made = directions(seed, derivative_KN.mean(axis=0), count)
  both_DN = np.concatenate(list(made.values()))
  moves = [(1 + h * both_DN, 1 - h * both_DN) for h in steps] + [(np.ones((1, training.rows)), 1 - both_DN)]
  found = iter(np.split(
    outputs_of(oracle, training, np.concatenate([w_DN for move in moves for w_DN in move]), at_once),
    np.cumsum([len(w_DN) for move in moves for w_DN in move])[:-1],
  ))  # fmt: skip
  for step, width in [*((h, 2 * h) for h in steps), (DROPPED, 1.0)]:
    change_DK = (next(found) - next(found)) / width
    for place, kind in enumerate(made):
      part = slice(place * count, (place + 1) * count)
      yield {'of': kind, 'step': step, **agreement(both_DN[part] @ derivative_KN.T, change_DK[part])}


def agreement(told_DK: np.ndarray, change_DK: np.ndarray) -> dict[str, float]:
  """How far what the derivative told is from what came about."""
  norm = float(np.linalg.norm(change_DK))
  return {
    'values': change_DK.size,
    'correlation': float(np.corrcoef(told_DK.ravel(), change_DK.ravel())[0, 1]),
    'relative_error': float(np.linalg.norm(told_DK - change_DK)) / norm,
    'norm_of_changes': norm,
  }


def directions(seed: int, derivative_N: np.ndarray, count: int) -> Mapping[str, np.ndarray]:
  """{'rows', 'groups'}: bool as float64 [count, N]; those of highest and lowest derivative first, then random ones."""
  rows = len(derivative_N)
  order, found = np.argsort(-derivative_N), {}
  for kind, size in (('rows', 1), ('groups', max(round(_GROUP * rows), 2))):
    found[kind] = np.zeros((count, rows))
    found[kind][0, order[:size]] = found[kind][1, order[-size:]] = 1
    for place in range(2, count):
      drawn = prng.numpy_stream(seed, 'derivative', kind, place).choice(rows, size, replace=False)
      found[kind][place, drawn] = 1
  return found


def outputs_of(oracle: Metagradient, training: ScannedTraining, weight_DN: np.ndarray, at_once: int) -> np.ndarray:
  """output_DK of run 0 trained with each row of weights, in float64; `at_once` trainings in one program."""
  begin = training.start(0), jnp.asarray(training.order(0))
  wide = widened(oracle.apply, jnp.ones(training.rows, jnp.float32), *begin)
  many, found = jax.jit(jax.vmap(wide, in_axes=(0, None, None))), []
  with jax.enable_x64(True):
    for start in range(0, len(weight_DN), at_once):
      part = weight_DN[start : start + at_once]
      filled = np.pad(part, ((0, at_once - len(part)), (0, 0)))  # one shape, one compilation
      found.append(np.asarray(many(jnp.asarray(filled, jnp.float64), *begin))[: len(part)])
  return np.concatenate(found)
