"""Tasks as text: prompts, files of the user's, and a split that no document straddles."""

import collections
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    ' Collapse and truncate the given text to fit in the given width.',
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
    RawItem('line 1', 'a\u2028b', ' c\x85d', 'mine/line 1', question='ab'),
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


def _sides(path: str, seed: int = 0, share: float = 0.5) -> tuple[list[str], int]:
  """The side of each line of a file, in order, and the number of groups."""
  task = read_jsonl(path)
  side = split_documents([task], share, seed)
  return [side[item.document] for item in task.items], len(set(tasks.group_documents([task]).values()))


def _passages(passages: int, questions: int, form: str) -> list[dict]:
  return [
    {'context': form.format(p=p, q=q), 'answer': f'fact {p}-{q}'} for p in range(passages) for q in range(questions)
  ]


@pytest.mark.parametrize(
  'form',
  [
    'Context: Passage number {p} tells a long story about the town of T{p}.\nQuestion: What about point {q}?\nAnswer:',
    'Read the text. Passage number {p} tells a long story about T{p}. Now tell me what it says of point {q}.',
    '第{p}個村莊的故事很長,講述了第{p}條河流和住在那裡的人們。\n問題:第{q}點說的是什麼?',
  ],
)
@pytest.mark.parametrize('passages', [4, 40])
def test_items_about_one_passage_are_on_one_side_without_documents(write_jsonl, form: str, passages: int):
  path = write_jsonl('\n'.join(map(json.dumps, _passages(passages, 5, form))))
  sides, groups = _sides(path)
  assert groups == passages
  assert all(len(set(sides[5 * p : 5 * p + 5])) == 1 for p in range(passages))


def test_a_short_passage_of_a_dense_script_is_one(write_jsonl):
  """Fourteen characters of Chinese say what seven English words do."""
  g = np.random.default_rng(0)
  text = lambda count: ''.join(map(chr, g.integers(0x4E00, 0x5E00, count)))  # noqa: E731
  passages = [text(14) for _ in range(20)]
  records = [{'context': f'{passage}\n{text(7)}？', 'answer': text(3)} for passage in passages for _ in range(3)]
  sides, groups = _sides(write_jsonl('\n'.join(map(json.dumps, records))))
  assert groups == 20 and all(len(set(sides[i : i + 3])) == 1 for i in range(0, 60, 3))
  records = [{'context': f'第{i}個數加上第{i * i}個數是多少？', 'answer': str(i + i * i)} for i in range(100)]
  assert _sides(write_jsonl('\n'.join(map(json.dumps, records))))[1] == 100


def test_other_questions_in_the_same_form_are_not_grouped(write_jsonl):
  """A template is no passage: arithmetic, long instructions, and the two forms of a generated task."""
  instruction = 'Read the following question carefully, think about it step by step, and answer with one number only.'
  for form in ('What is {i} plus {j}?', f'{instruction}\nWhat is {{i}} plus {{j}}?', f'Item {{i}}. {instruction * 9}'):
    records = [{'query': form.format(i=i, j=i * i), 'choices': ['yes', 'no'], 'gold': i % 2} for i in range(100)]
    assert _sides(write_jsonl('\n'.join(map(json.dumps, records))))[1] == 100
  forms = (
    'Strings: {} and {}\nQuestion: How long is their longest common subsequence?',
    'Brackets: {} {}\nAre they closed?',
  )
  records = [{'context': forms[i % 2].format(i * 7919, i * 104729), 'answer': str(i)} for i in range(100)]
  assert _sides(write_jsonl('\n'.join(map(json.dumps, records))))[1] == 100


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 6), min_size=3, max_size=12), st.integers(0, 4))
def test_splits_share_no_passage_and_no_question(tmp_path_factory, seed: int, questions: list[int], change: int):
  """Passages of random words, written in other ways: case and space, Unicode form, punctuation, one word, cut."""
  g = np.random.default_rng(seed)
  letters = list('abcdeéfghijklmnoöprstuvwz')
  text = lambda words: ' '.join(''.join(g.choice(letters, g.integers(2, 9))) for _ in range(words))  # noqa: E731
  changes = [
    lambda p: p.upper().replace(' ', '  \n'),
    lambda p: unicodedata.normalize('NFD', p),
    lambda p: f'“{p.replace(" ", ", ")}”!',
    lambda p: p.replace(p.split()[20], 'another'),
    lambda p: p[: len(p) * 2 // 3],
  ]
  records, owner = [], []
  for number, count in enumerate(questions):
    passage = text(60)
    for turn in range(count):
      records.append({'context': f'{changes[change](passage) if turn % 2 else passage}\n{text(6)}?', 'answer': text(2)})
      owner.append(number)
  again = int(g.integers(len(records)))
  records.append({'context': records[again]['context'].swapcase(), 'answer': text(2)})
  owner.append(owner[again])
  path = tmp_path_factory.mktemp('split') / 'mine.jsonl'
  path.write_text('\n'.join(map(json.dumps, records)))
  sides, groups = _sides(str(path), seed % 1000)
  assert groups == len(questions)
  assert all(len({side for side, o in zip(sides, owner, strict=True) if o == number}) == 1 for number in set(owner))


def test_equal_questions_of_two_tasks_are_on_one_side(tmp_path):
  """The same questions under another name, form and document; a document of the user's joins what text does not."""
  for name, changed in (('one', str), ('two', str.upper)):
    records = [
      {'context': changed(f'Who wrote book {i}?'), 'answer': 'A', 'document': f'{name} {i}'} for i in range(40)
    ]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, records)))
  result = [read_jsonl(str(tmp_path / f'{name}.jsonl')) for name in ('one', 'two')]
  side = split_documents(result, 0.5, 0)
  assert {side[f'one {i}'] == side[f'two {i}'] for i in range(40)} == {True}
  assert set(side.values()) == {'target', 'holdout'}


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


