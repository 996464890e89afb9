"""500 pairs of rows that differ in nothing but a right or a wrong answer: scores must tell them apart."""

import numpy as np

from configs import base
from dsdm_jax.attribution import datamodel
from dsdm_jax.attribution.gradients import TwoSidedFeatures
from dsdm_jax.core import prng
from dsdm_jax.lm import outputs
from dsdm_jax.training.step import abstract_model, trainer
from tests.attribution.test_datamodel import Rows

PAIRS, TARGETS, LENGTH = 500, 64, 12
KEYS, ANSWERS, FILLERS = 20, 10, 30
ASK = 0
VOCAB = 1 + KEYS + ANSWERS + FILLERS
ANSWER_AT = 8


def _rows(rng, count):
  """tokens_NL with random fillers and a random key, and the key of each; the answer is still missing."""
  tokens_NL = rng.integers(1 + KEYS + ANSWERS, VOCAB, (count, LENGTH))
  key_N = rng.integers(0, KEYS, count)
  # The key stands beside the answer, so that a proxy learns in 100 steps that it matters; before that, no gradient can
  # tell a right answer from a wrong one but by how frequent it is.
  tokens_NL[:, ANSWER_AT - 2], tokens_NL[:, ANSWER_AT - 1] = ASK, 1 + key_N
  return tokens_NL.astype(np.int32), key_N


def _answered(tokens_NL, answer_N):
  tokens_NL = tokens_NL.copy()
  tokens_NL[:, ANSWER_AT] = 1 + KEYS + answer_N
  return tokens_NL


def test_right_answers_score_higher_than_wrong_ones(one_device):
  """The pool says as often wrong as right; only the targets, on other fillers, say which is which."""
  rng = prng.numpy_stream(0, 'planted pairs')
  table_K = rng.integers(0, ANSWERS, KEYS)
  tokens_PL, key_P = _rows(rng, PAIRS)
  right_PL = _answered(tokens_PL, table_K[key_P])
  wrong_PL = _answered(tokens_PL, (table_K[key_P] + rng.integers(1, ANSWERS, PAIRS)) % ANSWERS)
  pool_NL = np.concatenate([right_PL, wrong_PL])
  tokens_TL, key_T = _rows(rng, TARGETS)
  target_TL = _answered(tokens_TL, table_K[key_T])
  assert ((right_PL != wrong_PL).sum(axis=1) == 1).all()

  config = base.get_config()
  config.model.update({'width': 32, 'mlp_width': 64, 'layers': 1, 'heads': 2})
  config.pretraining.train.warmup_steps = 10
  compiled = trainer(config.model, config.pretraining.train, VOCAB, LENGTH, one_device)
  state = compiled.init(prng.stream(0, 'init'))
  steps, batch = 200, 64
  for _ in range(steps):
    rows_B = rng.integers(0, len(pool_NL), batch)
    state, _ = compiled.step(state, pool_NL[rows_B], np.ones(batch, np.float32), np.int32(steps))

  step = TwoSidedFeatures(abstract_model(config.model, VOCAB, LENGTH), outputs.margin, '.*', 512, 0, one_device)
  prepared = step.prepare(state.params, 0)
  whole_L, answer_L = np.ones(LENGTH, np.float32), np.eye(LENGTH, dtype=np.float32)[ANSWER_AT]
  phi_NJ = np.asarray(step(prepared, pool_NL, np.tile(whole_L, (len(pool_NL), 1))))
  phi_TJ = np.asarray(step(prepared, target_TL, np.tile(answer_L, (len(target_TL), 1))))
  parts = datamodel.gram(Rows(phi_NJ, 256))
  mean_1J = phi_TJ.mean(axis=0, keepdims=True)
  u_J1 = datamodel.solve(parts, datamodel.whole(step.dimension), mean_1J, 0.1).u_JK
  score_N = datamodel.scores(Rows(phi_NJ, 256), u_J1)[:, 0]
  right = (score_N[:PAIRS] > score_N[PAIRS:]).mean()
  print(f'right above wrong in {right:.1%} of {PAIRS} pairs')
  assert right >= 0.9
