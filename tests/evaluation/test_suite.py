"""Prompts, delimiters, shots and truncation as token sequences, against cases worked by hand.

The vocabulary is bytes: a character of these texts is a token, its code plus three.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import base
from dsdm_jax.data.pool.vocabulary import EOS, ByteEncoder
from dsdm_jax.data.targets import benchmarks, tasks
from dsdm_jax.data.targets import targets as targets_lib
from dsdm_jax.data.targets.shapes import Item
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import results, suite
from dsdm_jax.evaluation.comparisons import Options
from dsdm_jax.evaluation.suite import Sequences


def text_of(ids: np.ndarray) -> str:
  return ''.join('|' if i == EOS else chr(i - 3) for i in ids)


def _build(name: str, items: list[Item], length: int = 200, begin: bool = True) -> suite.Request:
  return suite.build(benchmarks.BENCHMARKS[name], items, Sequences(ByteEncoder(), length, begin), 4, seed=0)


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
  assert request.describe()['chance'] == 0.25, 'every item has another answer'


def test_multiple_choice():
  item = Item('0', 'Q: up?', 'no', choices=('yes', 'no'), gold=1)
  request = _build('boolq', [item, dataclasses.replace(item, context='Q: down?')])
  shot = 'Q: down?\nAnswer: no\n'
  assert [text_of(ids) for ids in request.ids_P[:2]] == [f'|{shot}Q: up?\nAnswer: yes', f'|{shot}Q: up?\nAnswer: no']
  assert request.item_P.tolist() == [0, 0, 1, 1]
  assert request.gold_I.tolist() == [1, 3]
  assert request.characters_P.tolist() == [3, 2, 3, 2]
  assert request.count_P.tolist() == [4, 3, 4, 3]
  assert request.describe()['chance'] == 0.5


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
  ('delimiter', 'answer', 'prompt'),
  [
    (' ', 'leek', 'Who?'),
    ('\n', 'leek', 'Who?\n'),
    ('\nAnswer:\n ', 'leek', 'Who?\nAnswer:\n'),
    (' ', '\n\n1. leek\n', 'Who?\n\n'),
  ],
)
def test_a_line_break_before_a_generated_answer_is_in_the_prompt(tmp_path, delimiter, answer, prompt):
  """A generated answer ends at a line break, so a model that had to generate this one would never be right."""
  path = tmp_path / 'g.jsonl'
  path.write_text(json.dumps({'context': 'Who?', 'answer': answer, 'aliases': ['Leek']}) + '\n')
  benchmark = benchmarks.of_file(str(path), delimiter=delimiter)
  for length in (50, 1 + len(prompt) + 15, len(prompt) + 15):  # the last one is too short for all of the prompt
    request = suite.build(benchmark, benchmarks.read_items(benchmark), Sequences(ByteEncoder(), length), 15, seed=0)
    fits = length > len(prompt) + 15
    assert [text_of(ids) for ids in request.prompts_I] == [f'|{prompt if fits else prompt[1:]}']
    assert request.tokens_cut_I == (0 if fits else 1,)
  assert text_of(request.ids_P[0]).endswith(answer.strip('\n') + '\n' * answer.endswith('\n'))


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
  ids, answer_tokens = Sequences(ByteEncoder(), 8, begin).pair(context, answer)
  assert (text_of(ids), answer_tokens) == (expected, count)


@given(
  st.text('abc ', max_size=20).map(str.rstrip),
  st.text('xyz', min_size=1, max_size=20),
  st.integers(2, 24),
  st.booleans(),
)
def test_truncation_keeps_the_end(context, answer, length, begin):
  ids, count = Sequences(ByteEncoder(), length, begin).pair(context, answer)
  assert count + 1 <= len(ids) <= length, 'something comes before the answer'
  text = text_of(ids)
  assert text[-count:] == answer[-count:] and count == min(len(answer), length - 1)
  assert (context + answer).endswith(text.removeprefix('|')) or count < len(answer)
  if begin:
    assert text[0] == '|'


def _mine(tmp_path, shape: str, count: int = 20, words: int = 40, choices: int = 2) -> str:
  """A file with contexts of `words` words."""
  text = lambda i: f'Number {i * 7919}: ' + ' '.join(f'w{i}x{j}' for j in range(words))  # noqa: E731
  extra = {
    'multiple_choice': lambda i: {
      'query': text(i),
      'choices': [f'a{i}', f'bc{i}'] + ['d' * 9] * (choices - 2),
      'gold': i % 2,
    },
    'schema': lambda i: {'context_options': [f'{text(i)} a', f'{text(i)} b'], 'continuation': f'c{i}', 'gold': i % 2},
    'mixed white space': lambda i: {
      'context_options': [f'{text(i)} a', f'{text(i)} b\n', f'{text(i)} c '],
      'continuation': f'c{i}',
      'gold': i % 3,
    },
    'generation': lambda i: {'context': text(i), 'answer': f'a{i}', 'aliases': [f'b{i}']},
    'language_modelling': lambda i: {'context': text(i), 'answer': f'a{i}'},
  }
  path = tmp_path / 'mine.jsonl'
  path.write_text(''.join(json.dumps(extra[shape](i)) + '\n' for i in range(count)))
  return str(path)


SHAPES = ('multiple_choice', 'schema', 'generation', 'language_modelling')


@pytest.mark.parametrize('shape', SHAPES)
def test_a_prompt_that_does_not_fit_loses_whole_shots_from_the_left(tmp_path, shape: str):
  benchmark = benchmarks.of_file(_mine(tmp_path, shape, words=3), shots=5)
  items = benchmarks.read_items(benchmark)
  whole = suite.build(benchmark, items, Sequences(ByteEncoder(), 10_000), 4, 0)
  assert set(whole.shots_I) == {5} and not any(whole.dropped_I) and not any(whole.tokens_cut_I)
  for length in range(50, 250, 7):
    request = suite.build(benchmark, items, Sequences(ByteEncoder(), length), 4, 0)
    assert {a + b for a, b in zip(request.shots_I, request.dropped_I, strict=True)} == {5}
    of_item = [np.flatnonzero(request.item_P == i) for i in range(len(items))]
    for i, pairs in enumerate(of_item):
      full = [text_of(whole.ids_P[p]).removeprefix('|') for p in pairs]
      used = [text_of(request.ids_P[p]).removeprefix('|') for p in pairs]
      assert all(len(x.split('\n')) == request.shots_I[i] + 1 for x in used), 'whole shots, the same for each pair'
      assert all(x.endswith(y) for x, y in zip(full, used, strict=True))
      room = 4 if shape == 'generation' else 0
      spare = length - 1 - max(len(x) + max(0, room - request.count_P[p]) for x, p in zip(used, pairs, strict=True))
      if request.tokens_cut_I[i]:
        assert request.shots_I[i] == 0
      elif request.dropped_I[i]:  # one more would not have fitted
        assert spare < max(
          len('\n'.join(x.split('\n')[-request.shots_I[i] - 2 :])) - len(y) for x, y in zip(full, used, strict=True)
        )


def test_what_does_not_fit_is_counted_shown_and_refused(tmp_path):
  """Contexts of 290 characters at 128 tokens: no shot fits, and the beginning of each question is cut."""
  benchmark = benchmarks.of_file(_mine(tmp_path, 'multiple_choice'), shots=3)
  items = benchmarks.read_items(benchmark)
  request = suite.build(benchmark, items, Sequences(ByteEncoder(), 128), 4, 0)
  fact = request.describe()
  excess = [1 + len(f'{item.context} bc{i}') - 128 for i, item in enumerate(items)]
  assert fact['prompts'] == {
    'shots': {'0': 20},
    'lost_shots': 20,
    'contexts_cut': 20,
    'tokens_cut': sum(excess),
    'most_tokens_cut': max(excess),
    'shortened': 20,
  }
  assert fact['answers_cut'] == 0
  runs = [{'method': 'random', 'target_mix': 'any', 'seed': s} for s in range(3)]
  values = {f'{m}__mine__benchmark': np.random.default_rng(0).random((3, 20)) for m in ('logprob', 'accuracy')}
  found = results.results(results.Items(values, tasks=[fact]), runs, Options())
  printed = results.text_tables(found)
  assert printed.startswith('Most prompts of mine (20 of 20) are longer than pool.length: they lose shots or the')
  assert f'20 (by {np.mean(excess):.0f} tokens on average, at most {max(excess)})' in printed and '20 with 0' in printed
  with pytest.raises(
    UserError, match=rf'mine \(benchmark\), line 1: .* {excess[0]} tokens too long for pool.length 128'
  ):
    suite.build(benchmark, items, Sequences(ByteEncoder(), 128), 4, 0, 'refuse')
  # A third of the prompts: in the table, and not in the headline.
  some = [dataclasses.replace(item, context=item.context[:20]) if i % 3 else item for i, item in enumerate(items)]
  fact = suite.build(benchmark, some, Sequences(ByteEncoder(), 800), 4, 0).describe()
  assert 0 < fact['prompts']['lost_shots'] <= 10 and not results.shortened({'tasks': [fact]})


@pytest.mark.parametrize('shape', [*SHAPES, 'mixed white space'])
def test_a_target_is_asked_as_its_file_would_be_as_a_benchmark(tmp_path, shape: str):
  """The same pairs, rule and counts; a target's shots are of its split, and there are none here."""
  path = _mine(tmp_path, shape, words=12, choices=3)
  built, _ = targets_lib.build(_targets('', path), ByteEncoder(), 90)
  benchmark = benchmarks.of_file(path)
  items = {item.id: item for item in benchmarks.read_items(benchmark)}
  for (_, split), examples in built.items():
    sequences = Sequences(ByteEncoder(), 90)
    request = suite.of_target('mine', split, examples, sequences, base.get_config())
    if shape == 'language_modelling':
      assert request is None
      continue
    asked = [items[record['id']] for record in examples.records]
    wanted = suite.build(benchmark, asked, sequences, 16, 0)
    assert request.key == ('mine', split) and request.describe()['rule'] == wanted.benchmark.scoring
    for name in ('ids_P', 'prompts_I'):
      assert [x.tolist() for x in getattr(request, name)] == [x.tolist() for x in getattr(wanted, name)]
    for name in ('count_P', 'item_P', 'gold_I', 'characters_P'):
      assert getattr(request, name).tolist() == getattr(wanted, name).tolist()
    for name in ('aliases_I', 'item_ids_I', 'shots_I', 'tokens_cut_I', 'cut'):
      assert getattr(request, name) == getattr(wanted, name)
    assert sum(request.tokens_cut_I) > 0


