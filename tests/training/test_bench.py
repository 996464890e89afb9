"""`python -m dsdm_jax.bench train` on the smallest shapes: what it prints adds up."""

import json

import pytest

from dsdm_jax.bench import __main__ as bench


def test_train_prints_one_line_that_adds_up(capsys, monkeypatch):
  monkeypatch.setattr('dsdm_jax.bench.train.memory.keep_freed_memory', lambda: None)  # not in this process
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
