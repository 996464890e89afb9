"""The benches of training on the smallest shapes: what they print adds up."""

import json

import pytest

from dsdm_jax.bench import __main__ as bench


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
  for module in ('train', 'loop'):
    monkeypatch.setattr(f'dsdm_jax.bench.{module}.memory.keep_freed_memory', lambda: None)  # not in this process


def test_train_prints_one_line_that_adds_up(capsys):
  flags = '--model quickstart --batch 4 --microbatches 2 --length 16 --models-at-once 2 --repeats 1'
  assert bench.main(['train', *flags.split()]) == 0
  line = json.loads(capsys.readouterr().out)
  assert line['tokens_per_s'] == pytest.approx(2 * 4 * 16 / line['seconds'], rel=0.02)
  assert line['share_of_matmul_peak'] == pytest.approx(
    line['flop'] / line['seconds'] / line['matmul_flop_per_s'], rel=0.02, abs=1e-4
  )
  # 6 FLOP a token and parameter in matrices, and attention's: 12 · layers · L · D a token.
  matrices = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 1_024 * 64
  assert line['flop'] == 2 * 4 * 16 * (6 * matrices + 12 * 2 * 16 * 64)
  assert line['peak_bytes'] > 2 * 3 * 4 * matrices
  assert bench.main(['train', '--batch', '3', '--microbatches', '2']) == 2


@pytest.mark.slow
def test_loop_tells_the_first_step_and_what_input_costs(capsys, tmp_path):
  flags = f'--config=tests/pipeline/tiny.py --repeats=1 --parts=2 --folder={tmp_path}'
  assert bench.main(['loop', *flags.split()]) == 0
  cold, warm, read = map(json.loads, capsys.readouterr().out.splitlines())
  assert [(line['case'], line['cache']) for line in (cold, warm)] == [('first_step', 'cold'), ('first_step', 'warm')]
  assert all(1 < line['least_s'] <= line['seconds'] <= line['most_s'] for line in (cold, warm))  # imports take more
  assert all(line['cpu_s'] > 1 for line in (cold, warm))
  assert (read['case'], read['batch'], read['length'], read['steps'], read['parts']) == ('input', 16, 32, 4, 2)
  assert read['cpu_s'] > 0 and 0 <= read['starved'] < 1
  assert read['cost'] == pytest.approx(1 - read['step_in_memory_s'] / read['step_s'], abs=2e-3)
  assert list(tmp_path.iterdir()) == [], 'nothing is left'


def test_loop_refuses_what_it_cannot_measure(capsys, tmp_path):
  assert bench.main(['loop', '--cases=inptu']) == 2
  assert 'inptu is no case; cases are first_step, input' in capsys.readouterr().err
  assert bench.main(['loop', f'--config={tmp_path / "no.py"}']) == 2
  assert 'is no Python file' in capsys.readouterr().err
