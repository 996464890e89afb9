"""Scores equal those of the reference, traker 0.3.2, where its conventions are switched on."""

import dataclasses
import os
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsdm_jax.attribution import datamodel, rademacher, scores
from dsdm_jax.attribution.accumulators import Accumulator
from dsdm_jax.attribution.gradients import DenseFeatures
from dsdm_jax.attribution.solve import Member, Solved, TargetWeights
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.lm import outputs

N, T, L, J, C = 120, 8, 10, 64, 2
VOCAB, WIDTH, HIDDEN = 12, 6, 8
SEED = 5


class Model(nnx.Module):
  """The model of traker_scores.py."""

  def __init__(self, rngs):
    draw = nnx.initializers.normal(0.7)
    self.embedding = nnx.Param(draw(rngs.params(), (VOCAB, WIDTH)))
    self.inner = nnx.Param(draw(rngs.params(), (WIDTH, HIDDEN)))
    self.outer = nnx.Param(draw(rngs.params(), (HIDDEN, VOCAB)))

  def __call__(self, tokens_BL):
    return jnp.tanh(self.embedding[...][tokens_BL] @ self.inner[...]) @ self.outer[...]


def _projection(params, checkpoint):
  """The ±1 that `DenseFeatures` projects with, [J, W], parameters in the order of their names."""
  width = sum(x.size for x in jax.tree.leaves(params))
  assert width <= rademacher.BLOCK  # so all of it is remainders, and those are one block of one key
  return np.asarray(rademacher.signs(rademacher.keys(params, SEED, checkpoint)[-1], 0, J))[:width].T


@pytest.mark.peers
def test_scores_equal_the_references(peers, one_device, tmp_path):
  rng = np.random.default_rng(0)
  tokens_NL, tokens_TL = (rng.integers(0, VOCAB, (n, L)).astype(np.int32) for n in (N, T))
  models = [Model(nnx.Rngs(c)) for c in range(C)]
  params = [nnx.state(model, nnx.Param) for model in models]
  width = sum(x.size for x in jax.tree.leaves(params[0]))
  assert width < rademacher.BLOCK  # one block of signs for each parameter

  # Ours: features, store, Gram, solution, average over checkpoints, Q.
  step = DenseFeatures(models[0], outputs.margin, J, SEED, one_device)
  weights_BL = np.ones((1, L), np.float32)
  stores, targets, probability = [], [], []
  for c in range(C):
    prepared = step.prepare(params[c], c)
    phi_NJ, phi_TJ = (
      np.asarray(step(prepared, tokens, np.repeat(weights_BL, len(tokens), axis=0)))
      for tokens in (tokens_NL, tokens_TL)
    )
    store = FeatureStore(tmp_path / f'{c}.zarr', N, J, 50, 'float32')
    for shard in store.missing():
      store.write(shard, phi_NJ[slice(*store.bounds(shard))])
    stores.append(store)
    targets.append(phi_TJ)
    log_p = jax.vmap(outputs.token_log_probability)(models[c](tokens_NL), tokens_NL)
    probability.append(np.exp(log_p).mean(axis=1))
  grams = [datamodel.gram(store) for store in stores]
  # The reference adds one λ to every checkpoint's ΦᵀΦ, and its Φ is ours times √(J/W): it divides by √W, not √J.
  ratio = J / width
  damping = 0.05 * N * ratio * np.trace(grams[0][0]) / J
  blocks, solutions = datamodel.whole(J), []
  for parts, phi_TJ in zip(grams, targets, strict=True):
    relative = damping / (N * ratio * np.trace(parts[0]) / J)
    solution = datamodel.solve(parts, blocks, phi_TJ, relative, recentre=True)
    u_JK = solution.u_JK.repeat(2, axis=1)  # a target's mean, and its only group
    solutions.append(dataclasses.replace(solution, u_JK=u_JK))
  members = [
    Member(store, [phi_TJ], blocks, str(c)) for c, (store, phi_TJ) in enumerate(zip(stores, targets, strict=True))
  ]
  weights = [TargetWeights.of_documents(['x'], 1, 0, 0, str(t)) for t in range(T)]
  solved = Solved('checkpoints', members, solutions, [], damping)
  tasks = scores.score_tasks(solved, weights, np.zeros((C, N), bool), 'all', lambda rows: None, Accumulator())
  q_N = (1 - np.mean(probability, axis=0)).astype(np.float32)
  ours_NT = ratio * np.stack([task.block(0, N, q_N)['score_N'] for task in tasks], axis=1)

  names = ('embedding', 'inner', 'outer')
  np.savez(
    tmp_path / 'in.npz',
    tokens_NL=tokens_NL,
    tokens_TL=tokens_TL,
    damping=damping,
    projection_CJW=np.stack([_projection(p, c) for c, p in enumerate(params)]),
    **{f'{name}_C': np.stack([getattr(model, name)[...] for model in models]) for name in names},
  )
  script = Path(__file__).with_name('traker_scores.py')
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONWARNINGS')}
  done = subprocess.run(
    [peers, script, tmp_path / 'in.npz', tmp_path / 'out.npz'],
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
    env=environment,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(tmp_path / 'out.npz') as arrays:
    theirs_NT = arrays['score_NT']
  error = np.linalg.norm(ours_NT - theirs_NT) / np.linalg.norm(theirs_NT)
  print(f'relative difference {error:.1e}')
  assert error < 1e-4
  assert np.abs(ours_NT - theirs_NT).max() < 1e-4 * np.abs(theirs_NT).max()
