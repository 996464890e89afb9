"""The proxies' own passes, with a model of random weights."""

import errno
import threading
import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from configs.base import get_config
from dsdm_jax.attribution import rademacher
from dsdm_jax.core import prng, storage
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.data.targets.targets import Examples
from dsdm_jax.errors import UserError
from dsdm_jax.selection import less
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


def test_embeddings_are_of_tokens_alone_without_padding(proxies, monkeypatch):
  made, rows, model = proxies
  size_N = np.random.default_rng(1).integers(1, LENGTH + 1, ROWS)
  monkeypatch.setattr(rows, 'sizes', lambda asked: size_N[asked])
  # The first begins with the end mark, as examples do; the second holds token 0, and nine make three batches.
  sequences = [[END, 7, 8], [END, 0, 9, 3, 3, 3, 0], list(range(1, 11)), *([END, 11 + i, 4, 6] for i in range(6))]
  of_rows = [row_L[:size] for row_L, size in zip(rows.tokens_NL, size_N, strict=True)]
  hidden = jax.jit(model.hidden)

  def mean(tokens) -> np.ndarray:
    return np.asarray(hidden(np.int32(tokens)[None])[0], np.float64).mean(axis=0)

  raw_ND, raw_TD = (np.stack([mean(t) for t in texts]) for texts in (of_rows, sequences))
  white_DD = whitening((raw_ND - raw_ND.mean(axis=0)).astype(np.float32)).astype(np.float64)
  unit_ND, unit_TD = ((x - raw_ND.mean(axis=0)) @ white_DD for x in (raw_ND, raw_TD))
  unit_ND, unit_TD = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (unit_ND, unit_TD))
  nearest_N = (unit_ND @ unit_TD.T).max(axis=1)
  # float32 sums of 16 columns round by 1e-6, which whitening, dividing by √ε = √0.001, makes thirty times that.
  spent = []  # a pass over six batches of rows or three of examples costs as much a batch
  for pad in (0, END):
    target, before = padded(sequences, pad), made._context.cost.flop
    found = selected('embedding', ArrayCandidates(np.zeros(ROWS), rows, proxies=made), ROWS, 1, target=target)
    np.testing.assert_allclose(found.scores, nearest_N[found.rows], atol=3e-5)
    spent.append(made._context.cost.flop - before)
  assert spent[0] == spent[1] and spent[0] % (6 + 3) == 0


def test_embeddings_that_are_large_are_in_a_file_and_the_same(proxies, monkeypatch, tmp_path):
  made, _, _ = proxies
  monkeypatch.setattr('dsdm_jax.selection.proxy_signals.BLOCK', 5)  # of 23 rows
  plain_ND = made.embeddings()
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(storage, '_IN_MEMORY', 0)
  mapped_ND = made.embeddings()
  assert isinstance(mapped_ND.base, np.memmap) and not isinstance(plain_ND.base, np.memmap)
  np.testing.assert_array_equal(mapped_ND, plain_ND)
  assert storage.files(tmp_path / 'cache') == [], 'the file has no name, so that a kill leaves none'

  def full(*arguments):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(storage.os, 'posix_fallocate', full)
  with pytest.raises(OSError, match=r'No space left on device.*cache'):
    made.embeddings()


