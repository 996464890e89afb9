"""First contact with a TPU or GPU: does it compute what the CPU computes, and how fast?

    python -m dsdm_jax.bench device --out=device.json

checks results against the CPU of the same machine, times the programs of a run, and prints both as tables: predicted
time from the plan's model (`plan/cost.py`), measured time, their ratio, MFU, and memory. The file is what
`plan.calibration` reads. It takes a few minutes, most of them compilation, and needs no TensorFlow. Exit code 2 if a
check fails.

Predictions come from FLOP, HBM traffic and peaks of the chip where the plan knows it; elsewhere from FLOP and the
measured peak of a matrix product.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.gradients import DenseFeatures, TwoSidedFeatures
from dsdm_jax.attribution.quantization import Quantizer, column_blocks
from dsdm_jax.bench import features
from dsdm_jax.configs import base
from dsdm_jax.core import flops, prng, storage
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import attention, attention_tpu, outputs
from dsdm_jax.plan import cost, hlo, topology
from dsdm_jax.training.step import Trainer, abstract_model

_J, _DENSE_J = 4_096, 512  # columns of features that are timed
PROGRAMS = (
  *('train_step', 'forward', 'per_example_gradient', f'two_sided_j{_J}', f'dense_j{_DENSE_J}'),
  *('jvp_score', 'jvp_score_4_targets', 'matmul_peak'),
)
_FLOAT32, _HALF = 1e-4, 0.02  # largest relative errors of products in float32, and of bfloat16's eight bits


@dataclasses.dataclass(frozen=True)
class Check:
  """`value`, an error relative to the size of what is compared, must be at most `limit`."""

  name: str
  value: float
  limit: float

  @property
  def passed(self) -> bool:
    return self.value <= self.limit  # not for NaN


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--model', choices=features.MODELS, help='default: gpt2_125m, on a CPU quickstart')
  parser.add_argument('--batch', type=int, help='examples; default: 8, on a CPU 4')
  parser.add_argument('--length', type=int, help='tokens of an example; default: 1024, on a CPU 128')
  parser.add_argument('--repeats', type=int, default=10, help='runs of each program that are timed')
  parser.add_argument('--out', default='device.json', help='file for plan.calibration')


def run(flags: argparse.Namespace) -> None:
  """Checks, measures, prints and writes; see the module.

  Raises:
    UserError: a check failed, or the file cannot be written.
  """
  out = Path(flags.out)
  if not out.absolute().parent.is_dir():
    raise UserError(f'--out={flags.out}: {out.absolute().parent} is no folder')
  slow = jax.default_backend() == 'cpu'
  flags.model = flags.model or ('quickstart' if slow else 'gpt2_125m')
  flags.batch, flags.length = flags.batch or (4 if slow else 8), flags.length or (128 if slow else 1_024)
  device = jax.devices()[0]
  print(
    f'{device.device_kind}, {len(jax.devices())} devices, jax {jax.__version__}; checks and times are of one device'
  )
  checks = [check for group in (precision, fused_attention, quantization, resume) for check in group()]
  print(_table(('check', 'error', 'limit', ''), [_check_line(check) for check in checks]))
  measured = measure(flags, device)
  print(_table(tuple(measured[0]), [tuple(line.values()) for line in map(_shown, measured)]))
  calibration = {line['program']: line['ratio'] for line in measured if line['ratio'] is not None}
  storage.write_json(
    out,
    {
      'device': device.device_kind,
      'chip': flops.chip_name(device),
      'model': flags.model,
      'batch': flags.batch,
      'length': flags.length,
      'checks': [dataclasses.asdict(check) | {'passed': check.passed} for check in checks],
      'measured': measured,
      'calibration': calibration,
    },
  )
  print(f'written: {out}; plan with it: dsdm plan --config=… --config.plan.calibration={out}')
  failed = [check.name for check in checks if not check.passed]
  if failed:
    raise UserError(f'{device.device_kind} computes other results than the CPU: {", ".join(failed)}; do not use it')


def _check_line(check: Check) -> tuple[str, ...]:
  return check.name, f'{check.value:.1e}', f'{check.limit:.0e}', 'ok' if check.passed else 'FAILED'


def error(found: Any, wanted: Any) -> float:
  """‖found − wanted‖ / ‖wanted‖ over all leaves, in float64."""
  pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
  values = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
  distance = sum(np.square(a - b).sum() for a, b in values)
  return float(np.sqrt(distance / sum(np.square(b).sum() for _, b in values)))


class Small:
  """A model of one layer and one batch, on one device; float32 unless `dtype` says otherwise."""

  length, vocab_size = 128, 256

  def __init__(self, device: jax.Device, dtype: str = 'float32'):
    self.mesh = make_mesh(base.get_config().mesh, [device])
    self.config = base.model()
    self.config.update({'layers': 1, 'width': 64, 'heads': 2, 'kv_heads': 2, 'mlp_width': 128, 'compute_dtype': dtype})
    self.trainer = Trainer(self.config, base.training(), self.vocab_size, self.length, self.mesh)
    # The same numbers on every device: they are drawn on the CPU.
    with jax.default_device(jax.devices('cpu')[0]):
      drawn = Small._drawn(self.config)
    self.params, self.rest = jax.device_put(drawn, device)
    tokens_BL = prng.numpy_stream(0, 'bench').integers(0, self.vocab_size, (8, self.length), np.int32)
    weights_BL = np.ones(tokens_BL.shape, np.float32)
    weights_BL[:, 0] = 0
    self.inputs = jax.device_put((tokens_BL, weights_BL), device)

  @staticmethod
  def _drawn(config: Any) -> Any:
    from dsdm_jax.training.step import build_model

    model = build_model(config, Small.vocab_size, Small.length, nnx.Rngs(prng.stream(0, 'bench', 'init')))
    return nnx.split(model, nnx.Param, ...)[1:]

  def loss_and_gradient(self) -> tuple[jax.Array, Any]:
    tokens_BL, weights_BL = self.inputs

    def loss(params: Any) -> jax.Array:
      logits_BLV = self.trainer.logits(params, self.rest, tokens_BL)
      return jax.vmap(outputs.margin)(logits_BLV, tokens_BL, weights_BL).mean()

    return jax.jit(jax.value_and_grad(loss))(self.params)

  def features(self) -> dict[str, jax.Array]:
    """Two-sided and dense features and directional scores of the batch."""
    model = abstract_model(self.config, self.vocab_size, self.length)
    two_sided = TwoSidedFeatures(model, outputs.margin, '.*', 256, 0, self.mesh)
    dense = DenseFeatures(model, outputs.margin, 64, 0, self.mesh)
    scorer = DirectionalScores(model, outputs.margin, 0, self.mesh, 4)
    direction = jax.device_put(jnp.ones((64, 1)), self.mesh.devices.flat[0])
    return {
      'two-sided features': two_sided.jitted(two_sided.prepare(self.params, 0), *self.inputs),
      'dense features': dense.jitted(dense.prepare(self.params, 0), *self.inputs),
      'directional scores': scorer.jitted(scorer.prepare(self.params, direction, 0), *self.inputs),
    }


def precision() -> list[Check]:
  """float32 against the CPU, bfloat16 against float32 on the device."""
  device, cpu = jax.devices()[0], jax.devices('cpu')[0]
  with jax.default_matmul_precision('highest'):
    (loss, gradient), found = Small(device).loss_and_gradient(), Small(device).features()
    with jax.default_device(cpu):
      (wanted_loss, wanted_gradient), wanted = Small(cpu).loss_and_gradient(), Small(cpu).features()
  half_loss, half_gradient = Small(device, 'bfloat16').loss_and_gradient()
  return [
    Check('loss, float32, against the CPU', error(loss, wanted_loss), _FLOAT32),
    Check('gradient, float32, against the CPU', error(gradient, wanted_gradient), 10 * _FLOAT32),
    *(Check(f'{name}, float32, against the CPU', error(found[name], wanted[name]), 10 * _FLOAT32) for name in found),
    Check('loss, bfloat16 against float32', error(half_loss, loss), _HALF),
    Check('gradient, bfloat16 against float32', error(half_gradient, gradient), 5 * _HALF),
  ]


def fused_attention() -> list[Check]:
  """The fused kernel and its gradients against the plain one; on devices without the kernel there is nothing to do."""
  mesh = make_mesh(base.get_config().mesh, jax.devices()[:1])
  shape = (2, 256, 4, 64)
  q, k, v, weight = (jax.random.normal(key, shape) for key in jax.random.split(prng.stream(0, 'bench', 'qkv'), 4))

  def run(attend: Callable[..., jax.Array]) -> Any:
    return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * weight).sum(), argnums=(0, 1, 2)))(q, k, v)[1]

  with attention_tpu.on_mesh(mesh), jax.default_matmul_precision('highest'):
    if not attention_tpu.serves(shape[1]):
      return []
    return [Check('fused attention, gradients', error(run(attention_tpu.causal), run(attention.causal)), _HALF)]


def quantization() -> list[Check]:
  """int8 and bfloat16 features: inner products of rows, against float32."""
  small = Small(jax.devices()[0])
  model = abstract_model(small.config, small.vocab_size, small.length)
  step = TwoSidedFeatures(model, outputs.margin, '.*', 256, 0, small.mesh)
  phi_BJ = np.asarray(step.jitted(step.prepare(small.params, 0), *small.inputs))
  blocks = column_blocks(step.describe(), step.dimension)
  return [
    Check(f'inner products, {dtype} store', Quantizer(dtype, blocks).fidelity(phi_BJ)['inner_product_error'], _HALF)
    for dtype in ('bfloat16', 'int8')
  ]


def resume() -> list[Check]:
  """Four training steps, and two, a checkpoint, and two more: the same bits."""
  small = Small(jax.devices()[0])
  trainer, (tokens_BL, _) = small.trainer, small.inputs
  weight_B, steps = jnp.ones(tokens_BL.shape[0]), jnp.int32(4)

  def train(state: Any, count: int) -> Any:
    for _ in range(count):
      state, _ = trainer.step(state, tokens_BL, weight_B, steps)
    return state

  whole = train(trainer.init(prng.stream(0, 'bench', 'init')), 4)
  with tempfile.TemporaryDirectory() as folder:
    with Checkpoints(Path(folder)) as checkpoints:
      checkpoints.save(2, train(trainer.init(prng.stream(0, 'bench', 'init')), 2), {})
    with Checkpoints(Path(folder)) as checkpoints:
      restored = checkpoints.restore(trainer.abstract)
  assert restored is not None
  return [Check('training resumed from a checkpoint', error(train(restored[0], 2).params, whole.params), 0.0)]


def measure(flags: argparse.Namespace, device: jax.Device) -> list[dict[str, Any]]:
  """One line per program: seconds predicted and measured, MFU, bytes of memory; then transfers."""
  given = vars(flags) | {'devices': '1x1', 'remat': False, 'microbatch': None, 'rows': 0}
  given['dtype'] = 'float32' if device.platform == 'cpu' else 'bfloat16'
  cases = features.cases(PROGRAMS, argparse.Namespace(**given))
  seconds = {case.name: _median(case.run, flags.repeats) for case in cases}
  peak = cases[-1].flop / seconds['matmul_peak']
  name = flops.chip_name(device) or ''
  chip = topology.CHIPS[name].device if name in topology.CHIPS and name != 'v4' else topology.CHIPS.get(name)
  lines = []
  for case in cases:
    ends = _predicted(case, chip, peak)
    middle = sum(ends) / 2
    lines.append(
      {
        'program': case.name.partition('_j')[0] if case.j else case.name,
        'predicted_s': list(ends),
        'measured_s': seconds[case.name],
        'ratio': seconds[case.name] / middle if case.name != 'matmul_peak' else None,
        'mfu': (case.least_flop or case.flop) / seconds[case.name] / (chip.peak_flops if chip else peak),
        'planned_bytes': case.peak_bytes,
      }
    )
  array = jnp.ones((64, 2**18))  # 64 MiB
  host = np.asarray(array)
  for name, transfer in (
    ('to the host', lambda: np.asarray(array + 0)),
    ('to the device', lambda: jax.device_put(host)),
  ):
    took = _median(lambda transfer=transfer: jax.block_until_ready(transfer()), flags.repeats)  # type: ignore[misc]
    lines.append(_transfer(name, took, array.nbytes))
  return lines


def _transfer(name: str, seconds: float, size: int) -> dict[str, Any]:
  return {
    'program': f'64 MiB {name}',
    'predicted_s': [],
    'measured_s': seconds,
    'ratio': None,
    'mfu': None,
    'planned_bytes': size,
  }


def _predicted(case: features.Case, chip: topology.Chip | None, peak: float) -> tuple[float, float]:
  if chip is None or not case.text:
    return case.flop / peak, case.flop / peak
  time_ = cost.seconds(case.flop, 1, hlo.analyse(case.text), chip)
  return time_.low, time_.high


def _median(run: Callable[[], Any], repeats: int) -> float:
  run()
  times = []
  for _ in range(repeats):
    began = time.perf_counter()
    run()
    times.append(time.perf_counter() - began)
  return statistics.median(times)


def _shown(line: dict[str, Any]) -> dict[str, str]:
  ends = [f'{1_000 * s:,.2f}' for s in dict.fromkeys(line['predicted_s'])]
  return {
    'program': line['program'],
    'predicted_s': '–'.join(ends) + ' ms' if ends else '',
    'measured_s': f'{1_000 * line["measured_s"]:,.2f} ms',
    'ratio': '' if line['ratio'] is None else f'{line["ratio"]:.2f}',
    'mfu': '' if line['mfu'] is None else f'{line["mfu"]:.0%}',
    'planned_bytes': '' if line['planned_bytes'] is None else f'{line["planned_bytes"] / 2**20:,.0f} MiB',
  }


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
  widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
  return '\n'.join(
    '  '.join(f'{cell:<{w}}' for cell, w in zip(line, widths, strict=True)).rstrip() for line in (head, *lines)
  )
