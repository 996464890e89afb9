"""Conversations as text: a tokenizer's own chat template, a Jinja template that runs in a sandbox.

The template and the special pieces that it names come from the files beside a tokenizer.json: `chat_template.jinja`, or
`chat_template` in `tokenizer_config.json`. It renders as in Hugging Face's transformers, except that it has no clock:
templates that write the date fall back to a fixed one, so that the same documents give the same rows on any day.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsdm_jax.data import files
from dsdm_jax.errors import UserError

FILE = 'chat.json'  # in a pool's folder: the template and its variables
BESIDE = ('chat_template.jinja', 'tokenizer_config.json')  # of a tokenizer.json
_LARGEST = 2**20  # characters of a template
_PIECES = ('bos_token', 'eos_token', 'unk_token', 'pad_token', 'sep_token', 'cls_token', 'mask_token')
NO_TEMPLATE = (
  'a conversation needs a chat template, and pool.vocabulary has none; give the tokenizer.json of a model with a '
  'chat_template.jinja beside it'
)
Spans = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Chat:
  """A chat template.

  Attributes:
    template: its source.
    variables: special pieces by name, such as `bos_token`.
  """

  template: str
  variables: tuple[tuple[str, str], ...]

  def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str:
    """The text of a conversation; `prompt` adds what precedes an answer.

    Raises:
      ValueError: the template refuses it, or fails.
    """
    return self._render(messages, prompt, ('', ''))

  def _render(self, messages: Sequence[Mapping[str, Any]], prompt: bool, marks: tuple[str, str]) -> str:
    compiled = _compiled(self.template)
    try:
      return compiled.render(
        messages=messages,
        add_generation_prompt=prompt,
        generation_marks=marks,
        tools=None,
        documents=None,
        **dict(self.variables),
      )
    except Exception as error:  # a boundary: templates fail in their own ways
      raise ValueError(f'the chat template fails on it ({files.one_line(error)})') from error

  def document(self, messages: Any) -> tuple[str, Spans]:
    """(text, spans of the characters that the assistant wrote) of a whole conversation.

    A template that marks them by {% generation %} says where they are. Otherwise an answer is what the text gains when
    its message is added after the prompt for it, with the marks that end it.

    Raises:
      ValueError: this is no conversation, it has no answer, or the template fails on it or rewrites earlier messages.
    """
    listed = conversation(messages)
    if _compiled(self.template).has_generation:
      return _marked(lambda marks: self._render(listed, False, marks))
    text, spans = self.render(listed), []
    for index, message in enumerate(listed):
      if message['role'] != 'assistant':
        continue
      before, after = self.render(listed[:index], prompt=True), self.render(listed[: index + 1])
      if not (after.startswith(before) and text.startswith(after)):
        raise ValueError(
          f'the chat template writes what precedes message {index + 1} in another way when more follows; mark answers '
          'in the template with {% generation %}'
        )
      spans.append((len(before), len(after)))
    return text, tuple(spans)

  def pair(self, messages: Any) -> tuple[str, str]:
    """(prompt, answer): the last message, which the assistant wrote, and all before it.

    Raises:
      ValueError: as `document`; or the last message is not the assistant's.
    """
    listed = conversation(messages)
    if listed[-1]['role'] != 'assistant':
      raise ValueError('its last message is not of the role assistant')
    prompt, whole = self.render(listed[:-1], prompt=True), self.render(listed)
    if not whole.startswith(prompt):
      raise ValueError('the chat template writes earlier messages in another way when the answer follows')
    return prompt, whole[len(prompt) :]


def conversation(messages: Any) -> list[dict[str, Any]]:
  """`messages` as a list of objects without null fields.

  Raises:
    ValueError: it is none, a message has no role or content, or none is the assistant's.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
    raise ValueError(f'it is {type(messages).__name__}, not a list of messages' if messages else 'it has no messages')
  listed = []
  for number, message in enumerate(messages, 1):
    if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
      raise ValueError(f'message {number} is no object with a "role" and a "content"')
    if not isinstance(message.get('content'), str):
      raise ValueError(f'"content" of message {number} is {type(message.get("content")).__name__}, not text')
    listed.append({key: value for key, value in message.items() if value is not None})
  if not any(message['role'] == 'assistant' for message in listed):
    raise ValueError('no message is of the role assistant, and the loss is on these alone')
  return listed


