"""Benchmarks in TFDS: for each dataset a function from a record to the items it holds.

Prepared datasets in ArrayRecord and TFRecord files can be read. Nothing is downloaded; `prepare_command` is the command
that downloads and prepares a dataset.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dsdm_jax.core import tensorflow_start
from dsdm_jax.data import files
from dsdm_jax.data.targets.shapes import Item, squad_prompt
from dsdm_jax.errors import UserError


def read(name: str, data_dir: str | None = None) -> Iterator[Item]:
  """Items of the dataset 'dataset/config:split'.

  Raises:
    UserError: the dataset is not prepared, has no such split, or there is no reader for it.
  """
  dataset, _, split = name.partition(':')
  convert = READERS.get(dataset)
  if convert is None:
    raise UserError(f'no reader for the TFDS dataset {dataset!r}; there are readers for {", ".join(READERS)}')
  builder = _prepared(dataset, data_dir)
  if builder is None:
    raise UserError(
      f'the TFDS dataset {dataset} is not prepared in {data_dir or "~/tensorflow_datasets"}; with network '
      f'access run: {prepare_command(dataset, data_dir)}'
    )
  if split in builder.info.splits and (missing := missing_files(builder, split)):
    raise UserError(f'{missing[0]} is missing, though dataset_info.json lists it; prepare {dataset} again')
  if split not in builder.info.splits:
    raise UserError(
      f'the TFDS dataset {dataset} in {builder.data_dir} has no split {split}, only '
      f'{", ".join(builder.info.splits) or "none"}; prepare it again with that split'
    )
  try:
    for index, record in enumerate(records(builder, split)):
      yield from convert(f'{split}/{index}', record)
  except OSError as error:
    raise UserError(f'the TFDS dataset {dataset} in {builder.data_dir}: {error}; prepare it again') from error


def is_prepared(name: str, data_dir: str | None = None) -> bool:
  """Whether the dataset 'dataset/config:split' is prepared in `data_dir` or TFDS's default folder."""
  return _prepared(name.partition(':')[0], data_dir) is not None


@contextlib.contextmanager
def no_foreign_classes() -> Iterator[None]:
  """Keeps TFDS from importing the modules that a dataset's `features.json` names, except its own.

  Raises:
    UserError: the file names a class of another package that the program has not imported.
  """
  tensorflow_start.start()
  from tensorflow_datasets.core.features.feature import FeatureConnector

  by_name = FeatureConnector.__dict__['cls_from_name']

  def own(cls: type, name: Any) -> Any:
    if name not in cls._registered_features and not str(name).startswith('tensorflow_datasets.'):  # type: ignore[attr-defined]
      raise UserError(f'features.json of a TFDS dataset names the class {name}; a dataset must not bring code')
    return by_name.__func__(cls, name)

  FeatureConnector.cls_from_name = classmethod(own)
  try:
    yield
  finally:
    FeatureConnector.cls_from_name = by_name


def _prepared(dataset: str, data_dir: str | None) -> Any:
  tensorflow_start.start()
  import tensorflow_datasets as tfds

  try:
    with no_foreign_classes():
      builder = tfds.builder(dataset, data_dir=data_dir, try_gcs=False)
      return builder if builder.is_prepared() else None
  except (tfds.core.DatasetNotFoundError, FileNotFoundError):
    return None


def prepare_command(name: str, data_dir: str | None = None) -> str:
  """The command that prepares a dataset; TFDS's own `tfds build` needs apache_beam."""
  where = f', data_dir={data_dir!r}' if data_dir else ''
  return f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where}).download_and_prepare()"'


def missing_files(builder: Any, split: str) -> list[str]:
  """Files of a split that `dataset_info.json` lists and that do not exist."""
  return [str(path) for path in builder.info.splits[split].filepaths if not path.exists()]


def records(builder: Any, split: str) -> Iterator[Mapping[str, Any]]:
  """Records of a split, or of a part such as 'train[5:9]', in the order of the files that `dataset_info.json` lists.

  Raises:
    OSError: the files cannot be read, or hold another number of records than `dataset_info.json` says.
  """
  import tensorflow_datasets as tfds

  number = 0
  packed = 'array_record' in str(builder.info.file_format).lower()
  if packed:
    _check_array_records(builder.info.splits[split].file_instructions)
  try:
    # tf.data cannot read ArrayRecord, and as_data_source cannot read TFRecord.
    if packed:
      found = iter(builder.as_data_source(split=split))
    else:
      # By default TFDS takes records from 16 files in turn.
      order = tfds.ReadConfig(interleave_cycle_length=1)
      found = iter(tfds.as_numpy(builder.as_dataset(split=split, shuffle_files=False, read_config=order)))
    for record in found:
      number += 1
      yield record
  except UserError:
    raise
  except Exception as error:  # of TensorFlow, array_record and TFDS
    raise OSError(files.one_line(error)) from error
  wanted = builder.info.splits[split].num_examples
  if number != wanted:
    raise OSError(f'{number:,} records, but dataset_info.json says {wanted:,}')


