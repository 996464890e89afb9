"""The ladder: its sizes against what they should be, and its search on losses that are known and on real models."""

import json
import math
import signal

import jax
import pytest

from configs import quickstart
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.errors import Stopped, UserError
from dsdm_jax.training import ladder, loop
from dsdm_jax.training.step import trainer
from tests.helpers import data

FACTORS = ('0.25', '0.5', '1', '2', '4')
VOCAB, LENGTH = 1_024, 128


@pytest.fixture(scope='module')
def flop():
  """FLOP of one step of a model, counted once for each width."""
  config, known = quickstart.get_config(), {}
  mesh = make_mesh(config.mesh, jax.devices()[:1])

  def count(model) -> float:
    if model.width not in known:
      known[model.width] = trainer(model, config.pretraining.train, VOCAB, LENGTH, mesh).flop_per_step
    return known[model.width]

  return count


@pytest.fixture(scope='module')
def planned(flop) -> list[ladder.Rung]:
  config = quickstart.get_config()
  config.ladder.rungs = FACTORS
  return ladder.plan(config, VOCAB, LENGTH, flop)


def test_parameters_grow_with_the_root_and_compute_is_what_was_asked_for(planned, flop):
  """Widths are within half a step (4 of 40 or more) of the wanted size, and steps are whole."""
  base = planned[2]
  for rung in planned:
    assert rung.parameters / base.parameters == pytest.approx(math.sqrt(rung.factor), rel=0.1)
    spent = rung.steps * flop(rung.model) / (base.steps * flop(base.model))
    assert spent == pytest.approx(rung.factor, abs=0.5 * flop(rung.model) / (base.steps * flop(base.model)))


def test_other_sizes_of_a_rung_have_the_same_compute(planned, flop):
  config, base = quickstart.get_config(), planned[2]
  for size in (0.5, 2.0):
    rung = ladder.rung(config.model, 1.0, base.steps, VOCAB, LENGTH, flop, size)
    assert rung.parameters / base.parameters == pytest.approx(size, rel=0.1)
    assert rung.steps * flop(rung.model) == pytest.approx(base.steps * flop(base.model), rel=0.01)
  assert ladder.rung(config.model, 1.0, base.steps, VOCAB, LENGTH, flop, 1e-6) is None


def test_rung_of_one_is_the_arms_own_model(planned):
  config = quickstart.get_config()
  assert planned[2].model.to_dict() == config.model.to_dict()
  batch = config.pretraining.train.batch_size
  assert planned[2].steps == config.selection.examples * config.selection.epochs // batch


def test_rungs_that_cannot_be(flop):
  config = quickstart.get_config()
  config.ladder.rungs = ('0.00001', '1')
  with pytest.raises(UserError, match='ladder.rungs holds 1e-05'):
    ladder.plan(config, VOCAB, LENGTH, flop)


def test_the_search_ends_where_no_neighbor_is_better():
  asked = []

  def loss(place):
    asked.append(place)
    size, rate = place
    return (size + 2) ** 2 + (rate - 1) ** 2 + 0.5 * (size + 2) * (rate - 1)

  search = ladder.Search(loss)
  assert search.best((0, 0)) == (-2, 1)
  assert len(asked) == len(set(asked)) == len(search.losses), 'no place is tried twice'
  assert {(-3, 1), (-1, 1), (-2, 0), (-2, 2)} <= set(asked)
  assert ladder.Search(loss, steps=False).best((0, 0)) == (0, 0)


def test_the_search_leaves_diverged_places_and_stops_at_the_farthest():
  assert ladder.Search(lambda place: math.inf if place[1] > 0 else -place[1]).best((0, 0)) == (0, 0)
  assert ladder.Search(lambda place: place[0]).best((1, 0)) == (1 - 6, 0)


def _context(config, folder, pool, leakage):
  return data.context(config, folder, 'ladder', pool=pool, leakage=leakage)


@pytest.mark.full
def test_models_are_tuned_and_a_stopped_ladder_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
  """Real models: the rate of the arms is far too high, and lower ones win, after a stop too."""
  config = data.small_config(length=16, vocab_size=300, max_bytes=12_000)
  config.model.update({'layers': 1, 'width': 8, 'heads': 1, 'kv_heads': 1, 'mlp_width': 16})
  config.pretraining.train.update({'batch_size': 16, 'learning_rate': 6.4, 'warmup_steps': 1, 'log_every_steps': 4})
  config.pretraining.train.gradient_clip = 0.0
  config.selection.update({'examples': 128, 'epochs': 1})
  config.ladder.update({'rungs': ('2',), 'step': 64.0, 'seeds': 2})  # no model of such sizes has a step
  pool = data.run_pool(config, tmp_path / 'pool')
  files = [path.relative_to(pool.path).as_posix() for path in pool.path.rglob('*') if path.is_file()]
  pool.manifest.update({'identity': {}, 'files': {name: {'sha256': name} for name in files}, 'models': []})
  inputs = pool, data.run_leakage(config, tmp_path / 'pool', pool)
  monkeypatch.setattr(ladder, 'make_mesh', lambda config: make_mesh(config, jax.devices()[:1]))  # compiles faster
  facts = ladder.run(_context(config, tmp_path / 'whole', *inputs))
  index = json.loads((tmp_path / 'whole/ladder/index.json').read_text())
  assert [r['factor'] for r in facts['rungs']] == [2] and [e['rate'] for e in index[:2]] == [1, 1 / 64]
  chosen = [e for e in index if e['chosen']]
  assert [e['seed'] for e in chosen] == [0, 1] and chosen[0]['rate'] < 1 and chosen[0]['flop'] == chosen[1]['flop']
  assert chosen[0]['held_out_loss'] == min(e['held_out_loss'] for e in index if e['seed'] == 0)

  trained, train = [], loop.train

  def stopping(context, compiled, run, *others):
    trained.append(run.name)
    if len(trained) == 3:
      raise Stopped('stopped', signal.SIGTERM)
    return train(context, compiled, run, *others)

  monkeypatch.setattr(loop, 'train', stopping)
  with pytest.raises(Stopped):
    ladder.run(_context(config, tmp_path / 'again', *inputs))
  ladder.run(_context(config, tmp_path / 'again', *inputs))
  again = json.loads((tmp_path / 'again/ladder/index.json').read_text())
  assert [e | {'seconds': 0} for e in again] == [e | {'seconds': 0} for e in index]


def test_held_out_rows_are_trained_on_by_none():
  held, free = ladder.held_out_rows(0, 500, 8)
  assert len(held) == 24 and sorted([*held, *free]) == list(range(500)), 'three batches of 500 / 16'
  with pytest.raises(UserError, match='1000 rows'):
    ladder.held_out_rows(0, 500, 500)
