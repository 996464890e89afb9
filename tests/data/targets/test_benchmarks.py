"""The table of benchmarks, records of every shape, prompts by hand, and TFDS datasets that are really written."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.base import get_config
from dsdm_jax.data import files, inputs
from dsdm_jax.data.targets import benchmarks, shapes, tasks, tfds_items
from dsdm_jax.data.targets.benchmarks import BENCHMARKS, TABLE, Prompt, of_file, prompt, read_items
from dsdm_jax.errors import UserError

PAPER = set(
  'copa openbook_qa piqa cbt hellaswag winogrande boolq coqa news_qa bb_copy_logic bb_dyck_languages bb_operators '
  'arc_easy bb_qa_wikidata trivia_qa'.split()
)
RECORDS = {
  'language_modelling': {'context': 'TOWNS: It has a bridge ', 'continuation': 'Bath', 'category': 'uk'},
  'multiple_choice': {'query': 'To mend a sock', 'choices': ['eat it', 'sew it'], 'gold': 1},
  'schema': {'context_options': ['The cup', 'The box'], 'continuation': 'is full.', 'gold': 0},
  'generation': {'context': 'Question: Who?\nAnswer:', 'answer': 'Ada', 'aliases': ['Lovelace', 'Ada']},
}


def write(path: Path, *records: dict) -> str:
  path.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records), encoding='utf-8')
  return str(path)


def test_the_papers_benchmarks_are_all_there():
  assert {b.name for b in TABLE if b.role == 'held_out'} == PAPER
  assert {b.name for b in TABLE if b.role == 'target'} == {'lambada', 'squad', 'jeopardy', 'bigbench_cs_algorithms'}
  assert len(BENCHMARKS) == len(TABLE)
  for benchmark in TABLE:
    assert benchmark.shape in shapes.SHAPES
    assert benchmark.scoring == benchmarks.SCORING[benchmark.shape]
    assert benchmark.source.endswith('.jsonl')
    assert not benchmark.tfds or benchmark.tfds.partition(':')[0] in tfds_items.READERS


@pytest.mark.parametrize(
  ('shape', 'wanted'),
  [
    ('language_modelling', Prompt(('TOWNS: It has a bridge\nAnswer:',), (' Bath',))),
    ('multiple_choice', Prompt(('To mend a sock\nAnswer:',) * 2, (' eat it', ' sew it'), 1)),
    ('schema', Prompt(('The cup\nAnswer:', 'The box\nAnswer:'), (' is full.',) * 2)),
    ('generation', Prompt(('Question: Who?\nAnswer:\nAnswer:',), (' Ada',))),
  ],
)
def test_shapes_and_prompts_by_hand(tmp_path: Path, shape: str, wanted: Prompt):
  benchmark = of_file(write(tmp_path / 'mine.jsonl', RECORDS[shape]), delimiter='\nAnswer: ')
  assert (benchmark.name, benchmark.shape) == ('mine', shape)
  items = read_items(benchmark)
  assert prompt(benchmark, items, 0) == wanted


CODE = {'context': 'def add(a, b):\n', 'answer': '    return a + b\n'}
LIST = {'context': 'Q: List two.\nA:', 'answer': '\n1. one\n2. two'}
CHINESE = {'context': '中国的首都是', 'answer': '北京'}


@pytest.mark.parametrize(
  ('record', 'delimiter', 'wanted'),
  [
    (CODE, ' ', 'def add(a, b):\n    return a + b\n'),
    (LIST, ' ', 'Q: List two.\nA:\n1. one\n2. two'),
    (LIST, '\nSo: ', 'Q: List two.\nA:\nSo:\n1. one\n2. two'),
    (CHINESE, ' ', '中国的首都是北京'),
    ({'context': 'Was ist 首', 'answer': 'das'}, ' ', 'Was ist 首 das'),
    ({'context': '日本の首都は?', 'answer': '東京'}, '', '日本の首都は?東京'),
    ({'context': 'The word is sub', 'answer': 'marine'}, '', 'The word is submarine'),
    ({'context': '', 'answer': 'Once'}, ' ', 'Once'),
    ({'context': 'a\t', 'answer': '\u3000b '}, '', 'a\t\u3000b '),
    ({'context': ' a', 'answer': 'b '}, '\n', ' a\nb'),
    ({'context': 'a ', 'answer': 'b'}, '\nSo: ', 'a\nSo: b'),
  ],
)
def test_text_is_the_files_where_it_has_white_space_of_its_own(
  tmp_path: Path, record: dict, delimiter: str, wanted: str
):
  """For targets, evaluation and shots alike."""
  other = {'context': f'x{record["context"]}', 'answer': record['answer'].rstrip() + 'y'}
  path = write(tmp_path / 'mine.jsonl', record, other)
  items = read_items(of_file(path))
  first, second = (p.contexts[0] + p.answers[0] for i in (0, 1) if (p := prompt(of_file(path, 0, delimiter), items, i)))
  assert first == wanted
  asked = prompt(of_file(path, 1, delimiter), items, 0)
  assert asked.contexts[0] + asked.answers[0] == f'{second}\n{wanted}'
  config = get_config().targets
  config.tasks, config.file_delimiter, config.file_shots = (path,), delimiter, 1
  [task] = tasks.read_tasks(config)
  assert [item.context + item.answer for item in task.items] == [wanted, second]
  shown = [item.context + item.answer for item in tasks.with_shots(task, task.items, 0)]
  assert shown == [f'{second}\n{wanted}', f'{wanted}\n{second}']


def test_aliases_categories_and_squad(tmp_path: Path):
  squad = {'id': 'x', 'context': 'It has 3 legs. ', 'question': ' How many legs?', 'answers': ['3', 'three']}
  path = write(tmp_path / 'mine.jsonl', squad, squad | {'question': 'Of what?', 'answers': ['legs']})
  first, second = read_items(of_file(path))
  assert first.context == 'Context: It has 3 legs.\nQuestion: How many legs?\nAnswer:'
  assert (first.continuation, first.document) == ('3', second.document)
  [item] = read_items(of_file(write(tmp_path / 'g.jsonl', RECORDS['generation'])))
  assert item.aliases == ('Ada', 'Lovelace')
  [item] = read_items(of_file(write(tmp_path / 'l.jsonl', RECORDS['language_modelling'])))
  assert (item.category, item.id) == ('uk', 'line 1')


def test_shots_are_others_of_the_file_and_joined_by_newlines(tmp_path: Path):
  records = [{'context': f'Question {i}?', 'continuation': f'{i}'} for i in range(5)]
  benchmark = of_file(write(tmp_path / 'mine.jsonl', *records), shots=3, delimiter='\nAnswer: ')
  items = read_items(benchmark)
  equal = benchmarks.alike(items)
  for index in range(5):
    shown = benchmarks.shots(benchmark, equal, index, seed=0)
    assert len(set(shown)) == 3 and index not in shown
    wanted = [f'Question {i}?\nAnswer: {i}' for i in shown] + [f'Question {index}?\nAnswer:']
    assert prompt(benchmark, items, index).contexts == ('\n'.join(wanted),)
  assert len({tuple(benchmarks.shots(benchmark, equal, 0, seed)) for seed in range(9)}) > 1
  seen = {i for seed in range(40) for i in benchmarks.shots(benchmark, equal, 2, seed)}
  assert seen == {0, 1, 3, 4}
  assert len(benchmarks.shots(benchmark, benchmarks.alike(items[:2]), 0, seed=0)) == 1


def test_a_targets_shots_are_of_its_own_split(tmp_path: Path):
  """Prompts of target examples contain no question or answer of the holdout, and vice versa."""
  records = [{'context': f'Question {i}?', 'continuation': f'answer{i}.', 'document': f'd{i}'} for i in range(40)]
  path = write(tmp_path / 'mine.jsonl', *records)
  task = tasks.benchmark_task(of_file(path, shots=3, delimiter='\nAnswer: '), None, 'mine')
  side = tasks.split_documents([task], 0.5, 0)
  by_split = {s: [item for item in task.items if side[item.document] == s] for s in tasks.SPLITS}
  assert all(len(items) > 10 for items in by_split.values())
  for split, items in by_split.items():
    shown = tasks.with_shots(task, items, 3)
    other = next(items_ for s, items_ in by_split.items() if s != split)
    for alone, item in zip(items, shown, strict=True):
      assert item.context.endswith(f'\n{alone.context}') and item.context.count('\nAnswer: answer') == 3
      assert alone.answer not in item.context
      assert not any(o.answer in item.context for o in other)
    assert shown == tasks.with_shots(task, items, 3) != tasks.with_shots(task, items, 4)
  assert tasks.with_shots(task, [], 0) == [] and len(tasks.with_shots(task, by_split['target'][:1], 0)) == 1


def _asked_twice(record: dict, other: dict) -> list[dict]:
  """Ten pairs of records in which {i} is the number of the pair."""
  fill = lambda x, i: {k: v.format(i=f'{i}é') if isinstance(v, str) else v for k, v in x.items()}  # noqa: E731
  return [fill(x, i) for i in range(10) for x in (record, other)]


@pytest.mark.parametrize(
  'records',
  [
    _asked_twice(
      {'context': 'What is {i} + 1?', 'answer': 'It is {i}'}, {'context': 'WHAT  is {i}+1', 'answer': 'x{i}'}
    ),
    _asked_twice(
      {'context': 'Who made {i}?', 'answer': 'Ada {i}'}, {'context': 'By whom is {i}?', 'answer': ' ada {i}.'}
    ),
    _asked_twice(
      {'context': 'Who is {i}?', 'answer': 'a', 'aliases': []}, {'context': 'Who is {i}?', 'answer': 'b', 'aliases': []}
    ),
    [
      {'query': f'{form} {i}?', 'choices': [f'town {i}', f'{form} other'], 'gold': 0}
      for i in range(10)
      for form in ('Where is', 'At what place is')
    ],
    [
      {'context_options': [f'{x}{i} is big', f'{y}{i} is big'], 'continuation': f'so {x}', 'gold': 0}
      for i in range(10)
      for x, y in (('cup', 'box'), ('box', 'cup'))
    ],
  ],
  ids=['question', 'answer', 'generation', 'choices', 'schema'],
)
def test_shots_are_never_equal_to_the_item_in_content(tmp_path: Path, records: list[dict]):
  """Neighbours of a pair ask the same or have the same answer; as benchmark, and as target."""
  path = write(tmp_path / 'mine.jsonl', *records)
  benchmark = of_file(path, shots=17)
  items = read_items(benchmark)
  equal = benchmarks.alike(items)
  seen = set()
  for seed in range(3):
    for index in range(20):
      shown = benchmarks.shots(benchmark, equal, index, seed)
      assert len(set(shown)) == 17 and not {index, index ^ 1} & set(shown)
      seen |= {(index, other) for other in shown}
  assert len(seen) == 20 * 18
  task = tasks.benchmark_task(benchmark, None, 'mine')
  for index, item in enumerate(tasks.with_shots(task, task.items, 0)):
    preamble = item.context[: item.starts[-1]]
    assert len(item.starts) == 18
    assert task.items[index].context not in preamble and task.items[index ^ 1].context not in preamble


def test_answers_that_are_labels_do_not_decide_about_shots(tmp_path: Path):
  """Yes or no, with choices and without: shots with both answers, or they would give the answer away."""
  for extra in ({'choices': ['yes', 'no']}, {}):
    records = [
      {'context': f'Is {i * 7919} a prime?', 'answer': 'yes' if i % 2 else 'no', 'gold': (i + 1) % 2, **extra}
      for i in range(20)
    ]
    items = read_items(of_file(write(tmp_path / 'mine.jsonl', *records)))
    assert all(sets == (frozenset([i]),) for i, sets in enumerate(benchmarks.alike(items)))


TALK = [{'role': 'user', 'content': 'Whom?'}, {'role': 'assistant', 'content': 'Ann'}]
MET = {'context': 'Bob met Ann.', 'question': 'Whom?'}


@pytest.mark.parametrize(
  ('record', 'prompt', 'answer'),
  [
    (MET | {'answer': 'Ann'}, 'Context: Bob met Ann.\nQuestion: Whom?\nAnswer:', 'Ann'),
    (MET | {'answer': 'Ann', 'aliases': ['Anna']}, 'Context: Bob met Ann.\nQuestion: Whom?\nAnswer:', 'Ann'),
    (MET | {'choices': ['Ann', 'Bob'], 'gold': 0}, 'Context: Bob met Ann.\nQuestion: Whom?\nAnswer:', 'Ann'),
    (MET | {'context': '', 'answer': 'Ann'}, 'Question: Whom?\nAnswer:', 'Ann'),
    ({'question': 'Whom?', 'answer': 'Ann'}, 'Question: Whom?\nAnswer:', 'Ann'),
    ({'question': 'Whom?', 'answers': ['Ann', 'Anna']}, 'Question: Whom?\nAnswer:', 'Ann'),
    (MET | {'context': 'Bob met Ann.\nQ: Whom?\nA:', 'answer': 'Ann'}, 'Bob met Ann.\nQ: Whom?\nA:', 'Ann'),
    (MET | {'question': None, 'answer': 'Ann'}, 'Bob met Ann.', 'Ann'),
    ({'query': 'Whom?', 'answer': 'Ann'}, 'Whom?', 'Ann'),
    ({'prompt': 'Whom?', 'choices': ['Ann', 'Bob'], 'gold': 0}, 'Whom?', 'Ann'),
    ({'context': 'Whom?', 'answer': 'Ann', 'continuation': 'Ann'}, 'Whom?', 'Ann'),
    ({'context': '', 'prompt': 'Whom?', 'answer': 'Ann'}, 'Whom?', 'Ann'),
    (
      {'context': 'Ann asked: Whom? Bob said.', 'question': 'Whom?', 'answer': 'Ann'},
      'Context: Ann asked: Whom? Bob said.\nQuestion: Whom?\nAnswer:',
      'Ann',
    ),
    (
      {'context': 'Bob asked: Whom?', 'question': 'Whom?', 'answers': ['Ann']},
      'Context: Bob asked: Whom?\nQuestion: Whom?\nAnswer:',
      'Ann',
    ),
    (MET | {'answers': ['Ann', 'A'], 'answer': 'A'}, 'Context: Bob met Ann.\nQuestion: Whom?\nAnswer:', 'A'),
    ({'query': 'Whom?', 'choices': ['Ann', 'Bob'], 'gold': 0, 'answer': 'Ann'}, 'Whom?', 'Ann'),
  ],
)
def test_a_question_is_in_the_prompt(tmp_path: Path, record: dict, prompt: str, answer: str):
  path = write(tmp_path / 'mine.jsonl', record, record | {'id': 2})
  first, second = read_items(of_file(path))
  assert (first.context, first.continuation) == (prompt, answer)
  of_passage = prompt.startswith('Context: ')
  assert (first.document == second.document) == of_passage, 'questions about one passage stay together'
  config = get_config().targets
  config.tasks = (path,)
  [task] = tasks.read_tasks(config)
  assert {prompt} == {item.context for item in task.items}


@pytest.mark.parametrize(
  ('record', 'expected'),
  [
    ({'context': 'P', 'query': 'Q', 'choices': ['a', 'b'], 'gold': 0}, '"query" and "context" are both there'),
    ({'context': 'P', 'prompt': 'Q', 'completion': 'A'}, '"context" and "prompt" are both there'),
    ({'context': 'P', 'answer': 'A', 'continuation': 'B'}, '"continuation" and "answer" are both there and differ'),
    ({'query': 'Q', 'context_options': ['a', 'b'], 'continuation': 'c', 'gold': 0}, '"query" is there beside'),
    ({'query': 'Q', 'choices': ['', 'b'], 'gold': 0}, '"choices" has an empty string'),
    ({'query': 'Q', 'choices': ['a', 'b'], 'gold': 0, 'answer': 'b'}, '"answer" is another choice than that of'),
    ({'context': 'P', 'answer': 'A', 'continuation': 'B', 'aliases': ['a']}, '"answer" and "continuation" are both'),
    (MET | {'answers': ['A', 'B'], 'answer': 'C'}, 'the answer is not one of "answers"'),
    ({'messages': TALK, 'question': 'Why?'}, '"question" is there beside "messages"'),
    ({'context': 'P', 'question': 'Q', 'answers': [' ']}, '"answers" has an empty string'),
    ({'context': 'P', 'answer': 'A', 'aliases': ['']}, '"aliases" has an empty string'),
    ({'context_options': ['a', '\n'], 'continuation': 'c', 'gold': 0}, '"context_options" has an empty string'),
    ({'context': None, 'answer': 'A'}, '"context" must be a string, not NoneType'),
  ],
)
def test_text_that_would_be_left_out_or_is_not_there_is_refused(tmp_path: Path, record: dict, expected: str):
  path = write(tmp_path / 'mine.jsonl', record)
  with pytest.raises(UserError) as caught:
    read_items(of_file(path))
  assert str(caught.value).startswith(f'{path}, line 1: {expected}')


def test_unicode_line_separators_stay_inside_a_record(tmp_path: Path):
  path = write(tmp_path / 'mine.jsonl', {'context': 'a\u2028b\x85c', 'continuation': 'd'})
  assert read_items(of_file(path))[0].context == 'a\u2028b\x85c'


@pytest.mark.parametrize(
  ('record', 'expected'),
  [
    ({'query': 'q', 'choices': ['a', 'b'], 'gold': 2}, '"gold" must be the index of the right answer, 0 to 1, not 2'),
    ({'query': 'q', 'choices': ['a'], 'gold': 0}, '"choices" must be a list of at least 2 strings'),
    ({'choices': ['a', 'b'], 'gold': 0}, '"query" is missing; the fields are choices, gold'),
    ({'query': 3, 'choices': ['a', 'b'], 'gold': 0}, '"query" must be a string, not int'),
  ],
)
def test_broken_records_are_named(tmp_path: Path, record: dict, expected: str):
  path = write(tmp_path / 'mine.jsonl', RECORDS['multiple_choice'], record)
  with pytest.raises(UserError) as caught:
    read_items(of_file(path))
  assert str(caught.value).startswith(f'{path}, line 2: {expected}')
  with pytest.raises(UserError, match='match no shape'):
    of_file(write(tmp_path / 'other.jsonl', {'text': 'a'}))


@pytest.mark.parametrize('document', [None, '', ' ', [], ['a'], {}, True])
@pytest.mark.parametrize('shape', ['language_modelling', 'squad'])
def test_a_document_that_is_no_name_is_refused_and_merges_nothing(document, shape, tmp_path: Path):
  records = {
    'language_modelling': {'context': 'One and', 'continuation': 'two'},
    'squad': {'context': 'It has legs.', 'question': 'What?', 'answers': ['legs']},
  }
  good = records[shape]
  with pytest.raises(
    UserError, match=r'x\.jsonl, line 1: "document" (is empty; leave it out|must be a string or a numb)'
  ):
    read_items(of_file(write(tmp_path / 'x.jsonl', good | {'document': document})))
  for name in (7, 0, 1.5, 'a'):
    [item] = read_items(of_file(write(tmp_path / 'n.jsonl', good | {'document': name, 'category': None})))
    assert (item.document, item.category) == (str(name), '')


def test_a_missing_file_names_other_places(tmp_path: Path):
  with pytest.raises(UserError, match=rf'benchmark cbt: {tmp_path} is not a file and has no cbt\.jsonl; put'):
    read_items(BENCHMARKS['cbt'], str(tmp_path))
  with pytest.raises(UserError, match="or prepare TFDS's piqa and use the path 'tfds'"):
    read_items(BENCHMARKS['piqa'], str(tmp_path))
  with pytest.raises(UserError, match='TFDS has no benchmark cbt'):
    read_items(BENCHMARKS['cbt'], 'tfds')
  with pytest.raises(UserError, match='piqa is not prepared in .*piqa.*download_and_prepare'):
    read_items(BENCHMARKS['piqa'], f'tfds:{tmp_path}')


@pytest.mark.parametrize('more', ['', 'elsewhere | '])
def test_a_file_in_place_of_the_folder_is_not_read_for_every_benchmark(tmp_path: Path, more: str):
  path = write(tmp_path / 'jeopardy_all.jsonl', RECORDS['language_modelling'])
  assert len(read_items(BENCHMARKS['jeopardy'], more + path)) == 1
  with pytest.raises(
    UserError, match=r'squad is looked for in .*jeopardy_all\.jsonl, which is a file and not a folder'
  ):
    read_items(BENCHMARKS['squad'], more + path)


def test_nan_is_no_name(tmp_path: Path):
  """pandas writes it where a cell is empty."""
  record = {'context': 'q', 'continuation': 'a', 'category': float('nan')}
  assert [item.category for item in tasks.read_jsonl(write(tmp_path / 'mine.jsonl', record)).items] == ['']
  with pytest.raises(UserError, match='line 1: "document" is empty; leave it out'):
    tasks.read_jsonl(write(tmp_path / 'mine.jsonl', record | {'document': float('nan')}))


def test_a_benchmark_that_none_of_several_places_has(tmp_path: Path):
  with pytest.raises(UserError, match=rf'benchmark cbt: none of tfds:{tmp_path}, {tmp_path} has cbt\.jsonl; put'):
    read_items(BENCHMARKS['cbt'], f'tfds:{tmp_path} | {tmp_path}')


def test_files_behind_a_url(tmp_path: Path):
  """Targets are read through fsspec, as pools are."""
  import fsspec

  path = write(tmp_path / 'cbt.jsonl', RECORDS['multiple_choice'])
  fsspec.filesystem('memory').pipe(f'/{tmp_path.name}/below/cbt.jsonl', Path(path).read_bytes())
  folder = f'memory://{tmp_path.name}'
  for place in (folder, f'{folder}/below', f'{folder}/below/cbt.jsonl'):
    assert read_items(BENCHMARKS['cbt'], place) == read_items(BENCHMARKS['cbt'], path)
  assert tasks.read_jsonl(f'{folder}/below/cbt.jsonl').items == tasks.read_jsonl(path).items
  with pytest.raises(UserError, match=r'has no piqa\.jsonl'):
    read_items(BENCHMARKS['piqa'], folder)


def test_the_papers_splits(shared_data: Path):
  """Of LAMBADA the paper's holdout has six items fewer, and does not say which."""
  config = get_config().targets
  config.tasks, config.folder = ('lambada', 'jeopardy', 'bigbench_cs_algorithms'), str(shared_data / 'benchmarks')
  result = tasks.read_tasks(config)
  side = tasks.split_documents(result, config.holdout_share, config.seed)
  counts = {
    task.name: tuple(sum(side[item.document] == split for item in task.items) for split in tasks.SPLITS)
    for task in result
  }
  assert counts == {'lambada': (2_577, 2_576), 'jeopardy': (876, 876), 'bigbench_cs_algorithms': (660, 660)}