def _marked(render: Callable[[tuple[str, str]], str]) -> tuple[str, Spans]:
  """Text and spans of a template with {% generation %} blocks, which it renders between two marks."""
  plain = render(('', ''))
  # Characters of private use that the text does not have.
  marks = tuple([chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in plain][:2])
  if len(marks) < 2:
    raise ValueError('it has all characters of private use')
  parts: list[str] = []
  spans = []
  for part in render((marks[0], marks[1])).split(marks[0]):
    if parts:
      inside, _, after = part.partition(marks[1])
      begin = sum(map(len, parts))
      spans.append((begin, begin + len(inside)))
      part = inside + after
    parts.append(part)
  return ''.join(parts), tuple(spans)


@functools.lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
  """The template in the sandbox of transformers: no attributes that change anything, and no access to Python.

  Its attribute `has_generation` says whether it has {% generation %} blocks.
  """
  import jinja2
  import jinja2.ext
  import jinja2.nodes
  import jinja2.sandbox

  has_generation = False

  class Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: what the assistant writes."""

    tags = {'generation'}  # noqa: RUF012  as Jinja wants it

    def parse(self, parser: Any) -> Any:
      nonlocal has_generation
      has_generation = True
      line = next(parser.stream).lineno
      body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
      marks = jinja2.nodes.Name('generation_marks', 'load')
      return jinja2.nodes.CallBlock(self.call_method('_between', [marks]), [], [], body).set_lineno(line)

    def _between(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
      return f'{marks[0]}{caller()}{marks[1]}'

  def fail(message: str) -> None:
    raise jinja2.TemplateError(message)

  def as_json(x: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **more)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(  # the result is text, not HTML
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
  )
  environment.filters['tojson'] = as_json
  environment.globals['raise_exception'] = fail
  compiled: Any = environment.from_string(template)
  compiled.has_generation = has_generation  # set while it was parsed
  return compiled


def read(vocabulary: str) -> Chat | None:
  """The chat template beside the file of `pool.vocabulary`; None if there is none.

  Raises:
    UserError: a file is malformed, or the template is no Jinja.
  """
  if not vocabulary.endswith('.json'):
    return None
  folder = vocabulary[: vocabulary.rfind('/') + 1]
  try:
    options = json.loads(files.read_bytes(folder + BESIDE[1])) if files.is_file(folder + BESIDE[1]) else {}
    template = options.get('chat_template')
    if isinstance(template, list):  # several, by name
      template = next((part.get('template') for part in template if part.get('name') == 'default'), None)
    if files.is_file(folder + BESIDE[0]):
      template = files.read_bytes(folder + BESIDE[0]).decode()
    if template is None:
      return None
    if not isinstance(template, str) or len(template) > _LARGEST:
      raise ValueError(f'"chat_template" is {type(template).__name__} and not text of at most {_LARGEST:,} characters')
    named = {name: options.get(name) for name in _PIECES}
    pieces = {name: piece.get('content') if isinstance(piece, dict) else piece for name, piece in named.items()}
    chat = Chat(template, tuple((name, piece) for name, piece in pieces.items() if isinstance(piece, str)))
    _compiled(template)
  except files.READ_ERRORS as error:
    raise UserError(f'pool.vocabulary = {vocabulary!r}: {files.describe(error)}') from error
  except Exception as error:  # a boundary: of JSON, Unicode and Jinja
    raise UserError(
      f'pool.vocabulary = {vocabulary!r}: its chat template cannot be read ({files.one_line(error)}); correct the file'
    ) from error
  return chat


def to_json(chat: Chat) -> dict[str, Any]:
  """What `FILE` holds."""
  return {'template': chat.template, 'variables': dict(chat.variables)}


def of_json(values: Mapping[str, Any]) -> Chat:
  return Chat(values['template'], tuple(values['variables'].items()))
