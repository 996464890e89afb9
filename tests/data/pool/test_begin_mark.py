"""The begin mark of a tokenizer appears once before each document, target, prompt and piece of breadth."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from dsdm_jax.data.pool import chat, tokenizer_files, vocabulary
from dsdm_jax.data.pool.pool import END_OF_DOCUMENT, Pool
from dsdm_jax.data.targets import breadth
from dsdm_jax.data.targets.targets import sequence
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import ngrams
from dsdm_jax.evaluation.suite import Sequences, stop_tokens
from tests.helpers import vocabularies
from tests.helpers.data import invented, run_pool, small_config

BEGIN = '<s>'


def tokenizer(
  folder: Path, template: str = f'{BEGIN}:0 $A:0', kind: str = 'byte_level', special: bool = True, **beside
) -> str:
  """A tokenizer.json that puts `BEGIN` before each text, as Llama's; returns its path."""
  written = tokenizers.Tokenizer.from_str(vocabularies.encoder(kind).data.decode())
  (written.add_special_tokens if special else written.add_tokens)([BEGIN, '<top>'])
  pieces = [(piece, written.token_to_id(piece)) for piece in (BEGIN, '<top>', vocabularies.END)]
  written.post_processor = processors.TemplateProcessing(template, f'{template} $B:1', pieces)
  folder.mkdir(exist_ok=True)
  (folder / 'tokenizer.json').write_text(written.to_str())
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'eos_token': vocabularies.END, 'bos_token': BEGIN} | beside)
  )
  return str(folder / 'tokenizer.json')


def opened(path: str, folder: Path) -> vocabulary.HuggingFaceEncoder:
  vocabulary.save(path, folder)
  encoder = vocabulary.open_encoder(folder)
  assert isinstance(encoder, vocabulary.HuggingFaceEncoder)
  return encoder


@pytest.fixture(scope='module')
def pool(tmp_path_factory) -> Pool:
  folder = tmp_path_factory.mktemp('begin')
  return Pool(run_pool(small_config(vocabulary=tokenizer(folder / 'model')), folder))


@pytest.mark.parametrize('special', [True, False])
@pytest.mark.parametrize('kind', ['byte_level', 'llama_json', 'metaspace', 'wordpiece'])
def test_the_mark_is_the_piece_that_the_tokenizer_puts_before_a_text(tmp_path, kind, special):
  encoder = opened(tokenizer(tmp_path / 'm', kind=kind, special=special), tmp_path)
  assert encoder.begin_piece == BEGIN
  assert encoder.begin == encoder.tokenizer.token_to_id(BEGIN) != encoder.eos
  assert encoder.begin not in encoder.encode(f'{BEGIN} a{BEGIN}b')
  ids = encoder.encode('some words')
  assert encoder.decode([encoder.begin, *ids, encoder.eos]) == encoder.decode(ids)
  assert stop_tokens(encoder)[encoder.begin]


@pytest.mark.parametrize('template', ['$A:0', f'$A:0 {vocabularies.END}:0', f'{vocabularies.END}:0 $A:0'])
def test_without_one_the_end_mark_begins_a_text(tmp_path, template):
  encoder = opened(tokenizer(tmp_path / 'm', template), tmp_path)
  assert encoder.begin == encoder.eos
  assert Pool(run_pool(small_config(vocabulary=str(tmp_path / 'm/tokenizer.json')), tmp_path)).text(0)


@pytest.mark.parametrize(
  'template', [f'{BEGIN}:0 $A:0 {vocabularies.END}:0', f'$A:0 {vocabularies.END}:0', f'{vocabularies.END}:0 $A:0']
)
def test_an_exported_tokenizer_puts_nothing_else_around_a_text(tmp_path, template):
  encoder = opened(tokenizer(tmp_path / 'm', template), tmp_path)
  (tmp_path / 'out').mkdir()
  tokenizer_files.write(tmp_path, tmp_path / 'out', 8)
  exported = tokenizers.Tokenizer.from_file(str(tmp_path / 'out/tokenizer.json'))
  front = [encoder.begin] * template.startswith(BEGIN)
  assert exported.encode('a river').ids == front + encoder.encode('a river')
  assert exported.encode('a', 'river').ids == [*front, *encoder.encode('a'), *front, *encoder.encode('river')]


