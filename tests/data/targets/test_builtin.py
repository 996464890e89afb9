"""The tasks that need no download: documentation read from source text, and generated questions with right answers."""

import collections
import itertools
import re
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.data.targets import builtin
from dsdm_jax.data.targets.builtin import (
  brackets_valid,
  first_sentence,
  generate_questions,
  longest_common_subsequence,
  read_module,
  read_topics,
  without_licences,
)

PROSE = 'Words that describe what this module is for and how it is used. ' * 4

MODULE = f'''"""{PROSE}"""
import does_not_exist

class Box(dict, metaclass=Meta):
  """A box for things that are small."""

  def put(self, thing, *, where: int = 0, **rest) -> None:
    """Put a thing into the box.  Then close it."""

  def _hidden(self):
    """Nobody should ask about this one."""

try:
  from _fast import shake
except ImportError:
  def shake(box, /, times=3):
    """Shake the box, i.e. make its contents move about

    more text
    """

def shake(box):
  """A second definition that does not count."""

def undocumented(): pass

async def wait(seconds: float):
  """Wait for so many seconds."""
'''


def test_read_module_by_hand():
  prose, entries = read_module('pkg.mod', MODULE)
  assert [(p.document, p.id) for p in prose] == [('pkg.mod', 'pkg.mod')]
  assert prose[0].text == PROSE.strip()
  assert [(e.kind, e.signature, e.summary) for e in entries] == [
    ('Class', 'Box(dict)', 'A box for things that are small.'),
    ('Method', 'Box.put(self, thing, *, where: int=0, **rest)', 'Put a thing into the box.'),
    ('Function', 'shake(box, /, times=3)', 'Shake the box, i.e. make its contents move about'),
    ('Function', 'wait(seconds: float)', 'Wait for so many seconds.'),
  ]
  assert entries[1].id == 'pkg.mod.Box.put'


@pytest.mark.parametrize(
  ('docstring', 'sentence'),
  [
    ('Return the whole name. And more.', 'Return the whole name.'),
    ('Return the name e.g. of a file. And more.', 'Return the name e.g. of a file.'),
    ('Return the value 3.5 or another\n   one.', 'Return the value 3.5 or another one.'),
    ('No full stop here\n\nSecond paragraph.', 'No full stop here'),
    ('Too short.', ''),
    ('shorten(text) -> str', ''),
    ('lower case begins this sentence.', ''),
    ('Word ' * 41, ''),
    ('List of things: - one - two - three.', ''),
  ],
)
def test_first_sentence(docstring: str, sentence: str):
  assert first_sentence(docstring) == sentence


def test_licence_paragraphs_are_left_out():
  text = (
    'First.\n\nCopyright (c) 1999 Somebody.\nAll rights reserved.\n\n  Indented.  \n\nPermission to use this.\n\nLast.'
  )
  assert without_licences(text) == 'First.\n\n  Indented.\n\nLast.'


def test_topics():
  source = f'# generated\ntopics = {{"b": "{PROSE}", "a": "{PROSE}", "short": "x"}}\n'
  assert [(p.document, p.text) for p in read_topics(source)] == [
    ('topics/a', PROSE.strip()),
    ('topics/b', PROSE.strip()),
  ]
  assert read_topics('x = 1') == []


def test_read_a_library(tmp_path: Path):
  files = {
    'b.py': MODULE,
    'a/__init__.py': '"""Short."""',
    'a/c.py': MODULE,
    'a/_private.py': MODULE,
    'test/t.py': MODULE,
    'site-packages/p.py': MODULE,
    'broken.py': 'def (',
    'pydoc_data/topics.py': f'topics = {{"t": "{PROSE}"}}',
  }
  for name, source in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(source)
  (tmp_path / 'latin.py').write_bytes(b'"""caf\xe9"""')
  prose, entries = builtin.documentation(str(tmp_path))
  assert [p.document for p in prose] == ['topics/t', 'a.c', 'b']
  assert [e.module for e in entries] == ['a.c'] * 4 + ['b'] * 4