def test_a_target_file_with_the_name_of_a_benchmark_is_not_that_benchmark(tmp_path):
  config = base.get_config()
  path = tmp_path / 'jeopardy.jsonl'
  path.write_bytes(Path(_mine(tmp_path, 'multiple_choice')).read_bytes())
  config.targets.tasks, config.targets.file_shots, config.targets.file_delimiter = (str(path),), 1, '\n'
  built, _ = targets_lib.build(config.targets, ByteEncoder(), 256)
  sequences = Sequences(ByteEncoder(), 256)
  for (task, split), examples in built.items():
    facts = suite.of_target(task, split, examples, sequences, config).describe()
    assert (facts['shots'], facts['delimiter'], facts['group'], facts['categories']) == (1, '\n', '', [])
    assert not suite.of_target(task, split, examples, sequences, config).benchmark.per_category


def test_a_benchmark_leaves_out_the_target_split(tmp_path):
  """Of a target of the same name, and of the same questions in another file; or it is refused before the run."""
  path = _mine(tmp_path, 'multiple_choice', count=60)
  other = tmp_path / 'other.jsonl'
  lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
  new = {'query': 'A new question?', 'choices': ['a', 'b'], 'gold': 0}
  other.write_text(''.join(json.dumps(line | {'query': line['query'].upper()}) + '\n' for line in [*lines, new, new]))
  config = _targets('', path)
  (task,) = tasks.read_tasks(config)
  side = tasks.split_documents([task], config.holdout_share, config.seed)
  holdout = {item.id for item in task.items if side[item.document] == 'holdout'}
  for file, extra in ((path, set()), (str(other), {'line 61', 'line 62'})):
    suite.check(_config(file), config, _pool(256))
    (request,) = suite.read(_config(file), config, Sequences(ByteEncoder(), 256))
    assert set(request.item_ids_I) == holdout | extra
    assert request.describe()['left_out'] == 60 - len(holdout) > 0
  suite.check(_config('targets', str(other)), config, _pool(256))
  with pytest.raises(UserError, match=r"evaluates the holdout of 'mine', and the benchmark of that name; remove"):
    suite.check(_config('targets', path), config, _pool(256))
  target = [line for i, line in enumerate(lines, 1) if f'line {i}' not in holdout]
  other.write_text(''.join(json.dumps(line) + '\n' for line in target))
  with pytest.raises(UserError, match=f'other: {len(target)} items are in the target split .* leaves 0'):
    suite.check(_config(str(other)), config, _pool(256))


