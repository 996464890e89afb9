"""Tasks of lm-evaluation-harness as targets and benchmarks, and the harness that drives our models."""

import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from configs import base
from dsdm_jax import cli
from dsdm_jax.config import values
from dsdm_jax.config.validate import validate
from dsdm_jax.data.targets import harness
from dsdm_jax.errors import UserError
from tests.conftest import ROOT
from tests.helpers import harness_tasks
from tests.pipeline import runs


@pytest.fixture(scope='module')
def asked(finished, peers, tmp_path_factory):
  """What the adapter, our suite, and the harness with the exported folder give for the same tasks."""
  folder = tmp_path_factory.mktemp('harness')
  tasks = harness_tasks.write(folder / 'tasks')
  assert cli.main(['export', 'model', '--workdir', str(finished), '--arm', 'dsdm', '--out', str(folder / 'model')]) == 0
  [packages] = (peers.parent.parent / 'lib').glob('python*/site-packages')
  options = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(folder / 'home'), 'TOKENIZERS_PARALLELISM': 'false'}
  here = Path(__file__).parent
  exported = subprocess.Popen(
    [peers, here / 'harness_exported.py', folder / 'model', tasks, folder / 'exported.json'],
    env=runs.environment(1, PYTHONPATH='', **options),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  python = ROOT / '.venv' / 'bin' / 'python'
  ours = subprocess.run(
    [python, here / 'harness_jax.py', packages, finished, tasks, folder / 'jax.json'],
    env=runs.environment(1, PYTHONPATH=str(ROOT), **options),
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
  )
  said = exported.communicate()[0]
  assert ours.returncode == 0, ours.stderr[-3_000:]
  assert exported.returncode == 0, said[-3_000:]
  return json.loads((folder / 'jax.json').read_text()), json.loads((folder / 'exported.json').read_text())


def _answers(resps: list) -> list[tuple[float, bool]]:
  return [(float(answer[0][0]), answer[0][1] in (True, 'True')) for answer in resps]


@pytest.mark.peers
def test_the_adapter_gives_what_the_harness_gets_from_the_exported_folder(asked):
  ours, theirs = asked[0]['samples'], asked[1]
  assert ours.keys() == theirs.keys() == {f'own_{name}' for name in harness_tasks.TASKS}
  for task, samples in theirs.items():
    assert len(samples) == len(ours[task]) == 24
    for sample, resps in zip(samples, ours[task], strict=True):
      if task == 'own_write':
        assert resps == sample['resps']
      elif task == 'own_whole':
        # A sum of about 150 log-probabilities in float32 on both sides.
        assert float(resps[0][0]) == pytest.approx(float(sample['resps'][0][0]), abs=2e-3)
      else:
        for (total, greedy), (wanted, right) in zip(_answers(resps), _answers(sample['resps']), strict=True):
          assert total == pytest.approx(wanted, abs=2e-4) and greedy == right, task


@pytest.mark.peers
def test_our_suite_scores_a_task_as_the_harness_item_by_item(asked):
  ours, theirs = asked[0]['ours'], asked[1]
  for task, found in ours.items():
    places = [int(id.removeprefix('test/')) for id in found['ids']]
    # A document without an answer is left out here, and wrong there.
    assert places == [i for i in range(24) if i != 1 or task != 'own_choose']
    of_item = [
      [t for t, item in zip(found['totals'], found['item'], strict=True) if item == i] for i in range(len(places))
    ]
    for index, place in enumerate(places):
      wanted = [total for total, _ in _answers(theirs[task][place]['resps'])]
      np.testing.assert_allclose(of_item[index], wanted, atol=2e-4)
      for metric in ('acc', 'acc_norm'):
        name = 'accuracy' if task == 'own_continue' else metric
        if metric in theirs[task][place]:
          assert found['rules'][name][index] == theirs[task][place][metric]


@pytest.mark.peers
def test_prompts_with_shots_are_those_of_the_harness_item_by_item(asked):
  """Its draw, its sampler, its templates of shots, and descriptions that depend on the document."""
  ours, theirs = asked[0]['prompts'], asked[1]
  seen = set()
  for task, prompts in ours.items():
    assert len(prompts) >= 23
    for prompt in prompts:
      wanted = [list(pair) for pair in theirs[task][int(prompt['id'].removeprefix('test/'))]['asked']]
      assert prompt['pairs'] == wanted, task
      context, answer, options = prompt['target']
      assert [context, answer] == wanted[prompt['right']] and options in ([], [pair[0] for pair in wanted])
      starts, of_target = prompt['starts']
      assert starts == of_target and len(starts) == {'shots': 3, 'first': 4, 'blanks': 3, 'choose': 1}[task[4:]]
      seen.add(wanted[0][0][: starts[-1]])
  assert any(text.startswith('About ') and text.count('Solved: ') == 3 for text in seen) and len(seen) > 50


@pytest.mark.peers
def test_targets_have_the_prompts_of_the_task_and_never_its_test_split(asked):
  found = asked[0]
  choose = {item['id']: item for item in found['raw']['lm_eval.own_choose']}
  assert set(choose) == {f'train/{i}' for i in range(24) if i != 1}
  item = choose['train/3']
  assert (item['context'], item['answer'], item['gold']) == ('3 and 7 is', ' 10', 0)
  assert item['choices'] == [' 10', ' int 3', ' int'] and item['starts'] == [0]
  assert [item['answer'] for item in found['raw']['lm_eval.own_blank']][3] == ' int'
  assert found['raw']['lm_eval.own_blank'][3]['context_options'] == ['3 is', '7 is']
  assert found['modelling'] == ['lm_eval.own_whole']
  assert found['raw']['lm_eval.own_whole'][0]['answer'].startswith('list is not 0; ')
  answers = {f'{i} {2 * i + 1} {choose[f"train/{i}"]["answer"].strip()}; ' for i in range(24) if i != 1}
  assert len(found['shown']) > 15  # of a task with shots of its training split, and of one with shots of its test split
  for context, starts, answer, id in found['shown']:
    number = int(id.removeprefix('train/'))
    assert context.startswith('Sums:\n') and len(starts) == 3 and starts[0] == 0
    parts = [context[len('Sums:\n') : starts[1]], context[starts[1] : starts[2]]]
    assert set(parts) <= answers and len(set(parts)) == 2 and f'{number} {2 * number + 1}{answer}; ' not in parts
    assert context[starts[2] :] == f'{number} {2 * number + 1}'
  first, second = found['digests']
  assert first.startswith('lm_eval.own_choose: content ') and second.startswith('lm_eval.own_choose.test: content ')
  assert first.split()[-1] != second.split()[-1]
  assert found['guarded'][3] == '4 and 9 is  none 4'


@pytest.mark.peers
def test_what_a_task_lacks_is_one_line(asked):
  refused = asked[0]['refused']
  assert refused['own_write'] == (
    'lm_eval:own_write: the task has no training or validation split, only test; name one'
  )
  assert "has no task 'own_none'; put a YAML file" in refused['own_none']
  assert refused['own_choose:test'] == 'lm_eval.own_choose.test'
  assert refused['mmlu'] == 'lm_eval:mmlu: mmlu is a group of lm-evaluation-harness; name one of its tasks'
  assert 'asks for the likelihood of whole documents; make it a target' in refused['own_whole']
  assert not any('\n' in text for text in refused.values())


def test_tasks_are_named_in_settings():
  c = base.get_config()
  c.targets.tasks = ('lm_eval:arc_easy', 'lm_eval:arc_easy:validation', 'docs')
  c.evaluation.tasks = ('targets', 'lm_eval:piqa')
  validate(c)
  assert [values.task_name(task) for task in c.targets.tasks] == [
    'lm_eval.arc_easy',
    'lm_eval.arc_easy.validation',
    'docs',
  ]
  assert values.guarded(('evaluated',), c.evaluation.tasks) == ('lm_eval:piqa',)
  for wrong in ('lm_eval:', 'lm_eval:a:dev', 'lm_eval:a b'):
    c.targets.tasks = (wrong,)
    with pytest.raises(UserError, match='lm_eval:TASK'):
      validate(c)


def test_a_missing_package_is_one_line(workdir):
  for keys in ('targets', 'evaluation'):
    said = runs.refused(runs.TINY, f'--workdir={workdir}', f"--config.{keys}.tasks=('lm_eval:arc_easy',)")
    assert 'lm_eval:arc_easy needs lm-evaluation-harness, which is not installed (' in said and 'pip' in said
  with pytest.raises(UserError, match='pip install lm_eval'):
    harness.read('lm_eval:arc_easy')
  with pytest.raises(UserError, match='pip install lm_eval'):
    importlib.import_module('dsdm_jax.evaluation.lm_eval')
