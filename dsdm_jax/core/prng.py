"""Named streams of randomness: nothing else in the project makes keys or generators.

A stream is a pure function of the root seed and a path of names, so that adding a stream never shifts another
and a resumed job draws what the undisturbed one would have drawn.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  import jax


def _digest(seed: int, names: tuple[str | int, ...]) -> bytes:
  # repr keeps 1 and '1' apart; the separator cannot occur unescaped inside a repr.
  text = '\x1f'.join([str(int(seed)), *(repr(name) for name in names)])
  return hashlib.sha256(text.encode()).digest()


def stream(seed: int, *names: str | int) -> 'jax.Array':
  """A threefry key for the stream `names` under `seed`: `stream(seed, 'projection', checkpoint)`."""
  import jax  # here, so that what draws with NumPy alone starts fast

  key = jax.random.key(0, impl='threefry2x32')
  words = np.frombuffer(_digest(seed, names)[:8], '<u4')
  return jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1])


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
  """A counter-based NumPy generator (Philox) for the stream `names` under `seed`."""
  key = np.frombuffer(_digest(seed, names)[:16], '<u8')
  return np.random.Generator(np.random.Philox(key=key))


def derive(seed: int, *names: str | int) -> int:
  """A child seed (63 bits) for code that takes a seed and names its own streams below it."""
  return int.from_bytes(_digest(seed, names)[:8], 'little') >> 1