def _check_array_records(shards: Iterable[Any]) -> None:
  """Compares numbers of records: of a file that ends at a block's edge, array_record gives empty records."""
  from array_record.python import array_record_module

  for file in shards:
    name, wanted = os.path.basename(file.filename), file.examples_in_shard
    number = array_record_module.ArrayRecordReader(str(file.filename)).num_records()  # 0 if it cannot be read
    if number != wanted:
      raise OSError(f'{name} is truncated: {number:,} records, but dataset_info.json says {wanted:,}')


def _text(value: Any) -> str:
  return value.decode() if isinstance(value, bytes) else str(value)


def _texts(values: Any) -> list[str]:
  return [_text(value) for value in values]


def _choice(id: str, query: str, choices: list[str], gold: int) -> Iterator[Item]:
  if 0 <= gold < len(choices):  # test splits without answers have −1
    yield Item(id, query, choices[gold], choices=tuple(choices), gold=gold, document=id)


def _lambada(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  context, _, word = _text(record['passage']).strip().rpartition(' ')
  yield Item(id, context, word, document=id)


def _squad(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  prompt = squad_prompt(_text(record['context']), _text(record['question']))
  answers = _texts(record['answers']['text'])
  if answers:
    yield Item(id, prompt, answers[0], document=_text(record['title']))


def _trivia_qa(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  answer = _text(record['answer']['value'])
  aliases = tuple(dict.fromkeys((answer, *_texts(record['answer']['aliases']))))
  yield Item(id, f'Question: {_text(record["question"])}\nAnswer:', answer, aliases=aliases, document=id)


def _piqa(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  choices = [_text(record['sol1']), _text(record['sol2'])]
  yield from _choice(id, f'Question: {_text(record["goal"])}', choices, int(record['label']))


def _hellaswag(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  context = f'{_text(record["activity_label"])}: {_text(record["context"])}'
  yield from _choice(id, context, _texts(record['endings']), int(record['label']))


def _winogrande(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  before, _, after = _text(record['sentence']).partition('_')
  options = tuple(before + _text(record[key]) for key in ('option1', 'option2'))
  gold = int(record['label'])
  if gold >= 0 and after.strip():
    yield Item(id, '', after.strip(), context_options=options, gold=gold, document=id)


def _bool_q(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  query = f'Passage: {_text(record["passage"])}\nQuestion: {_text(record["question"])}?'
  yield from _choice(id, query, ['no', 'yes'], int(bool(record['answer'])))


def _openbookqa(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  question = record['question']
  choices = [_text(question[f'choice_{letter}']) for letter in 'ABCD']
  yield from _choice(id, _text(question['stem']), choices, int(record['answerKey']))


def _coqa(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  """One item a question; earlier questions and answers are in the prompt."""
  prompt = f'Passage: {_text(record["story"])}'
  answers = _texts(record['answers']['input_text'])
  for turn, (question, answer) in enumerate(zip(_texts(record['questions']), answers, strict=True)):
    prompt += f'\nQuestion: {question}\nAnswer:'
    if answer.strip():
      yield Item(f'{id}/{turn}', prompt, answer, document=id)
    prompt += f' {answer}'


def _arc(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  labels = [int(label) for label in record['choices']['label']]
  key = int(record['answerKey'])
  gold = labels.index(key) if key in labels else -1
  yield from _choice(id, f'Question: {_text(record["question"])}', _texts(record['choices']['text']), gold)


def _copa(id: str, record: Mapping[str, Any]) -> Iterator[Item]:
  joined = {'cause': 'because', 'effect': 'therefore'}[_text(record['question'])]
  choices = [_text(record[key]) for key in ('choice1', 'choice2')]
  choices = [choice[:1].lower() + choice[1:] for choice in choices]
  query = f'{_text(record["premise"]).strip().rstrip(".")} {joined}'
  yield from _choice(id, query, choices, int(record['label']))


READERS: Mapping[str, Callable[[str, Mapping[str, Any]], Iterator[Item]]] = {
  'lambada': _lambada,
  'squad': _squad,
  'trivia_qa/rc.nocontext': _trivia_qa,
  'piqa': _piqa,
  'hellaswag': _hellaswag,
  'winogrande': _winogrande,
  'bool_q': _bool_q,
  'openbookqa': _openbookqa,
  'coqa': _coqa,
  'ai2_arc/ARC-Easy': _arc,
  'ai2_arc/ARC-Challenge': _arc,
  'super_glue/copa': _copa,
}
