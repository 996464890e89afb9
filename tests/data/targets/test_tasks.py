"""Tasks as text: prompts, files of the user's, and a split that no document straddles."""

import json
from collections.abc import Callable

import pytest

from configs.base import get_config
from dsdm_jax.data.targets import tasks
from dsdm_jax.data.targets.tasks import RawItem, RawTask, read_jsonl, read_tasks, split_documents
from dsdm_jax.errors import UserError


def test_prompts_by_hand():
  config = get_config().targets
  result = {task.name: {item.id: item for item in task.items} for task in read_tasks(config)}
  assert result['api_qa']['textwrap.shorten'] == RawItem(
    'textwrap.shorten',
    'Module: textwrap\nFunction: shorten(text, width, **kwargs)\nQuestion: What does it do?\nAnswer:',
    'Collapse and truncate the given text to fit in the given width.',
    'textwrap',
  )
  assert result['api_qa']['textwrap.TextWrapper'].context == (
    'Module: textwrap\nClass: TextWrapper\nQuestion: What is it?\nAnswer:'
  )
  assert result['docs']['textwrap.TextWrapper'].context == ''
  assert result['docs']['textwrap.TextWrapper'].document == 'textwrap'
  first = result['cs_algorithms']['000000']
  assert first.context.endswith('\nQuestion: How long is their longest common subsequence?\nAnswer:')
  assert len(result['cs_algorithms']) == tasks.GENERATED


def test_jsonl(write_jsonl: Callable[[str], str]):
  # U+2028 and U+0085 are no ends of lines, and blank lines are nothing.
  lines = [
    json.dumps({'context': 'a\u2028b', 'continuation': 'c\x85d'}, ensure_ascii=False),
    '',
    json.dumps({'context': '', 'answer': 'x', 'document': 'book', 'other': [1]}),
  ]
  path = write_jsonl('\n'.join(lines) + '\r\n')
  task = read_jsonl(path)
  assert task.name == 'mine'
  assert task.items == (
    RawItem('line 1', 'a\u2028b', 'c\x85d', 'mine/line 1', question='ab'),
    RawItem('line 3', '', 'x', 'book', question='\nx'),
  )


@pytest.mark.parametrize(
  ('line', 'expected'),
  [
    ('{"context": "a", "answer"', r'not JSON'),
    ('[1, 2]', r'must be a JSON object, not list'),
    ('{"context": "a"}', r'"continuation" is missing'),
    ('{"answer": "a"}', r'"context" is missing'),
    ('{"context": 3, "answer": "a"}', r'"context" must be a string'),
    ('{"context": "a", "answer": " "}', r'"answer" is empty'),
  ],
)
def test_broken_line_is_named(write_jsonl: Callable[[str], str], line: str, expected: str):
  good = '{"context": "a", "answer": "b"}\n'
  path = write_jsonl(good + good + line + '\n' + good)
  with pytest.raises(UserError, match=rf'mine\.jsonl, line 3: {expected}') as caught:
    read_jsonl(path)
  assert '\n' not in str(caught.value)


def test_file_that_is_no_text_or_empty_or_missing(write_jsonl: Callable[[str], str], tmp_path):
  (tmp_path / 'latin.jsonl').write_bytes(b'{"context": "caf\xe9", "answer": "b"}\n')
  with pytest.raises(UserError, match=r'latin\.jsonl, line 1: not UTF-8'):
    read_jsonl(str(tmp_path / 'latin.jsonl'))
  with pytest.raises(UserError, match='has no items'):
    read_jsonl(write_jsonl('\n\n'))
  with pytest.raises(UserError, match=r'gone\.jsonl: cannot be read \(No such file'):
    read_jsonl(str(tmp_path / 'gone.jsonl'))


def test_unknown_and_double_tasks(write_jsonl: Callable[[str], str]):
  config = get_config().targets
  config.tasks = ('poems',)
  with pytest.raises(UserError, match=r"targets\.tasks has 'poems'"):
    read_tasks(config)
  path = write_jsonl('{"context": "a", "answer": "b"}\n')
  config.tasks = (path, path)
  with pytest.raises(UserError, match="two tasks named 'mine'"):
    read_tasks(config)


def test_benchmark_files(shared_data):
  for name, items in (('lambada_openai', 5_153), ('bigbench_cs_algorithms', 1_320), ('jeopardy_all', 2_117)):
    assert len(read_jsonl(str(shared_data / 'benchmarks' / f'{name}.jsonl')).items) == items


def test_split_keeps_documents_and_their_copies_together():
  shared = 'this paragraph of eight words stands in both'
  items = [RawItem(f'{i}', '', f'text number {i}', f'd{i}') for i in range(400)]
  first = RawTask('one', tuple(items))
  pairs = [RawItem(f'p{i}', '', f'{shared} {i}\n\nmore', f'd{i}') for i in range(100)]
  copies = [RawItem(f'q{i}', 'asks', f'{shared} {i}', f'd{i + 100}') for i in range(100)]
  side = split_documents([first, RawTask('two', tuple(pairs + copies))], 0.25, seed=0)
  assert len(side) == 400
  for i in range(100):
    assert side[f'd{i}'] == side[f'd{i + 100}']
  # 300 groups: five standard deviations of a binomial.
  holdout = sum(side[f'd{i}'] == 'holdout' for i in range(100, 400))
  assert abs(holdout - 75) < 5 * (300 * 0.25 * 0.75) ** 0.5
  # Other documents do not move a document to the other side.
  assert split_documents([first], 0.25, seed=0)['d399'] == side['d399']
  assert split_documents([first], 0.25, seed=1) != split_documents([first], 0.25, seed=0)


def test_built_in_tasks_share_no_long_answer_between_the_sides():
  config = get_config().targets
  result = read_tasks(config)
  side = split_documents(result, config.holdout_share, config.seed)
  paragraphs = {'target': set(), 'holdout': set()}
  for task in result:
    for item in task.items:
      for paragraph in item.answer.split('\n\n'):
        if len(key := tasks.words(paragraph)) >= 8:
          paragraphs[side[item.document]].add(tuple(key))
  assert paragraphs['target']
  assert not paragraphs['target'] & paragraphs['holdout']
  count = {s: sum(v == s for k, v in side.items() if not k.startswith('cs_')) for s in tasks.SPLITS}
  assert min(count.values()) > 100


def test_raw_texts_hold_answers_and_no_signatures():
  texts = tasks.raw_texts(get_config().targets)
  of = {task: [t.text for t in texts if t.task == task] for task in tasks.BUILT_IN}
  assert any('Collapse and truncate the given text' in t for t in of['api_qa'])
  assert not any('Module: ' in t for t in of['api_qa'])
  assert any(t.startswith('Strings: ') and t[-1].isdigit() for t in of['cs_algorithms'])
