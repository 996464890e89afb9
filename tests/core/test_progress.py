"""What a run tells while it goes."""

import json

import pytest

from dsdm_jax.core import progress, storage
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


def test_an_object_store_has_the_logs_of_each_start_when_a_stage_ends(tmp_path):
  workdir = storage.locate(f'memory://bucket{tmp_path}')
  for start in range(2):
    progress._files_of.cache_clear()  # as in another process
    for stage in ('pool', 'proxies'):
      log = Log(workdir, f'{stage}{start}')
      log.event('begin')
      log.scalars(1, {'loss': 2.0}, run='model')
      log.close()
      log.event('end')
  names = storage.files(workdir)
  events = [name for name in names if name.startswith('events/')]
  lines = sorted([json.loads(x)['stage'] for x in storage.read(workdir / name).splitlines()] for name in events)
  assert lines == [['pool0', 'pool0', 'proxies0', 'proxies0'], ['pool1', 'pool1', 'proxies1', 'proxies1']]
  curves = [name for name in names if name.startswith('tensorboard/model/')]
  assert len(curves) == 4
  assert all(b'loss' in storage.read(workdir / name) for name in curves)


def test_one_of_a_unit_is_singular():
  assert [progress.counted(n, 'query') for n in (0, 1, 4_007)] == ['0 queries', '1 query', '4,007 queries']


def test_other_processes_than_the_first_write_nothing(workdir, capsys):
  log = Log(workdir, 'stage', enabled=False)
  log.event('begin')
  log.scalars(1, {'loss': 2.0}, run='a')
  log.say('hello')
  log.warn('hello')
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


class Clock:
  """Time that passes when the test says so."""

  def __init__(self, monkeypatch):
    self.now = 1_000.0
    monkeypatch.setattr(progress.time, 'monotonic', lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
  return Clock(monkeypatch)


@pytest.fixture
def display(clock, monkeypatch):
  display = progress.Display()
  display._ticks = True  # the test asks for the line itself
  monkeypatch.setattr(progress, 'display', display)
  return display


STAGES = ['pool', 'targets', 'proxies', 'features', 'datamodel', 'selection', 'pretraining', 'evaluation', 'report']


def test_the_line_has_what_a_person_wants_to_know_and_80_columns(workdir, display, clock, capsys):
  display.begin(STAGES, {'proxies': 100.0, 'features': 60.0, 'report': 20.0}, 'info')
  log = Log(workdir, 'proxies')
  with display.stage('proxies') as ended, log.bar(total=2_004, unit='step') as bar:
    log.describe('2 models × 1,002 steps')
    assert display.line() == '[3/9] proxies  0 of 2,004 steps  0:00 of 3:00'
    clock.now += 10  # compiles
    bar.update()
    bar.show(loss=4.312)
    clock.now += 1
    bar.update(20)
    assert display.line() == '[3/9] proxies  21 of 2,004 steps  loss 4.31  0:11 of 3:00', 'no rate yet'
    for _ in range(4):
      clock.now += 1
      bar.update(20)
    assert display.line() == '[3/9] proxies  101 of 2,004 steps  loss 4.31  20 steps/s  0:15 of 3:10'
    assert len(display.line()) < 80
    assert display.where() == 'in proxies at step 101 of 2,004'
    ended()
  assert capsys.readouterr().out == '[3/9] proxies  2 models × 1,002 steps  0:15\n'
  with display.stage('features'):
    assert display.line() == '[4/9] features  0:15 of 0:57', 'the first stage was faster than expected'
  assert display.where() == 'between two stages'


def test_steps_of_an_earlier_start_say_nothing_about_the_rate(workdir, display, clock):
  display.begin(STAGES, {}, 'info')
  with display.stage('proxies'), Log(workdir, 'proxies').bar(total=1_000, unit='step') as bar:
    bar.skip(900)
    for _ in range(6):
      bar.update(1)
      clock.now += 1
    assert bar.rate == pytest.approx(5 / 6) and bar.remaining == pytest.approx(94 / bar.rate)
    assert display.line() == '[3/9] proxies  906 of 1,000 steps  0.833 steps/s  0:06 of 1:59'


def test_a_long_line_loses_what_matters_least_and_a_stage_with_nothing_to_do_is_silent(workdir, display, clock, capsys):
  display.begin(STAGES, {}, 'info')
  with display.stage('proxies') as ended:
    display.what = 'x' * 70
    assert display.line().endswith('0:00') and len(display.line()) < 80
    display.what = ''
    ended()
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(('level', 'printed'), [('warning', 'w'), ('info', 'w'), ('debug', 'wd')])
def test_the_level_chooses_what_is_printed(workdir, display, capsys, level, printed):
  display.begin(STAGES, {}, level)
  log = Log(workdir, 'stage')
  log.warn('w')
  log.say('d')
  assert capsys.readouterr().err.split() == list(printed)
