"""The benches of training on the smallest shapes: what they print adds up."""

import json
import subprocess

import jax
import pytest

from dsdm_jax.bench import __main__ as bench
from dsdm_jax.bench import peers as peers_bench
from tests.conftest import ROOT
from tests.training.test_step import LENGTH, VOCAB, make_trainer


@pytest.fixture(autouse=True)
def memory_as_it_is(monkeypatch):
  for module in ('train', 'loop', 'features'):
    monkeypatch.setattr(f'dsdm_jax.bench.{module}.processes.keep_freed_memory', lambda: None)  # not in this process


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
def test_loop_measures_first_step_and_cost_of_input(capsys, tmp_path):
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
  assert 'inptu is unknown; cases are first_step, input' in capsys.readouterr().err
  assert bench.main(['loop', f'--config={tmp_path / "no.py"}']) == 2
  assert 'is no Python file' in capsys.readouterr().err


@pytest.mark.peers
def test_gpt2_is_timed_beside_a_training_step(peers, capsys):
  flags = '--peers=gpt2_eager,gpt2_sdpa --model=quickstart --batch=2 --length=16 --repeats=1'
  assert bench.main(['peers', f'--python={peers}', *flags.split()]) == 0
  lines = {line['case']: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
  assert list(lines) == ['train_step', 'gpt2_eager', 'gpt2_sdpa']
  ours = lines['train_step']
  for peer in ('gpt2_eager', 'gpt2_sdpa'):
    ratio = lines[peer]['seconds'] / ours['seconds']
    assert ours[f'{peer}_seconds_over_this'] == pytest.approx(ratio, rel=0.02)
    assert lines[peer][f'{peer}_seconds_over_this'] == 1
    assert lines[peer]['cpu_s'] > 0 and ours['cpu_s'] > 0


@pytest.mark.peers
def test_gpt2_beside_it_has_as_many_parameters(peers):
  """So that what is timed is the same model; the script is what the bench starts."""
  shape = {'layers': 1, 'width': 16, 'heads': 2, 'vocab': VOCAB, 'length': LENGTH, 'batch': 2, 'threads': 1}
  optimizer = {'learning_rate': 1e-3, 'weight_decay': 0.1, 'adam_b1': 0.9, 'adam_b2': 0.95, 'adam_eps': 1e-8}
  given = {**shape, **optimizer, 'gradient_clip': 1.0, 'attention': 'eager'}
  script = ROOT / 'dsdm_jax/bench/peer_process.py'
  done = subprocess.run(
    [peers, script, 'gpt2_eager', json.dumps(given)], input='\n', capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-2000:]
  params = make_trainer(model={'mlp_width': 64}).abstract.params
  assert json.loads(done.stdout)['parameters'] == sum(x.size for x in jax.tree.leaves(params))


def test_no_peer_of_that_name(capsys):
  assert bench.main(['peers', '--python=python3', '--peers=gpt3']) == 2
  assert f'gpt3 is unknown; peers are {", ".join(peers_bench.PEERS)}' in capsys.readouterr().err
