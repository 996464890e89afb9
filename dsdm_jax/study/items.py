"""Makes questions of a study from benchmark files in LLM-Foundry's shapes.

Writes `<task>_cloze.jsonl` for each task: its questions, with four answers of other questions to choose from beside the
right one. As targets they give log-probabilities of the right answer, as the original files do, and an accuracy above
zero. Passages of SQuAD are cut to the sentences around the answer and stay one `document`, so that none is on both
sides of a split.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsdm_jax.core import prng, storage
from dsdm_jax.data.targets import shapes
from dsdm_jax.errors import UserError, visible

_FILES = {
  'lambada': 'lambada_openai',
  'squad': 'squad_xquad_en',
  'jeopardy': 'jeopardy_all',
  'trivia_qa': 'triviaqa_sm_sub',
}
_SENTENCE = re.compile(r'(?<=[.!?])\s+')
_DISTRACTORS = 4


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--folder', required=True, help=f'folder of {", ".join(f"{f}.jsonl" for f in _FILES.values())}')
  parser.add_argument('--words', type=int, default=60, help='maximum words of the sentences around an answer')
  parser.add_argument('--seed', type=int, default=0, help='of the answers to choose from')
  parser.add_argument('--out', required=True, help='output folder')


def run(flags: argparse.Namespace) -> None:
  """Writes the files; see the module.

  Raises:
    UserError: a file is missing or malformed.
  """
  out = storage.check_folder(flags.out, '--out')
  for task, name in _FILES.items():
    path = f'{flags.folder}/{name}.jsonl'
    records = [record for _, record in shapes.read_jsonl(path)]
    if task == 'squad':
      records = list(squad(records, flags.words, path))
    elif task == 'trivia_qa':  # of several correct answers the first
      parsed = (shapes.parse(r, shapes.GENERATION, str(i), f'{path}, record {i + 1}') for i, r in enumerate(records))
      records = [{'context': item.context, 'continuation': item.continuation} for item in parsed]
    lines = [json.dumps(record) for record in cloze(records, task, flags.seed)]
    storage.write_text(out / f'{task}_cloze.jsonl', '\n'.join([*lines, '']))
  print(visible(f'items: {out}'))


def squad(records: Sequence[Mapping[str, Any]], words: int, path: str) -> Iterator[dict[str, str]]:
  """Records {context, continuation, document} of SQuAD's own; those whose sentences are longer are left out."""
  for number, record in enumerate(records):
    item = shapes.parse(record, shapes.LANGUAGE_MODELLING, str(number), f'{path}, record {number + 1}')
    if 'question' not in record:
      raise UserError(f'{path}, record {number + 1} has no question; give a file in the fields of SQuAD')
    passage = near(str(record['context']), str(record['question']), item.continuation, words)
    if passage:
      document = hashlib.sha256(item.document.encode()).hexdigest()[:16]
      context = shapes.squad_prompt(passage, str(record['question']))
      yield {'context': context, 'continuation': item.continuation, 'document': document}


def near(passage: str, question: str, answer: str, words: int) -> str:
  """The sentence with the answer, and as many around it as fit in `words`; '' if it does not fit itself.

  Of several sentences with the answer it is the one that has most words of the question.
  """
  sentences = _SENTENCE.split(passage.strip())
  asked = set(question.casefold().split())
  holding = [i for i, sentence in enumerate(sentences) if answer in sentence]
  if not holding:
    return ''
  best = max(holding, key=lambda i: len(asked & set(sentences[i].casefold().split())))
  start, stop = best, best + 1
  count = [len(sentence.split()) for sentence in sentences]
  if count[best] > words:
    return ''
  while True:  # the one before gives what pronouns stand for
    if start and sum(count[start - 1 : stop]) <= words:
      start -= 1
    elif stop < len(sentences) and sum(count[start : stop + 1]) <= words:
      stop += 1
    else:
      return ' '.join(sentences[start:stop])


def cloze(records: Sequence[Mapping[str, Any]], task: str, seed: int) -> list[dict[str, Any]]:
  """Multiple choice records: the right answer among answers of other questions of its category and form."""
  forms: dict[tuple[str, str], set[str]] = {}
  for record in records:
    forms.setdefault(_form(record), set()).add(record['continuation'])
  folded = {form: [(answer, answer.casefold()) for answer in sorted(answers)] for form, answers in forms.items()}
  result = []
  for number, record in enumerate(records):
    answer = record['continuation']
    own = answer.casefold()
    others = [other for other, key in folded[_form(record)] if key != own]
    if len(others) < _DISTRACTORS:
      continue
    rng = prng.numpy_stream(seed, 'study', 'cloze', task, number)
    choices = [others[i] for i in rng.choice(len(others), _DISTRACTORS, replace=False)]
    gold = int(rng.integers(_DISTRACTORS + 1))
    choices.insert(gold, answer)
    kept = {key: record[key] for key in ('category', 'document') if key in record}
    result.append({'query': record['context'], 'choices': choices, 'gold': gold, **kept})
  return result


def _form(record: Mapping[str, Any]) -> tuple[str, str]:
  """What may stand for an answer: its category, and whether it is a number, a name or another word."""
  answer = record['continuation'].strip()
  form = 'number' if any(c.isdigit() for c in answer) else 'name' if answer[:1].isupper() else 'word'
  return str(record.get('category', '')), form