def test_an_export_with_a_chat_template_begins_with_it(tmp_path):
  encoder = opened(tokenizer(tmp_path / 'm', chat_template='{{ messages[0].content }}', bos_token=None), tmp_path)
  (tmp_path / 'out').mkdir()
  assert tokenizer_files.write(tmp_path, tmp_path / 'out', 8)['bos_token_id'] == encoder.begin != encoder.eos
  about = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert about['bos_token'] == BEGIN and about['add_bos_token'] is True


def test_an_export_leaves_a_begin_mark_that_no_chat_template_writes_to_the_tokenizer(tmp_path):
  """With `add_bos_token` transformers 5 would put `bos_token` before each text in its place."""
  path = tokenizer(tmp_path / 'm', chat_template='{{ bos_token }}{{ messages[0].content }}', bos_token='<top>')
  encoder = opened(path, tmp_path)
  (tmp_path / 'out').mkdir()
  assert tokenizer_files.write(tmp_path, tmp_path / 'out', 8)['bos_token_id'] != encoder.begin
  about = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert about['bos_token'] == '<top>' and 'add_bos_token' not in about
  exported = tokenizers.Tokenizer.from_file(str(tmp_path / 'out/tokenizer.json'))
  assert exported.encode('a').ids == [encoder.begin, *encoder.encode('a')]


@pytest.mark.parametrize('mark', ['begin', 'end'])
def test_a_document_whose_text_gives_a_mark_is_refused(tmp_path, mark):
  """The texts that are tried before do not show it: the normalizer writes the piece for another character alone."""
  ids = {sign: i for i, sign in enumerate([*pre_tokenizers.ByteLevel.alphabet(), '<s', BEGIN])}
  written = tokenizers.Tokenizer(models.BPE(ids, [('<', 's'), ('<s', '>')]))
  written.normalizer = normalizers.Sequence([normalizers.Replace('<', '('), normalizers.Replace('~', BEGIN)])
  written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  written.add_special_tokens([vocabularies.END])
  if mark == 'begin':
    written.post_processor = processors.TemplateProcessing(f'{BEGIN} $A', None, [(BEGIN, ids[BEGIN])])
  written.save(str(tmp_path / 'tokenizer.json'))
  end = BEGIN if mark == 'end' else vocabularies.END
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': end}))
  (tmp_path / 'docs.jsonl').write_text('{"text": "river stone"}\n{"text": "about ~ 5"}\n')
  config = small_config(
    vocabulary=str(tmp_path / 'tokenizer.json'), sources=(f'jsonl:{tmp_path}/docs.jsonl',), length=8
  )
  with pytest.raises(UserError, match=rf'docs.jsonl.*2.*its text gives the {mark} mark of pool.vocabulary'):
    run_pool(config, tmp_path)


def test_a_configuration_may_name_an_end_piece_that_is_not_special_by_its_id(tmp_path):
  path = tokenizer(tmp_path / 'm', kind='llama_json', special=False, eos_token=None)
  top = tokenizers.Tokenizer.from_file(path).token_to_id('<top>')
  (tmp_path / 'm/generation_config.json').write_text(json.dumps({'eos_token_id': top}))
  assert opened(path, tmp_path).end == '<top>'


def test_a_tokenizer_without_its_options_is_of_another_version(tmp_path):
  opened(tokenizer(tmp_path / 'm'), tmp_path)
  (tmp_path / vocabulary.OPTIONS).unlink()
  with pytest.raises(UserError, match=r'tokenizer.json without tokenizer_options.json.*build the pool again'):
    vocabulary.open_encoder(tmp_path)


def test_several_are_refused(tmp_path):
  with pytest.raises(UserError, match=r"puts 2 pieces before each text \('<top> <s>'\).*\"post_processor\""):
    opened(tokenizer(tmp_path / 'm', f'<top>:0 {BEGIN}:0 $A:0'), tmp_path)


