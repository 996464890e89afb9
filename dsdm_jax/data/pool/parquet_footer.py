"""Sizes of columns from the footer of a Parquet file.

pyarrow ends the process where the metadata of a column is damaged: its accessor lets a C++ exception escape. The footer
is a struct of Thrift's compact protocol; parquet.thrift of the Parquet format has the numbers of the fields.
"""

import dataclasses
import io
import struct
from typing import Any, BinaryIO


@dataclasses.dataclass(frozen=True)
class Chunk:
  """A column of a row group.

  Attributes:
    path: names from the outermost column to the values, joined by dots.
    values: number of values, empty ones included.
    unpacked_bytes, packed_bytes: of its pages, before and after compression.
  """

  path: str
  values: int
  unpacked_bytes: int
  packed_bytes: int


def row_groups(file: BinaryIO) -> list[tuple[int, list[Chunk]]]:
  """(Number of rows, chunks) of each row group; moves the position in the file.

  Raises:
    ValueError: the footer is damaged.
  """
  file.seek(-8, 2)
  (length,) = struct.unpack('<I', file.read(8)[:4])
  file.seek(-8 - length, 2)
  try:
    groups = _struct(io.BytesIO(file.read(length)))[4]
    return [(group[3], [_chunk(column[3]) for column in group[1]]) for group in groups]
  except (KeyError, IndexError, TypeError, RecursionError) as error:
    raise ValueError('the footer of the file is damaged') from error


def _chunk(column: dict[int, Any]) -> Chunk:
  return Chunk(b'.'.join(column[3]).decode(), column[5], column[6], column[7])


def _struct(data: BinaryIO) -> dict[int, Any]:
  """A struct of Thrift's compact protocol: number of each field → its value."""
  fields, number = {}, 0
  while head := data.read(1)[0]:
    number = number + (head >> 4) if head >> 4 else _integer(data)
    fields[number] = head & 15 == 1 if head & 15 <= 2 else _value(data, head & 15)
  return fields


def _value(data: BinaryIO, kind: int) -> Any:
  if kind in (1, 2, 3):  # Booleans of a list have a byte each
    return data.read(1)[0]
  if kind in (4, 5, 6):
    return _integer(data)
  if kind == 7:
    return data.read(8)
  if kind == 8:
    return data.read(_varint(data))
  if kind in (9, 10):
    head = data.read(1)[0]
    size = head >> 4 if head >> 4 < 15 else _varint(data)
    return [_value(data, head & 15) for _ in range(size)]
  if kind == 12:
    return _struct(data)
  raise IndexError(kind)  # Parquet has no maps


def _varint(data: BinaryIO) -> int:
  value, shift = 0, 0
  while True:
    byte = data.read(1)[0]
    value |= (byte & 127) << shift
    shift += 7
    if byte < 128:
      return value
    if shift > 63:
      raise IndexError(shift)


def _integer(data: BinaryIO) -> int:
  value = _varint(data)
  return value >> 1 ^ -(value & 1)
