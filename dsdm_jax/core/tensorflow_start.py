"""Starts TensorFlow, which reads, tokenizes and writes curves: once, quietly, and without accelerators."""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator


@functools.cache
def start() -> None:
  """Imports TensorFlow and hides accelerators from it; takes some seconds the first time.

  Call it before seqio or clu is imported. TensorFlow would claim all memory of a GPU. Its C++ part prints several lines
  about missing CUDA at any log level: they are withheld, and printed if the import fails.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  with held_stderr():
    import tensorflow as tf

    for kind in ('GPU', 'TPU'):
      tf.config.set_visible_devices([], kind)


@contextlib.contextmanager
def held_stderr() -> Iterator[None]:
  """Withholds what C++ code prints to file descriptor 2; prints it if the block raises."""
  sys.stderr.flush()
  saved = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      yield
    except BaseException:
      held.seek(0)
      os.write(saved, held.read())
      raise
    finally:
      os.dup2(saved, 2)
      os.close(saved)