def test_an_id_without_a_piece_is_refused(tmp_path):
  file = Path(tokenizer(tmp_path / 'm'))
  about = json.loads(file.read_text())
  about['post_processor']['special_tokens'][BEGIN]['ids'] = [99_999]
  file.write_text(json.dumps(about))
  with pytest.raises(UserError, match='"post_processor" of the tokenizer puts id 99999 before each text, which has no'):
    opened(str(file), tmp_path)


def test_each_document_of_a_pool_has_one(pool):
  config = small_config()
  texts = {document.id: document.text for document in invented(config.pool, config.seed)}
  tokens_NL, encoder = pool.tokens(np.arange(pool.num_rows)), pool.encoder
  after_end = tokens_NL[:, 1:][tokens_NL[:, :-1] == encoder.eos]
  assert len(after_end) > 20 and (after_end == encoder.begin).all()
  documents = np.arange(20)
  for document, ids in zip(documents, pool.document_tokens(documents), strict=True):
    record = pool.documents[int(document)]
    whole = [encoder.begin, *encoder.encode(texts[record['id']])]
    assert record['tokens'] == len(whole) and ids.tolist()[: len(whole)] == whole[: len(ids)]
    assert texts[record['id']].startswith(pool.text_of(ids[ids != encoder.eos], one=True).rstrip('\ufffd'))
  assert not any(BEGIN in pool.text(row) for row in range(pool.num_rows))


def test_targets_prompts_and_breadth_begin_with_one(pool):
  encoder = pool.encoder
  tokens_L, weights_L = sequence(encoder, 'river', ' stone', 64)
  ids, count = Sequences(encoder, 64, begin_with_end_mark=False).pair('river', ' stone')
  assert ids.tolist() == tokens_L[: len(ids)].tolist() == [encoder.begin, *encoder.encode('river stone')]
  assert weights_L.sum() == count
  assert Sequences(encoder, 3).pair('river of stones', ' x')[0][0] == encoder.begin
  assert Sequences(encoder, 64).prompt('river ', 4).tolist() == [encoder.begin, *encoder.encode('river')]
  pieces = breadth.pieces(pool, np.arange(12), 0.5)[0]
  for tokens_L, _, record in (*pieces['target'], *pieces['holdout']):
    assert tokens_L[0] == encoder.begin and (tokens_L == encoder.begin).sum() == 1
    assert BEGIN not in record['answer']


def test_a_history_of_n_grams_begins_with_it():
  end, begin = 1, 2
  stream = np.array([begin, 5, 6, end, begin, 7])
  counts = ngrams.NGrams(stream, np.zeros(1, np.int64), 8, [begin, end], 3)
  asked = counts.probabilities(np.array([begin, 7]), np.zeros(1, np.int64))
  inside = counts.probabilities(stream, np.zeros(1, np.int64))
  np.testing.assert_allclose(asked[:, 1], inside[:, 5])
  # A conversation may have none: what precedes its document is no history either.
  assert ngrams.histories(np.array([begin, 5, end, 6, 7]), np.zeros(1, np.int64), [begin, end], 4)[-1] == 2


def test_text_shows_where_documents_meet_that_have_begin_marks_alone(pool):
  encoder = pool.encoder
  a, b = encoder.encode('river'), encoder.encode('stone')
  for between in ([encoder.begin], [encoder.eos], [encoder.eos, encoder.begin]):
    assert pool.text_of(np.array([encoder.begin, *a, *between, *b])) == f'river{END_OF_DOCUMENT}stone'


