"""Features and scores against a training step, side by side on the same model and batch.

Each case is timed once in each of `--repeats` rounds, so that all cases see the same machine, and its median is printed
as one JSON line. FLOP are those of matrix products (see `core.flops`). `ratio_to_floor` compares seconds with a lower
bound of the method: the training step's time, times the share of its FLOP that the method needs; for dense features the
time of per-example gradients plus that of a bare matrix product of the same shape, measured as cases; for whole passes
over a pool (`stage_store_j4096`, `stage_stream_j4096`) the time of their compiled steps alone. `cpu_ratio_to_floor` is
the same for processor seconds, which other users of the machine hardly change.

On CPU set GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1: all threads then allocate from one arena that
keeps freed memory. In a run, steps follow each other; here seconds may pass until a case runs again, in which memory
would go back to the system.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import probes, rademacher
from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.bench import stages
from dsdm_jax.configs import base
from dsdm_jax.core import flops, prng, processes
from dsdm_jax.core.mesh import batch_sharding, make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import outputs
from dsdm_jax.training.step import Trainer, abstract_model

# name: (layers, width, heads, vocabulary)
MODELS = {
  'quickstart': (2, 64, 2, 1_024),
  'small': (4, 256, 4, 4_096),
  'gpt2_125m': (12, 768, 12, 50_304),
  'gpt2_356m': (24, 1_024, 16, 50_304),
  'gpt2_760m': (24, 1_536, 12, 50_304),
  'gpt2_1300m': (24, 2_048, 16, 50_304),
}
CASES = tuple(
  'train_step forward per_example_gradient two_sided_j4096 two_sided_j16384 bare_matmul_j4096 dense_j4096 jvp_score '
  'jvp_score_4_targets matmul_peak'.split()
)
_ANY_J = re.compile(r'(two_sided|bare_matmul|dense|gram|stage_store|stage_stream)_j[1-9]\d*')
PEAK_SIZE = {'cpu': 2_048}  # side of the square product that measures the machine's peak; 8,192 on accelerators


@dataclasses.dataclass
class Case:
  """One compiled program, or a pass over many rows. `run` calls it and waits; for a pass it returns the time."""

  name: str
  run: Callable[[], Any]
  flop: float
  least_flop: float | None
  peak_bytes: int | None
  j: int | None = None
  rows: int | None = None
  microbatch: int | None = None
  seconds: list[float] = dataclasses.field(default_factory=list)
  text: str = ''  # of the compiled program, on a TPU
  over_floor: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # of a pass: wall clock, processors


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', choices=MODELS, default='small')
  parser.add_argument('--batch', type=int, default=16, help='examples')
  parser.add_argument('--length', type=int, default=256, help='tokens of an example')
  parser.add_argument('--devices', default='1x1', help='DATAxMODEL; a CPU is split into as many devices')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of activations')
  parser.add_argument('--remat', action='store_true', help='recompute activations in backward passes')
  parser.add_argument(
    '--cases', default=','.join(CASES), help=f'comma-separated names from {", ".join(CASES)}; any number may follow _j'
  )
  parser.add_argument('--rows', type=int, default=2_048, help='of the pool of stage_store and stage_stream')
  parser.add_argument(
    '--shard-rows', type=int, default=0, help=f'of stage_store and stage_stream; 0: {stages.SHARD_ROWS}'
  )
  parser.add_argument('--microbatch', type=int, default=None, help='examples per jvp; default: half a batch')
  parser.add_argument('--repeats', type=int, default=5, help='rounds')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  wanted = tuple(flags.cases.split(','))
  stages.SHARD_ROWS = flags.shard_rows or stages.SHARD_ROWS
  for name in wanted:
    if name not in CASES and not _ANY_J.fullmatch(name):
      raise UserError(
        f'--cases={flags.cases}: {name} is unknown; cases are {", ".join(CASES)}, with any number after _j'
      )
  measured = cases(dict.fromkeys((*wanted, 'matmul_peak')), flags)
  for case in measured:
    if case.rows is None:  # passes are compiled already
      case.run()
  for _ in range(flags.repeats):
    for case in measured:
      began = time.perf_counter()
      result = case.run()
      if case.rows is None:
        case.seconds.append(time.perf_counter() - began)
      else:
        spent, floor = result
        case.seconds.append(spent.clock)
        case.over_floor.append((spent.clock / floor.clock, spent.processors / floor.processors))
  for line in _lines(measured, flags):
    print(json.dumps(line), flush=True)


def cases(names: Iterable[str], flags: argparse.Namespace) -> list[Case]:
  """Compiled programs of these names; `flags` has those of `add_flags`."""
  mesh = mesh_of(flags.devices)
  if jax.default_backend() == 'cpu':
    processes.keep_freed_memory()  # as a run does
  return [_case(name, flags, mesh) for name in names]


def mesh_of(devices: str) -> Mesh:
  data, _, model = devices.partition('x')
  if not (data.isdecimal() and model.isdecimal()):
    raise UserError(f'--devices={devices} must be DATAxMODEL, such as 4x2')
  config = base.get_config().mesh
  config.data, config.model = int(data), int(model)
  count = config.data * config.model
  if count > 1:
    jax.config.update('jax_num_cpu_devices', count)
  if len(jax.devices()) < count:
    raise UserError(f'--devices={devices} needs {count} devices and there are {len(jax.devices())}')
  return make_mesh(config, jax.devices()[:count])


def model_config(flags: argparse.Namespace) -> tuple[ConfigDict, int]:
  """The config of `--model` and its vocabulary."""
  layers, width, heads, vocab_size = MODELS[flags.model]
  config = base.model()
  config.update({'layers': layers, 'width': width, 'heads': heads, 'kv_heads': heads, 'mlp_width': 4 * width})
  config.update({'compute_dtype': flags.dtype, 'remat': flags.remat, 'scan_layers': layers > 4})
  return config, vocab_size


def _case(name: str, flags: argparse.Namespace, mesh: Mesh) -> Case:
  config, vocab_size = model_config(flags)
  model = abstract_model(config, vocab_size, flags.length)
  tokens_BL = prng.numpy_stream(0, 'bench').integers(0, vocab_size, (flags.batch, flags.length), np.int32)
  weights_BL = np.ones((flags.batch, flags.length), np.float32)
  weights_BL[:, 0] = 0
  inputs = jax.device_put((tokens_BL, weights_BL), batch_sharding(mesh))
  matmuls, attention = _least(config, vocab_size, flags)
  kind, _, size = name.partition('_j')
  j = int(size) if size.isdecimal() else None

  if name == 'matmul_peak':
    side = PEAK_SIZE.get(jax.default_backend(), 8_192)
    x = jnp.ones((side, side), flags.dtype)
    return _compiled(name, lambda x: x @ x, (x,), 2.0 * side**3)
  trainer = Trainer(config, base.training(), vocab_size, flags.length, mesh)
  key = prng.stream(0, 'bench', 'init')
  if name == 'train_step':
    return _train_case(trainer, key, inputs[0], 6 * matmuls + 12 * attention)
  params = trainer.init(key).params
  if name == 'forward':
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def forward(params: nnx.State, tokens_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
      return jax.vmap(outputs.margin)(nnx.merge(graphdef, params, rest)(tokens_BL), tokens_BL, weights_BL)

    return _compiled(name, forward, (params, *inputs), 2 * matmuls + 4 * attention)
  if name == 'per_example_gradient':
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def output(params: nnx.State, tokens_L: jax.Array, weights_L: jax.Array) -> jax.Array:
      return outputs.margin(nnx.merge(graphdef, params, rest)(tokens_L[None])[0], tokens_L, weights_L)

    gradients = jax.vmap(jax.grad(output), in_axes=(None, 0, 0))
    return _compiled(name, gradients, (params, *inputs), 6 * matmuls + 12 * attention)
  if kind == 'two_sided' and j:
    two_sided = TwoSidedFeatures(model, outputs.margin, '.*', j, 0, mesh)
    prepared = two_sided.prepare(params, 0)
    thin = flags.batch * probes.least_flop(two_sided.layers, flags.length, ['embedding/embedding'])
    least = 4 * matmuls + 12 * attention + thin
    return _compiled(name, two_sided.apply, (prepared, *inputs), least, two_sided.dimension)
  if kind == 'bare_matmul' and j:
    return _bare_matmul(name, params, flags.batch, j)
  if kind == 'dense' and j:
    dense = DenseFeatures(model, outputs.margin, j, 0, mesh)
    return _compiled(name, dense.apply, (dense.prepare(params, 0), *inputs), None, j)
  if kind == 'gram' and j:
    function, phi_BJ = stages.gram_step(j)
    return _compiled(name, function, (phi_BJ,), None, j)
  if kind in ('stage_store', 'stage_stream') and j:
    return _stage_case(name, flags, vocab_size, TwoSidedFeatures(model, outputs.margin, '.*', j, 0, mesh), params)
  microbatch = flags.batch // 2 if flags.microbatch is None else flags.microbatch
  targets = 4 if name.endswith('4_targets') else 1
  scorer = DirectionalScores(model, outputs.margin, 0, mesh, microbatch)
  prepared = scorer.prepare(params, jnp.ones((64, targets)), 0)
  least = (2 + 4 * targets) * matmuls + (4 + 8 * targets) * attention
  case = _compiled(name, scorer.apply, (prepared, *inputs), least)
  return dataclasses.replace(case, microbatch=microbatch)


def _stage_case(
  name: str, flags: argparse.Namespace, vocab_size: int, step: TwoSidedFeatures, params: nnx.State
) -> Case:
  kind = name.partition('_j')[0]
  run = stages.make_pass(kind, step, params, flags.rows, flags.batch, flags.length, vocab_size, step.mesh)
  tokens_BL = jnp.zeros((flags.batch, flags.length), jnp.int32)
  one = flops.count(step.apply, step.prepare(params, 0), tokens_BL, jnp.ones(tokens_BL.shape))
  total = one * _batches(flags) * (1 if kind == 'stage_store' else 2)
  return Case(name, run, total, None, None, step.dimension, flags.rows)


def _batches(flags: argparse.Namespace) -> int:
  """Number of batches of a pass over the pool, shard by shard."""
  whole, rest = divmod(flags.rows, stages.SHARD_ROWS)
  return whole * -(-stages.SHARD_ROWS // flags.batch) + -(-rest // flags.batch)


def _least(config: ConfigDict, vocab_size: int, flags: argparse.Namespace) -> tuple[float, float]:
  """Tokens × parameters in matrix products, and tokens × layers × L × D."""
  tokens = flags.batch * flags.length
  matmuls = config.layers * (4 * config.width**2 + 2 * config.width * config.mlp_width) + vocab_size * config.width
  return float(tokens * matmuls), float(tokens * config.layers * flags.length * config.width)


def _compiled(
  name: str, function: Callable[..., Any], args: tuple[Any, ...], least: float | None, j: int | None = None
) -> Case:
  program = jax.jit(function).lower(*args).compile()
  return Case(
    name,
    lambda: jax.block_until_ready(program(*args)),
    flops.count(function, *args),
    least,
    peak_bytes(program),
    j,
    text=_text(program),
  )


def _train_case(trainer: Trainer, key: jax.Array, tokens_BL: jax.Array, least: float) -> Case:
  state, weight_B, steps = trainer.init(key), jnp.ones(tokens_BL.shape[0]), jnp.int32(1_000)
  program = trainer.step.lower(state, tokens_BL, weight_B, steps).compile()
  held = [state]

  def step() -> None:
    held[0], metrics = trainer.step(held[0], tokens_BL, weight_B, steps)
    jax.block_until_ready(metrics)
    jax.block_until_ready(held[0])

  return Case(
    'train_step',
    step,
    flops.count(trainer.step, state, tokens_BL, weight_B, steps),
    least,
    peak_bytes(program),
    text=_text(program),
  )


def _text(program: Any) -> str:
  return program.as_text() or '' if jax.default_backend() == 'tpu' else ''


def _bare_matmul(name: str, params: nnx.State, batch: int, j: int) -> Case:
  """[B, W] × [W, J] with one block of [·, J] that is reused: the whole matrix would not fit into memory."""
  parameters = sum(x.size for x in jax.tree.leaves(params))
  blocks = -(-parameters // rademacher.BLOCK)
  block_WJ = jnp.ones((rademacher.BLOCK, j), jnp.float32)
  grads_BW = jnp.ones((batch, blocks * rademacher.BLOCK), jnp.float32)

  def product(grads_BW: jax.Array, block_WJ: jax.Array) -> jax.Array:
    def add(phi_BJ: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
      part = jax.lax.dynamic_slice_in_dim(grads_BW, number * rademacher.BLOCK, rademacher.BLOCK, axis=1)
      return phi_BJ + part @ block_WJ, None

    return jax.lax.scan(add, jnp.zeros((batch, j), jnp.float32), jnp.arange(blocks))[0]

  return _compiled(name, product, (grads_BW, block_WJ), 2.0 * batch * parameters * j, j)


def peak_bytes(program: Any) -> int | None:
  """Bytes of arguments, results and temporaries of a compiled program on one device; None if XLA does not report it."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  return int(total - memory.alias_size_in_bytes)


