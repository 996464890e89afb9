"""`python -m dsdm_jax.bench evaluation` on a handful of items."""

import json
import random

from dsdm_jax.bench import __main__ as bench
from dsdm_jax.data.targets.benchmarks import BENCHMARKS

NAMES = [''.join(random.Random(i).choices('abcdefghijklmnopqrst', k=2 + i % 6)) for i in range(2_000)]


def test_evaluation_bench(capsys, tmp_path, monkeypatch):
  monkeypatch.setattr('dsdm_jax.bench.evaluation.processes.keep_freed_memory', lambda: None)  # not in this process
  lines = [
    {'context': f'{i}: {" ".join(NAMES[(i * k) % 2_000] for k in range(1, 20))}', 'continuation': NAMES[i]}
    for i in range(300)
  ]
  (tmp_path / 'lambada_openai.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert BENCHMARKS['lambada'].source == 'lambada_openai.jsonl'
  assert bench.main(['evaluation', '--folder', str(tmp_path), '--items', '40']) == 0
  line = json.loads(capsys.readouterr().out)
  assert (line['task'], line['items']) == ('lambada', 40)
  assert line['flop'] > 0 and line['score_first_s'] >= line['score_again_s'] > 0
  assert bench.main(['evaluation', '--folder', str(tmp_path), '--tasks', 'poems']) == 2
