"""Models trained at once equal those trained one by one, and an interrupted group resumes."""

import jax
import numpy as np
import pytest

from dsdm_jax.core import storage
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.training import loop, vmapped
from tests.training.test_loop import KEYS, STEPS, Bar, Stop, config, context, stream
from tests.training.test_step import flat, make_trainer

NAMES = ['a', 'b', 'c']


@pytest.fixture(scope='module')
def trainer():
  return make_trainer(**KEYS, adam_eps=1e-3)


def train(folder, trainer, bar, stop_before: int = STEPS + 1):
  keys = [jax.random.key(i) for i in range(3)]
  data = [stream(seed=i, stop_before=stop_before) for i in range(3)]
  vmapped.train(context(folder), trainer, NAMES, keys, data, STEPS, config(adam_eps=1e-3), bar)


def test_three_at_once_are_the_three_one_by_one(trainer, tmp_path):
  bar = Bar(None, None, None, 'step')
  with pytest.raises(Stop):
    train(tmp_path / 'many', trainer, bar, stop_before=3)
  assert not list((tmp_path / 'many').glob('*.jsonl'))
  with Checkpoints(tmp_path / 'many/a') as checkpoints:  # left by a kill while states are written one by one
    checkpoints.save(STEPS, trainer.init(jax.random.key(9)), {'history': []})
  bar = Bar(None, None, None, 'step')
  train(tmp_path / 'many', trainer, bar)
  assert bar.n == 3 * STEPS
  files = 'a a.jsonl a.jsonl.sha256 b b.jsonl b.jsonl.sha256 c c.jsonl c.jsonl.sha256 cost.json'.split()
  assert sorted(p.name for p in (tmp_path / 'many').iterdir()) == files
  for i, name in enumerate(NAMES):
    run = loop.Run(name, jax.random.key(i), stream(seed=i), STEPS)
    wanted = loop.train(context(tmp_path / 'one'), trainer, run, config(adam_eps=1e-3), Bar(None, None, None, 'step'))
    found = storage.read_jsonl(tmp_path / 'many' / f'{name}.jsonl')
    for line, expected in zip(found, wanted, strict=True):
      assert line == pytest.approx(expected, rel=2e-5)
    a, b = (flat(loop.load_state(tmp_path / which / name, trainer).params) for which in ('many', 'one'))
    for k in a:  # rate · rounding / eps over six steps, as in test_step
      np.testing.assert_allclose(a[k], b[k], atol=1e-5, err_msg=k)
  losses = [storage.read_jsonl(tmp_path / 'many' / f'{name}.jsonl')[-1]['loss'] for name in NAMES]
  assert len(set(losses)) == 3
