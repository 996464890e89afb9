"""Questions of a study: passages cut to what answers them, and answers to choose from."""

import json

import pytest

from dsdm_jax.study import __main__ as commands
from dsdm_jax.study import items

PASSAGE = 'A river rises in Peru. It is the Amazon. It flows east. Peru has other rivers too. They are short.'


@pytest.mark.parametrize(
  ('question', 'answer', 'words', 'kept'),
  [
    ('What rises in Peru?', 'Amazon', 4, 'It is the Amazon.'),
    ('What rises in Peru?', 'Amazon', 9, 'A river rises in Peru. It is the Amazon.'),
    ('What rises in Peru?', 'Amazon', 12, 'A river rises in Peru. It is the Amazon. It flows east.'),
    ('Which country has other rivers?', 'Peru', 5, 'Peru has other rivers too.'),
    ('Where?', 'Peru', 3, ''),
    ('Where?', 'Chile', 60, ''),
  ],
)
def test_the_sentences_around_an_answer_are_kept(question, answer, words, kept):
  assert items.near(PASSAGE, question, answer, words) == kept


def test_a_question_has_answers_of_its_category_and_form_to_choose_from(tmp_path, capsys):
  people = [{'context': f'Who {i}?', 'continuation': f'Name {chr(65 + i)}', 'category': 'people'} for i in range(6)]
  years = [{'context': f'When {i}?', 'continuation': str(1900 + i), 'category': 'people'} for i in range(5)]
  alone = [{'context': 'Where?', 'continuation': 'Peru', 'category': 'places'}]
  passages = [{'context': f'It was in {y}. Long ago.', 'question': 'When?', 'answers': [str(y)]} for y in range(10, 16)]
  several = [
    {'context': p['context'], 'answer': p['continuation'], 'aliases': [f'Alias {i}']} for i, p in enumerate(people)
  ]
  files = {
    'jeopardy_all': people + years + alone,
    'lambada_openai': people,
    'squad_xquad_en': passages,
    'triviaqa_sm_sub': several,
  }
  for name, records in files.items():
    (tmp_path / f'{name}.jsonl').write_text(''.join(f'{json.dumps(record)}\n' for record in records))
  flags = ['items', '--folder', str(tmp_path), '--out', str(tmp_path / 'out'), '--words']
  assert commands.main([*flags, '4']) == 0
  found = {f.stem: [*map(json.loads, f.read_text().splitlines())] for f in (tmp_path / 'out').iterdir()}
  assert sorted(map(len, found.values())) == [6, 6, 6, 11]
  for record in found['jeopardy_cloze']:
    choices, right = record['choices'], record['choices'][record['gold']]
    assert len(set(choices)) == 5 and {c[:4] == 'Name' for c in choices} == {record['query'][:3] == 'Who'}
    assert {'context': record['query'], 'continuation': right, 'category': 'people'} in people + years
  assert len({record['gold'] for record in found['jeopardy_cloze']}) > 1
  assert [r['choices'][r['gold']] for r in found['trivia_qa_cloze']] == [p['continuation'] for p in people]
  assert found['squad_cloze'][0]['query'] == 'Context: It was in 10.\nQuestion: When?\nAnswer:'
  assert len({record['document'] for record in found['squad_cloze']}) == 6
  assert commands.main(['items', '--folder', str(tmp_path / 'none'), '--out', str(tmp_path / 'other')]) == 2
  assert 'lambada_openai.jsonl' in capsys.readouterr().err
