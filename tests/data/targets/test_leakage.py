"""The leakage guard finds copies of target text, and nothing else."""

import gzip
import inspect
import json
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
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


def leak_of(guard: Guard, document: Document) -> leakage.Span | None:
  """The first passage, if any; the document lies among others."""
  leak = guard.leaks([Document('x', 'docs', 'no'), document, document]).get(1)
  return leak.spans[0] if leak else None


def test_words_are_case_folded_runs_of_word_characters():
  assert leakage.words('Straße, *foo_bar*: x=1\n(Ünder)') == ['strasse', 'foo_bar', 'x', '1', 'ünder']


def test_n_words_in_a_row_are_a_copy_and_fewer_are_not():
  guard = Guard([TargetText('t', SENTENCE)], 12)
  eleven = ' '.join(SENTENCE.split()[:11])
  assert leak_of(guard, document(f'before {eleven} after')) is None
  leak = leak_of(guard, document(f'before {" ".join(SENTENCE.split()[1:])} after'))
  assert (leak.task, leak.in_document, leak.in_target) == ('t', (7, 7 + len(SENTENCE) - 4), (4, len(SENTENCE)))
  assert leak.words == ' '.join(SENTENCE.split()[1:])


def test_layout_punctuation_and_case_hide_nothing():
  guard = Guard([TargetText('t', SENTENCE)], 12)
  disguised = '# ' + ',\n    # '.join(SENTENCE.upper().split())
  assert leak_of(guard, document(disguised)) is not None


ZH = '长江是中国最长的河流，全长约六千三百公里，发源于青藏高原的唐古拉山脉，最后在哪一座城市附近流入东海？'
JA = '東京都の人口は約千四百万人で、日本の都道府県の中で最も多く、カタカナのデータベースで調べることができます。'
TH = 'ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอนหรือวรรณยุกต์เช่นเดียวกับภาษาจีนและออกเสียงแยกคำต่อคำ'
KO = '한국의 수도 서울은 한강을 끼고 있으며 인구는 약 구백만 명으로 우리나라에서 가장 많은 사람이 사는 도시이다'
FR = 'Le garçon a été très étonné de découvrir où le vieux maître avait caché les clés dorées'
HI = 'हिन्दी विश्व की एक प्रमुख भाषा है और यह भारत के अनेक राज्यों में बोली तथा लिखी जाती है'


def wide(text: str) -> str:
  return ''.join(chr(ord(c) + 0xFEE0) if '!' <= c <= '~' else c for c in text)


def strewn(text: str, mark: str) -> str:
  return ''.join(c + mark if i % 3 == 1 else c for i, c in enumerate(text))


@pytest.mark.parametrize(
  ('target', 'copy'),
  [
    (ZH, f'前言：这里是网页的导航栏{ZH}以上内容转载自网络论坛'),
    (ZH, ZH[10:38]),
    (ZH, '\r\n'.join(ZH)),
    (ZH, ZH.replace('，', ' ')),
    (JA, JA.replace('データベース', 'ﾃﾞｰﾀﾍﾞｰｽ')),
    (JA, unicodedata.normalize('NFD', JA)),
    (TH, 'ก่อนหน้า' + TH[5:80]),
    (TH, strewn(TH, '\u200b')),
    (KO, KO),
    (KO, unicodedata.normalize('NFD', KO)),
    (FR, unicodedata.normalize('NFD', FR).upper()),
    (unicodedata.normalize('NFD', FR), FR),
    (FR, strewn(FR, '\u00ad')),
    (HI, f'{HI}।'),
    (SENTENCE, wide(SENTENCE)),
    (SENTENCE, SENTENCE.replace(' ', '\r\n')),
    (SENTENCE, strewn(SENTENCE, '\u2060')),
    ('the ﬁrst ofﬁce of Straße Größe №5 ends', 'THE FIRST OFFICE OF STRASSE GRÖSSE NO5 ENDS'),
    (f'{ZH[:8]} open the {ZH[8:14]} file again', f'{ZH[:8]} Open the {ZH[8:14]} FILE again'),
    ('长江在上海市附近注入东海', '长江在上海市附近注入东海'),
    ('Кто написал роман о мастере и его кошке', 'КТО НАПИСАЛ РОМАН О МАСТЕРЕ И ЕГО КОШКЕ'),
  ],
)  # fmt: skip
def test_copies_in_any_script_and_form_are_found_with_their_place(target: str, copy: str):
  guard = Guard([TargetText('t', f'« {target}', 'i7'), TargetText('t', 'nothing of the kind is in here at all')], 12)
  text = f'Ünrelated… words\u00ad ﬁrst; {copy} — and after'
  leak = leak_of(guard, document(text))
  assert (leak.task, leak.item) == ('t', 'i7')
  place, there = text[slice(*leak.in_document)], f'« {target}'[slice(*leak.in_target)]
  assert leakage.words(place) == leakage.words(there)
  assert len(leakage.words(place)) >= 6 and text.find(place) >= text.find('; ')
  assert leak_of(guard, document(f'Ünrelated {target[: len(target) // 4]} and after')) is None


def test_a_short_passage_in_dense_scripts_is_no_copy():
  guard = Guard([TargetText('t', ZH), TargetText('t', TH)], 12)
  assert leak_of(guard, document('x' + ZH.replace('，', '')[:23] + 'x')) is None
  assert leak_of(guard, document('x' + ZH.replace('，', '')[:24] + 'x')) is not None
  assert leak_of(guard, document(f'ท {TH[:30]} ท')) is None


