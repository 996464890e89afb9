"""Prompts with completions and conversations: which tokens count, packed and one to a row; as targets too."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsdm_jax.data import inputs
from dsdm_jax.data.order.batches import token_weights, training_batches
from dsdm_jax.data.order.schedule import Part, Schedule
from dsdm_jax.data.pool import chat as chats
from dsdm_jax.data.pool import tokenizer_files, vocabulary
from dsdm_jax.data.pool.chat import Chat
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.data.targets import targets
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import suite
from dsdm_jax.selection import ngrams
from tests.data.pool.test_sources import build
from tests.helpers.data import small_config

TEMPLATE = (
  '{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}'
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
MARKED = (
  '{{ bos_token }}{% for message in messages %}{% if message.role == "assistant" %}A: {% generation %}'
  '{{ message.content }}<|im_end|>{% endgeneration %}{% else %}U: {{ message.content }}\n{% endif %}{% endfor %}'
)
TALK = [
  {'role': 'user', 'content': 'Hi <|im_end|>'},
  {'role': 'assistant', 'content': 'Hello'},
  {'role': 'user', 'content': 'Bye'},
  {'role': 'assistant', 'content': 'See you'},
]


def write_tokenizer(folder: Path, template: str | None = TEMPLATE) -> str:
  """A byte-level tokenizer without merges, with ChatML's special pieces; returns its path."""
  folder.mkdir(exist_ok=True)
  signs = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<|im_start|>', '<|im_end|>'])
  (folder / 'tokenizer.json').write_text(tokenizer.to_str())
  config = {
    'eos_token': '<|im_end|>',
    'bos_token': {'__type': 'AddedToken', 'content': '<|im_start|>'},
    'tokenizer_class': 'GPT2Tokenizer',
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(config | ({'chat_template': template} if template else {})))
  return str(folder / 'tokenizer.json')


def write_jsonl(path: Path, *records: dict) -> Path:
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def counted_texts(pool: Pool) -> list[str]:
  """Text of each row in which tokens that do not count are dots."""
  rows = np.arange(pool.num_rows)
  return [
    ''.join(pool.encoder.decode([i]) or '$' if w else '.' for i, w in zip(ids_L, weights_L, strict=True))
    for ids_L, weights_L in zip(pool.tokens(rows).tolist(), pool.weights(rows), strict=True)
  ]


PAIRS = [{'prompt': 'What? ', 'completion': 'That.'}, {'prompt': '', 'completion': 'Alone'}]


def test_each_completion_counts_with_its_end_mark_in_a_row_of_its_own(tmp_path):
  path = write_jsonl(tmp_path / 'pairs.jsonl', *PAIRS, {'prompt': 'A long prompt', 'completion': ' cut off here'})
  pool = build(tmp_path, f'jsonl:{path} | prompt=prompt | completion=completion', length=20, packed=False)
  assert pool.counts_some and pool.num_rows == 3
  assert set(counted_texts(pool)) == {'.' * 13 + ' cut of', '.lone$' + '.' * 14, '......That.$' + '.' * 8}
  assert sorted(pool.text(row) for row in range(3)) == ['A long prompt cut of', 'Alone', 'What? That.']
  # Padding is no text, and a document that is cut is not whole.
  texts = [pool.encoder.decode(tokens_L) for tokens_L in pool.texts(np.arange(3))]
  assert texts == [pool.text(row) for row in range(3)]
  size_N = pool.sizes(np.arange(3))
  assert sorted(size_N) == [6, 12, 20]
  assert (pool.spans.own_D[pool.document_N] == size_N).all() and (pool.spans.tokens_D == 20).all()
  assert pool.spans.whole_D[pool.document_N].tolist() == (size_N < 20).tolist()
  assert ngrams.PoolGrams(pool, 'tokens', 64).rows(np.arange(3)).size_B.tolist() == (2 * size_N - 1).tolist()
  [block] = [grams for _, _, grams in ngrams.PoolGrams(pool, 'tokens', 64)]
  assert block.size_B.tolist() == (2 * size_N - 1).tolist()