def test_real_files(shared_data: Path):
  folder = str(shared_data / 'benchmarks')
  count = {'lambada': 5_153, 'jeopardy': 1_752, 'bigbench_cs_algorithms': 1_320, 'piqa': 1_838, 'trivia_qa': 3_000}
  for name, items in (count | {'winograd': 273, 'squad_xquad': 1_190}).items():
    assert len(read_items(BENCHMARKS[name], folder)) == items, name
  some = read_items(BENCHMARKS['jeopardy'], folder, limit=40)
  assert len(some) == 40
  assert {item.category for item in some} == {'american_history', 'literature', 'science', 'world_history'}
  nested = read_items(BENCHMARKS['piqa'], str(shared_data))  # one folder below
  assert nested == read_items(BENCHMARKS['piqa'], folder)


# One raw example of each dataset, as its builder is given them, and the prompt that is to come of it.
TFDS = {
  'lambada': ({'passage': 'He took the old map\n'}, (('He took the old',), (' map',), 0)),
  'squad': (
    {
      'id': '1', 'title': 'Bees', 'context': 'Bees fly.', 'question': 'What flies?',
      'answers': {'text': ['Bees'], 'answer_start': [0]},
    },
    (('Context: Bees fly.\nQuestion: What flies?\nAnswer:',), (' Bees',), 0),
  ),
  'trivia_qa/rc.nocontext': (
    {
      'question': 'Who wrote notes on the engine?', 'question_id': 'q', 'question_source': 's', 'entity_pages': [],
      'search_results': [],
      'answer': {
        'aliases': ['Ada Lovelace', 'Countess of Lovelace'], 'normalized_aliases': [], 'value': 'Ada Lovelace',
        'matched_wiki_entity_name': '', 'normalized_matched_wiki_entity_name': '', 'normalized_value': '', 'type': 'x',
      },
    },
    (('Question: Who wrote notes on the engine?\nAnswer:',), (' Ada Lovelace',), 0),
  ),
  'piqa': ({'id': '1', 'goal': 'Go', 'sol1': 'up', 'sol2': 'out', 'label': 1},
           (('Question: Go\nAnswer:',) * 2, (' up', ' out'), 1)),
  'hellaswag': (
    {'context': 'A man', 'endings': ['sits', 'is', 'sees', 'eats'], 'activity_label': 'Sawing', 'label': 2,
     'split_type': 'indomain', 'source_id': 'a'},
    (('Sawing: A man',) * 4, (' sits', ' is', ' sees', ' eats'), 2),
  ),
  'winogrande': (
    {'sentence': 'The _ is full of tea.', 'option1': 'box', 'option2': 'cup', 'label': '2'},
    (('The box', 'The cup'), (' is full of tea.',) * 2, 1),
  ),
  'bool_q': (
    {'question': 'is tea hot', 'passage': 'Tea is hot.', 'answer': True, 'title': 'Tea'},
    (('Passage: Tea is hot.\nQuestion: is tea hot?\nAnswer:',) * 2, (' no', ' yes'), 1),
  ),
  'openbookqa': (
    {'question': {'stem': 'Ice is', 'choice_A': 'wet', 'choice_B': 'hot', 'choice_C': 'cold', 'choice_D': 'red'},
     'fact1': '', 'humanScore': 1.0, 'clarity': 1.0, 'turkIdAnonymized': '', 'answerKey': 'C'},
    (('Ice is',) * 4, (' wet', ' hot', ' cold', ' red'), 2),
  ),
  'coqa': (
    {'source': 's', 'story': 'A cat sat.', 'questions': ['Who?', 'Did it run?'],
     'answers': [{'input_text': 'a cat', 'answer_start': 0, 'answer_end': 5},
                 {'input_text': 'no', 'answer_start': 0, 'answer_end': 5}]},
    (('Passage: A cat sat.\nQuestion: Who?\nAnswer:',), (' a cat',), 0),
  ),
  'ai2_arc/ARC-Easy': (
    {'id': 'a', 'question': 'Which?', 'choices': {'text': ['x', 'y', 'z'], 'label': ['A', 'B', 'C']}, 'answerKey': 'B'},
    (('Question: Which?\nAnswer:',) * 3, (' x', ' y', ' z'), 1),
  ),
  'super_glue/copa': (
    {'premise': 'It rained.', 'choice1': 'The ground got wet.', 'choice2': 'He sang.', 'question': 'effect', 'idx': 0,
     'label': 'choice1'},
    (('It rained therefore',) * 2, (' the ground got wet.', ' he sang.'), 0),
  ),
}  # fmt: skip