def test_passages_are_listed_with_their_number():
  other = ' '.join(reversed(SENTENCE.split()))
  guard = Guard([TargetText('t', SENTENCE, 'a'), TargetText('t', other, 'b')], 12)
  text = ' and then '.join([SENTENCE, other] * 6)
  leak = guard.leaks([document(text)])[0]
  assert (leak.count, len(leak.spans), leak.short, leak.whole) == (12, 8, False, True)
  assert [span.item for span in leak.spans] == ['a', 'b'] * 4
  assert [text[slice(*span.in_document)] for span in leak.spans] == [SENTENCE, other] * 4
  record = leak.record()
  assert record['passages'] == 12 and len(record['more']) == 7 and json.dumps(record)


def test_phrases_of_many_documents_are_common():
  document, run = np.array([0, 0, 1, 2, 3, 4]), np.array([7, 8, 7, 7, 9, 7])
  assert leakage.common_phrases(document, run, 3).tolist() == [1, 2, 4]  # document 0 has also 8
  assert leakage.common_phrases(document, run, 4).tolist() == leakage.common_phrases(document, run, 0).tolist() == []


@given(
  texts=st.lists(
    st.text(st.sampled_from('aB1 長江ท่าé\u0301\u00ad\u200bﬁß가\u1100\u1161…\r\n_'), max_size=30), max_size=6
  )
)
def test_batches_and_places_do_not_change_units(texts: list[str]):
  """All texts together have the units of each; a unit's place in a text holds this unit."""
  together = leakage._Units(texts)
  for i, text in enumerate(texts):
    alone = leakage.words(text)
    assert together.ids[together.bounds[i] : together.bounds[i + 1]].tolist() == leakage._Units([text]).ids.tolist()
    assert leakage._Units([leakage.fold(text)]).ids.tolist() == leakage._Units(alone).ids.tolist()
    start, end = leakage._places(text)
    assert len(start) == len(alone)
    for word, i, j in zip(alone, start.tolist(), end.tolist(), strict=True):
      assert leakage.fold(word) in leakage.fold(text[i:j])


def test_long_words_and_texts_are_hashed_in_blocks():
  word = 'x' * 50_000
  texts = [f'{word} {SENTENCE} ' * 3, SENTENCE, word]
  ids, bounds = (units := leakage._Units(texts)).ids, units.bounds
  assert ids[1:14].tolist() == ids[bounds[1] : bounds[2]].tolist() and ids[0] == ids[14] == ids[-1]
  assert len(set(ids.tolist())) == 14


def test_short_target_texts_count_whole_from_six_words_on():
  guard = Guard(
    [TargetText('six', 'return the name of that file'), TargetText('five', 'close this open network socket')], 12
  )
  assert leak_of(guard, document('They return the name of that file quickly')).task == 'six'
  assert leak_of(guard, document('return the name of that')) is None
  assert leak_of(guard, document('close this open network socket')) is None


def test_an_empty_guard_finds_nothing():
  assert leak_of(Guard([], 12), document(SENTENCE)) is None
  assert leak_of(Guard([TargetText('t', 'too short')], 12), document(SENTENCE)) is None
  assert leak_of(Guard([TargetText('t', SENTENCE)], 12), document('')) is None


def test_boilerplate_of_licences_drops_nothing():
  licence = 'permission is hereby granted free of charge to any person who obtains a copy of this'
  targets = [TargetText('t', f'{SENTENCE} {licence}')]
  documents = [document(f'{licence} {i}', 'licences', i) for i in range(3)] + [document(f'mine: {licence}')]
  guard = Guard(targets, 12, documents[:3])
  assert [leak_of(guard, d) for d in documents] == [None] * 4
  assert guard.boilerplate_runs == len(licence.split()) - 11
  # A single licence file with target text is a leak like any other.
  documents = [document(SENTENCE, 'licences'), document(SENTENCE)]
  guard = Guard(targets, 12, documents[:1])
  assert [leak.id for leak in guard.leaks(documents).values()] == ['licences/0', 'docs/0']


@given(data=st.data())
def test_agrees_with_a_search_for_words(data: st.DataObject):
  word = st.sampled_from('a b c d'.split())
  target, text = (data.draw(st.lists(word, max_size=40)) for _ in range(2))
  n = data.draw(st.integers(2, 6))
  runs = {tuple(target[i : i + n]) for i in range(len(target) - n + 1)}
  expected = any(tuple(text[i : i + n]) in runs for i in range(len(text) - n + 1))
  result = leak_of(Guard([TargetText('t', ' '.join(target))], n), document(' '.join(text)))
  assert (result is not None) == expected
  if result:
    passage = result.words.split()
    assert {tuple(passage[i : i + n]) for i in range(len(passage) - n + 1)} <= runs
    assert ' '.join(text)[slice(*result.in_document)] == ' '.join(target)[slice(*result.in_target)] == result.words


def test_a_piece_of_the_standard_library_is_a_leak():
  texts = tasks.raw_texts(get_config().targets)
  copied = inspect.getsource(textwrap)[:6_000]
  own = 'def area(width, height):\n  """Square metres of a room."""\n  return width * height\n'
  guard = Guard(texts, 12)
  assert leak_of(guard, document(copied)).task in ('docs', 'api_qa')
  assert leak_of(guard, document(own)) is None


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
  assert [leak for novel in novels if (leak := leak_of(guard, novel))] == []
  passage = leakage.words(texts[17].text)
  for length, result in ((len(passage), True), (12, True), (11, False)):
    halves = novels[5].text[:3_000], novels[5].text[3_000:]
    planted = document('\n\n'.join((halves[0], ' '.join(passage[-length:]).upper(), halves[1])), 'fiction')
    leak = leak_of(guard, planted)
    assert (leak is not None) == result
    assert leak is None or (leak.task == 'lambada' and leakage.words(leak.words)[:12] == passage[-length:][:12])


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
    assert leak_of(again, document(text)) == leak_of(guard, document(text))