def test_packed_rows_count_completions_wherever_they_are_cut(tmp_path):
  records = [{'prompt': f'{i} asks ', 'completion': f'answer {i}'} for i in range(40)]
  path = write_jsonl(tmp_path / 'pairs.jsonl', *records)
  other = write_jsonl(tmp_path / 'text.jsonl', {'text': 'Prose counts as a whole. ' * 4})
  line = f'jsonl:{path} | prompt=prompt | completion=completion'
  pool = build(tmp_path, line, f'jsonl:{other} | name=prose', length=16)
  order = np.lexsort((pool.offset_N, pool.document_N))
  stream = pool.tokens(order).ravel()
  bits = np.unpackbits(pool._counted_NC[order], axis=1, count=16).ravel().astype(bool)
  begin = 0
  for document in pool.documents:
    end = begin + document['tokens'] + 1
    text = pool.encoder.decode(stream[begin:end])
    first = 0 if document['source'] == 'prose' else text.find('answer')
    wanted = np.arange(begin, end) >= begin + max(first, 0)
    assert bits[begin:end].tolist() == wanted[: len(bits[begin:end])].tolist(), text
    begin = end
  assert not pool.weights(order)[:, 0].any()


def test_a_conversation_counts_what_the_assistant_says(tmp_path):
  path = write_jsonl(tmp_path / 'talks.jsonl', {'id': 'one', 'messages': TALK})
  pool = build(
    tmp_path,
    f'jsonl:{path} | messages=messages',
    vocabulary=write_tokenizer(tmp_path / 'model'),
    length=160,
    packed=False,
  )
  [row], [weights_L] = pool.tokens([0]), pool.weights([0])
  encoder = pool.encoder
  start, end = encoder.tokenizer.token_to_id('<|im_start|>'), encoder.tokenizer.token_to_id('<|im_end|>')
  ids = encoder.encode
  # The user's own <|im_end|> becomes the piece, as in transformers.
  wanted = [
    (start, 0),
    *((i, 0) for i in ids('user\nHi ')),
    (end, 0),
    (end, 0),
    *((i, 0) for i in ids('\n')),
    (start, 0),
    *((i, 0) for i in ids('assistant\n')),
    *((i, 1) for i in ids('Hello')),
    (end, 1),
    (ids('\n')[0], 1),
    (start, 0),
    *((i, 0) for i in ids('user\nBye')),
    (end, 0),
    *((i, 0) for i in ids('\n')),
    (start, 0),
    *((i, 0) for i in ids('assistant\n')),
    *((i, 1) for i in ids('See you')),
    (end, 1),
    (ids('\n')[0], 1),
  ]
  assert row[: len(wanted)].tolist() == [i for i, _ in wanted]
  assert weights_L.tolist() == [w for _, w in wanted] + [0] * (160 - len(wanted))


def test_parquet_with_nested_messages_gives_the_same(tmp_path):
  records = [{'meta': {'id': f'n{i}'}, 'messages': TALK[: 2 + 2 * (i % 2)]} for i in range(6)]
  pq.write_table(pa.Table.from_pylist(records), tmp_path / 'talks.parquet')
  path = write_jsonl(tmp_path / 'talks.jsonl', *records)
  model, pools = write_tokenizer(tmp_path / 'model'), []
  for kind, name in (('jsonl', path), ('parquet', tmp_path / 'talks.parquet')):
    line = f'{kind}:{name} | messages=messages | id=meta.id'
    pools.append(build(tmp_path / kind, line, vocabulary=model, length=64, drop_duplicates=False))
  rows = np.arange(pools[0].num_rows)
  np.testing.assert_array_equal(pools[0].tokens(rows), pools[1].tokens(rows))
  np.testing.assert_array_equal(pools[0].weights(rows), pools[1].weights(rows))
  assert {d['id'] for d in pools[0].documents} == {f'n{i}' for i in range(6)}


@pytest.mark.parametrize('file_format', ['array_record', 'tfrecord'])
def test_conversations_of_tfds_are_those_of_files(tmp_path, file_format):
  """TFDS turns a sequence of messages into one array for each of their fields."""
  import tensorflow_datasets as tfds

  records = [{'id': 'é', 'messages': TALK}, {'id': 'n', 'messages': TALK[:2]}]
  folder, text = tmp_path / 'written', tfds.features.Text()
  folder.mkdir()
  identity = tfds.core.dataset_info.DatasetIdentity(
    name='mine', version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='m'
  )
  features = tfds.features.FeaturesDict(
    {'id': text, 'messages': tfds.features.Sequence({'role': text, 'content': text})}
  )
  info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=20, file_format=file_format)
  writer.initialize_splits(['train'])
  writer.add_examples({'train': records})
  writer.close_all()
  model, pools = write_tokenizer(tmp_path / 'model'), []
  for line in (f'jsonl:{write_jsonl(tmp_path / "talks.jsonl", *records)}', f'tfds:{folder}'):
    pools.append(build(tmp_path / f'{len(pools)}', f'{line} | messages=messages', vocabulary=model, length=64))
  rows = np.arange(pools[0].num_rows)
  np.testing.assert_array_equal(pools[0].tokens(rows), pools[1].tokens(rows))
  np.testing.assert_array_equal(pools[0].weights(rows), pools[1].weights(rows))
  assert {d['id'] for d in pools[1].documents} == {'é', 'n'}


