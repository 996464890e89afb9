"""Token ids of a selection in the file formats of trainers. Each function writes `Example`s in order into a folder.

ArrayRecord has one `tf.train.Example` per record, in groups of one record, so that Grain reads by index.

Megatron-LM's `.bin` has the ids end to end, and its `.idx` says where each sequence begins: MMIDIDX and two zero bytes,
version 1 (uint64), a code for the type of ids (uint8), numbers of sequences and of document bounds (uint64), lengths of
sequences (int32), their first bytes in the `.bin` (int64), and document bounds (int64): 0, 1, 2, … as each sequence is
a document.

A Mosaic Data Shard is the number of samples and their bounds (uint32), the JSON of its columns, and the samples: sizes
of the columns without a fixed size (uint32), then the columns. `index.json` lists the shards.
"""

import dataclasses
import itertools
import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core import storage, tensorflow_start

_SHARD_BYTES = 2**26  # of one MDS file, its usual size
_SHARD_EXAMPLES = 65_536  # of one ArrayRecord file
_UINT16, _INT32 = 8, 4  # Megatron's codes of types
_LARGEST_UINT16 = 65_500  # vocabulary size from which Megatron takes int32


@dataclasses.dataclass(frozen=True)
class Example:
  """A row or document.

  Attributes:
    id: document id of its first token.
    row: of the pool; -1 for a document.
    weight: of its loss.
    tokens_L: int32.
    mask_L: uint8, 1 for tokens that the loss counts; None where it counts all. All examples of a file have one or none.
  """

  id: str
  row: int
  weight: float
  tokens_L: np.ndarray
  mask_L: np.ndarray | None = None


def arrayrecord(examples: Iterable[Example], count: int, out: Path, name: str) -> None:
  """Writes `name-0000i-of-0000n.array_record`: features tokens, row, loss_mask (int64), weight (float), id (bytes)."""
  tensorflow_start.start()
  from array_record.python import array_record_module
  from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

  shards, source = -(-count // _SHARD_EXAMPLES), iter(examples)
  for shard in range(shards):
    path = out / f'{name}-{shard:05d}-of-{shards:05d}.array_record'
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for _, example in zip(range(_SHARD_EXAMPLES), source):  # noqa: B905 - the last shard is short
      features = {
        'tokens': tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=example.tokens_L.tolist())),
        'row': tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[example.row])),
        'weight': tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=[example.weight])),
        'id': tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[example.id.encode()])),
      }
      if example.mask_L is not None:
        int64 = tf_feature_pb2.Int64List(value=example.mask_L.tolist())
        features['loss_mask'] = tf_feature_pb2.Feature(int64_list=int64)
      record = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
      writer.write(record.SerializeToString(deterministic=True))
    writer.close()


def megatron(examples: Iterable[Example], count: int, out: Path, name: str, vocab_size: int) -> None:
  """Writes `name.bin` and `name.idx`. Weights and masks are not in this format."""
  small = vocab_size < _LARGEST_UINT16
  dtype = np.dtype('<u2' if small else '<i4')
  sizes = np.empty(count, '<i4')
  with open(out / f'{name}.bin', 'wb') as file:
    for place, example in enumerate(examples):
      file.write(example.tokens_L.astype(dtype).tobytes())
      sizes[place] = len(example.tokens_L)
  begin = np.concatenate([[0], np.cumsum(sizes[:-1], dtype='<i8')]) * dtype.itemsize
  with open(out / f'{name}.idx', 'wb') as file:
    file.write(b'MMIDIDX\0\0' + struct.pack('<QBQQ', 1, _UINT16 if small else _INT32, count, count + 1))
    file.write(sizes.tobytes() + begin.astype('<i8').tobytes() + np.arange(count + 1, dtype='<i8').tobytes())


def mds(examples: Iterable[Example], out: Path) -> None:
  """Writes `shard.0000i.mds` and `index.json`: columns id, row, tokens, weight, and loss_mask where there are masks."""
  examples = iter(examples)
  first = next(examples)
  columns = {'id': ('str', None), 'row': ('int64', 8), 'tokens': ('ndarray:int32', None), 'weight': ('float32', 4)}
  if first.mask_L is not None:
    columns['loss_mask'] = ('ndarray:uint8', None)
  layout = {
    'format': 'mds',
    'version': 2,
    'compression': None,
    'hashes': [],
    'size_limit': _SHARD_BYTES,
    'column_names': list(columns),
    'column_encodings': [kind for kind, _ in columns.values()],
    'column_sizes': [size for _, size in columns.values()],
  }
  header = json.dumps(layout, sort_keys=True).encode()
  shards: list[dict[str, Any]] = []
  for samples in _shards(map(_sample, itertools.chain([first], examples)), len(header)):
    bounds = (
      np.concatenate([[0], np.cumsum([len(sample) for sample in samples])]) + 4 * (len(samples) + 2) + len(header)
    )
    data = struct.pack('<I', len(samples)) + bounds.astype('<u4').tobytes() + header + b''.join(samples)
    file = f'shard.{len(shards):05d}.mds'
    (out / file).write_bytes(data)
    entry = {
      'samples': len(samples),
      'zip_data': None,
      'raw_data': {'basename': file, 'bytes': len(data), 'hashes': {}},
    }
    shards.append(layout | entry)
  storage.write_json(out / 'index.json', {'version': 2, 'shards': shards})


def _sample(example: Example) -> bytes:
  fields = [example.id.encode(), struct.pack('<q', example.row), _ndarray(example.tokens_L.astype('<i4'))]
  fields.append(struct.pack('<f', example.weight))
  sizes = [len(fields[0]), len(fields[2])]  # of the columns without a fixed size
  if example.mask_L is not None:
    fields.append(_ndarray(example.mask_L))
    sizes.append(len(fields[-1]))
  return struct.pack(f'<{len(sizes)}I', *sizes) + b''.join(fields)


def _ndarray(x_L: np.ndarray) -> bytes:
  return struct.pack('<BI', 1 << 2 | 2, len(x_L)) + x_L.tobytes()  # one axis, whose length has 4 bytes


def _shards(samples: Iterable[bytes], header: int) -> Iterator[list[bytes]]:
  part: list[bytes] = []
  size = header + 8
  for sample in samples:
    if part and size + len(sample) + 4 > _SHARD_BYTES:
      yield part
      part, size = [], header + 8
    part.append(sample)
    size += len(sample) + 4
  if part:
    yield part
