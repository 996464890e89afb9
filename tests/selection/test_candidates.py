"""Shared results are computed once and charged to each selection that uses them, as if it had run alone."""

import pytest

from dsdm_jax.selection.candidates import CostAccounting


class Work:
  """Counts operations, as a stage does."""

  def __init__(self):
    self.flop, self.costs = 0.0, CostAccounting(lambda: self.flop)

  def spend(self, flop: float) -> float:
    self.flop += flop
    return flop

  def embeddings(self) -> float:
    return self.costs.once('embeddings', lambda: self.spend(100))

  def clusters(self) -> float:
    return self.costs.once('clusters', lambda: self.embeddings() + self.spend(10))


def test_each_is_charged_what_it_would_have_cost_alone():
  work = Work()
  charged = [
    work.costs.charged(compute)[1]['flop']
    for compute in (
      lambda: work.clusters() + work.spend(1),
      lambda: work.clusters() + work.clusters() + work.spend(2),
      lambda: work.embeddings() + work.spend(3),
      lambda: work.spend(4),
    )
  ]
  assert charged == [111, 112, 103, 4]
  assert work.flop == 100 + 10 + 1 + 2 + 3 + 4, 'shared results were computed once'


def test_seconds_are_charged_alike(monkeypatch):
  now = iter(range(100))
  monkeypatch.setattr('time.monotonic', lambda: next(now))
  work = Work()
  assert work.costs.charged(work.embeddings)[1]['seconds'] == 3, 'of 3 ticks one was for the embeddings'
  assert work.costs.charged(work.embeddings)[1]['seconds'] == 1 + 1


def test_failures_are_not_cached():
  work = Work()

  def fails() -> None:
    raise ValueError('no')

  with pytest.raises(ValueError, match='no'):
    work.costs.charged(lambda: work.costs.once('x', fails))
  assert work.costs.charged(lambda: work.costs.once('x', lambda: work.spend(5))) == (
    5,
    {'seconds': pytest.approx(0, abs=1), 'flop': 5},
  )
