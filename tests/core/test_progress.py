"""What a run tells while it goes."""

import json

import pytest

from dsdm_jax.core.progress import Log


def test_events_are_lines_of_json_that_later_logs_add_to(workdir):
  for number in range(2):
    log = Log(workdir, f'stage{number}')
    log.event('begin', resumed=bool(number), text='line\nbreak ∑')
    log.close()
  lines = (workdir / 'events.jsonl').read_text().splitlines()
  events = [json.loads(line) for line in lines]
  assert [e['stage'] for e in events] == ['stage0', 'stage1']
  assert [e['resumed'] for e in events] == [False, True]
  assert events[0]['text'] == 'line\nbreak ∑'
  assert events[0]['time'] <= events[1]['time']


def test_other_processes_than_the_first_write_nothing(workdir, capsys):
  log = Log(workdir, 'stage', enabled=False)
  log.event('begin')
  log.scalars(1, {'loss': 2.0}, run='a')
  log.say('hello')
  assert list(log.bar(range(3))) == [0, 1, 2]
  log.close()
  assert list(workdir.iterdir()) == []
  assert capsys.readouterr().err == ''


def test_scalars_can_be_read_back_by_tensorboard(workdir):
  log = Log(workdir, 'stage')
  for step in (1, 2):
    log.scalars(step, {'loss': 1 / step}, run='model')
  log.close()
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  found = EventAccumulator(str(workdir / 'tensorboard' / 'model'), size_guidance={'tensors': 0})
  found.Reload()
  from tensorboard.util import tensor_util

  points = [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in found.Tensors('loss')]
  assert points == [(1, pytest.approx(1.0)), (2, pytest.approx(0.5))]


def test_bar_counts_and_says_its_name(workdir, capsys):
  log = Log(workdir, 'stage')
  with log.bar(total=10, desc='rows', unit='row') as bar:
    bar.update(4)
    bar.update(6)
  output = capsys.readouterr().err
  assert 'rows' in output
  assert '10.0/10.0' in output