@pytest.mark.parametrize('writes', [True, False])
def test_a_chat_template_writes_its_own(tmp_path, writes):
  template = (
    '{% for m in messages %}{% generation %}{{ m.content }}' + vocabularies.END + '{% endgeneration %}{% endfor %}'
  )
  path = tokenizer(tmp_path / 'm', chat_template='{{ bos_token }}' * writes + template)
  (tmp_path / 'talk.jsonl').write_text(
    ''.join(json.dumps({'messages': [{'role': 'assistant', 'content': f'Number {i}.'}]}) + '\n' for i in range(30))
  )
  config = small_config(vocabulary=path, sources=(f'jsonl:{tmp_path}/talk.jsonl | messages=messages',), length=32)
  pool = Pool(run_pool(config, tmp_path))
  encoder = pool.encoder
  ids = [of for of in pool.document_tokens(np.arange(30)) if len(of)]  # the others are after the last whole row
  assert len(ids) > 5 and all(
    (of == encoder.begin).sum() == writes and (of[0] == encoder.begin) == writes for of in ids
  )
  text = encoder.chat.render([{'role': 'user', 'content': 'Hi'}])
  ids, _ = Sequences(encoder.templated, 32).pair(text, 'yes')
  assert ids[0] == encoder.begin and (ids == encoder.begin).sum() == 1
  prompt = Sequences(encoder.templated, 32).prompt(text, 4)
  assert prompt[0] == encoder.begin and (prompt == encoder.begin).sum() == 1


def test_a_chat_template_may_write_the_end_mark_first(tmp_path):
  template = '{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}'
  path = tokenizer(tmp_path / 'm', '$A:0', bos_token=vocabularies.END, chat_template=template)  # as OLMo's
  (tmp_path / 'talk.jsonl').write_text(
    ''.join(json.dumps({'messages': [{'role': 'assistant', 'content': f'Number {i}.'}]}) + '\n' for i in range(30))
  )
  config = small_config(vocabulary=path, sources=(f'jsonl:{tmp_path}/talk.jsonl | messages=messages',), length=32)
  pool = Pool(run_pool(config, tmp_path))
  encoder, tokens = pool.encoder, pool.document_tokens([0])[0]
  assert pool.text_of(tokens[:-1], one=True).startswith(f'{vocabularies.END}Number ')
  text = encoder.chat.render([{'role': 'user', 'content': 'Hi'}])
  sequences = Sequences(encoder.templated, 32, begin_with_end_mark=False)
  assert sequences.pair(text, ' yes')[0].tolist() == encoder.templated.encode(f'{text} yes')
  assert sequences.prompt(text, 4)[0] == encoder.eos


@pytest.mark.parametrize('marked', [True, False])
def test_rows_of_ids_say_whether_they_have_it(tmp_path, marked):
  path = tokenizer(tmp_path / 'm')
  encoder = opened(path, tmp_path)
  text = encoder.encode('no such thing')[:7]
  rows = [[encoder.begin if marked else encoder.eos, *text] for _ in range(16)]
  rows.insert(0, [encoder.eos, *text])
  for number, part in enumerate((rows[:1], [], rows[1:])):
    pq.write_table(pa.table({'ids': pa.array(part, pa.list_(pa.int32()))}), tmp_path / f'rows-{number}.parquet')
  sources = (f'tokens:{tmp_path}/rows-*.parquet | text=ids',)
  pool = Pool(run_pool(small_config(vocabulary=path, sources=sources, length=8), tmp_path))
  assert pool.encoder.begin == (encoder.begin if marked else encoder.eos)
  # The exported tokenizer does the same by default, as transformers and lm-evaluation-harness use it.
  (tmp_path / 'out').mkdir()
  ids = tokenizer_files.write(pool.path, tmp_path / 'out', 8)
  assert ids['bos_token_id'] == pool.encoder.begin
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'out/tokenizer.json')).encode('a river').ids
  assert theirs == ([encoder.begin] if marked else []) + encoder.encode('a river')
  if marked:
    assert theirs == Sequences(pool.encoder, 8, begin_with_end_mark=False).pair('a', ' river')[0].tolist()
  about = json.loads((tmp_path / 'out/tokenizer_config.json').read_text())
  assert about['bos_token'] == (BEGIN if marked else vocabularies.END)
  assert chat.read(str(tmp_path / 'out/tokenizer.json')) is None
