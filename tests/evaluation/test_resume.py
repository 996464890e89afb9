"""An evaluation that is killed before a change of a file charges each model once, whatever this process evaluated."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.evaluation import evaluate

FLOP = {'arm--0': 1e17, 'arm--1': 0.1, 'arm--2': 0.3}  # the last is lost in a difference of sums
ENTRIES = [{'name': name, 'method': 'arm', 'folder': name, 'step': 1, 'of': name} for name in FLOP]
REQUEST = SimpleNamespace(key=('docs', 'holdout'), item_ids_I=['1', '2'])


class Killed(BaseException):
  pass


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs the loop of the stage over made-up models; returns names in order of their evaluation, and the cost."""
  names: list[str] = []

  def score(suite, scorer, name, task):
    assert task == 'docs'
    names.append(name)
    scorer.flop += FLOP[name]
    return {'accuracy__docs__holdout': np.ones(2, np.float32)}, {('docs', 'holdout'): ['a', 'b']}

  made = SimpleNamespace(vocab_size=9, length=8, encoder=SimpleNamespace(pad=0))
  for name in ('Pool', 'trainer', 'make_mesh'):
    monkeypatch.setattr(evaluate, name, lambda *_: made)
  monkeypatch.setattr(evaluate, 'load_state', lambda folder, *_: folder.name)
  monkeypatch.setattr(evaluate.scoring, 'evaluate', score)
  monkeypatch.setattr(evaluate.scoring, 'Scorer', lambda *_: SimpleNamespace(flop=0.0))
  config = ConfigDict({'pretraining': {'train': {}}, 'mesh': {}, 'evaluation': {'batch_size': 2}, 'model': {}})

  def act() -> tuple[list[str], Cost]:
    del names[:]
    cost = Cost(tmp_path)
    context = Context(config, tmp_path, {'pool': None}, Log(tmp_path, 'evaluation', enabled=False), cost)
    evaluate._evaluate(
      context, SimpleNamespace(requests=[REQUEST], digests={'docs': 'x'}), config.model, ENTRIES, 'evaluation'
    )
    return names, cost

  return act


@pytest.mark.parametrize('at', range(1, 13))
def test_killed_evaluation(run, monkeypatch, tmp_path, at):
  rename, left = os.replace, iter(range(at - 1, -1, -1))

  def replace(source, target):
    if not next(left, 1):
      raise Killed
    rename(source, target)

  monkeypatch.setattr(os, 'replace', replace)
  with pytest.raises(Killed):
    run()
  saved = Cost(tmp_path)
  names, cost = run()
  # Four files for each model: answers, values, the note on them, and the cost.
  done = (at - 1) // 4
  flop = {f'{name} on docs flop': value for name, value in FLOP.items()}
  assert names == list(FLOP)[done:] and [key for key in saved.parts if key in flop] == list(flop)[:done]
  assert cost.flop == 0.0 + 1e17 + 0.1 + 0.3 and {key: cost.parts[key] for key in flop} == flop
  assert run()[0] == []
