"""A training step: tokens per second, share of the measured matmul peak, memory, time to the first step.

Steps and bare square matrix products alternate, so that both see the same machine; medians are printed as one JSON
line. FLOP are those of matrix products (see `core.flops`). `peak_bytes` is XLA's figure for one device: arguments,
results and temporaries. With `--models-at-once` several models train with `vmap`, and tokens are the sum over them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsdm_jax.bench import features
from dsdm_jax.configs import base
from dsdm_jax.core import flops, prng, processes
from dsdm_jax.core.mesh import place
from dsdm_jax.errors import UserError
from dsdm_jax.training.step import Trainer
from dsdm_jax.training.vmapped import VmappedTrainer


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', choices=(*features.MODELS, 'quickstart'), default='small')
  parser.add_argument('--batch', type=int, default=16, help='examples')
  parser.add_argument('--microbatches', type=int, default=0, help='microbatches per batch; 0: as in a run')
  parser.add_argument('--length', type=int, default=256, help='tokens of an example')
  parser.add_argument('--devices', default='1x1', help='DATAxMODEL; a CPU is split into as many devices')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of activations')
  parser.add_argument('--attention', choices=('xla', 'fused'), default='xla')
  parser.add_argument('--remat', action='store_true', help='recompute activations in the backward pass')
  parser.add_argument('--models-at-once', type=int, default=1, help='models trained side by side')
  parser.add_argument('--repeats', type=int, default=9, help='rounds')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  if flags.batch % (flags.microbatches or 1):
    raise UserError(f'--microbatches={flags.microbatches} must divide --batch={flags.batch}')
  began = time.perf_counter()
  mesh = features.mesh_of(flags.devices)
  if jax.default_backend() == 'cpu':
    processes.keep_freed_memory()  # as every run of the pipeline does
  step, flop, peak_bytes = _step(flags, mesh)
  step()
  first = time.perf_counter() - began
  side = features.PEAK_SIZE.get(jax.default_backend(), 8_192)
  x = jnp.ones((side, side), flags.dtype)
  product = jax.jit(lambda x: x @ x).lower(x).compile()
  seconds: dict[str, list[float]] = {'step': [], 'product': []}
  cases: tuple[tuple[str, Callable[[], Any]], ...] = (
    ('step', step),
    ('product', lambda: jax.block_until_ready(product(x))),
  )
  for _ in range(flags.repeats + 1):
    for name, case in cases:
      start = time.perf_counter()
      case()
      seconds[name].append(time.perf_counter() - start)
  step_s, product_s = (statistics.median(seconds[name][1:]) for name in ('step', 'product'))
  devices = mesh.size if jax.default_backend() != 'cpu' else 1  # simulated devices share the cores
  measured = 2.0 * side**3 / product_s * devices
  peak = flops.peak(list(mesh.devices.flat))
  print(
    json.dumps(
      {
        'model': flags.model,
        'batch': flags.batch,
        'length': flags.length,
        'dtype': flags.dtype,
        'devices': flags.devices,
        'models_at_once': flags.models_at_once,
        'seconds': round(step_s, 5),
        'tokens_per_s': round(flags.models_at_once * flags.batch * flags.length / step_s),
        'flop': flop,
        'share_of_matmul_peak': round(flop / step_s / measured, 4),
        'mfu': round(flop / step_s / peak, 4) if peak and flags.dtype == 'bfloat16' else None,
        'matmul_flop_per_s': round(measured),
        'peak_bytes': peak_bytes,
        'first_step_s': round(first, 2),
      }
    ),
    flush=True,
  )


def _step(flags: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Callable[[], None], float, int | None]:
  """(function that runs one step and waits; FLOP; bytes on one device)."""
  config, vocab_size = _model(flags)
  train = base.training()
  train.update({'batch_size': flags.batch, 'microbatches': flags.microbatches})
  trainer: Any = Trainer(config, train, vocab_size, flags.length, mesh)
  shape: tuple[int, ...] = (flags.batch, flags.length)
  key: Any = prng.stream(0, 'bench', 'init')
  if flags.models_at_once > 1:
    trainer, shape = VmappedTrainer(trainer, flags.models_at_once), (flags.models_at_once, *shape)
    key = [prng.stream(0, 'bench', 'init', i) for i in range(flags.models_at_once)]
  tokens = prng.numpy_stream(0, 'bench').integers(0, vocab_size, shape, np.int32)
  pair = place((tokens, np.ones(shape[:-1], np.float32)), trainer.batch_sharding)
  steps, held = jnp.int32(1_000), [trainer.init(key)]
  program = trainer.step.lower(held[0], *pair, steps).compile()

  def step() -> None:
    held[0], metrics = program(held[0], *pair, steps)
    jax.block_until_ready((held[0], metrics))

  return step, flops.count(trainer.step, held[0], *pair, steps), features.peak_bytes(program)


def _model(flags: argparse.Namespace) -> tuple[Any, int]:
  if flags.model == 'quickstart':
    from dsdm_jax.configs import quickstart

    whole = quickstart.get_config()
    config, vocab_size = whole.model, whole.pool.vocab_size
    config.update({'compute_dtype': flags.dtype, 'remat': flags.remat})
  else:
    config, vocab_size = features.model_config(flags)
  config.attention = flags.attention
  return config, vocab_size
