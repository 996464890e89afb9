"""Generated questions have the right answers, balanced, and repeat with the seed."""

import collections
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.targets import cs_algorithms
from dsdm_jax.data.targets.cs_algorithms import brackets_valid, generate, longest_common_subsequence


def by_trying_all(first: str, second: str) -> int:
  subsequences = [
    {''.join(c) for n in range(len(text) + 1) for c in itertools.combinations(text, n)} for text in (first, second)
  ]
  return max(map(len, subsequences[0] & subsequences[1]))


@given(st.text('ABC', max_size=8), st.text('ABC', max_size=8))
def test_longest_common_subsequence(first: str, second: str):
  assert longest_common_subsequence(first, second) == by_trying_all(first, second)


@pytest.mark.parametrize(
  ('sequence', 'valid'),
  [
    ('', True),
    ('()', True),
    ('([]{})', True),
    ('(', False),
    (')(', False),
    ('([)]', False),
    ('())', False),
    ('[}', False),
  ],
)
def test_brackets_valid(sequence: str, valid: bool):
  assert brackets_valid(sequence) == valid


@given(st.text('()[]{}', max_size=10))
def test_brackets_valid_agrees_with_rewriting(sequence: str):
  rest = sequence
  while rest != (shorter := re.sub(r'\(\)|\[\]|\{\}', '', rest)):
    rest = shorter
  assert brackets_valid(sequence) == (rest == '')


def test_items_are_right_balanced_and_different():
  items = generate(400, seed=3)
  assert len({item.context for item in items}) == 400
  answers = collections.Counter()
  lengths = collections.defaultdict(list)
  for item in items:
    answers[item.answer] += 1
    if item.context.startswith('Strings'):
      first, second = re.match(r'Strings: (\w+) and (\w+)\n', item.context).groups()
      assert by_trying_all(first, second) == int(item.answer)
    else:
      sequence = item.context.split('\n')[0].removeprefix('Brackets: ').replace(' ', '')
      assert item.answer == ('Valid' if brackets_valid(sequence) else 'Invalid')
      lengths[item.answer].append(len(sequence))
  assert answers == {'Valid': 100, 'Invalid': 100} | {str(n): 40 for n in cs_algorithms.LCS_ANSWERS}
  # Four standard errors of the difference of two means over 100 draws from the five lengths (deviation 2.8).
  difference = sum(lengths['Valid']) / 100 - sum(lengths['Invalid']) / 100
  assert abs(difference) < 4 * 2.83 * (2 / 100) ** 0.5


def test_seeded_and_longer_lists_begin_with_shorter_ones():
  assert generate(30, seed=1) == generate(60, seed=1)[:30]
  assert generate(30, seed=1) != generate(30, seed=2)
