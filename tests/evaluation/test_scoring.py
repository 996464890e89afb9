"""The scores of answers equal plain sums of log-probabilities and do not depend on the batch."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.core import prng
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.pool.vocabulary import ByteEncoder
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.data.targets.shapes import Item
from dsdm_jax.evaluation import suite
from dsdm_jax.evaluation.scoring import Scorer, score_request
from dsdm_jax.training.step import Trainer

V, L = 131, 40


class Plain(nnx.Module):
  """A custom model: only logits at all positions, and no cache."""

  def __init__(self, inner):
    self.inner = inner

  def __call__(self, tokens_BL):
    return self.inner(tokens_BL)


def plain(config, vocab_size, length, rngs):
  from dsdm_jax.lm.decoder import build

  return Plain(build(config, vocab_size, length, rngs))


def _trainer(factory: str = 'dsdm_jax.lm.decoder:build') -> Trainer:
  c = base.get_config()
  c.model.layers, c.model.width, c.model.mlp_width, c.model.init_std, c.model.factory = 1, 16, 32, 0.5, factory
  return Trainer(c.model, c.pretraining.train, V, L, make_mesh(c.mesh, jax.devices()[:1]))


@pytest.fixture(scope='module')
def trained():
  trainer = _trainer()
  return trainer, trainer.init(prng.stream(0, 'test'))


@pytest.fixture(scope='module')
def eight(trained) -> Scorer:
  """Eight answers at once; compiled for all tests."""
  return Scorer(trained[0], 8, 0)


def _pairs(count: int) -> tuple[list[np.ndarray], np.ndarray]:
  g = np.random.default_rng(0)
  size_P = g.integers(3, L + 1, count)
  return [g.integers(3, V, size).astype(np.int32) for size in size_P], g.integers(1, size_P)


@functools.cache
def _logits(trainer):
  return jax.jit(lambda params, rest, tokens_BL: nnx.merge(trainer.graphdef, params, rest)(tokens_BL))


def _oracle(trainer, state, ids, count) -> tuple[float, bool]:
  """From the logits of the unpadded sequence, in float64."""
  padded = np.full((1, L), V - 1, np.int32)
  padded[0, : len(ids)] = ids
  logits_LV = np.asarray(_logits(trainer)(state.params, state.rest, padded)[0], np.float64)
  logprob_LV = logits_LV - np.log(np.exp(logits_LV).sum(-1, keepdims=True))
  places = range(len(ids) - count, len(ids))
  return sum(logprob_LV[i - 1, ids[i]] for i in places), all(logprob_LV[i - 1].argmax() == ids[i] for i in places)


def test_answers_are_sums_of_log_probabilities(trained, eight):
  """float32 rounding over at most 39 terms of size 10: 1e-4 at the very worst, seen 1e-5."""
  trainer, state = trained
  ids_P, count_P = _pairs(6)
  first_id = int(np.argmax(_logits(trainer)(state.params, state.rest, ids_P[0][None])[0, -1]))
  ids_P.append(np.append(ids_P[0][-L + 1 :], first_id).astype(np.int32))  # one that is greedy
  count_P = np.append(count_P, 1)
  if len(ids_P[0]) >= L:
    ids_P[-1] = ids_P[-1][-L:]
  found = eight.answers(state, ids_P, count_P, L)
  wanted = [_oracle(trainer, state, ids, count) for ids, count in zip(ids_P, count_P, strict=True)]
  np.testing.assert_allclose(found.total_P, [total for total, _ in wanted], atol=1e-4)
  assert found.greedy_P.tolist() == [greedy for _, greedy in wanted]
  assert found.greedy_P.any() and not found.greedy_P.all()


def test_log_probabilities_do_not_depend_on_the_batch(trained, eight):
  """Alone, in another order, and in batches of another size: to 1e-5 nats a token."""
  trainer, state = trained
  ids_P, count_P = _pairs(30)
  whole = eight.answers(state, ids_P, count_P, L)
  order = np.random.default_rng(1).permutation(30)
  shuffled = eight.answers(state, [ids_P[i] for i in order], count_P[order], L)
  single = [eight.answers(state, [ids_P[i]], count_P[[i]], L).mean_P[0] for i in range(5)]
  np.testing.assert_allclose(shuffled.mean_P, whole.mean_P[order], atol=1e-5, rtol=0)
  np.testing.assert_allclose(single, whole.mean_P[:5], atol=1e-5, rtol=0)
  larger = Scorer(trainer, 30, 0).answers(state, ids_P, count_P, L)
  np.testing.assert_allclose(larger.mean_P, whole.mean_P, atol=1e-5, rtol=0)
  assert (shuffled.greedy_P == whole.greedy_P[order]).all()


def test_sequences_are_padded_with_the_vocabularys_padding_id(trained):
  seen = []

  class Watched(Scorer):
    def _batches(self, arrays):
      seen.append(arrays[0])
      return super()._batches(arrays)

  trainer, state = trained
  ids_P, count_P = _pairs(5)
  Watched(trainer, 8, 2).answers(state, ids_P, count_P, L)
  filled = [
    row[len(ids) :] for table in seen for row in table for ids in ids_P if row[: len(ids)].tolist() == ids.tolist()
  ]
  assert set(np.concatenate(filled).tolist()) == {2}


def test_score_reads_weights(trained, eight):
  _, state = trained
  ids_P, count_P = _pairs(5)
  tokens_IL, weights_IL = np.zeros((5, L), np.int32), np.zeros((5, L), np.float32)
  for row, (ids, count) in enumerate(zip(ids_P, count_P, strict=True)):
    tokens_IL[row, : len(ids)], weights_IL[row, len(ids) - count : len(ids)] = ids, 1
  logprob_I, _ = eight.score(state, tokens_IL, weights_IL)
  np.testing.assert_allclose(logprob_I, eight.answers(state, ids_P, count_P, L).mean_P, atol=1e-5)


def test_generation_with_a_custom_model(trained):
  """Without selected positions and cache, a model gives the same texts and log-probabilities."""
  trainer, state = trained
  other = _trainer('tests.evaluation.test_scoring:plain')
  inner = Plain(nnx.merge(trainer.graphdef, state.params, state.rest))
  _, params, rest = nnx.split(inner, nnx.Param, ...)
  items = [Item(str(i), f'Say {"x" * i} please:', 'ok', aliases=('ok',)) for i in range(6)]
  decode = lambda ids: ''.join(chr(int(i) - 3) for i in ids if i > 2)  # noqa: E731
  request = suite.build(benchmarks.BENCHMARKS['trivia_qa'], items, suite.Sequences(ByteEncoder(), L), 5, 0)
  stop_V = np.arange(V) == 13
  found = [
    score_request(Scorer(t, 4, 0), s, request, L, 5, stop_V, decode)
    for t, s in ((trainer, state), (other, state._replace(params=params, rest=rest)))
  ]
  assert found[0][1] == found[1][1] and len(set(found[0][1])) > 1
  np.testing.assert_allclose(found[0][0]['logprob'], found[1][0]['logprob'], atol=1e-5)
  # The first character again, by hand: the argmax after the prompt.
  ids = request.prompts_I[2]
  logits_V = nnx.merge(trainer.graphdef, state.params, state.rest)(ids[None])[0, -1]
  assert found[0][1][2].startswith(decode([int(np.argmax(logits_V))]).strip())
