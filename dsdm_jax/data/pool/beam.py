"""The same passes on Apache Beam: DirectRunner on one machine, Dataflow or Flink on many.

Scan and encode are mapped over units. Rows are put together by Beam's own grouping, from the fragments that documents
give to them, and written through TFDS's Beam support under their row number, which keeps their order. Workers share
the folder of the run: what passes hand on lies in files there. Needs the packages of requirements-beam.txt.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import storage, tensorflow_start
from dsdm_jax.data.pool import passes
from dsdm_jax.data.pool.build import Builder
from dsdm_jax.data.pool.passes import Plan, Scanned, Task
from dsdm_jax.errors import UserError


class BeamBuilder(Builder):
  """A `Builder` whose passes are Beam pipelines with the options of `host.beam`."""

  def execute(self, function: Callable, given: Sequence, desc: str, unit: str, total: int | None) -> list:
    del desc, unit, total  # Beam has bars of its own
    beam = _beam()
    folder = self.work / f'results-{function.__name__}'
    folder.mkdir(exist_ok=True)
    numbered = list(enumerate(given))
    with beam.Pipeline(options=self._options()) as pipeline:
      tasks = pipeline | beam.Create(numbered) | beam.Reshuffle()
      _ = tasks | function.__name__ >> beam.Map(_run, function, str(folder))
    return [_result(folder / f'{number}.json') for number, _ in numbered]

  def _options(self) -> Any:
    from apache_beam.options.pipeline_options import PipelineOptions

    return PipelineOptions(self.config.host.beam.split())

  def write_rows(self, given: list[Task], plan: Plan, last: Sequence[np.ndarray]) -> None:
    tensorflow_start.start()
    import tensorflow_datasets as tfds

    folder = self.work / 'tfds'
    builder = _dataset_builder(plan, given, last)(data_dir=str(folder), file_format='array_record')
    config = tfds.download.DownloadConfig(beam_options=self._options(), try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    shutil.rmtree(self.out / 'dataset', ignore_errors=True)
    shutil.move(builder.data_dir, self.out / 'dataset')


def _beam() -> Any:
  try:
    import apache_beam
  except ImportError as error:
    raise UserError(
      'host.beam is set, but apache_beam is not installed; install requirements-beam.txt into an environment of its own'
    ) from error
  return apache_beam


def _run(numbered: tuple[int, Any], function: Callable, folder: str) -> None:
  """Runs one task on a worker. What a user can mend travels as a result: Beam would retry it and bury its message."""
  number, task = numbered
  try:
    result = function(task)
    said = {'scanned': dataclasses.asdict(result)} if isinstance(result, Scanned) else {'value': result}
  except UserError as error:
    said = {'error': str(error)}
  storage.write_json(Path(folder) / f'{number}.json', said)


def _result(file: Path) -> Any:
  said = json.loads(file.read_bytes())
  if 'error' in said:
    raise UserError(said['error'])
  return Scanned(**said['scanned']) if 'scanned' in said else said['value']


def _fragments(task: Task, plan: Plan) -> Iterator[tuple[int, tuple[int, bytes]]]:
  """(row of the pool, (column, tokens)) of each fragment that a unit gives."""
  order = passes.row_order(plan.rows, plan.seed)
  for row_B, column_B, size_B, place_B, joined in passes.fragments(task, plan):
    to_B = order.place(row_B)
    for row, column, size, place in zip(*(x.tolist() for x in (to_B, column_B, size_B, place_B)), strict=True):
      yield row, (column, joined[place : place + size].tobytes())


def _assembled(found: tuple[int, Iterable[tuple[int, bytes]]], plan: Plan) -> tuple[int, dict[str, np.ndarray]]:
  row, parts = found
  tokens_L = np.frombuffer(b''.join(part for _, part in sorted(parts)), plan.dtype)
  if len(tokens_L) != plan.length:
    raise RuntimeError(f'row {row} has {len(tokens_L)} tokens of {plan.length}')
  return row, {'tokens': tokens_L}


def _dataset_builder(plan: Plan, given: Sequence[Task], last: Sequence[np.ndarray]) -> Any:
  """A TFDS builder of the rows, whose examples come from a Beam pipeline."""
  import tensorflow_datasets as tfds

  beam = _beam()
  # Functions of their own: what Beam sends to workers must not hold the builder.
  rows = (
    beam.Create(list(given))
    | beam.Reshuffle()
    | beam.FlatMap(_fragments, plan)
    | beam.GroupByKey()
    | beam.Map(_assembled, plan)
  )
  planted = beam.Create([(plan.rows + index, {'tokens': row}) for index, row in enumerate(last)])

  with tfds.core.registered.skip_registration():

    class Pool(tfds.core.GeneratorBasedBuilder):
      """Rows of tokens of a candidate pool; an id is a row."""

      VERSION = tfds.core.Version('1.0.0')

      def _info(self) -> Any:
        tokens = tfds.features.Tensor(shape=(plan.length,), dtype=np.dtype(plan.dtype).type, encoding='bytes')
        features = tfds.features.FeaturesDict({'tokens': tokens})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

      def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {'train': self._generate_examples()}

      def _generate_examples(self) -> Any:
        return _both(rows, planted)

  return Pool


def _both(rows: Any, planted: Any) -> Any:
  beam = _beam()

  @beam.ptransform_fn
  def all_rows(pipeline: Any) -> Any:
    return (pipeline | 'stream' >> rows, pipeline | 'planted' >> planted) | beam.Flatten()

  return all_rows()
