"""The passes on Apache Beam: DirectRunner on one machine, Dataflow or Flink on many.

Scan and encode are mapped over units. Beam's grouping assembles rows from the fragments of documents, and TFDS's Beam
support writes them, keyed by row number, which keeps their order. Workers share the folder of the run, since passes
communicate through its files. Needs the packages of requirements-beam.txt.
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
from dsdm_jax.data.pool.passes import Job, Plan, Scanned
from dsdm_jax.errors import UserError


def execute(function: Callable, jobs: Sequence, work: Path, options: str) -> list:
  """`[function(job) for job in jobs]` as a pipeline; `options` are `host.beam`."""
  beam = _beam()
  folder = work / f'results-{function.__name__}'
  folder.mkdir(exist_ok=True)
  numbered = list(enumerate(jobs))
  with beam.Pipeline(options=_options(options)) as pipeline:
    elements = pipeline | beam.Create(numbered) | beam.Reshuffle()
    _ = elements | function.__name__ >> beam.Map(_run, function, str(folder))
  return [_result(folder / f'{number}.json') for number, _ in numbered]


def write_rows(
  jobs: Sequence[Job], plan: Plan, last: Sequence[np.ndarray], work: Path, dataset: Path, options: str
) -> None:
  """Writes the dataset: the rows of the stream in the pool's order, followed by the rows `last`."""
  tensorflow_start.start()
  import tensorflow_datasets as tfds

  builder = _dataset_builder(plan, jobs, last)(data_dir=str(work / 'tfds'), file_format='array_record')
  config = tfds.download.DownloadConfig(beam_options=_options(options), try_download_gcs=False)
  builder.download_and_prepare(download_config=config)
  shutil.rmtree(dataset, ignore_errors=True)
  shutil.move(builder.data_dir, dataset)


def _beam() -> Any:
  try:
    import apache_beam
  except ImportError as error:
    raise UserError(
      'host.beam is set, but apache_beam is not installed; install requirements-beam.txt into a separate environment'
    ) from error
  return apache_beam


def _options(options: str) -> Any:
  from apache_beam.options.pipeline_options import PipelineOptions

  return PipelineOptions(options.split())


def _run(numbered: tuple[int, Any], function: Callable, folder: str) -> None:
  """Runs one job on a worker. A UserError is written as a result: Beam would retry it and bury its message."""
  number, job = numbered
  try:
    value = function(job)
    result = {'scanned': dataclasses.asdict(value)} if isinstance(value, Scanned) else {'value': value}
  except UserError as error:
    result = {'error': str(error)}
  storage.write_json(Path(folder) / f'{number}.json', result)


def _result(file: Path) -> Any:
  result = json.loads(file.read_bytes())
  if 'error' in result:
    raise UserError(result['error'])
  return Scanned(**result['scanned']) if 'scanned' in result else result['value']


def _fragments(job: Job, plan: Plan) -> Iterator[tuple[int, tuple[int, bytes]]]:
  """(row of the pool, (column, tokens)) of each fragment of a unit."""
  order = passes.row_order(plan.rows, plan.seed)
  for row_B, column_B, size_B, place_B, joined, _ in passes.fragments(job, plan):
    to_B = order.place(row_B)
    for row, column, size, place in zip(*(x.tolist() for x in (to_B, column_B, size_B, place_B)), strict=True):
      yield row, (column, joined[place : place + size].tobytes())


def _assemble(grouped: tuple[int, Iterable[tuple[int, bytes]]], plan: Plan) -> tuple[int, dict[str, np.ndarray]]:
  row, parts = grouped
  tokens_L = np.frombuffer(b''.join(part for _, part in sorted(parts)), plan.dtype)
  if len(tokens_L) != plan.length:
    raise RuntimeError(f'row {row} has {len(tokens_L)} tokens instead of {plan.length}')
  return row, {'tokens': tokens_L}


def _dataset_builder(plan: Plan, jobs: Sequence[Job], last: Sequence[np.ndarray]) -> Any:
  """A TFDS builder of the rows, whose examples come from a Beam pipeline."""
  import tensorflow_datasets as tfds

  beam = _beam()
  # Module-level functions: what Beam sends to workers must not refer to the builder.
  rows = (
    beam.Create(list(jobs))
    | beam.Reshuffle()
    | beam.FlatMap(_fragments, plan)
    | beam.GroupByKey()
    | beam.Map(_assemble, plan)
  )
  planted = beam.Create([(plan.rows + index, {'tokens': row}) for index, row in enumerate(last)])

  @beam.ptransform_fn
  def all_rows(pipeline: Any) -> Any:
    return (pipeline | 'stream' >> rows, pipeline | 'planted' >> planted) | beam.Flatten()

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
        return all_rows()

  return Pool