def test_next_lines_of_code_choose_between_passages():
  config = get_config().targets
  config.tasks = ('next_code',)
  (task,) = read_tasks(config)
  assert len(task.items) > 1_000
  gold = collections.Counter(item.gold for item in task.items)
  # Four standard errors of the share of one of four places.
  assert all(
    abs(count / len(task.items) - 0.25) < 4 * (0.25 * 0.75 / len(task.items)) ** 0.5 for count in gold.values()
  )
  for item in task.items:
    assert item.context_options[item.gold] == item.context and len(set(item.context_options)) == 4
    assert all(text.endswith('\n') for text in item.context_options)
  module_of = {item.context: item.document for item in task.items}
  wrong = [(item.document, module_of[text]) for item in task.items for text in item.context_options[:4]]
  assert sum(own == other for own, other in wrong) == pytest.approx(
    len(task.items), rel=0.02
  )  # equal texts of two modules
  config.seed = 1
  assert [item.context_options for item in read_tasks(config)[0].items] != [i.context_options for i in task.items]


def test_a_closing_bracket_chooses_between_passages():
  config = get_config().targets
  config.tasks = ('brackets',)
  (task,) = read_tasks(config)
  for item in task.items:
    assert item.context_options[item.gold] == item.context and len(set(item.context_options)) == 2
    assert item.answer in ')]}'
  config.seed = 1
  assert [item.context_options for item in read_tasks(config)[0].items] != [i.context_options for i in task.items]


@pytest.mark.parametrize('delimiter', ['', '\nAnswer: '])
def test_the_text_of_a_file_for_the_guard_needs_no_setting(tmp_path, delimiter: str):
  """Nor is a file one of the built-in tasks or a benchmark if it has their name."""
  config = get_config().targets
  config.file_delimiter, config.file_shots = delimiter, 1
  config.tasks = tuple(f'{tmp_path}/{name}.jsonl' for name in ('api_qa', 'docs', 'squad'))
  for path in config.tasks:
    Path(path).write_text(''.join(json.dumps({'context': f'why {i}', 'answer': f'so {i}'}) + '\n' for i in range(2)))
  wanted = [(name, f'why {i} so {i}') for name in ('api_qa', 'docs', 'squad') for i in range(2)]
  assert [(text.task, text.text) for text in tasks.raw_texts(config)] == wanted


def test_raw_texts_hold_answers_and_no_signatures():
  texts = tasks.raw_texts(get_config().targets)
  of = {task: [t.text for t in texts if t.task == task] for task in ('api_qa', 'cs_algorithms')}
  assert any('Collapse and truncate the given text' in t for t in of['api_qa'])
  assert not any('Module: ' in t for t in of['api_qa'])
  assert any(t.startswith('Strings: ') and t[-1].isdigit() for t in of['cs_algorithms'])
