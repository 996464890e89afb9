"""Prompts, delimiters, shots and truncation as token sequences, against cases worked by hand.

The vocabulary is bytes: a character of these texts is a token, its code plus three.
"""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from dsdm_jax.data.pool.vocabulary import EOS
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.data.targets.shapes import Item
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import suite
from dsdm_jax.evaluation.suite import Sequences


def encode(text: str) -> list[int]:
  return [byte + 3 for byte in text.encode()]


def text_of(ids: np.ndarray) -> str:
  return ''.join('|' if i == EOS else chr(i - 3) for i in ids)


def _build(name: str, items: list[Item], length: int = 200, begin: bool = True) -> suite.Request:
  return suite.build(benchmarks.BENCHMARKS[name], items, Sequences(encode, length, EOS, begin), 4, seed=0)


def test_language_modelling():
  request = _build('lambada', [Item('0', 'He saw the ', 'cat')])
  assert [text_of(ids) for ids in request.ids_P] == ['|He saw the cat']
  assert request.count_P.tolist() == [4], 'the space between them belongs to the answer'


def test_shots_are_joined_by_newlines_and_are_never_the_item():
  items = [Item(str(i), f'q{i}', f'a{i}', category='x') for i in range(4)]
  request = _build('jeopardy', items)
  for index, ids in enumerate(request.ids_P):
    *shots, last = text_of(ids).removeprefix('|').replace('\nAnswer', ';Answer').split('\n')
    assert last == f'q{index};Answer: a{index}'
    assert sorted(shots) == [f'q{i};Answer: a{i}' for i in range(4) if i != index]
    assert request.count_P[index] == len(' a0')
  assert request.category_I == ('x',) * 4


def test_multiple_choice():
  item = Item('0', 'Q: up?', 'no', choices=('yes', 'no'), gold=1)
  request = _build('boolq', [item, dataclasses.replace(item, context='Q: down?')])
  shot = 'Q: down?\nAnswer: no\n'
  assert [text_of(ids) for ids in request.ids_P[:2]] == [f'|{shot}Q: up?\nAnswer: yes', f'|{shot}Q: up?\nAnswer: no']
  assert request.item_P.tolist() == [0, 0, 1, 1]
  assert request.gold_I.tolist() == [1, 3]
  assert request.characters_P.tolist() == [3, 2, 3, 2]
  assert request.count_P.tolist() == [4, 3, 4, 3]


def test_schema_has_one_answer_after_several_contexts():
  item = Item('0', '', 'is big.', context_options=('The cup', 'The trophy'), gold=1)
  request = _build('winograd', [item])
  assert [text_of(ids) for ids in request.ids_P] == ['|The cup is big.', '|The trophy is big.']
  assert request.count_P.tolist() == [8, 8]
  assert request.gold_I.tolist() == [1]


def test_generation_leaves_room_for_the_answer():
  item = Item('0', 'abcdefgh\nAnswer:', 'leek', aliases=('leek', 'a leek'))
  request = _build('trivia_qa', [item], length=12)
  assert [text_of(ids) for ids in request.prompts_I] == ['|Answer:']
  assert len(request.prompts_I[0]) + 4 == 12
  assert request.aliases_I == (('leek', 'a leek'),)
  assert [text_of(ids) for ids in request.ids_P] == ['|nswer: leek']


@pytest.mark.parametrize(
  ('begin', 'context', 'answer', 'expected', 'count'),
  [
    (True, 'abcdef', ' xy', '|cdef xy', 3),
    (False, 'abcdef', ' xy', 'bcdef xy', 3),
    (True, 'ab', ' xy', '|ab xy', 3),
    (True, 'ab', '0123456', '|0123456', 7),
    (True, 'ab', '0123456789', '|3456789', 7),
    (False, 'ab', '0123456789', 'b3456789', 7),
    (False, '', ' xy', '| xy', 3),
  ],
)
def test_left_truncation_to_eight_tokens(begin, context, answer, expected, count):
  ids, answer_tokens = Sequences(encode, 8, EOS, begin).pair(context, answer)
  assert (text_of(ids), answer_tokens) == (expected, count)


@given(st.text('abc ', max_size=20), st.text('xyz', min_size=1, max_size=20), st.integers(2, 24), st.booleans())
def test_truncation_keeps_the_end(context, answer, length, begin):
  ids, count = Sequences(encode, length, EOS, begin).pair(context, answer)
  assert count + 1 <= len(ids) <= length, 'something comes before the answer'
  text = text_of(ids)
  assert text[-count:] == answer[-count:] and count == min(len(answer), length - 1)
  assert (context + answer).endswith(text.removeprefix('|')) or count < len(answer)
  if begin:
    assert text[0] == '|'


def test_cut_answers_are_counted():
  request = _build('lambada', [Item('0', 'a', 'b' * 20), Item('1', 'a', 'b')], length=10)
  assert request.cut == 1


def _targets(folder: str = '', *tasks: str):
  config = base.get_config().targets
  config.folder = folder
  config.tasks = tasks or config.tasks
  return config


def _config(*tasks: str):
  config = base.get_config().evaluation
  config.tasks = tasks
  return config


def test_selected_benchmarks(tmp_path):
  mine = tmp_path / 'mine.jsonl'
  mine.write_text(json.dumps({'query': 'q', 'choices': ['a', 'b'], 'gold': 1}) + '\n')
  selected = suite.selected_benchmarks(_config('targets', 'piqa', str(mine)))
  shapes = [(b.name, b.shape, b.shots) for b in selected]
  assert shapes == [('piqa', 'multiple_choice', 10), ('mine', 'multiple_choice', 0)]
  suite.check(_config('targets', str(mine)), _targets(), 32)
  (tmp_path / 'asked.jsonl').write_text('{"context": "q", "answer": "a", "aliases": []}\n')
  with pytest.raises(UserError, match='generate_tokens = 16 must be less than pool.length = 16'):
    suite.check(_config(str(tmp_path / 'asked.jsonl')), _targets(), 16)
  for task, words in (('piqua', 'is it piqa?'), (str(tmp_path / 'none.jsonl'), 'No such file')):
    with pytest.raises(UserError, match=words):
      suite.check(_config(task), _targets(), 32)
  with pytest.raises(UserError, match=r'piqa\.jsonl'):
    suite.check(_config('piqa'), _targets(str(tmp_path)), 32)
