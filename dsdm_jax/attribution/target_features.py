"""Stage `target_features`: φ of every target example, for each checkpoint of each proxy. A task is a unit."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dsdm_jax.attribution.extractor import FeatureExtractor, check_finite, checkpoint_name, step_rows
from dsdm_jax.attribution.gradients import FeatureStep
from dsdm_jax.core import flops, processes, storage
from dsdm_jax.core.mesh import batch_sharding, fetch, place
from dsdm_jax.core.progress import Bar, counted
from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets.targets import Examples, Targets
from dsdm_jax.training.proxies import checkpoints


def run(context: Context) -> dict[str, Any]:
  """Writes `<task>_<c>.npy` [T, J] (float32) for each checkpoint c; nothing for EK-FAC, which has no such features."""
  config, targets = context.config, Targets(context.inputs['targets'])
  count = checkpoints(config)
  semantics = {'tasks': targets.tasks, 'checkpoints': count}
  if config.features.projection == 'ekfac':
    return semantics
  features = context.inputs['features']
  context.units.take(
    {task: {'examples': targets.digest(task), 'features': features.digest} for task in targets.tasks},
    lambda task: [f'{task}_{c}.npy' for c in range(count)],
  )
  extractor = FeatureExtractor(context, Pool(context.inputs['pool']), features.path)
  examples = {task: targets.examples(task, 'target') for task in targets.tasks}
  total = count * sum(map(len, examples.values()))
  context.log.describe(f'{counted(len(targets.tasks), "target")} × {counted(count, "checkpoint")}')
  with context.log.bar(total=total, unit='example') as bar:
    for checkpoint in range(count):
      extract(context, extractor.step, lambda c: extractor.prepare(c)[0], checkpoint, examples, extractor.mesh, bar)
  return semantics


def extract(
  context: Context,
  step: FeatureStep,
  prepare: Callable[[int], Any],
  checkpoint: int,
  examples: Mapping[str, Examples],
  mesh: Mesh,
  bar: Bar,
) -> None:
  """Computes the features of a checkpoint that are missing.

  Args:
    prepare: checkpoint → the step's form of it; called if something is missing.
    examples: of each task.
  """
  batch, prepared = step_rows(context.config.features, mesh)[0], None
  for task, of_task in examples.items():
    file = context.out / f'{task}_{checkpoint}.npy'
    there, spent = processes.decide(lambda: storage.is_marked(file)), context.cost.parts  # noqa: B023  called at once
    if not there:
      began = time.monotonic()
      prepared = prepare(checkpoint) if prepared is None else prepared
      shape = batch, of_task.tokens_TL.shape[1]
      shapes = jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.float32)
      spent[f'{task} flop_{checkpoint}'] = flops.count(step.apply, prepared, *shapes) / batch * len(of_task)
      parts = []
      for start in range(0, len(of_task), batch):
        rows = of_task.tokens_TL[start : start + batch], of_task.weights_TL[start : start + batch]
        padded = tuple(np.pad(x, ((0, batch - len(x)), (0, 0))) for x in rows)
        tokens_BL, weights_BL = place(padded, batch_sharding(mesh))
        parts.append(fetch(step(prepared, tokens_BL, weights_BL)))
      phi_TJ = np.concatenate(parts)[: len(of_task)]
      check_finite(step, phi_TJ, checkpoint_name(context.config, checkpoint), f'example of target {task}')
      spent[task] = spent.get(task, 0.0) + time.monotonic() - began
      context.cost.save()  # first: a kill must not leave features without their cost
      if context.first:
        storage.save_npy(file, phi_TJ)
        storage.mark(file)
    context.add_flop(spent.get(f'{task} flop_{checkpoint}', 0.0))
    bar.update(len(of_task))
