"""Scoring rules against cases worked by hand."""

import numpy as np
import pytest

from dsdm_jax.evaluation import scoring
from dsdm_jax.evaluation.scoring import Answers


def _answers(total, count, greedy=None) -> Answers:
  return Answers(np.array(total, np.float32), np.zeros(len(total), bool) if greedy is None else greedy, np.array(count))


def test_multiple_choice_hand_worked():
  """One item of three choices on which the three rules differ, and one that all get right.

  Choices: −4 over 1 token and 2 characters, −5 over 4 tokens and 5, −9 over 6 tokens and 20: per token −4, −1.25, −1.5,
  per character −2, −1, −0.45. So the mean chooses the second, the sum the first, characters the third.
  """
  answers = _answers([-4, -5, -9, -1, -8], [1, 4, 6, 1, 1])
  item_P, characters_P = np.array([0, 0, 0, 1, 1]), np.array([2, 5, 20, 3, 3])
  for gold, right in enumerate(('acc', 'accuracy', 'acc_norm')):
    found = scoring.lowest_cross_entropy(answers, item_P, np.array([gold, 3]), characters_P)
    assert {name for name in ('accuracy', 'acc', 'acc_norm') if found[name][0] == 1} == {right}
    assert all(found[name][1] == 1 for name in ('accuracy', 'acc', 'acc_norm'))
    assert found['logprob'].tolist() == [(-4, -1.25, -1.5)[gold], -1]


def test_first_of_equal_choices_is_chosen():
  answers = _answers([-2, -2, -2, -2], [1, 1, 1, 1])
  found = scoring.lowest_cross_entropy(answers, np.array([0, 0, 1, 1]), np.array([0, 3]), np.ones(4))
  assert found['accuracy'].tolist() == found['acc'].tolist() == [1, 0]


def test_language_modelling_hand_worked():
  found = scoring.exact_argmax(_answers([-3, -0.5], [2, 1], np.array([False, True])))
  assert found['logprob'].tolist() == [-1.5, -0.5]
  assert found['accuracy'].tolist() == [0, 1]


@pytest.mark.parametrize(
  ('text', 'plain'),
  [
    ('The Beatles!', 'beatles'),
    ('  an  "apple"\n a day', 'apple day'),
    ('U.S.A.', 'u s'),
    ('snake_case', 'snake case'),
    ('theory', 'theory'),
    ('...', ''),
    ('Ångström’s', 'ångström s'),
  ],
)
def test_normalized(text, plain):
  assert scoring.normalized(text) == plain


def test_generation_is_right_where_the_output_begins_with_an_alias():
  outputs = ['The Onion, I think', 'I think onion', 'onion', '', 'red onions']
  aliases = [['Onions', 'onion'], ['onion'], ['!', 'leek'], ['...'], ['Red Onion']]
  assert scoring.alias_prefix(outputs, aliases).tolist() == [1, 0, 0, 0, 1]


def test_aliases_that_the_normal_form_leaves_nothing_of_are_compared_as_they_are():
  outputs = [' A', 'a) because', 'Apple', '% of it', '', 'the', '%', 'an onion', '%5']
  aliases = [['A'], ['A'], ['A'], ['%', 'A'], ['A'], ['The'], ['+'], ['A', 'onion'], ['%']]
  assert scoring.alias_prefix(outputs, aliases).tolist() == [1, 1, 0, 1, 0, 1, 0, 1, 1]
