"""TensorFlow reads, tokenizes and writes curves here. It is started once, quietly, and never near an accelerator."""

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator


@functools.cache
def start() -> None:
  """Imports TensorFlow and takes accelerators out of its sight; costs some seconds the first time.

  To be called before seqio or clu is imported. TensorFlow would claim all memory of a GPU, and its C++ part prints
  half a dozen lines about missing CUDA whatever its log level says: they are held back, and shown if the import fails.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  with held_stderr():
    import tensorflow as tf

    for kind in ('GPU', 'TPU'):
      tf.config.set_visible_devices([], kind)


@contextlib.contextmanager
def held_stderr() -> Iterator[None]:
  """Holds back what C++ code prints to file descriptor 2; prints it after all when the block raises."""
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