def test_generated_targets_need_room(tmp_path):
  with pytest.raises(UserError, match='generate_tokens = 16 must be less than pool.length = 16'):
    suite.check(_config('targets'), _targets('', _mine(tmp_path, 'generation')), _pool(16))


def test_a_benchmark_takes_two_items_and_conversations_a_template(tmp_path):
  path, talk = tmp_path / 'mine.jsonl', tmp_path / 'talk.jsonl'
  path.write_text('{"context": "a", "answer": "b"}\n')
  with pytest.raises(UserError, match='mine: it has 1 to evaluate, and it takes two'):
    suite.check(_config(str(path)), _targets(), _pool(32))
  messages = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  talk.write_text((json.dumps({'messages': messages}) + '\n') * 2)
  tokenizer = tmp_path / 'model/tokenizer.json'
  tokenizer.parent.mkdir()
  for vocabulary in ('bytes', str(tokenizer)):
    with pytest.raises(UserError, match='evaluation.tasks: talk: a conversation needs a chat template'):
      suite.check(_config(str(talk)), _targets(), _pool(32, vocabulary))
    with pytest.raises(UserError, match=r'targets.tasks: .*talk.jsonl: a conversation needs a chat template'):
      tasks.check_files(_targets('', str(talk)), vocabulary)
  tokenizer.with_name('chat_template.jinja').write_text('{{ messages }}')
  suite.check(_config(str(talk)), _targets(), _pool(32, str(tokenizer)))
  tasks.check_files(_targets('', str(talk)), str(tokenizer))


