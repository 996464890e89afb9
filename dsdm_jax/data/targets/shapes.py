"""Items of benchmarks and targets: one type for the four shapes of evaluation files, and parsers of their records.

The shapes are those of LLM-Foundry's JSONL files and of SQuAD's own. Lines end at newline characters only: some records
contain Unicode line separators.
"""

import collections
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dsdm_jax.data import files
from dsdm_jax.data.pool.chat import conversation
from dsdm_jax.errors import UserError

LANGUAGE_MODELLING = 'language_modelling'  # "context", "continuation"; "prompt", "completion"; "messages"
MULTIPLE_CHOICE = 'multiple_choice'  # "query", "choices", "gold"
SCHEMA = 'schema'  # "context_options", "continuation", "gold"
GENERATION = 'generation'  # "context", "answer", "aliases"
SHAPES = (LANGUAGE_MODELLING, MULTIPLE_CHOICE, SCHEMA, GENERATION)
_ANSWERS = 'continuation', 'answer', 'completion'
# White space, invisible characters, and the punctuation that copies of a question differ in. Signs of arithmetic,
# decimal points and brackets stay: they may be all that tells two questions apart.
_IGNORED = re.compile(
  '[.,](?!\\d)|(?<!\\d)[.,]|[\\s;:!?"\'`´‘’‚“”„«»‹›¿¡…。、「」『』\u00ad\u200b-\u200f\u2060\ufeff]+'
)


@dataclasses.dataclass(frozen=True)
class Item:
  """One question of a benchmark.

  Attributes:
    id: unique in its benchmark.
    context: the prompt; '' for a schema, which has `context_options`.
    continuation: the right answer: for multiple choice the gold choice, for generation the first answer.
    choices: answers to choose from (multiple choice), else empty.
    context_options: contexts to choose from (schema), else empty.
    gold: index into `choices` or `context_options`; −1 if there are none.
    aliases: correct answers (generation), including `continuation`; else empty.
    category: results may be averaged per category first; '' for none.
    document: items of one document are never split between target and holdout.
    messages: the conversation as JSON, whose last message is the answer; '' for none. Context and continuation are then
      its text without the marks of a chat template.
    description: text before the shots.
    shots: those that the item's source draws for it, as they are; () to draw others of its benchmark.
    solved: the item as a shot before others; '' for context, answer and a newline.
  """

  id: str
  context: str
  continuation: str
  choices: tuple[str, ...] = ()
  context_options: tuple[str, ...] = ()
  gold: int = -1
  aliases: tuple[str, ...] = ()
  category: str = ''
  document: str = ''
  messages: str = ''
  description: str = ''
  shots: tuple[str, ...] = ()
  solved: str = ''


