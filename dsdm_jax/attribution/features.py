"""Stage `features`: φ of every row of the pool, for each checkpoint of each proxy."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.attribution.extractor import (
  FeatureExtractor,
  basis_digest,
  checkpoint_name,
)
from dsdm_jax.attribution.gradients import FeatureStep, TwoSidedFeatures
from dsdm_jax.attribution.sources import Recomputed
from dsdm_jax.attribution.store import FeatureStore, open_store
from dsdm_jax.core import artifacts, processes, storage
from dsdm_jax.core.progress import Bar
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.training.proxies import checkpoints

_UNCHANGED, _UNCOVERED = 0.8, 0.5  # shares of neighbours and of ‖g‖² beyond which a warning is printed
_FIDELITY_ROWS = 512  # of the first shard, whose inner products are compared before and after quantization


def run(context: Context) -> dict | None:
  """Writes, for each checkpoint c, in mode `store` `features_<c>.zarr` [N, J]; of EK-FAC `factors_<c>.npz`.

  Returns None if this is one of several jobs and the parts of others are not complete.
  """
  config, out = context.config, context.out
  pool = Pool(context.inputs['pool'])
  extractor = FeatureExtractor(context, pool, out)
  step, described = extractor.step, extractor.step.describe()
  two_sided, stored = isinstance(step, TwoSidedFeatures), config.features.mode == 'store'
  context.log.event('features', **described, dimension=step.dimension, batch_size=extractor.batch_size)
  if isinstance(step, TwoSidedFeatures):
    shapes = ', '.join(f'{a}×{b}' for a, b in sorted({(layer.a, layer.b) for layer in step.layers}))
    context.log.say(f'  two-sided projection: {shapes} for each layer')
  elif isinstance(step, WholeGradients):
    return _factors(context, extractor, step, pool)

  count, notes = checkpoints(config), []
  context.log.describe(f'{count} models × {pool.num_rows:,} rows, J = {step.dimension:,}')
  with context.log.bar(total=count * pool.num_rows if stored else 0, unit='row') as bar:
    for checkpoint in range(count):
      prepared, note = extractor.prepare(checkpoint)
      notes.append(note)
      if two_sided:
        _measure_coverage(context, extractor, checkpoint)
      if stored:
        _extract_pool(context, step, extractor.source(checkpoint, prepared), checkpoint, bar)
  # Only now: other jobs may have completed what was missing when this one started.
  if not processes.decide(lambda: all(_complete(context, pool.num_rows, step, c) for c in range(count))):
    return None

  semantics = described | {'dimension': step.dimension, 'rows': pool.num_rows, 'checkpoints': count}
  semantics |= {k: config.features[k] for k in ('mode', 'shard_rows', 'store_dtype', 'precondition', 'basis')}
  semantics |= {name: [note[name] for note in notes] for name in notes[0]}
  if two_sided:
    semantics['unprobed'] = [json.loads(_coverage_file(out, c).read_text()) for c in range(count)]
  if stored:
    semantics['fidelity'] = [json.loads(_fidelity_file(out, c).read_text()) for c in range(count)]
    unchanged = min(fidelity['top_overlap'] for fidelity in semantics['fidelity'])
    text = f'  {config.features.store_dtype} store: {unchanged:.1%} of nearest neighbours unchanged'
    if unchanged < _UNCHANGED:
      context.log.warn(f'{text}; scores are coarse: set --config.features.store_dtype=bfloat16 and --rerun')
    else:
      context.log.say(text)
  return semantics


def _factors(context: Context, extractor: FeatureExtractor, step: WholeGradients, pool: Pool) -> dict | None:
  features, count = context.config.features, checkpoints(context.config)
  rows = min(features.basis_rows, pool.num_rows)
  context.log.describe(f'EK-FAC of {step.dimension:,} parameters, {count} × {rows:,} rows')
  with context.log.bar(range(count), unit='model') as bar:
    # All of them: the cost of the stage is that of all jobs.
    written = [extractor.make_factors(c, c % features.jobs == features.job) for c in bar]
  if not all(written):
    return None
  semantics = step.describe() | {'dimension': step.dimension, 'rows': pool.num_rows, 'checkpoints': count}
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


def _extract_pool(context: Context, step: FeatureStep, source: Recomputed, checkpoint: int, bar: Bar) -> None:
  """Computes this job's shards that are missing; a shard is written while the next one is computed."""
  source.charge()
  # Process 0 opens the store first, and creates it if it is absent.
  missing = processes.decide(lambda: _missing(context, _store(context, step, source.rows, checkpoint), checkpoint))
  store, features = _store(context, step, source.rows, checkpoint), context.config.features
  # Each job takes adjacent shards; their numbers differ by at most one between jobs.
  first, stop = (store.shards * job // features.jobs for job in (features.job, features.job + 1))
  missing = [shard for shard in missing if first <= shard < stop]
  bar.skip(source.rows - sum(stop - start for start, stop in map(store.bounds, missing)))
  shards = source.ranges(map(store.bounds, missing))
  if not context.first:  # takes part in the steps; process 0 writes
    for _ in shards:
      pass
    return
  for shard, phi_BJ in store.fill(missing, shards):
    if shard == 0:
      fidelity = store.quantizer.fidelity(phi_BJ[:_FIDELITY_ROWS])
      storage.write_json(_fidelity_file(context.out, checkpoint), fidelity)
      storage.mark(_fidelity_file(context.out, checkpoint))
    bar.update(len(phi_BJ))
    context.cost.save()


def _complete(context: Context, rows: int, step: FeatureStep, checkpoint: int) -> bool:
  """Whether all jobs' parts of a checkpoint are written. Only their markers and sizes are read."""
  if isinstance(step, TwoSidedFeatures) and not storage.is_marked(_coverage_file(context.out, checkpoint)):
    return False
  if context.config.features.mode != 'store':
    return True
  return not _missing(context, _store(context, step, rows, checkpoint), checkpoint, verify=False)


def _missing(context: Context, store: FeatureStore, checkpoint: int, *, verify: bool = True) -> list[int]:
  """Shards to compute. The fidelity report comes from the first one."""
  missing = store.missing(verify=verify)
  measured = storage.is_marked(_fidelity_file(context.out, checkpoint))
  return missing if 0 in missing or measured else [0, *missing]


def _store(context: Context, step: FeatureStep, rows: int, checkpoint: int) -> FeatureStore:
  features: ConfigDict = context.config.features
  semantics = step.describe() | {'dimension': step.dimension, 'rows': rows}
  semantics |= {'shard_rows': features.shard_rows, 'store_dtype': features.store_dtype}
  digest = basis_digest(context.out, checkpoint, features.basis)
  return open_store(context.out, checkpoint, semantics, digest, _origin(context))


def _origin(context: Context) -> str:
  return artifacts.origin(context.out)


def _coverage_file(folder: Path, checkpoint: int) -> Path:
  return folder / f'unprobed_{checkpoint}.json'


def _fidelity_file(folder: Path, checkpoint: int) -> Path:
  return folder / f'fidelity_{checkpoint}.json'
