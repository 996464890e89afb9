"""The scaling law: by hand, and against ladders of a known law."""

import math

import numpy as np
import pytest

from dsdm_jax.evaluation import scaling_law

TRUE = scaling_law.Law(1.5, 40.0, 0.3, 300.0, 0.4, 0.0, 0)
UNIQUE = 3e6


def test_effective_tokens_by_hand():
  """Two passes: U (1 + R (1 − e^(−1/R))) = 1.968 U. Without an end of passes at most 1 + R times U."""
  assert scaling_law.effective_tokens(5.0, 10.0) == scaling_law.effective_tokens(5.0, math.inf) == 5.0
  ratio = 15.387756
  assert scaling_law.effective_tokens(20.0, 10.0) == pytest.approx(10 * (1 + ratio * (1 - math.exp(-1 / ratio))))
  assert scaling_law.effective_tokens(20.0, 10.0) == pytest.approx(19.68, abs=0.01)
  assert scaling_law.effective_tokens(1e6, 10.0) == pytest.approx(10 * (1 + ratio))


def _entry(rung: int, parameters: float, tokens: float, rate: float, loss: float, chosen: bool) -> dict:
  facts = {'rung': rung, 'factor': 2.0**rung, 'parameters': parameters, 'tokens': tokens, 'rate': rate}
  epochs = max(1.0, tokens / UNIQUE)
  return facts | {'flop': 6 * parameters * tokens, 'epochs': epochs, 'held_out_loss': loss, 'chosen': chosen}


def _index(noise: float = 0.0, sizes: tuple[float, ...] = (0.5, 1.0, 2.0), choose: int | None = None) -> list[dict]:
  """Four rungs of three sizes each, with a worse rate and a diverged one at each."""
  g, index = np.random.default_rng(0), []
  for rung in range(4):
    flop, own = 6e11 * 4**rung, []
    for size in sizes:
      n = 1e5 * 2**rung * size
      loss = TRUE.loss(n, scaling_law.effective_tokens(flop / 6 / n, UNIQUE)) + g.normal(0, noise)
      own.append(_entry(rung, n, flop / 6 / n, 1.0, loss, False))
      index += [_entry(rung, n, flop / 6 / n, 2.0, loss + 0.5, False), own[-1] | {'rate': 4.0, 'held_out_loss': None}]
    own[int(np.argmin([e['held_out_loss'] for e in own])) if choose is None else choose]['chosen'] = True
    index += own
  return index


def test_an_exact_law_is_found():
  found = scaling_law.check(_index())
  assert found['points'] == 12 and found['rms'] < 1e-4
  fitted = scaling_law.Law(
    found['least'], found['of_size'], found['size_exponent'], found['of_data'], found['data_exponent'], 0.0, 0
  )
  for n, d in ((2e5, 5e5), (4e5, 2e6), (1e6, 8e6)):
    assert fitted.loss(n, d) == pytest.approx(TRUE.loss(n, d), abs=2e-3)


def test_rungs_of_the_best_size_need_their_compute_and_others_less():
  best = [rung['compute'] for rung in scaling_law.check(_index(0.002))['rungs']]
  assert all(share is None or 0.8 < share < 1.25 for share in best)
  found = scaling_law.check(_index(0.002, (0.125, 0.5, 1.0), choose=0))
  true = []
  for rung in range(4):
    flop, n = 6e11 * 4**rung, 1e5 * 2**rung * 0.125
    loss = TRUE.loss(n, scaling_law.effective_tokens(flop / 6 / n, UNIQUE))
    sizes = np.geomspace(1e5 * 0.125, 8e5, 200)
    shares = np.geomspace(1 / 16, 1, 400)
    better = (
      min(TRUE.loss(m, scaling_law.effective_tokens(s * flop / 6 / m, UNIQUE)) for m in sizes) <= loss for s in shares
    )
    true.append(next(share for share, reached in zip(shares, better, strict=True) if reached))
  for rung, share in zip(found['rungs'], true, strict=True):
    assert rung['best'] < rung['loss'] and rung['compute'] == pytest.approx(share, rel=0.15)


def test_too_few_models_give_no_law():
  assert scaling_law.check([e for e in _index() if e['chosen']]) is None
  assert scaling_law.check([]) is None
