"""EK-FAC scores order rows as those of kronfluence 1.0.1 do."""

import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from dsdm_jax.attribution.directional import DirectionalScores
from dsdm_jax.attribution.ekfac import WholeGradients
from dsdm_jax.lm import outputs

N, T, L = 200, 8, 12
VOCAB, WIDTH, HIDDEN = 24, 10, 14
EMBEDDING_VD = np.random.default_rng(1).normal(size=(VOCAB, WIDTH)).astype(np.float32)  # no parameter


class Model(nnx.Module):
  """The model of kronfluence_scores.py."""

  def __init__(self, rngs):
    self.inner, self.outer = (
      nnx.Linear(i, o, use_bias=False, kernel_init=nnx.initializers.normal(0.7), rngs=rngs)
      for i, o in ((WIDTH, HIDDEN), (HIDDEN, VOCAB))
    )

  def __call__(self, tokens_BL):
    return self.outer(jnp.tanh(self.inner(jnp.asarray(EMBEDDING_VD)[tokens_BL])))


@pytest.mark.peers
def test_scores_agree(peers, one_device, tmp_path):
  rng = np.random.default_rng(0)
  # A few tokens are frequent, as in text, so that gradients have directions in common.
  share_V = 1 / np.arange(1, VOCAB + 1)
  tokens_NL, tokens_TL = (rng.choice(VOCAB, (n, L), p=share_V / share_V.sum()).astype(np.int32) for n in (N, T))
  model = Model(nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  step = WholeGradients(model, outputs.margin, one_device, 20)
  factors = step.factors(params, tokens_NL, np.ones((N, L), np.float32))
  means = step.means(params, tokens_TL, np.ones((T, L), np.float32), np.eye(T))
  directions = {path: f.solve(np.asarray(means[path]), f.damped(0.1)) for path, f in factors.items()}
  scorer = DirectionalScores(model, outputs.margin, 0, one_device)
  score_NT = np.asarray(scorer(scorer.placed(params, step.tree(directions, params)), tokens_NL, jnp.ones((N, L))))

  source, destination = tmp_path / 'in.npz', tmp_path / 'out.npz'
  weights = {name: np.asarray(getattr(model, name).kernel[...]) for name in ('inner', 'outer')}
  np.savez(source, tokens_NL=tokens_NL, tokens_TL=tokens_TL, embedding=EMBEDDING_VD, **weights)
  script = Path(__file__).with_name('kronfluence_scores.py')
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONWARNINGS')}
  command = [peers, script, source, destination]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(destination) as arrays:
    theirs_NT = arrays['score_NT']
  for ours_N, theirs_N in zip(score_NT.T, theirs_NT.T, strict=True):
    correlation = scipy.stats.spearmanr(ours_N, theirs_N).statistic
    print(f'Spearman {correlation:.4f}')
    assert correlation > 0.999