def test_less_by_its_formula(proxies, monkeypatch):
  """Γ = m̂ / (√v̂ + ε) after one more step of Adam on a row, against plain gradients of examples, in float64."""
  made, rows, _ = proxies
  train, rng = made._config.proxies.train, np.random.default_rng(2)
  fresh = made._trainer.init(prng.stream(0, 'init'))
  [old] = [x for x in jax.tree.leaves(fresh.opt_state, is_leaf=is_adam) if is_adam(x)]
  leaves, tree = jax.tree.flatten(old.mu)
  m, v = ([(scale * rng.normal(size=x.shape)) ** power for x in leaves] for scale, power in ((1e-5, 1), (3e-4, 2)))
  adam = optax.ScaleByAdamState(
    np.int32(7), *(jax.tree.unflatten(tree, [np.float32(x) for x in parts]) for parts in (m, v))
  )
  state = fresh._replace(opt_state=(adam,))
  monkeypatch.setattr(made, 'state', lambda checkpoint: state)
  made._config.proxies.count = 1
  graphdef = made._trainer.graphdef

  @jax.jit
  def gradient(tokens_L, weights_L):
    def loss(params):
      logits_LV = nnx.merge(graphdef, params, state.rest)(tokens_L[None])[0]
      p_L = jax.nn.log_softmax(logits_LV[:-1])[np.arange(LENGTH - 1), tokens_L[1:]]
      return -(p_L * weights_L[1:]).sum() / weights_L[1:].sum()

    return jax.tree.leaves(jax.grad(loss)(state.params))

  def flat(parts) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])

  m, v = flat(m), flat(v)
  b1, b2, steps = train.adam_b1, train.adam_b2, 8
  step_NW = []
  for tokens_L in rows.tokens_NL:
    g = flat(gradient(tokens_L, np.ones(LENGTH, np.float32)))
    first, second = (b1 * m + (1 - b1) * g) / (1 - b1**steps), (b2 * v + (1 - b2) * g**2) / (1 - b2**steps)
    step_NW.append(first / (np.sqrt(second) + train.adam_eps))
  tasks = [padded([[END, 7, 8, 3]], 0), padded([[END, 1, 2], list(range(1, 11))], 0)]
  examples = [task.examples('docs') for task in tasks]
  wanted_KN = np.zeros((2, ROWS))
  keys, sizes = rademacher.keys(state.params, made._config.seed, 0), np.cumsum([x.size for x in leaves])[:-1]

  def projected(w_BW) -> np.ndarray:
    parts = [p.reshape(-1, *x.shape) for p, x in zip(np.split(np.float32(w_BW), sizes, axis=1), leaves, strict=True)]
    phi_BJ = np.asarray(rademacher.project(parts, keys, less.DIMENSION), np.float64)
    return phi_BJ / np.linalg.norm(phi_BJ, axis=1, keepdims=True)

  phi_NJ, same_KN = projected(np.stack(step_NW)), np.zeros((2, ROWS))
  for k, of_task in enumerate(examples):
    for tokens_L, weights_L in zip(of_task.tokens_TL, of_task.weights_TL, strict=True):
      g = flat(gradient(tokens_L, weights_L))
      cosine_N = [s @ g / np.linalg.norm(s) / np.linalg.norm(g) for s in step_NW]
      wanted_KN[k] += np.array(cosine_N) / len(of_task.tokens_TL)
      same_KN[k] += phi_NJ @ projected(g[None])[0] / len(of_task.tokens_TL)
  found_KN = made.adam_cosines(examples, less.DIMENSION)
  # By the same signs, but for float32; without them, a cosine changes by 1/√J = 0.011, a mean of several by no more.
  np.testing.assert_allclose(found_KN, same_KN, atol=2e-5)
  np.testing.assert_allclose(found_KN, wanted_KN, atol=4.5 / less.DIMENSION**0.5)
  assert np.std(wanted_KN[0]) > 0.02
  both = Target('mix', ('a', 'b'), lambda task: examples['ab'.index(task)], 'zscore')
  pool = ArrayCandidates(np.zeros(ROWS), rows, proxies=made)
  rows.counted_N[best := int(found_KN.max(axis=0).argmax())] = False  # Adam's momentum steps on such a row, too
  found = selected('less', pool, ROWS, 1, target=both)
  assert found.rows[-1] == best
  np.testing.assert_allclose(found.scores[:-1], found_KN.max(axis=0)[found.rows[:-1]], atol=1e-6)


def is_adam(x) -> bool:
  return isinstance(x, optax.ScaleByAdamState)


def test_less_needs_adam(proxies):
  made, *_ = proxies
  with pytest.raises(UserError, match='less needs the moments of Adam'):
    made.adam_cosines([padded([[END, 7, 8]], 0).examples('docs')], 64)  # no step was taken