def read_jsonl(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number from 1, object) for every line that is not blank.

  Raises:
    UserError: the file cannot be read, or a line is not a JSON object in UTF-8; the message names file and line.
  """
  try:
    with files.open_bytes(path) as file:
      for number, line in files.lines(file):
        if not line.strip():
          continue
        try:
          record = files.parse_line(line)
        except files.BadLineError as error:
          raise UserError(f'{path}, line {number}: {error}; each line must be a JSON object in UTF-8') from error
        yield number, record
  except files.READ_ERRORS as error:
    raise UserError(f'{path}: {files.describe(error)}') from error


def shape_of(record: Mapping[str, Any]) -> str | None:
  """The shape of a record by its fields, or None."""
  if 'choices' in record:
    return MULTIPLE_CHOICE
  if 'context_options' in record:
    return SCHEMA
  if 'question' in record or 'aliases' in record:
    return GENERATION if 'aliases' in record else LANGUAGE_MODELLING
  return LANGUAGE_MODELLING if {'continuation', 'answer', 'completion', 'messages'} & set(record) else None


def parse(record: Mapping[str, Any], shape: str, id: str, where: str) -> Item:
  """Parses a record of the shape `shape`.

  Args:
    record: the object.
    shape: one of `SHAPES`.
    id: the item's.
    where: file and line, for messages.

  Raises:
    UserError: a field is missing, empty or of the wrong type.
  """
  fields = _Fields(record, shape, where)
  item = _PARSERS[shape](fields)
  if 'document' in record and not fields.label('document'):
    raise fields.fail('"document" is empty; leave it out for an item without a document')
  document = fields.label('document') or item.document or id
  return dataclasses.replace(item, id=id, category=fields.label('category'), document=document)


@dataclasses.dataclass(frozen=True)
class _Fields:
  record: Mapping[str, Any]
  shape: str
  where: str

  def fail(self, text: str) -> UserError:
    return UserError(f'{self.where}: {text} (shape {self.shape})')

  def text(self, *keys: str, filled: bool = True) -> str:
    for key in keys:
      if key in self.record:
        value = self.record[key]
        if not isinstance(value, str):
          raise self.fail(f'"{key}" must be a string, not {type(value).__name__}')
        if filled and not value.strip():
          raise self.fail(f'"{key}" is empty; fill it in or delete the line')
        return value
    raise self.fail(f'"{keys[0]}" is missing; the fields are {", ".join(sorted(self.record)) or "none"}')

  def texts(self, key: str, least: int) -> tuple[str, ...]:
    value = self.record.get(key)
    if not isinstance(value, list) or len(value) < least or not all(isinstance(v, str) for v in value):
      raise self.fail(f'"{key}" must be a list of at least {least} strings')
    if not all(map(str.strip, value)):
      raise self.fail(f'"{key}" has an empty string; fill it in or delete the line')
    return tuple(value)

  def given(self, *keys: str) -> list[str]:
    """Those of `keys` that the record has, neither null nor blank."""
    values = {key: self.record.get(key) for key in keys}
    return [key for key, x in values.items() if x is not None and not (isinstance(x, str) and not x.strip())]

  def prompt(self, *keys: str) -> tuple[str, str]:
    """(what is asked, with the question where that is a field of its own; the passage of such a question, or '')."""
    given = self.given(*keys)
    if len(given) > 1:
      raise self.fail(f'"{given[0]}" and "{given[1]}" are both there, and the prompt is one field; join their text')
    if not self.given('question'):
      return self.text(*(given or keys), filled=False), ''
    passage, question = self.text(*given, filled=False) if given else '', self.text('question').strip()
    ends = [line.rstrip() for line in passage.rstrip().split('\n')[-2:]]
    if not self.given('answers') and any(line.endswith(question) for line in ends):  # SQuAD's passages never ask
      return passage, ''
    return squad_prompt(passage, question), passage

  def answer(self, *keys: str) -> str:
    given = self.given(*keys)
    if any(self.record[key] != self.record[given[0]] for key in given):
      raise self.fail(f'"{given[0]}" and "{given[1]}" are both there and differ; leave the right answer')
    return self.text(*(given or keys))

  def label(self, key: str) -> str:
    """A name that may be missing, null, NaN or blank: ''. Numbers count as names."""
    value = self.record.get(key)
    if value is None or value != value:
      return ''
    if isinstance(value, bool) or not isinstance(value, str | int | float):
      raise self.fail(f'"{key}" must be a string or a number, not {type(value).__name__}')
    return str(value) if str(value).strip() else ''

  def gold(self, count: int) -> int:
    value = self.record.get('gold')
    if type(value) is not int or not 0 <= value < count:
      raise self.fail(f'"gold" must be the index of the right answer, 0 to {count - 1}, not {value!r}')
    return value


def _language_modelling(fields: _Fields) -> Item:
  if 'messages' in fields.record:
    return _conversation(fields)
  prompt, passage = fields.prompt('context', 'prompt', 'query')
  is_squad = fields.given('question', 'answers') == ['question', 'answers']
  answers = fields.texts('answers', 1) if is_squad else ()
  answer = answers[0] if is_squad and not fields.given(*_ANSWERS) else fields.answer(*_ANSWERS)
  if is_squad and answer not in answers:
    raise fields.fail('the answer is not one of "answers"; leave the right ones')
  return Item('', prompt, answer, document=passage)


def _conversation(fields: _Fields) -> Item:
  try:
    *before, last = conversation(fields.record['messages'])
  except ValueError as error:
    raise fields.fail(f'"messages": {error}') from error
  if last['role'] != 'assistant' or not last['content'].strip():
    raise fields.fail('the last of "messages" must be an answer of the role assistant')
  said = [message['content'] for message in before]
  for key in fields.given('context', 'prompt', 'query', 'question'):  # some datasets repeat the first message there
    if not any(fields.text(key).strip() in content for content in said):
      raise fields.fail(f'"{key}" is there beside "messages", which are the whole prompt; make it a message of its own')
  context = ''.join(f'{message["role"]}: {message["content"]}\n' for message in before)
  return Item('', context, last['content'], messages=json.dumps([*before, last], sort_keys=True))


def _multiple_choice(fields: _Fields) -> Item:
  choices = fields.texts('choices', 2)
  gold = fields.gold(len(choices))
  if fields.record.get('answer') in choices and fields.record['answer'] != choices[gold]:
    raise fields.fail('"answer" is another choice than that of "gold"; correct one of the two')
  prompt, passage = fields.prompt('query', 'context', 'prompt')
  return Item('', prompt, choices[gold], choices=choices, gold=gold, document=passage)


def _schema(fields: _Fields) -> Item:
  options = fields.texts('context_options', 2)
  gold = fields.gold(len(options))
  if unused := fields.given('context', 'prompt', 'query', 'question'):
    raise fields.fail(
      f'"{unused[0]}" is there beside "context_options", which are whole prompts; put its text into each'
    )
  return Item('', '', fields.text('continuation'), context_options=options, gold=gold)


def _generation(fields: _Fields) -> Item:
  answer = fields.answer('answer', 'continuation', 'completion')
  aliases = fields.texts('aliases', 0) if 'aliases' in fields.record else ()
  prompt, passage = fields.prompt('context', 'prompt', 'query')
  return Item('', prompt, answer, aliases=tuple(dict.fromkeys((answer, *aliases))), document=passage)


def content_key(text: str) -> str:
  """`text` without what does not change its content: case, white space, Unicode form, punctuation of sentences."""
  folded = unicodedata.normalize('NFKC', unicodedata.normalize('NFKC', text).casefold())
  return _IGNORED.sub('', folded) or text.strip()


def is_template(count: int, items: int) -> bool:
  """Whether text that `count` of `items` items share is a form that they are asked in, and not what is asked."""
  return count > max(4, 0.75 * items)


def question_keys(items: Sequence[Item]) -> list[str]:
  """A key for what each item asks, equal for equal content.

  It is the normalised context, with the answer where there is no context or nearly all items have the same one.
  """
  keys = [content_key('\n'.join(sorted(item.context_options)) or item.context) for item in items]
  count = collections.Counter(keys)
  return [
    f'{key}\n{content_key(item.continuation)}' if not key or is_template(count[key], len(items)) else key
    for key, item in zip(keys, items, strict=True)
  ]


def squad_prompt(passage: str, question: str) -> str:
  """The prompt of a question, and of its passage if there is one, as in LLM-Foundry's files of SQuAD and TriviaQA."""
  context = f'Context: {passage.strip()}\n' if passage.strip() else ''
  return f'{context}Question: {question.strip()}\nAnswer:'


_PARSERS: Mapping[str, Callable[[_Fields], Item]] = {
  LANGUAGE_MODELLING: _language_modelling,
  MULTIPLE_CHOICE: _multiple_choice,
  SCHEMA: _schema,
  GENERATION: _generation,
}
