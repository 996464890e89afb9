"""The files of a pool's vocabulary, whatever its kind, to be copied or compared."""

import os
from pathlib import Path

from dsdm_jax.data.pool.vocabulary import BYTES, MODEL, TOKENIZER
from dsdm_jax.errors import UserError

_FILES = (MODEL, TOKENIZER, 'end_piece.json', BYTES)


def read(folder: str | os.PathLike) -> dict[str, bytes]:
  """Name → bytes of each file that `folder` holds; `vocabulary.open_encoder` opens a folder with these files alone.

  Raises:
    UserError: it holds none.
  """
  found = {name: (Path(folder) / name).read_bytes() for name in _FILES if (Path(folder) / name).is_file()}
  if not found:
    raise UserError(f'{folder} holds no vocabulary; run --stage=pool')
  return found