def test_this_library():
  prose, entries = builtin.documentation()
  by_id = {e.id: e for e in entries}
  assert by_id['textwrap.shorten'].signature == 'shorten(text, width, **kwargs)'
  assert by_id['textwrap.shorten'].summary == first_sentence(textwrap.shorten.__doc__)
  assert len(entries) > 2_000
  assert len({p.document for p in prose}) > 100


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
  [(text, True) for text in ('', '()', '([]{})')] + [(text, False) for text in ('(', ')(', '([)]', '())', '[}')],
)
def test_brackets_valid(sequence: str, valid: bool):
  assert brackets_valid(sequence) == valid


@given(st.text('()[]{}', max_size=10))
def test_brackets_valid_agrees_with_rewriting(sequence: str):
  rest = sequence
  while rest != (shorter := re.sub(r'\(\)|\[\]|\{\}', '', rest)):
    rest = shorter
  assert brackets_valid(sequence) == (rest == '')


def test_passages_are_code_alone():
  code = [f'value_{i} = compute_{i}({i})' for i in range(8)]
  prose = ['"""Words that look like', *[f'code_{i} = in_a_string_of_several_lines({i})' for i in range(14)], '"""']
  comment = [*code[:7], '# a comment']
  (found,) = builtin.read_passages('a.b', '\n'.join([*comment, *prose, *code, 'end']))
  assert (found.module, found.id) == ('a.b', 'a.b:25')
  assert found.text == '\n'.join(code[:5]) + '\n'
  assert found.after == '\n'.join(code[5:])
  assert builtin.read_passages('a', '\n'.join(['x = 1'] * 40)) == [], 'too short'


def test_brackets_have_a_partner_far_before_them_and_not_in_a_string():
  code = ['found = compute(first_of_all, second_of_all)', "text = '[ a bracket in a string ' + other[index]"]
  code += ['more = {name: value for name, value in pairs}', 'last = 1']
  [found] = builtin.read_brackets('a.b', '\n'.join(code))
  assert (found.module, found.id, found.closing) == ('a.b', 'a.b:1:138', '}')
  assert found.text + '}\nlast = 1' == '\n'.join(code) and found.text[found.opened] == '{'
  assert builtin.read_brackets('a', '\n'.join([*code[:2], '# ' + code[2], 'last = 1'])) == [], 'a comment'
  closed_before = ['    a_long_name_of_something,' + 'and_more, ' * 3, '    another_one] + (third_name']
  assert builtin.read_brackets('a', '\n'.join([*closed_before, '    + fourth_name_of_all)', 'x'])) != []
  assert builtin.read_brackets('a', '\n'.join(['value = (1)'] * 40)) == [], 'too near'


def test_the_other_passage_differs_in_the_partner_alone():
  brackets = builtin.brackets()
  assert len(brackets) > 1_000
  gold = 0
  for bracket, (texts, place) in zip(brackets, builtin.partners(brackets, 3), strict=True):
    own, other = texts[place], texts[1 - place]
    assert own == bracket.text and bracket.closing in ')]}'
    assert [i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b] == [bracket.opened]
    assert {own[bracket.opened], other[bracket.opened]} <= set('([{')
    gold += place
  # Four standard errors of the share of one of two places.
  assert abs(gold / len(brackets) - 0.5) < 4 * 0.5 / len(brackets) ** 0.5


def test_items_are_right_balanced_and_different():
  items = generate_questions(400, seed=3)
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
  assert answers == {'Valid': 100, 'Invalid': 100} | {str(n): 40 for n in builtin.LCS_ANSWERS}
  # Four standard errors of the difference of two means over 100 draws from the five lengths (deviation 2.8).
  difference = sum(lengths['Valid']) / 100 - sum(lengths['Invalid']) / 100
  assert abs(difference) < 4 * 2.83 * (2 / 100) ** 0.5


def test_seeded_and_longer_lists_begin_with_shorter_ones():
  assert generate_questions(30, seed=1) == generate_questions(60, seed=1)[:30]
  assert generate_questions(30, seed=1) != generate_questions(30, seed=2)
