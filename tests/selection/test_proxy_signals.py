"""The proxies' own passes, with a model of random weights."""

import threading
import types

import jax
import numpy as np
import pytest
from flax import nnx

from configs.base import get_config
from dsdm_jax.core import prng
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.targets.targets import Examples
from dsdm_jax.selection.candidates import Target
from dsdm_jax.selection.proxy_signals import Proxies, whitening
from tests.helpers.selection import ArrayCandidates, Rows, selected

VOCAB, LENGTH, ROWS = 32, 10, 23
END = 5  # a vocabulary's end mark, which pads too


@pytest.fixture
def proxies(tmp_path, monkeypatch):
  """(Proxies over a pool in memory, the pool, the model of the first one)."""
  config = get_config()
  config.proxies.model.update({'width': 16, 'mlp_width': 32, 'layers': 1, 'heads': 2, 'kv_heads': 2})
  monkeypatch.setattr('dsdm_jax.selection.proxy_signals._TOKENS', 4 * LENGTH)  # several batches
  rows = Rows(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32))
  rows.vocab_size = VOCAB
  inputs = {'proxies': types.SimpleNamespace(path=tmp_path)}
  context = Context(config, tmp_path, inputs, Log(tmp_path, 'selection', enabled=False), Cost(tmp_path))
  made = Proxies(context, rows)
  state = made._trainer.init(prng.stream(0, 'init'))
  monkeypatch.setattr(made, 'state', lambda checkpoint: state)
  return made, rows, nnx.merge(made._trainer.graphdef, state.params, state.rest)


def padded(sequences, pad: int) -> Target:
  """A task whose examples are padded with `pad`; the last two tokens are to be predicted."""
  tokens_TL, weights_TL = (
    np.full((len(sequences), LENGTH), pad, np.int32),
    np.zeros((len(sequences), LENGTH), np.float32),
  )
  for i, sequence in enumerate(sequences):
    tokens_TL[i, : len(sequence)] = sequence
    weights_TL[i, len(sequence) - 2 : len(sequence)] = 1
  return Target('docs', ('docs',), lambda task: Examples(tokens_TL, weights_TL, ()), 'zscore')


def test_likelihoods_one_by_one_while_rows_are_read_ahead(proxies, monkeypatch):
  made, rows, model = proxies
  threads, read = set(), rows.tokens

  def tokens(asked):
    threads.add(threading.current_thread())
    return read(asked)

  monkeypatch.setattr(rows, 'tokens', tokens)
  found_N = made.log_likelihood_of(made.state(0))
  assert threads and threading.main_thread() not in threads
  logits = jax.jit(model)
  for tokens_L, found in zip(rows.tokens_NL, found_N, strict=True):
    logit_LV = np.asarray(logits(tokens_L[None])[0], np.float64)
    p_L = [np.exp(x_V[t]) / np.exp(x_V).sum() for x_V, t in zip(logit_LV, tokens_L[1:], strict=False)]
    assert found == pytest.approx(np.log(p_L).mean(), rel=1e-4)


def test_embeddings_of_examples_are_those_of_their_tokens_alone(proxies):
  made, rows, model = proxies
  # The first begins with the end mark, as examples do; the second holds token 0, and nine make three batches.
  sequences = [[END, 7, 8], [END, 0, 9, 3, 3, 3, 0], list(range(1, 11)), *([END, 11 + i, 4, 6] for i in range(6))]
  hidden = jax.jit(model.hidden)

  def mean(tokens) -> np.ndarray:
    return np.asarray(hidden(np.int32(tokens)[None])[0], np.float64).mean(axis=0)

  raw_ND, raw_TD = (np.stack([mean(t) for t in texts]) for texts in (rows.tokens_NL, sequences))
  white_DD = whitening((raw_ND - raw_ND.mean(axis=0)).astype(np.float32)).astype(np.float64)
  unit_ND, unit_TD = ((x - raw_ND.mean(axis=0)) @ white_DD for x in (raw_ND, raw_TD))
  unit_ND, unit_TD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (unit_ND, unit_TD))
  nearest_N = (unit_ND @ unit_TD.T).max(axis=1)
  # float32 sums of 16 columns round by 1e-6, which whitening, dividing by √ε = √0.001, makes thirty times that.
  for pad in (0, END):
    target = padded(sequences, pad)
    found = selected('embedding', ArrayCandidates(np.zeros(ROWS), rows, proxies=made), ROWS, 1, target=target)
    np.testing.assert_allclose(found.scores, nearest_N[found.rows], atol=3e-5)
