"""What is shared is made once and charged to each that asks for it, as if each had worked alone."""

import pytest

from dsdm_jax.selection.cost_accounting import Ledger


class Work:
  """Counts operations, as a stage does."""

  def __init__(self):
    self.flop, self.ledger = 0.0, Ledger(lambda: self.flop)

  def spend(self, flop: float) -> float:
    self.flop += flop
    return flop

  def embeddings(self) -> float:
    return self.ledger.once('embeddings', lambda: self.spend(100))

  def clusters(self) -> float:
    return self.ledger.once('clusters', lambda: self.embeddings() + self.spend(10))


def test_each_bears_what_it_would_have_cost_alone():
  work = Work()
  charged = [
    work.ledger.charged(make)[1]['flop']
    for make in (
      lambda: work.clusters() + work.spend(1),
      lambda: work.clusters() + work.clusters() + work.spend(2),
      lambda: work.embeddings() + work.spend(3),
      lambda: work.spend(4),
    )
  ]
  assert charged == [111, 112, 103, 4]
  assert work.flop == 100 + 10 + 1 + 2 + 3 + 4, 'what is shared was made once'


def test_seconds_are_charged_alike(monkeypatch):
  now = iter(range(100))
  monkeypatch.setattr('time.monotonic', lambda: next(now))
  work = Work()
  assert work.ledger.charged(work.embeddings)[1]['seconds'] == 3, 'of 3 ticks one was for the embeddings'
  assert work.ledger.charged(work.embeddings)[1]['seconds'] == 1 + 1


def test_what_fails_is_not_kept():
  work = Work()

  def fails() -> None:
    raise ValueError('no')

  with pytest.raises(ValueError, match='no'):
    work.ledger.charged(lambda: work.ledger.once('x', fails))
  assert work.ledger.charged(lambda: work.ledger.once('x', lambda: work.spend(5))) == (
    5,
    {'seconds': pytest.approx(0, abs=1), 'flop': 5},
  )