def test_templates_that_mark_answers_say_where_they_are():
  text, spans = Chat(MARKED, (('bos_token', '<s>'),)).document(TALK)
  assert text == '<s>U: Hi <|im_end|>\nA: Hello<|im_end|>U: Bye\nA: See you<|im_end|>'
  assert [text[a:b] for a, b in spans] == ['Hello<|im_end|>', 'See you<|im_end|>']
  assert Chat(TEMPLATE, ()).pair(TALK[:2]) == (
    '<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n',
    'Hello<|im_end|>\n',
  )


@pytest.mark.parametrize('tag', ['{%-generation-%}', '{%  generation %}', '{%+ generation%}', '{% generation -%}'])
def test_a_template_may_spell_its_marks_in_every_way(tag):
  text, spans = Chat(MARKED.replace('{% generation %}', tag), (('bos_token', '<s>'),)).document(TALK)
  assert [text[begin:end] for begin, end in spans] == ['Hello<|im_end|>', 'See you<|im_end|>']
  commented = Chat('{# {% generation %} #}' + TEMPLATE, ())
  assert commented.document(TALK) == Chat(TEMPLATE, ()).document(TALK)


def test_pieces_of_a_template_take_the_white_space_that_their_file_says(tmp_path):
  """Phi-3's end piece takes the newline after it."""
  path = Path(write_tokenizer(tmp_path / 'model'))
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  tokenizer.add_special_tokens([tokenizers.AddedToken('<|im_end|>', rstrip=True)])
  path.write_text(tokenizer.to_str())
  encoder = vocabulary.HuggingFaceEncoder(path.read_bytes(), '<|im_end|>')
  text = Chat(TEMPLATE, ()).render(TALK[1:])
  assert '<|im_end|>\n' in text
  assert encoder.templated.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_rows_without_a_token_that_counts_are_known(tmp_path):
  path = write_jsonl(tmp_path / 'pairs.jsonl', {'prompt': 'long prompt ' * 8, 'completion': 'short'}, *PAIRS)
  pool = build(tmp_path, f'jsonl:{path} | prompt=prompt | completion=completion', length=16)
  assert pool.counted_N.tolist() == (pool.weights(np.arange(pool.num_rows)).sum(axis=1) > 0).tolist()
  assert 0 < pool.counted_N.sum() < pool.num_rows


def test_templates_run_in_a_sandbox(tmp_path):
  for attack in (
    "{{ ''.__class__.__mro__ }}",
    '{{ messages.append(1) }}',
    '{{ raise_exception("no system prompt") }}',
    '{{ cycler.__init__.__globals__ }}{{ cycler.__init__.__globals__.os }}',
  ):
    with pytest.raises(ValueError, match='the chat template fails on it .(SecurityError|UndefinedError|TemplateError)'):
      Chat(attack, ()).render(TALK)
  with pytest.raises(UserError, match='its chat template cannot be read .TemplateSyntaxError'):
    chats.read(write_tokenizer(tmp_path, '{% if %}'))
  rewrites = '{% for m in messages[-2:] %}{{ m.content }}|{% endfor %}'
  with pytest.raises(ValueError, match='writes what precedes message 2 in another way'):
    Chat(rewrites, ()).document(TALK)


PAIR = 'prompt=prompt | completion=completion'