def write_tfds(folder: Path, dataset: str, **splits: list[dict]) -> None:
  """A prepared dataset with the features of TFDS's own builder, and records of ours in the place of the download."""
  import tensorflow_datasets as tfds

  builder = tfds.builder(dataset, data_dir=str(folder), try_gcs=False, file_format='array_record')
  Path(builder.data_dir).mkdir(parents=True)
  writer = tfds.core.SequentialWriter(builder.info, max_examples_per_shard=10, file_format='array_record')
  writer.initialize_splits(list(splits))
  writer.add_examples(splits)
  writer.close_all()


def test_every_tfds_dataset_of_the_table_is_read_here():
  assert {b.tfds.partition(':')[0] for b in TABLE if b.tfds} - {'ai2_arc/ARC-Challenge'} == TFDS.keys()


@pytest.mark.parametrize('dataset', TFDS)
def test_tfds_datasets(dataset: str, tmp_path: Path):
  raw, wanted = TFDS[dataset]
  [benchmark] = [b for b in TABLE if b.tfds.partition(':')[0] == dataset]
  write_tfds(tmp_path, dataset, **{benchmark.tfds.partition(':')[2]: [raw]})
  items = read_items(benchmark, f'tfds:{tmp_path}')
  result = prompt(benchmark, items, 0) if dataset != 'squad' else prompt(benchmark, items[:1], 0)
  assert (result.contexts, result.answers, result.gold) == wanted
  assert len(items) == (2 if dataset == 'coqa' else 1)
  if benchmark.shape == shapes.GENERATION:
    assert items[0].aliases == ('Ada Lovelace', 'Countess of Lovelace')


