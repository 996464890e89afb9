"""Floating-point operations of a JAX function, counted over its jaxpr.

XLA's own cost analysis counts the body of a scan once, and no hand-written kernel; here a scan counts its body as often
as it runs, and a kernel as often as its grid has points (blocks that a causal mask skips count too). Only matrix
multiplications and convolutions are counted (a multiply-add is two operations), which is the field's convention for
transformers; elementwise work is left out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

# Dense bfloat16 peak of one JAX device, FLOP/s, from the makers' data sheets (cloud.google.com/tpu/docs,
# nvidia.com/data-center).
PEAKS = {
  'v4': 275e12, 'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12, 'tpu7x': 1_153.5e12,
  'A100': 312e12, 'H100': 989e12, 'H200': 989e12,
}  # fmt: skip
# Part of JAX's name of the device kind → key of PEAKS; the first match counts.
_KINDS = (
  ('TPU v5 lite', 'v5e'),
  ('TPU v5e', 'v5e'),
  ('TPU v5', 'v5p'),
  ('TPU v6', 'v6e'),
  ('TPU v4', 'v4'),
  ('TPU7x', 'tpu7x'),
)


def chip_name(device: jax.Device) -> str | None:
  """The key of PEAKS for a device; None if it is not there, as CPUs."""
  names = (*_KINDS, *((name, name) for name in PEAKS))
  return next((name for kind, name in names if kind in device.device_kind), None)


def peak(devices: Sequence[jax.Device]) -> float | None:
  """Dense bfloat16 FLOP/s of all `devices` together; None if a kind is unknown, as on CPUs."""
  names = [chip_name(device) for device in devices]
  return None if None in names else float(sum(PEAKS[name] for name in names if name))


def count(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
  """FLOP of one call `function(*args, **kwargs)`; arguments may be `ShapeDtypeStruct`s. Nothing runs."""
  return float(_count_jaxpr(jax.make_jaxpr(function)(*args, **kwargs).jaxpr))


def _count_jaxpr(jaxpr: jex_core.Jaxpr) -> int:
  return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: jex_core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    lhs = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[d] for d in contracted)
  if name == 'conv_general_dilated':
    kernel = _shape(equation.invars[1])
    outputs = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2 * math.prod(_shape(equation.outvars[0])) * (math.prod(kernel) // outputs)
  if name == 'cond':
    return max(_count_jaxpr(branch.jaxpr) for branch in params['branches'])
  repeats = _repeats(name, params)
  return repeats * sum(_count_jaxpr(inner) for inner in _inner_jaxprs(params))


def _repeats(name: str, params: dict[str, Any]) -> int:
  """How often the jaxprs inside an equation run, over all devices."""
  if name == 'scan':
    return params['length']
  if name == 'pallas_call':  # a kernel runs once for each point of its grid
    return math.prod(params['grid_mapping'].grid)
  if name == 'shard_map':  # the jaxpr inside is one device's share
    return math.prod(params['mesh'].shape[axis] for axis in params['newly_manual_axes'])
  return 1


def _shape(variable: Any) -> tuple[int, ...]:
  return tuple(variable.aval.shape)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[jex_core.Jaxpr]:
  for value in params.values():
    if isinstance(value, jex_core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, jex_core.Jaxpr):
      yield value
