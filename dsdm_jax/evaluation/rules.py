"""Scoring rules: from the log-probabilities of answers to what counts as right.

Primary are LLM-Foundry's rules; beside them stand lm-evaluation-harness's `acc` (highest summed log-probability) and
`acc_norm` (highest per character of the choice). A *pair* is one way an item's text may go on: a context and an answer.
"""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a model gives to the answers of all pairs.

  Attributes:
    total_P: sum over the answer's tokens of log p(token | everything before it), nats.
    greedy_P: bool, every token of the answer is the argmax.
    count_P: tokens of the answer, at least 1.
  """

  total_P: np.ndarray
  greedy_P: np.ndarray
  count_P: np.ndarray

  @property
  def mean_P(self) -> np.ndarray:
    return self.total_P.astype(np.float64) / self.count_P


def exact_argmax(answers: Answers) -> dict[str, np.ndarray]:
  """Language modelling, a pair for each item: right where the argmax is right at every token, teacher-forced."""
  return {'logprob': answers.mean_P, 'accuracy': answers.greedy_P.astype(np.float64)}


def lowest_cross_entropy(
  answers: Answers, item_P: np.ndarray, gold_I: np.ndarray, characters_P: np.ndarray
) -> dict[str, np.ndarray]:
  """Multiple choice and schemas: right where the gold pair has the lowest mean cross-entropy a token.

  Of equals the first counts as chosen, in all three rules.

  Args:
    answers: of all pairs; a schema's pairs have one answer after several contexts.
    item_P: the item of each pair, from 0, not decreasing.
    gold_I: the pair (index into P) that is right.
    characters_P: length of each answer without the white space in front.

  Returns:
    'logprob' of the gold pair (mean a token), 'accuracy', 'acc' and 'acc_norm', each float64 [I].
  """
  rules = {
    'accuracy': answers.mean_P,
    'acc': answers.total_P.astype(np.float64),
    'acc_norm': answers.total_P.astype(np.float64) / np.maximum(characters_P, 1),
  }
  right = {name: (_best(value_P, item_P) == gold_I).astype(np.float64) for name, value_P in rules.items()}
  return {'logprob': answers.mean_P[gold_I], **right}


def _best(value_P: np.ndarray, item_P: np.ndarray) -> np.ndarray:
  """The first pair of highest value of each item."""
  order_P = np.lexsort((np.arange(len(value_P)), -value_P, item_P))
  first_P = np.concatenate([[True], np.diff(item_P[order_P]) > 0])
  return order_P[first_P]


_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + '‘’´`', ' '))


def normalized(text: str) -> str:
  """Lower case, without punctuation, the articles a, an, the, and runs of white space: as TriviaQA compares answers."""
  words = text.lower().translate(_PUNCTUATION).split()
  return ' '.join(word for word in words if not re.fullmatch('a|an|the', word))


def alias_prefix(outputs: Sequence[str], aliases: Sequence[Sequence[str]]) -> np.ndarray:
  """Generation: 1 where the normalised output begins with a normalised alias, float64 [I]; empty ones never."""
  return np.array([
    any(normalized(output).startswith(known) for alias in known_I if (known := normalized(alias)))
    for output, known_I in zip(outputs, aliases, strict=True)
  ], np.float64)  # fmt: skip


METRICS: Mapping[str, str] = {
  'logprob': 'mean over the right answer\'s tokens of log p, nats; higher is better',
  'accuracy': 'share of right items by the rule of the task',
  'acc': 'share of items whose right choice has the highest summed log-probability (lm-evaluation-harness)',
  'acc_norm': 'the same per character of the choice (lm-evaluation-harness)',
}  # fmt: skip
