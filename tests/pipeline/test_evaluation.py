"""The evaluation stage alone, on a finished run: benchmarks of every shape, and a checkpoint given by its folder."""

import json

import numpy as np
import pytest

from tests.helpers.workdirs import files_of
from tests.pipeline import runs

ITEMS = {
  'words': [{'context': f'The {i} cats saw the', 'continuation': 'dog', 'category': 'ab'[i % 2]} for i in range(4)],
  'choose': [{'query': f'Is {i} odd?', 'choices': ['yes', 'no', 'perhaps'], 'gold': i % 2} for i in range(4)],
  'schema': [{'context_options': [f'A{i}', f'The B{i}'], 'continuation': 'is big.', 'gold': 0} for i in range(4)],
  'asked': [{'context': f'Question: {i}?\nAnswer:', 'answer': 'leek', 'aliases': ['a leek']} for i in range(4)],
}


def test_benchmarks_and_a_checkpoint(copied, tmp_path):
  paths = []
  for name, lines in ITEMS.items():
    paths.append(str(tmp_path / f'{name}.jsonl'))
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  flags = (
    runs.TINY, f'--workdir={copied}', '--stage=evaluation', '--rerun', f'--config.evaluation.tasks={tuple(paths)}',
    '--config.evaluation.file_shots=1', '--config.evaluation.generate_tokens=3',
    '--config.leakage.benchmarks=()',  # as the mask was made: no benchmark was evaluated then
  )  # fmt: skip
  message = runs.refused(*flags, '--config.leakage.benchmarks=("evaluated",)')
  assert 'reads leakage, which is not finished' in message and 'leakage.benchmarks was [], now' in message
  message = runs.refused(*flags, '--config.evaluation.checkpoints=("mine=/no/such",)')
  assert 'evaluation.checkpoints names /no/such, which is no folder' in message
  (tmp_path / 'long.jsonl').write_text((json.dumps({'context': 'word ' * 99, 'answer': 'x'}) + '\n') * 2)
  long = f'--config.evaluation.tasks=("{tmp_path}/long.jsonl",)'
  message = runs.refused(*flags, long, '--config.evaluation.long_prompts=refuse')
  assert 'long (benchmark), line 1: prompt and answer are' in message and 'evaluation.long_prompts=cut' in message
  flags += (f'--config.evaluation.checkpoints=("mine={files_of(copied, "pretraining")}/random--any--0",)',)
  runs.succeed(*flags)
  output = (copied / 'results.md').read_text()
  assert 'Accuracy on benchmarks' in output and 'choose' in output and 'mine' in output

  found = json.loads((copied / 'results.json').read_text())
  assert {(t['task'], t['split'], t['rule'], t['shots']) for t in found['tasks']} == {
    ('words', 'benchmark', 'exact_argmax', 1),
    ('choose', 'benchmark', 'mean_cross_entropy', 1),
    ('schema', 'benchmark', 'shared_continuation', 1),
    ('asked', 'benchmark', 'alias_prefix', 1),
  }
  rows = {(r['method'], r['seed'], r['task']): r for r in found['arms']}
  assert {task for _, _, task in rows} == set(ITEMS)
  for task in ITEMS:
    mine, random = rows['mine', 0, task], rows['random', 0, task]
    assert {k: v for k, v in mine.items() if k != 'method'} == {k: v for k, v in random.items() if k != 'method'}
    assert mine['logprob'] < 0 and (mine['acc_norm'] is None) == (task in ('words', 'asked'))
  pairs = [c for c in found['comparisons'] if c['method'] == 'mine' and c['baseline'] == 'random']
  assert len(pairs) == 4 and not any(c['paired_seeds'] for c in pairs)
  assert {row['task'] for row in found['means']['summary']} == {'mean'}
  with np.load(files_of(copied, 'evaluation') / 'items.npz') as items:
    assert items['acc__choose__benchmark'].shape == (9, 4)
  # Counts answer the same items; the checkpoint gets the lines of the first random model, which it is.
  with np.load(files_of(copied, 'evaluation') / 'lines.npz') as lines:
    assert {key.split('__')[0] for key in lines} == {'bigram', 'trigram', '4-gram', '5-gram', 'answer unigrams'}
    assert {key.split('__')[1] for key in lines if 'words' in key} == {'logprob'}
    right_RI = lines['5-gram__acc__choose__benchmark']
    assert right_RI.shape == (9, 4) and set(np.unique(right_RI)) <= {0, 1}
    assert all((lines[key] < 0).all() for key in lines if '__logprob__' in key)
  by_arm = {(r['method'], r['task'], r['line']): r['logprob'] for r in found['lines']}
  assert len(by_arm) == 5 * len(ITEMS) * len({method for method, _, _ in by_arm})
  for row in found['summary']:
    best = max(v for (method, task, _), v in by_arm.items() if (method, task) == (row['method'], row['task']))
    assert row['over_line'] == pytest.approx(row['logprob'] - best)
    if row['task'] not in ('choose', 'schema'):  # of which right choices decide
      assert row['below_ngrams'] == (row['over_line'] <= 0)
  lines = (files_of(copied, 'evaluation') / 'answers' / 'checkpoint--mine--asked.jsonl').read_text().splitlines()
  assert [json.loads(line)['id'] for line in lines] == [f'line {i}' for i in range(1, 5)]

  (tmp_path / 'words.jsonl').write_text('{"context": "The cat saw the", "continuation": "dog"}\n' * 2)
  message = runs.refused(*[flag for flag in flags if flag != '--rerun'])
  assert 'evaluation.tasks was ["words.jsonl: content ' in message