def test_squad_from_tfds_has_the_papers_split(tmp_path: Path):
  """The target is of the training split, the holdout and evaluation are the validation split; the guard knows both."""

  def record(split: str, i: int) -> dict:
    answers = {'text': [f'{split} {i}'], 'answer_start': [0]}
    return {'id': f'{split}{i}', 'title': f'{split} {i % 3}', 'context': f'{split} {i} it is.',
            'question': f'Which {i}?', 'answers': answers}  # fmt: skip

  splits = {split: [record(split, i) for i in range(n)] for split, n in (('train', 12), ('validation', 5))}
  write_tfds(tmp_path, 'squad', **splits)
  config = get_config().targets
  config.tasks, config.folder = ('squad',), f'tfds:{tmp_path}'
  [task] = tasks.read_tasks(config)
  side = tasks.split_documents([task], 0.5, 0)
  result = {s: sorted(item.answer for item in task.items if side[item.document] == s) for s in ('target', 'holdout')}
  assert result == {
    'target': sorted(f' train {i}' for i in range(12)),
    'holdout': sorted(f' validation {i}' for i in range(5)),
  }
  assert all(item.context.count('Question:') == 1 and item.answer.split()[0] in item.context for item in task.items)
  for split in result:
    own = [item for item in task.items if side[item.document] == split]
    shown = tasks.with_shots(task, own, 0)
    assert [item.answer for item in shown] == [item.answer for item in own]
    assert all(item.context.count('Question:') == 4 for item in shown)
    other = {'target': 'validation', 'holdout': 'train'}[split]
    assert not any(other in item.context for item in shown), 'shots of one split stay in it'
  assert len(read_items(BENCHMARKS['squad'], f'tfds:{tmp_path}')) == 5
  with pytest.raises(UserError, match='squad in .* has no split test, only train, validation; prepare'):
    read_items(dataclasses.replace(BENCHMARKS['squad'], tfds='squad:test'), f'tfds:{tmp_path}')
  assert len(tasks.raw_texts(config)) == 17
  # Beside a folder that holds what TFDS does not have.
  question = {'context': 'HISTORY: It was', 'continuation': 'Rome', 'category': 'history'}
  (tmp_path / 'files').mkdir()
  write(tmp_path / 'files' / 'jeopardy_all.jsonl', *([question] * 4))
  write(tmp_path / 'files' / 'squad.jsonl', {'context': 'not', 'continuation': 'this'})
  config.tasks, config.folder = ('squad', 'jeopardy'), f'tfds:{tmp_path} | {tmp_path}/files'
  assert [len(task.items) for task in tasks.read_tasks(config)] == [17, 4]
  settings = {'targets.folder': config.folder, 'targets.tasks': list(config.tasks)}
  found, given = inputs.by_content(settings, settings, None)
  digests = [files.digest(f'{tmp_path}/{place}') for place in ('squad', 'files/jeopardy_all.jsonl')]
  assert found['targets.tasks'] == [f'squad: content {digests[0]}', f'jeopardy: content {digests[1]}']
  assert given == settings and not found['targets.folder']
  config.folder = f'tfds:{tmp_path}/none | {tmp_path}/files'  # where it is not prepared, the next place is asked
  assert [len(task.items) for task in tasks.read_tasks(config)] == [1, 4]
