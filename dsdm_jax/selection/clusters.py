"""k-means by scikit-learn, so that it gives the same on any number of threads and for any number of rows."""

import numpy as np

FIT_ROWS = 65_536  # of a larger set, a sample of this size finds the centres
_CHUNK = 8_192


def centres(x_ND: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
  """At most `count` centres of unit length (0: the square root of the rows), float32 [count, D]."""
  from sklearn.cluster import KMeans
  from threadpoolctl import threadpool_limits

  count = min(count or round(len(x_ND) ** 0.5), len(x_ND))
  sample = x_ND if len(x_ND) <= FIT_ROWS else x_ND[np.sort(rng.choice(len(x_ND), FIT_ROWS, replace=False))]
  with threadpool_limits(1):  # threads would add floating-point numbers in another order
    found = KMeans(count, n_init=1, max_iter=20, random_state=int(rng.integers(2**31))).fit(sample)
  centres_KD = found.cluster_centers_.astype(np.float32)
  norm_K = np.linalg.norm(centres_KD, axis=1, keepdims=True)
  return centres_KD / np.where(norm_K > 0, norm_K, 1)


def assign(x_ND: np.ndarray, centres_KD: np.ndarray) -> np.ndarray:
  """The centre of largest cosine to each row: int64 [N]."""
  parts = [np.argmax(x_ND[i : i + _CHUNK] @ centres_KD.T, axis=1) for i in range(0, len(x_ND), _CHUNK)]
  return np.concatenate(parts)
