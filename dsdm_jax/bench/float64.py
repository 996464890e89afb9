"""A function of float32 evaluated in float64, to tell what rounding does to it from what the function does.

Models and trainings name float32 in many places, which turning JAX's 64-bit mode on would not change. What they compute
is traced as it is, and each operation is then done on wider numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_NARROW, _WIDE = jnp.dtype('float32'), jnp.dtype('float64')


def widened(function: Callable, *example: Any) -> Callable:
  """`function`, which takes pytrees shaped like `example`, in float64; call it under `jax.enable_x64(True)`.

  Arguments are widened. What comes out can be mapped and jitted.
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
    # A number of Python's may carry its dtype with it, and is made plain first.
    return jnp.asarray(np.asarray(variable.val), _WIDE) if jnp.result_type(variable.aval) == _NARROW else variable.val

  for equation in jaxpr.eqns:
    found = _apply(equation, [read(v) for v in equation.invars])
    values.update(zip(equation.outvars, found, strict=True))
  return [read(v) for v in jaxpr.outvars]


def _apply(equation: Any, args: list[Any]) -> list[Any]:
  name, params = equation.primitive.name, equation.params
  if name == 'scan':
    return _scan(params, args)
  if name == 'cond':
    branches = [lambda *x, b=b: tuple(_evaluate(b.jaxpr, b.consts, x)) for b in params['branches']]
    return list(jax.lax.switch(args[0], branches, *args[1:]))
  if name == 'scatter-add':  # it carries the sum of two float32 with it
    names = ('dimension_numbers', 'indices_are_sorted', 'unique_indices', 'mode')
    return [jax.lax.scatter_add(*args, **{key: params[key] for key in names})]
  for key in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):  # calls of all kinds; their own rules are of no use here
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