@pytest.mark.parametrize(
  ('record', 'options', 'words'),
  [
    ({'prompt': 'a'}, PAIR, "no field 'completion' among prompt; name it with . completion"),
    ({'prompt': 'a', 'completion': ' '}, PAIR, "'completion' is empty"),
    ({'prompt': 1, 'completion': 'b'}, PAIR, "'prompt' is int, not text"),
    ({'prompt': 'long ' * 9, 'completion': 'b'}, PAIR, 'no token that the loss counts fits into pool.length'),
    ({'messages': []}, 'messages=messages', "'messages': it has no messages"),
    ({'messages': [{'role': 'user', 'content': 'a'}]}, 'messages=messages', 'no message is of the role assistant'),
    ({'messages': [{'role': 'assistant'}]}, 'messages=messages', '"content" of message 1 is NoneType'),
    ({'messages': {'role': ['user'], 'content': []}}, 'messages=messages', "'messages': its fields have lists of 1, 0"),
    ({'text': 'a'}, 'prompt=prompt', 'give one of text=, messages=, or prompt= and completion= together'),
  ],
)
def test_what_is_wrong_is_one_line(record, options, words, tmp_path):
  path = write_jsonl(tmp_path / 'x.jsonl', record)
  with pytest.raises(UserError, match=words) as caught:
    build(tmp_path, f'jsonl:{path} | {options}', vocabulary=write_tokenizer(tmp_path / 'm'), length=24, packed=False)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('rows', 'added', 'size'),
  [
    (258, {'<image>': True, '<pad>': True}, 258),
    (259, {'<image>': True, '<pad>': True}, 259),
    (300, {'<image>': True}, 259),  # a padded table
    (None, {'<image>': True}, 259),
    (258, {'<image>': True, '<table>': False}, 260),  # text gives <table>
    (257, {'<image>': True}, 259),  # the end mark has no row
  ],
)
def test_special_pieces_without_a_row_are_not_in_the_vocabulary(tmp_path, rows, added, size):
  path = Path(write_tokenizer(tmp_path / 'model'))
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  for piece, special in added.items():
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([piece])
  path.write_text(tokenizer.to_str())
  if rows:
    (path.parent / 'config.json').write_text(json.dumps({'vocab_size': rows}))
  vocabulary.save(str(path), tmp_path)
  encoder = vocabulary.open_encoder(tmp_path)
  assert isinstance(encoder, vocabulary.HuggingFaceEncoder) and encoder.chat
  assert vocabulary.size_of(str(path)) == encoder.size == size
  assert encoder.pad == (259 if size > 259 and '<pad>' in added else encoder.eos)
  assert max(encoder.encode('An <image> and <|im_end|>')) < 256
  talk = [*TALK[:3], {'role': 'assistant', 'content': 'An <image>'}]
  assert encoder.templated.encode(encoder.chat.render(TALK))
  if size == 258:
    with pytest.raises(UserError, match=r"the special piece '<image>', whose id is 258, and the model has 258 rows"):
      encoder.templated.encode(encoder.chat.render(talk))
    jsonl = write_jsonl(tmp_path / 'a.jsonl', {'messages': TALK}, {'messages': talk})
    with pytest.raises(UserError, match='a.jsonl, line 2: .*<image>'):
      build(tmp_path, f'jsonl:{jsonl} | messages=messages', vocabulary=str(path), length=24)
  else:
    assert 258 in encoder.templated.encode(encoder.chat.render(talk))


def test_messages_need_a_chat_template(tmp_path):
  path = write_jsonl(tmp_path / 'x.jsonl', {'messages': TALK})
  for choice in ('bytes', write_tokenizer(tmp_path / 'm', None)):
    with pytest.raises(UserError, match='no chat template; give the tokenizer.json of a model'):
      build(tmp_path, f'jsonl:{path} | messages=messages', vocabulary=choice)


def test_the_template_is_part_of_the_content_of_a_vocabulary(tmp_path):
  path = write_tokenizer(tmp_path, None)
  before = inputs._vocabulary(path)
  (tmp_path / 'chat_template.jinja').write_text(MARKED)
  assert chats.read(path) == Chat(MARKED, (('bos_token', '<|im_start|>'), ('eos_token', '<|im_end|>')))
  assert inputs._vocabulary(path) != before


def test_an_exported_tokenizer_keeps_the_template(tmp_path):
  (tmp_path / 'out').mkdir()
  vocabulary.save(write_tokenizer(tmp_path / 'm', MARKED), tmp_path, '')
  ids = tokenizer_files.write(tmp_path, tmp_path / 'out', 64)
  encoder = vocabulary.open_encoder(tmp_path)
  assert ids['bos_token_id'] == encoder.tokenizer.token_to_id('<|im_start|>') and ids['eos_token_id'] == encoder.eos
  written = chats.read(str(tmp_path / 'out' / 'tokenizer.json'))
  assert written.document(TALK) == encoder.chat.document(TALK)


