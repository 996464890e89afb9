"""`python -m dsdm_jax.bench features` on the smallest shapes: what it prints."""

import argparse
import json

import pytest

from dsdm_jax.bench import __main__ as bench
from dsdm_jax.bench import features, stages

KEYS = (
  'case seconds ratio_to_train_step ratio_to_floor cpu_ratio_to_floor tokens_per_s peak_bytes flop '
  'share_of_matmul_peak model batch length j rows microbatch devices'
).split()


def test_features_prints_a_line_for_each_case(capsys, monkeypatch):
  monkeypatch.setattr('dsdm_jax.bench.features.processes.keep_freed_memory', lambda: None)  # not in this process
  monkeypatch.setattr(features, 'PEAK_SIZE', {'cpu': 64})
  cases = 'train_step,forward,two_sided_j64,dense_j32,jvp_score'
  flags = f'--model quickstart --batch 2 --length 16 --repeats 1 --cases {cases}'
  assert bench.main(['features', *flags.split()]) == 0
  lines = {line['case']: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
  assert list(lines) == [*cases.split(','), 'matmul_peak']
  for name, line in lines.items():
    assert list(line) == KEYS
    assert line['seconds'] > 0 and line['flop'] > 0 and line['share_of_matmul_peak'] > 0
    assert (line['tokens_per_s'] is None) == (name == 'matmul_peak')
  assert lines['train_step']['ratio_to_train_step'] == 1
  assert lines['two_sided_j64']['ratio_to_floor'] > 0
  # Two sided: 2 × 2 of ten matrices, and five of all vectors.
  assert (lines['two_sided_j64']['j'], lines['dense_j32']['j'], lines['jvp_score']['microbatch']) == (45, 32, 1)


def test_share_of_the_peak_is_of_all_devices(monkeypatch):
  """A product on one device, and a step on four that does four times as much in the same time: both at the peak."""
  measured = [
    features.Case('matmul_peak', lambda: None, 1e9, None, None, seconds=[1.0]),
    features.Case('forward', lambda: None, 4e9, None, None, seconds=[1.0]),
  ]
  flags = argparse.Namespace(devices='2x2', model='small', batch=4, length=8)
  monkeypatch.setattr('dsdm_jax.bench.features.jax.default_backend', lambda: 'gpu')
  assert [line['share_of_matmul_peak'] for line in features._lines(measured, flags)] == [pytest.approx(1.0)] * 2


def test_passes_are_compared_with_their_steps_in_pauses(capsys, monkeypatch):
  """Five shards of 64 rows: pauses after the first and the fifth."""
  monkeypatch.setattr('dsdm_jax.bench.features.processes.keep_freed_memory', lambda: None)
  monkeypatch.setattr(features, 'PEAK_SIZE', {'cpu': 64})
  monkeypatch.setattr(stages, 'SHARD_ROWS', 64)
  pauses = []
  wait = stages._wait_until_idle
  monkeypatch.setattr(stages, '_wait_until_idle', lambda: pauses.append(1) or wait())
  flags = (
    '--model quickstart --batch 16 --length 16 --repeats 1 --rows 300 --cases stage_store_j32,stage_stream_j32'.split()
  )
  assert bench.main(['features', *flags]) == 0
  lines = {line['case']: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
  store, stream = lines['stage_store_j32'], lines['stage_stream_j32']
  assert stream['flop'] == 2 * store['flop']
  assert all(
    line['cpu_ratio_to_floor'] > 0 and line['ratio_to_floor'] > 0 and line['seconds'] > 0 and line['rows'] == 300
    for line in (store, stream)
  )
  assert len(pauses) == 2 + 2 + 2 * 2  # before each case, then in one pass and in two
