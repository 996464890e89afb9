"""The oracle of the validation against finite differences: `python -m dsdm_jax.bench derivative --workdir FOLDER`.

FOLDER is the workdir of a run with `configs/validation.py` that has the stages pool and targets. For both settings of
the bank and at its size, computes the derivative of each task's mean output with respect to the weight of every row
(float32, reverse mode through training, as in the bank). Then trains again with slightly higher and lower weights of a
few rows, and of a few groups of 2 % of the rows (float64, so that rounding does not matter).

Prints a line of JSON for each setting, each size of change, and rows or groups: the `correlation` of derivative and
change over tasks and rows or groups, `relative_error`, the norm of their difference over the norm of the changes, and
that norm. `step` is the change of the weights in both directions, so that the second order cancels; `dropped` means
weights that go from one to zero. The error at the smallest step is rounding of the derivative; errors at larger steps
are higher orders that a derivative does not have.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from ml_collections import ConfigDict

from dsdm_jax.config.validate import load_callable
from dsdm_jax.configs import validation
from dsdm_jax.core import artifacts, prng
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.masked import masked_rows
from dsdm_jax.data.targets.targets import Targets
from dsdm_jax.errors import UserError
from dsdm_jax.training.differentiable import Metagradient, ScannedTraining, TargetOutputs
from dsdm_jax.validation.validate import METASMOOTH, PLAIN, Examples, examples_of, train_config

DROPPED = 'dropped'
_GROUP = 0.02  # of the rows


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--workdir', type=Path, required=True, help='of a run with the stages pool and targets')
  parser.add_argument('--settings', nargs='+', choices=(PLAIN, METASMOOTH), default=[PLAIN, METASMOOTH])
  parser.add_argument('--rows', type=int, default=2_048, help='of the pool; validation.rows')
  parser.add_argument('--epochs', type=float, default=3.0, help='validation.epochs')
  parser.add_argument(
    '--directions', type=int, default=4, help='number of rows, and of groups of rows, to change; at least 2'
  )
  parser.add_argument('--steps', type=float, nargs='+', default=[0.001, 0.3], help='changes of the weights')
  parser.add_argument('--models-at-once', type=int, default=4, help='models per program')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  config = validation.get_config()
  config.validation.rows, config.validation.epochs = flags.rows, flags.epochs
  pool, targets, leakage = (_stage(flags.workdir, stage) for stage in ('pool', 'targets', 'leakage'))
  examples = examples_of(config.validation, Pool(pool), Targets(targets), masked_rows(leakage))
  for name in flags.settings:
    for line in compare(config, name, examples, flags.directions, flags.steps, flags.models_at_once):
      print(json.dumps({'setting': name, **line}), flush=True)


def _stage(workdir: Path, name: str) -> Artifact:
  artifact = artifacts.open_stage(workdir.absolute(), name)
  if artifact is None:
    raise UserError(f'--workdir={workdir} has no finished stage {name}; run it with --config=configs/validation.py')
  return artifact


def compare(
  config: ConfigDict, name: str, examples: Examples, count: int, steps: list[float], at_once: int
) -> Iterator[dict[str, Any]]:
  """Lines of one setting, with `count` changed rows and as many groups."""
  train, seed = train_config(config, name), config.seed
  tokens_NL, epochs = examples.tokens_NL, config.validation.epochs
  training = ScannedTraining(config.proxies.model, train, examples.vocab_size, tokens_NL, epochs, seed)
  outputs = TargetOutputs(training, load_callable(config.features.output_fn), examples.tokens_TL, examples.weights_TL)
  oracle = Metagradient(training, outputs, examples.member_KT)
  _, derivative_KN = oracle(0, np.ones(training.rows))
  changes = directions(seed, derivative_KN.mean(axis=0), count)
  both_DN = np.concatenate(list(changes.values()))
  moves = [(1 + h * both_DN, 1 - h * both_DN) for h in steps] + [(np.ones((1, training.rows)), 1 - both_DN)]
  weights = [weight_DN for move in moves for weight_DN in move]
  output_DK = outputs_of(oracle, training, np.concatenate(weights), at_once)
  outputs_by_move = iter(np.split(output_DK, np.cumsum([len(weight_DN) for weight_DN in weights])[:-1]))
  for step, width in [*((h, 2 * h) for h in steps), (DROPPED, 1.0)]:
    change_DK = (next(outputs_by_move) - next(outputs_by_move)) / width
    for place, kind in enumerate(changes):
      part = slice(place * count, (place + 1) * count)
      yield {'of': kind, 'step': step, **agreement(both_DN[part] @ derivative_KN.T, change_DK[part])}


def agreement(predicted_DK: np.ndarray, change_DK: np.ndarray) -> dict[str, float]:
  """Agreement of the changes that the derivative predicts with the actual ones."""
  norm = float(np.linalg.norm(change_DK))
  return {
    'values': change_DK.size,
    'correlation': float(np.corrcoef(predicted_DK.ravel(), change_DK.ravel())[0, 1]),
    'relative_error': float(np.linalg.norm(predicted_DK - change_DK)) / norm,
    'norm_of_changes': norm,
  }


def directions(seed: int, derivative_N: np.ndarray, count: int) -> Mapping[str, np.ndarray]:
  """{'rows', 'groups'} → 0/1 as float64 [count, N]; highest and lowest derivative first, then random ones."""
  rows = len(derivative_N)
  order, result = np.argsort(-derivative_N), {}
  for kind, size in (('rows', 1), ('groups', max(round(_GROUP * rows), 2))):
    result[kind] = np.zeros((count, rows))
    result[kind][0, order[:size]] = result[kind][1, order[-size:]] = 1
    for place in range(2, count):
      drawn = prng.numpy_stream(seed, 'derivative', kind, place).choice(rows, size, replace=False)
      result[kind][place, drawn] = 1
  return result


def outputs_of(oracle: Metagradient, training: ScannedTraining, weight_DN: np.ndarray, at_once: int) -> np.ndarray:
  """output_DK of run 0 after training with each row of weights, in float64, `at_once` trainings per program."""
  begin = training.start(0), jnp.asarray(training.order(0))
  wide = widened(oracle.apply, jnp.ones(training.rows, jnp.float32), *begin)
  many, parts = jax.jit(jax.vmap(wide, in_axes=(0, None, None))), []
  with jax.enable_x64(True):
    for start in range(0, len(weight_DN), at_once):
      part = weight_DN[start : start + at_once]
      filled = np.pad(part, ((0, at_once - len(part)), (0, 0)))  # one shape, one compilation
      parts.append(np.asarray(many(jnp.asarray(filled, jnp.float64), *begin))[: len(part)])
  return np.concatenate(parts)


# Models and trainings name float32 in many places, which JAX's 64-bit mode does not change. So a function is traced in
# float32, and its operations are then evaluated on float64 values.
_NARROW, _WIDE = jnp.dtype('float32'), jnp.dtype('float64')


def widened(function: Callable, *example: Any) -> Callable:
  """`function`, which takes pytrees shaped like `example`, in float64; call it under `jax.enable_x64(True)`.

  Arguments are converted to float64. The result can be vmapped and jitted.
  """
  closed, shapes = jax.make_jaxpr(function, return_shape=True)(*example)
  structure = jax.tree.structure(shapes)

  def wide(*args: Any) -> Any:
    return jax.tree.unflatten(structure, _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args)))

  return wide


def _evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], map(_wider, [*consts, *args]), strict=True))

  def read(variable: Any) -> Any:
    if not isinstance(variable, core.Literal):
      return values[variable]
    # A scalar literal may carry a dtype, which NumPy drops.
    return jnp.asarray(np.asarray(variable.val), _WIDE) if jnp.result_type(variable.aval) == _NARROW else variable.val

  for equation in jaxpr.eqns:
    results = _apply(equation, [read(v) for v in equation.invars])
    values.update(zip(equation.outvars, results, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _apply(equation: Any, args: list[Any]) -> list[Any]:
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return _scan(params, args)
  if name == 'cond':
    branches = [lambda *x, b=b: tuple(_evaluate(b.jaxpr, b.consts, x)) for b in params['branches']]
    return list(jax.lax.switch(args[0], branches, *args[1:]))
  if name == 'scatter-add':  # its parameters contain the sum of two float32
    names = ('dimension_numbers', 'indices_are_sorted', 'unique_indices', 'mode')
    return [jax.lax.scatter_add(*args, **{key: params[key] for key in names})]
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):  # calls of all kinds, whose custom rules are ignored
    if key in params:
      inner = params[key]
      if isinstance(inner, core.ClosedJaxpr):
        return _evaluate(inner.jaxpr, inner.consts, args)
      return _evaluate(inner, (), args)
  out = equation.primitive.bind(*args, **{key: _wider_dtype(value) for key, value in params.items()})
  return list(out) if equation.primitive.multiple_results else [out]


def _scan(params: Any, args: list[Any]) -> list[Any]:
  fixed, carried, body = params['num_consts'], params['num_carry'], params['jaxpr']

  def step(carry: tuple[Any, ...], x: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    out = _evaluate(body.jaxpr, body.consts, [*args[:fixed], *carry, *x])
    return tuple(out[:carried]), tuple(out[carried:])

  first, rows = tuple(args[fixed : fixed + carried]), tuple(args[fixed + carried :])
  carry, out = jax.lax.scan(step, first, rows, params['length'], params['reverse'])
  return [*carry, *out]


def _wider(x: Any) -> Any:
  return jnp.asarray(x, _WIDE) if jnp.result_type(x) == _NARROW else x


def _wider_dtype(value: Any) -> Any:
  return _WIDE if isinstance(value, np.dtype) and value == _NARROW else value