@pytest.mark.slow
def test_batches_carry_the_weights_of_tokens(tmp_path):
  path = write_jsonl(tmp_path / 'pairs.jsonl', *(PAIRS[0] | {'completion': f'No. {i}'} for i in range(8)))
  pool = build(tmp_path, f'jsonl:{path} | prompt=prompt | completion=completion', length=16, packed=False)
  schedule = Schedule((Part('all', np.arange(8), 1.0),), 8, 0)
  [batch] = training_batches(pool, schedule, 8)
  np.testing.assert_array_equal(batch['weight_BL'], token_weights(pool.weights(batch['row_B']), np.ones(8)))
  np.testing.assert_allclose(batch['weight_BL'].sum(1), 1, rtol=1e-6)
  assert token_weights(np.zeros((1, 3)), np.ones(1)).tolist() == [[0, 0, 0]]


def test_completions_and_conversations_are_targets_and_benchmarks(tmp_path):
  sums = [{'prompt': f'{i} plus {i} is ', 'completion': f'{2 * i}.'} for i in range(9)]
  asked = [[{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': f'yes {i}'}] for i in range(9)]
  pairs = write_jsonl(tmp_path / 'pairs.jsonl', *sums)
  talks = write_jsonl(tmp_path / 'talks.jsonl', *({'messages': messages} for messages in asked))
  vocabulary.save(write_tokenizer(tmp_path / 'm'), tmp_path, '')
  encoder = vocabulary.open_encoder(tmp_path)
  c = small_config()
  c.targets.tasks, c.targets.file_delimiter = (str(pairs), str(talks)), ' and '
  examples, _ = targets.build(c.targets, encoder, 96)
  of_pairs, of_talks = examples['pairs', 'target'], examples['talks', 'target']
  record = of_pairs.records[0]
  number = int(record['id'].split()[-1]) - 1
  assert (record['context'], record['answer']) == (f'{number} plus {number} is ', f'{2 * number}.')
  record, tokens_L, weights_L = of_talks.records[0], of_talks.tokens_TL[0], of_talks.weights_TL[0]
  number = int(record['id'].split()[-1]) - 1
  assert record['context'] == f'<|im_start|>user\n{number}?<|im_end|>\n<|im_start|>assistant\n'
  assert encoder.decode(tokens_L[weights_L > 0]) == f'yes {number}\n' and weights_L.sum() == len(f'yes {number}') + 2
  c.evaluation.tasks = (str(talks),)
  c.targets.tasks = ('cs_algorithms',)
  [request] = suite.read(c.evaluation, c.targets, suite.Sequences(encoder, 96))
  start = encoder.tokenizer.token_to_id('<|im_start|>')
  assert request.ids_P[0][:2].tolist() == [encoder.eos, start] and request.count_P[0] == len('yes 0') + 2


@pytest.mark.peers
def test_ids_and_counted_tokens_are_those_of_transformers(peers, tmp_path):
  talks = [TALK[:2], TALK]
  for number, template in enumerate((TEMPLATE, MARKED)):
    write_tokenizer(tmp_path / f'm{number}', template)
  code = (
    'import json, sys, transformers\n'
    'found = []\n'
    'for folder in sys.argv[2:]:\n'
    '  t = transformers.PreTrainedTokenizerFast.from_pretrained(folder)\n'
    '  for messages in json.loads(sys.argv[1]):\n'
    '    r = t.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)\n'
    "    found.append([t.apply_chat_template(messages, tokenize=False), r['input_ids'], r['assistant_masks']])\n"
    'print(json.dumps(found))\n'
  )
  done = subprocess.run(
    [peers, '-c', code, json.dumps(talks), tmp_path / 'm0', tmp_path / 'm1'],
    env={**os.environ, 'PYTHONPATH': '', 'HF_HUB_OFFLINE': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  theirs = iter(json.loads(done.stdout.splitlines()[-1]))
  for number in (0, 1):
    chat = chats.read(str(tmp_path / f'm{number}' / 'tokenizer.json'))
    encoder = vocabulary.HuggingFaceEncoder((tmp_path / f'm{number}' / 'tokenizer.json').read_bytes(), '<|im_end|>')
    for messages in talks:
      text, ids, mask = next(theirs)
      found, spans = chat.document(messages)
      assert found == text and encoder.templated.encode(found) == ids
      if number:  # without {% generation %} theirs marks nothing
        assert vocabulary.counted(encoder.templated, found, spans).tolist() == list(map(bool, mask))
