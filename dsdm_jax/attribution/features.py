"""Stage `features`: φ of every row of the pool, or that a prefilter keeps, for each checkpoint of each proxy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.attribution.extractor import (
  FeatureExtractor,
  basis_digest,
  checkpoint_name,
)
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.attribution.sources import Recomputed
from dsdm_jax.attribution.store import FeatureStore, open_store
from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.mesh import Team, on_one_device
from dsdm_jax.core.progress import Bar, counted
from dsdm_jax.core.stage import Context
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.training.proxies import checkpoints

_UNCHANGED, _UNCOVERED = 0.8, 0.5  # shares of neighbours and of ‖g‖² beyond which a warning is printed
_FIDELITY_ROWS = 512  # of the first shard, whose inner products are compared before and after quantization


def run(context: Context) -> dict | None:
  """Writes, for each checkpoint c, in mode `store` `features_<c>.zarr` [N, J]; of EK-FAC `factors_<c>.npz`.

  Returns None if this is one of several jobs and the parts of others are not complete.
  """
  config, out = context.config, context.out
  whole = Pool(context.inputs['pool'])
  extractor = FeatureExtractor(context, whole, out)
  step, pool = extractor.step, extractor.scored
  described = step.describe() | {'dimension': step.dimension, 'rows': pool.num_rows}
  two_sided, stored = isinstance(step, TwoSidedFeatures), config.features.mode == 'store'
  context.log.event('features', **described, batch_size=extractor.batch_size)
  if isinstance(step, TwoSidedFeatures):
    shapes = ', '.join(f'{a}×{b}' for a, b in sorted({(layer.a, layer.b) for layer in step.layers}))
    context.log.say(f'  two-sided projection: {shapes} for each layer')
  elif isinstance(step, WholeGradients):
    return _factors(context, extractor, step, min(config.features.basis_rows, whole.num_rows))

  count, notes = checkpoints(config), []
  context.log.describe(f'{counted(count, "model")} × {pool.num_rows:,} rows, J = {step.dimension:,}')
  with context.log.bar(total=count * pool.num_rows if stored else 0, unit='row') as bar:
    for checkpoint in range(count):
      prepared, note = extractor.prepare(checkpoint)
      notes.append(note)
      if two_sided:
        _measure_coverage(context, extractor, checkpoint)
      if stored:
        _extract_pool(context, extractor.source(checkpoint, prepared), checkpoint, described, bar)
  processes.wait()  # for shards that others are still writing
  # Only now: other jobs may have completed what was missing when this one started.
  if not processes.decide(lambda: all(_complete(context, c, described) for c in range(count))):
    return None

  semantics = described | {'checkpoints': count}
  semantics |= {k: config.features[k] for k in ('mode', 'shard_rows', 'store_dtype', 'precondition', 'basis')}
  semantics |= {name: [note[name] for note in notes] for name in notes[0]}
  if two_sided:
    semantics['unprobed'] = [storage.read_json(_coverage_file(out, c)) for c in range(count)]
  if stored:
    semantics['fidelity'] = [storage.read_json(_fidelity_file(out, c)) for c in range(count)]
    unchanged = min(fidelity['top_overlap'] for fidelity in semantics['fidelity'])
    text = f'  {config.features.store_dtype} store: {unchanged:.1%} of nearest neighbours unchanged'
    if unchanged < _UNCHANGED:
      context.log.warn(f'{text}; scores are coarse: set --config.features.store_dtype=bfloat16 and --rerun')
    else:
      context.log.say(text)
  return semantics


def _factors(context: Context, extractor: FeatureExtractor, step: WholeGradients, rows: int) -> dict | None:
  features, count = context.config.features, checkpoints(context.config)
  context.log.describe(f'EK-FAC of {step.dimension:,} parameters, {count} × {rows:,} rows')
  with context.log.bar(range(count), unit='model') as bar:
    # All of them: the cost of the stage is that of all jobs.
    written = [extractor.make_factors(c, c % features.jobs == features.job) for c in bar]
  if not all(written):
    return None
  semantics = step.describe() | {'dimension': step.dimension, 'rows': extractor.scored.num_rows, 'checkpoints': count}
  return semantics | {'mode': 'jvp', 'shard_rows': features.shard_rows, 'sample': rows}


def _measure_coverage(context: Context, extractor: FeatureExtractor, checkpoint: int) -> None:
  """Reports and saves how much of the gradient has no probe, once per checkpoint, in one of the jobs."""
  file, features = _coverage_file(context.out, checkpoint), context.config.features
  mine = checkpoint % features.jobs == features.job
  result = extractor.coverage(checkpoint, measured=not mine or processes.decide(lambda: storage.is_marked(file)))
  if not result:
    return
  if context.first:
    storage.write_json(file, result)
    storage.mark(file)
  context.log.event('unprobed', checkpoint=checkpoint, share=result['share'])
  largest = ', '.join(f'{path} {share:.0%}' for path, share in list(result['parameters'].items())[:2]) or 'none'
  text = (
    f'  proxy {checkpoint_name(context.config, checkpoint)}: features cover {1 - result["share"]:.0%} of the gradient'
  )
  if result['share'] > _UNCOVERED and checkpoint == 0:
    context.log.warn(
      f'{text} (without: {largest}); scores see only that part: set --config.features.layers to cover more, or compare '
      'with --config.features.projection=dense'
    )
  else:
    context.log.say(f'{text} on {result["rows"]} rows (without: {largest})')


def _extract_pool(
  context: Context, source: Recomputed, checkpoint: int, described: Mapping[str, Any], bar: Bar
) -> None:
  """Computes this job's shards that are missing; each process writes its own while the next ones are computed."""
  source.charge()
  # Process 0 opens the store first, and creates it if it is absent.
  processes.decide(lambda: _store(context, checkpoint, described).shards)
  store, features = _store(context, checkpoint, described, source.team), context.config.features
  missing = store.missing()
  measured = processes.decide(lambda: storage.is_marked(_fidelity_file(context.out, checkpoint)))
  if not (measured or 0 in missing):
    missing = [0, *missing]
  # Each job takes adjacent shards; their numbers differ by at most one between jobs.
  first, stop = (store.shards * job // features.jobs for job in (features.job, features.job + 1))
  bounds = [store.bounds(shard) for shard in missing if first <= shard < stop]
  bar.skip(source.rows - sum(stop - start for start, stop in bounds))
  # The fidelity report comes from the first shard.
  sample = _Sample() if bounds[:1] == [store.bounds(0)] and source.team.index == 0 and source.team.leads else None
  for number, (start, _) in enumerate(store.fill(source.ranges(bounds, sample))):
    if sample is not None and not number:
      fidelity = store.quantizer.fidelity(sample.rows(min(_FIDELITY_ROWS, store.bounds(0)[1])))
      storage.write_json(_fidelity_file(context.out, checkpoint), fidelity)
      storage.mark(_fidelity_file(context.out, checkpoint))
    together = bounds[number * source.team.count : (number + 1) * source.team.count]
    bar.update(sum(stop - start for start, stop in together))
    context.cost.save()


class _Sample:
  """The first float32 features that a pass computes, on one device."""

  def __init__(self) -> None:
    self._parts: list[jax.Array] = []
    self._count = 0

  def __call__(self, row: int, phi_BJ: jax.Array) -> None:
    if not row and self._count < _FIDELITY_ROWS:
      self._parts.append(on_one_device(phi_BJ))
      self._count += len(self._parts[-1])

  def rows(self, count: int) -> jax.Array:
    return jnp.concatenate(self._parts)[:count]


def _complete(context: Context, checkpoint: int, described: Mapping[str, Any]) -> bool:
  """Whether all jobs' parts of a checkpoint are written. Only their markers and sizes are read."""
  if described['projection'] == 'two_sided' and not storage.is_marked(_coverage_file(context.out, checkpoint)):
    return False
  if context.config.features.mode != 'store':
    return True
  measured = storage.is_marked(_fidelity_file(context.out, checkpoint))
  return measured and not _store(context, checkpoint, described).missing(verify=False)


def _store(context: Context, checkpoint: int, described: Mapping[str, Any], team: Team | None = None) -> FeatureStore:
  features, out = context.config.features, context.out
  semantics = {**described, 'shard_rows': features.shard_rows, 'store_dtype': features.store_dtype}
  digest = basis_digest(out, checkpoint, features.basis)
  return open_store(out, checkpoint, semantics, digest, artifacts.origin(out), team or Team())


def _coverage_file(folder: Location, checkpoint: int) -> Location:
  return folder / f'unprobed_{checkpoint}.json'


def _fidelity_file(folder: Location, checkpoint: int) -> Location:
  return folder / f'fidelity_{checkpoint}.json'