def _lines(cases: list[Case], flags: argparse.Namespace) -> list[dict[str, Any]]:
  seconds = {case.name: statistics.median(case.seconds) for case in cases}
  of_name = {case.name: case for case in cases}
  peak = of_name['matmul_peak'].flop / seconds['matmul_peak'] if 'matmul_peak' in seconds else None
  # The product that measures the peak and bare products run on one device; simulated devices share the cores.
  devices = math.prod(map(int, flags.devices.split('x'))) if jax.default_backend() != 'cpu' else 1
  lines = []
  for case in cases:
    mine = seconds[case.name]
    floor = _floor(case, of_name, seconds)
    lines.append(
      {
        'case': case.name,
        'seconds': round(mine, 5),
        'ratio_to_train_step': round(mine / seconds['train_step'], 4) if 'train_step' in seconds else None,
        'ratio_to_floor': round(mine / floor, 4) if floor else None,
        'cpu_ratio_to_floor': round(statistics.median(x for _, x in case.over_floor), 4) if case.over_floor else None,
        'tokens_per_s': round(tokens / mine) if (tokens := _tokens(case, flags)) else None,
        'peak_bytes': case.peak_bytes,
        'flop': case.flop,
        'share_of_matmul_peak': round(case.flop / mine / (peak * _devices(case, devices)), 4) if peak else None,
        'model': flags.model,
        'batch': flags.batch,
        'length': flags.length,
        'j': case.j,
        'rows': case.rows,
        'microbatch': case.microbatch,
        'devices': flags.devices,
      }
    )
  return lines


def _devices(case: Case, devices: int) -> int:
  return 1 if case.name == 'matmul_peak' or case.name.startswith(('bare', 'gram')) else devices


def _tokens(case: Case, flags: argparse.Namespace) -> int:
  if case.name == 'matmul_peak' or case.name.startswith('gram'):
    return 0
  return (case.rows or flags.batch) * flags.length


def _floor(case: Case, of_name: dict[str, Case], seconds: dict[str, float]) -> float | None:
  mine = seconds[case.name]
  if case.over_floor:
    return mine / statistics.median(clock for clock, _ in case.over_floor)
  if case.name.startswith('dense'):
    parts = ('per_example_gradient', case.name.replace('dense', 'bare_matmul'))
    return sum(seconds[p] for p in parts) if seconds.keys() >= set(parts) else None
  if (
    case.name in ('matmul_peak', 'per_example_gradient')
    or case.name.startswith(('bare', 'gram'))
    or 'train_step' not in seconds
  ):
    return None
  train = of_name['train_step'].least_flop
  return seconds['train_step'] * case.least_flop / train if case.least_flop and train else None
