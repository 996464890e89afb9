"""The rows of a pool as a TFDS dataset in ArrayRecord files, written in row order.

`tfds.builder_from_directory(folder).as_data_source('train')[row]['tokens']` reads a row. Tokens are stored as raw
little-endian bytes: parsing a list of integers would cost more than reading it.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import tensorflow_start

SHARD_ROWS = 16_384


def info(folder: Path, length: int, dtype: np.dtype) -> Any:
  """What TFDS knows of the dataset in `folder`: one split 'train' whose order is kept."""
  tensorflow_start.start()
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {'tokens': tfds.features.Tensor(shape=(length,), dtype=dtype.type, encoding='bytes')}
  )
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='pool', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='dsdm_jax.data.pool.pool'
  )
  return tfds.core.DatasetInfo(
    builder=identity,
    description='Rows of tokens of a candidate pool; an id is a row.',
    features=features,
    # Without it TFDS shuffles by hashes of keys, and rows would not be ids.
    disable_shuffling=True,
  )


def record_head(dataset_info: Any, length: int, dtype: np.dtype) -> bytes:
  """What TFDS writes before the bytes of a row: rows are of one length, so it is the same for all.

  Raises:
    RuntimeError: TFDS has come to write records of another form.
  """
  from tensorflow_datasets.core import example_serializer

  features = dataset_info.features
  serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
  heads = set()
  for value in (0, np.iinfo(dtype).max):
    row = np.full(length, value, dtype)
    record = serializer.serialize_example(features.encode_example({'tokens': row}))
    if not record.endswith(row.tobytes()):
      raise RuntimeError('a record of TFDS does not end with the bytes of its row')
    heads.add(record[: -row.nbytes])
  if len(heads) != 1:
    raise RuntimeError('the beginning of a record of TFDS depends on the row')
  return heads.pop()


def write(
  folder: Path, rows: int, length: int, dtype: np.dtype,
  write_shards: Callable[[Sequence[tuple[str, int, int]], bytes], Sequence[int]],
) -> None:  # fmt: skip
  """Writes the dataset over what an earlier attempt left.

  Args:
    folder: of the dataset.
    rows: N.
    length: L.
    dtype: of the tokens.
    write_shards: is given (file, first row, one behind the last row) of each shard and what stands before the bytes of
      each row; writes the files and returns the bytes of the records of each.
  """
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  dataset_info = info(folder, length, dtype)
  from tensorflow_datasets.core import naming, splits

  template = naming.ShardedFileTemplate(
    dataset_name='pool', data_dir=folder, split='train', filetype_suffix='array_record',
    template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}',
  )  # fmt: skip
  bounds = [(first, min(first + SHARD_ROWS, rows)) for first in range(0, rows, SHARD_ROWS)]
  files = [
    (str(template.sharded_filepath(shard_index=index, num_shards=None)), first, stop)
    for index, (first, stop) in enumerate(bounds)
  ]
  sizes = write_shards(files, record_head(dataset_info, length, dtype))
  dataset_info.set_file_format('array_record', override=True)
  split = splits.SplitInfo(
    name='train', shard_lengths=[stop - first for first, stop in bounds], num_bytes=sum(sizes),
    filename_template=template,
  )  # fmt: skip
  dataset_info.set_splits(splits.SplitDict([split]))
  dataset_info.write_to_directory(str(folder))


def write_array(folder: Path, tokens_NL: np.ndarray) -> None:
  """Writes a dataset of rows that are in memory."""
  from array_record.python import array_record_module

  def write_shards(files: Sequence[tuple[str, int, int]], head: bytes) -> list[int]:
    for path, first, stop in files:
      writer = array_record_module.ArrayRecordWriter(path, 'group_size:1')
      for row_L in tokens_NL[first:stop]:
        writer.write(head + row_L.tobytes())
      writer.close()
    return [(stop - first) * (len(head) + tokens_NL[0].nbytes) for _, first, stop in files]

  write(folder, len(tokens_NL), tokens_NL.shape[1], tokens_NL.dtype, write_shards)
