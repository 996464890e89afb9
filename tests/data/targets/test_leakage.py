"""The leakage guard finds copies of target text, and nothing else."""

import gzip
import inspect
import json
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.base import get_config
from dsdm_jax.data.pool.sources import Document
from dsdm_jax.data.targets import leakage, tasks
from dsdm_jax.data.targets.leakage import Guard, TargetText

SENTENCE = 'one two three four five six seven eight nine ten eleven twelve thirteen'


def document(text: str, source: str = 'docs', number: int = 0) -> Document:
  return Document(f'{source}/{number}', source, text)


def test_words_are_case_folded_runs_of_word_characters():
  assert leakage.words('Straße, *foo_bar*: x=1\n(Ünder)') == ['strasse', 'foo_bar', 'x', '1', 'ünder']


def test_n_words_in_a_row_are_a_copy_and_fewer_are_not():
  guard = Guard([TargetText('t', SENTENCE)], 12)
  eleven = ' '.join(SENTENCE.split()[:11])
  assert guard.leak(document(f'before {eleven} after')) is None
  leak = guard.leak(document(f'before {" ".join(SENTENCE.split()[1:])} after'))
  assert (leak.id, leak.task) == ('docs/0', 't')
  assert leak.words == ' '.join(SENTENCE.split()[1:])


def test_layout_punctuation_and_case_hide_nothing():
  guard = Guard([TargetText('t', SENTENCE)], 12)
  disguised = '# ' + ',\n    # '.join(SENTENCE.upper().split())
  assert guard.leak(document(disguised)) is not None


def test_short_target_texts_count_whole_from_six_words_on():
  guard = Guard(
    [TargetText('six', 'return the name of that file'), TargetText('five', 'close this open network socket')], 12
  )
  assert guard.leak(document('They return the name of that file quickly')).task == 'six'
  assert guard.leak(document('return the name of that')) is None
  assert guard.leak(document('close this open network socket')) is None


def test_an_empty_guard_finds_nothing():
  assert Guard([], 12).leak(document(SENTENCE)) is None
  assert Guard([TargetText('t', 'too short')], 12).leak(document(SENTENCE)) is None
  assert Guard([TargetText('t', SENTENCE)], 12).leak(document('')) is None


def test_boilerplate_of_licences_drops_nothing():
  licence = 'permission is hereby granted free of charge to any person who obtains a copy of this'
  targets = [TargetText('t', f'{SENTENCE} {licence}')]
  documents = [document(f'{licence} {i}', 'licences', i) for i in range(3)] + [document(f'mine: {licence}')]
  guard = Guard(targets, 12, documents[:3])
  assert [guard.leak(d) for d in documents] == [None] * 4
  assert guard.boilerplate_runs == len(licence.split()) - 11
  # A single licence file with target text is a leak like any other.
  documents = [document(SENTENCE, 'licences'), document(SENTENCE)]
  guard = Guard(targets, 12, documents[:1])
  assert [guard.leak(d).id for d in documents] == ['licences/0', 'docs/0']


@given(data=st.data())
def test_agrees_with_a_search_for_words(data: st.DataObject):
  word = st.sampled_from('a b c d'.split())
  target, text = (data.draw(st.lists(word, max_size=40)) for _ in range(2))
  n = data.draw(st.integers(2, 6))
  runs = {tuple(target[i : i + n]) for i in range(len(target) - n + 1)}
  expected = any(tuple(text[i : i + n]) in runs for i in range(len(text) - n + 1))
  result = Guard([TargetText('t', ' '.join(target))], n).leak(document(' '.join(text)))
  assert (result is not None) == expected
  assert result is None or tuple(result.words.split()) in runs


def test_a_piece_of_the_standard_library_is_a_leak():
  texts = tasks.raw_texts(get_config().targets)
  copied = inspect.getsource(textwrap)[:6_000]
  own = 'def area(width, height):\n  """Square metres of a room."""\n  return width * height\n'
  guard = Guard(texts, 12)
  assert guard.leak(document(copied)).task in ('docs', 'api_qa')
  assert guard.leak(document(own)) is None


def test_n_must_be_at_least_two():
  with pytest.raises(ValueError, match='at least 2'):
    Guard([], 1)


def test_lambada_against_fiction(shared_data: Path):
  """Novels hold no LAMBADA passage of twelve words; one that was put into them is found, and a part of one too."""
  folder = shared_data / 'benchmarks'
  texts = tasks.benchmark_texts(('lambada',), str(folder))
  guard = Guard(texts, 12)
  novels = []
  with gzip.open(shared_data / 'pool' / 'mixed_text-00000-of-00008.jsonl.gz', 'rb') as file:
    for record in map(json.loads, file):
      if record['source'] == 'fiction':
        novels.append(document(record['text'], 'fiction', len(novels)))
  assert len(novels) > 300
  assert [leak for novel in novels if (leak := guard.leak(novel))] == []
  passage = leakage.words(texts[17].text)
  for length, result in ((len(passage), True), (12, True), (11, False)):
    halves = novels[5].text[:3_000], novels[5].text[3_000:]
    planted = document('\n\n'.join((halves[0], ' '.join(passage[-length:]).upper(), halves[1])), 'fiction')
    leak = guard.leak(planted)
    assert (leak is not None) == result
    assert leak is None or (leak.task == 'lambada' and leak.words in ' '.join(passage))


def test_benchmark_texts_are_without_the_words_of_the_prompt(tmp_path: Path):
  record = {'context': 'Question: Who wrote it?\nAnswer:', 'answer': 'Ada', 'aliases': []}
  (tmp_path / 'mine.jsonl').write_text(json.dumps(record))
  [text] = tasks.benchmark_texts((str(tmp_path / 'mine.jsonl'),), '')
  assert (text.task, leakage.words(text.text)) == ('mine', ['who', 'wrote', 'it', 'ada'])


def test_a_guard_in_another_process_is_the_same(tmp_path: Path):
  guard = Guard([TargetText('a', SENTENCE), TargetText('b', 'return the name of that file')], 12)
  guard.save(tmp_path / 'guard.npz')
  again = Guard.load(tmp_path / 'guard.npz')
  for text in (SENTENCE, f'x {SENTENCE}', 'They return the name of that file', 'nothing'):
    assert again.leak(document(text)) == guard.leak(document(text))
