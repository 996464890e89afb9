"""Target sequences, hand-worked on a vocabulary of bytes, and what the stage leaves on disk."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import Log
from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.pool.vocabulary import ByteEncoder
from dsdm_jax.data.targets.targets import SplitTask, Targets, build, build_task, excess, pieces, sequence
from dsdm_jax.data.targets.tasks import SPLITS, RawItem, RawTask
from dsdm_jax.errors import UserError
from tests.helpers.data import run_pool, run_targets, small_config


def by_bytes(text: str) -> list[int]:
  return [100 + b for b in text.encode()]


class Bytes(ByteEncoder):
  eos: int = 1
  pad: int = 0

  def encode(self, text: str) -> list[int]:
    return by_bytes(text)


def test_sequence_by_hand():
  tokens_L, weights_L = sequence(Bytes(), 'Q:', ' yes', 10)
  assert tokens_L.tolist() == [1, *by_bytes('Q: yes'), 0, 0, 0]
  assert weights_L.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
  assert (tokens_L.dtype, weights_L.dtype) == (np.int32, np.float32)


def test_padding_is_the_vocabularys():
  other = Bytes()
  other.eos, other.begin, other.pad = 7, 8, 9
  tokens_L, weights_L = sequence(other, 'Q:', ' yes', 10)
  assert tokens_L.tolist() == [8, *by_bytes('Q: yes'), 9, 9, 9]
  assert weights_L.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def test_white_space_where_context_and_answer_meet_belongs_to_the_answer():
  tokens_L, weights_L = sequence(Bytes(), 'Q:\n', '  y ', 10)
  assert tokens_L.tolist() == [1, *by_bytes('Q:\n  y '), 0, 0]
  assert weights_L.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def test_long_context_loses_its_beginning():
  tokens_L, weights_L = sequence(Bytes(), 'abcdef', ' xy', 7)
  assert tokens_L.tolist() == [1, *by_bytes('def xy')]
  assert weights_L.tolist() == [0, 0, 0, 0, 1, 1, 1]
  tokens_L, weights_L = sequence(Bytes(), 'abcdef', ' xyzuv', 7)
  assert tokens_L.tolist() == [1, *by_bytes(' xyzuv')]
  assert weights_L.tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_each_option_is_as_long_as_with_its_own_answer():
  options = {'context_options': ('aaaa', 'b\n'), 'option_answers': (' end', 'end'), 'gold': 1}
  item = RawItem('0', 'b\n', 'end', 'd', **options)
  assert excess(Bytes(), item, 9) == len('aaaa end') - 8


def test_language_modelling_counts_all_but_the_end_mark():
  tokens_L, weights_L = sequence(Bytes(), '', ' ab', 6)
  assert tokens_L.tolist() == [1, *by_bytes(' ab'), 0, 0]
  assert weights_L.tolist() == [0, 1, 1, 1, 0, 0]


def test_answers_that_are_empty_or_do_not_fit():
  assert sequence(Bytes(), 'Q:', ' ', 10) is None
  assert sequence(Bytes(), 'Q:', ' ' + 'x' * 9, 10) is None
  assert sequence(Bytes(), '', 'x' * 9, 10) is not None


@given(st.text('ab \n', max_size=300), st.integers(8, 40))
def test_pieces_fit_and_hold_all_text(text: str, length: int):
  result = list(pieces(by_bytes, text, length))
  place = 0
  for piece in result:
    assert len(by_bytes(piece)) <= length
    # A run of the text, and every piece after the one before; between them is white space only.
    found = text.index(piece, place)
    assert not text[place:found].strip()
    place = found + len(piece)
  assert not text[place:].strip()


@given(st.lists(st.text('ab ', max_size=20), max_size=30))
def test_pieces_of_short_lines_are_whole_lines(lines: list[str]):
  for piece in pieces(by_bytes, '\n'.join(lines), 40):
    assert set(piece.split('\n')) <= set(lines)


def test_pieces_end_at_a_blank_line_in_the_second_half():
  text = 'aaaa\nbbbb\n\ncccc\ndddd\neeee\nffff'
  assert list(pieces(by_bytes, text, 19)) == ['aaaa\nbbbb', 'cccc\ndddd\neeee', 'ffff']


def test_long_lines_are_cut():
  assert list(pieces(by_bytes, 'x' * 30 + '\naaaa', 12)) == ['x' * 11, 'x' * 12, 'x' * 7 + '\naaaa']
  words = [f'{number:03}' for number in range(20)]
  result = list(pieces(by_bytes, ' '.join(words), 24))
  assert ' '.join(result).split() == words and max(map(len, result)) > 18
  # A short line is no piece of its own because a long one follows.
  assert list(pieces(by_bytes, 'a\n' + '2 ' * 10, 20)) == ['a\n2 2 2 2 2 2 2 2', '2 2 ']


def test_whole_documents_are_kept_and_what_is_not_is_counted():
  texts = ['\n'.join(' '.join(f'{i}{line:02}{word:02}' for word in range(50)) for line in range(40)) for i in range(4)]
  items = tuple(RawItem(str(i), '', text, str(i)) for i, text in enumerate([*texts, 'A short one.']))
  task = SplitTask(RawTask('whole', items, language_modelling=True), {str(i): SPLITS[i % 2] for i in range(5)}, 5)
  config = small_config().targets
  config.max_examples = 1_000
  examples, count = build_task(task, config, Bytes(), 257)
  answers = [record['answer'] for of_split in examples.values() for record in of_split.records]
  assert sorted(' '.join(answers).split()) == sorted(' '.join(texts).split())
  assert (count['items'], count['short'], count['unfit']) == (len(answers), 1, 0)
  short = dataclasses.replace(task, task=dataclasses.replace(task.task, items=items[4:]))
  with pytest.raises(UserError, match='0 do not fit into pool.length 257, 1 piece of less than'):
    build_task(short, config, Bytes(), 257)


def test_build_splits_samples_and_counts(write_jsonl: Callable[[str], str]):
  records = [{'context': f'c{i}', 'answer': f'answer {i}', 'document': f'd{i % 40}'} for i in range(200)]
  records += [records[0], {'context': 'c', 'answer': 'x' * 40, 'document': 'd0'}]
  config = small_config().targets
  config.tasks = (write_jsonl('\n'.join(map(json.dumps, records))),)
  config.max_examples = 1_000
  examples, counts = build(config, Bytes(), 24)
  count = counts['mine']
  assert (count['documents'], count['items'], count['duplicates'], count['unfit']) == (40, 202, 1, 1)
  assert count['target'] + count['holdout'] == 200
  documents = {s: {r['document'] for r in examples['mine', s].records} for s in ('target', 'holdout')}
  assert documents['target'] | documents['holdout'] == {f'd{i}' for i in range(40)}
  assert not documents['target'] & documents['holdout']
  # A sample takes from every document before it takes from one again, and is the beginning of a larger one.
  config.max_examples = len(documents['target'])
  fewer, _ = build(config, Bytes(), 24)
  assert len({r['document'] for r in fewer['mine', 'target'].records}) == len(documents['target'])
  assert fewer['mine', 'target'].records == examples['mine', 'target'].records[: config.max_examples]


def test_what_is_left_out_is_printed(tmp_path, write_jsonl: Callable[[str], str], monkeypatch):
  records = [{'context': f'c{i}', 'answer': 'x' * (40 if i < 3 else 4)} for i in range(30)]
  path = write_jsonl('\n'.join(map(json.dumps, [*records, *records[-2:]])))
  config = small_config()
  config.targets.tasks, config.targets.max_examples = (path,), 1_000
  said: list[str] = []
  monkeypatch.setattr(Log, 'say', lambda _, text: said.append(text))
  (tmp_path / 'card.json').write_text('{"length": 24}')
  vocabulary.save('bytes', tmp_path)
  run_targets(config, tmp_path, Artifact(tmp_path, {}))
  assert said[-1].endswith('left out: 2 duplicates; left out: 3 whose answer has no tokens, or more than 23')


@pytest.mark.parametrize(('count', 'number'), [(1, 'no'), (3, '1')])
def test_a_split_with_less_than_two_examples_is_an_error(write_jsonl: Callable[[str], str], count: int, number: str):
  config = small_config().targets
  config.tasks = (write_jsonl(''.join(f'{{"context": "a {i}", "answer": "b"}}\n' for i in range(count))),)
  with pytest.raises(UserError, match=rf"'mine' has {number} example in its (target|holdout) split, and it takes two"):
    build(config, Bytes(), 24)


def test_stage(tiny_artifact: Artifact, tmp_path: Path):
  config = small_config()
  artifact = run_targets(config, tmp_path, tiny_artifact)
  result = Targets(artifact)
  assert result.tasks == ['cs_algorithms']
  assert 'padded with 0;' in artifact.semantics['sequence']  # of a trained vocabulary
  for split in ('target', 'holdout'):
    examples = result.examples('cs_algorithms', split)
    assert examples.tokens_TL.shape == examples.weights_TL.shape == (len(examples), 48)
    assert (examples.tokens_TL.dtype, examples.weights_TL.dtype) == (np.int32, np.float32)
    assert len(examples) == config.targets.max_examples
    assert not examples.weights_TL[:, 0].any()
    assert (examples.weights_TL.sum(axis=1) >= 1).all()
    assert not examples.weights_TL[examples.tokens_TL == 0].any()
    assert set(examples.records[0]) == {
      'id', 'context', 'answer', 'document', 'starts', 'shots_dropped', 'tokens_cut',
    }  # fmt: skip
  with pytest.raises(KeyError):
    result.examples('docs', 'target')
  with pytest.raises(KeyError):
    result.examples('cs_algorithms', 'train')
  again = run_targets(config, tmp_path / 'again', tiny_artifact)
  for file in sorted(artifact.path.iterdir()):
    assert file.read_bytes() == (again.path / file.name).read_bytes()


def test_odd_text_survives_the_files(tiny_artifact: Artifact, tmp_path: Path, write_jsonl: Callable[[str], str]):
  config = small_config()
  odd = 'a\u2028b\x85é'
  records = [{'context': f'{odd}{i}', 'answer': f'{odd}{i}'} for i in range(40)]
  config.targets.tasks = (write_jsonl('\n'.join(json.dumps(r, ensure_ascii=False) for r in records)),)
  result = Targets(run_targets(config, tmp_path, tiny_artifact)).examples('mine', 'target')
  assert all(r['answer'].startswith(f' {odd}') for r in result.records)


def test_pool_and_targets_agree_on_the_examples(tmp_path: Path):
  """What a pool plants is what the targets stage makes, though only the pool's vocabulary is common to both."""
  config = small_config(plant_targets=3)
  pool_artifact = run_pool(config, tmp_path)
  examples = Targets(run_targets(config, tmp_path, pool_artifact)).examples('cs_algorithms', 'target')
  planted = json.loads((pool_artifact.path / 'planted.json').read_text())
  assert [p['id'] for p in planted] == [r['id'] for r in examples.records[:3]]