def test_cut_answers_are_counted():
  request = _build('lambada', [Item('0', 'a', 'b' * 20), Item('1', 'a', 'b')], length=10)
  assert request.cut == 1


def _targets(folder: str = '', *tasks: str):
  config = base.get_config().targets
  config.folder = folder
  config.tasks = tasks or config.tasks
  return config


def _pool(length: int, vocabulary: str = 'bytes'):
  config = base.get_config().pool
  config.length, config.vocabulary = length, vocabulary
  return config


def _config(*tasks: str):
  config = base.get_config().evaluation
  config.tasks = tasks
  return config


def test_selected_benchmarks(tmp_path):
  mine = tmp_path / 'mine.jsonl'
  mine.write_text((json.dumps({'query': 'q', 'choices': ['a', 'b'], 'gold': 1}) + '\n') * 2)
  selected = suite.selected_benchmarks(_config('targets', 'piqa', str(mine)))
  shapes = [(b.name, b.shape, b.shots) for b in selected]
  assert shapes == [('piqa', 'multiple_choice', 10), ('mine', 'multiple_choice', 0)]
  suite.check(_config('targets', str(mine)), _targets(), _pool(32))
  (tmp_path / 'asked.jsonl').write_text('{"context": "q", "answer": "a", "aliases": []}\n')
  with pytest.raises(UserError, match='generate_tokens = 16 must be less than pool.length = 16'):
    suite.check(_config(str(tmp_path / 'asked.jsonl')), _targets(), _pool(16))
  for task, words in (('piqua', 'is it piqa?'), (str(tmp_path / 'none.jsonl'), 'No such file')):
    with pytest.raises(UserError, match=words):
      suite.check(_config(task), _targets(), _pool(32))
  with pytest.raises(UserError, match=r'piqa\.jsonl'):
    suite.check(_config('piqa'), _targets(str(tmp_path)), _pool(32))
