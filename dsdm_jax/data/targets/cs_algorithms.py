"""Two generated algorithm tasks, after the description of BIG-bench's cs_algorithms: own wording, own items.

Longest common subsequence: two strings of capitals, the answer is a length. Bracket validity: a sequence of (, [, {
and their partners, the answer is Valid or Invalid. Answers are balanced, and valid and invalid sequences are equally
long.
"""

import dataclasses

import numpy as np

from dsdm_jax.core import prng

LCS_ANSWERS = (1, 2, 3, 4, 5)
_PAIRS = {'(': ')', '[': ']', '{': '}'}
_LENGTHS = (4, 6, 8, 10, 12)


@dataclasses.dataclass(frozen=True)
class Item:
  context: str
  answer: str


def longest_common_subsequence(first: str, second: str) -> int:
  """Length of the longest string that both contain with gaps allowed."""
  best = [0] * (len(second) + 1)
  for a in first:
    diagonal = 0
    for j, b in enumerate(second, 1):
      diagonal, best[j] = best[j], diagonal + 1 if a == b else max(best[j], best[j - 1])
  return best[-1]


def brackets_valid(sequence: str) -> bool:
  """Whether each bracket is closed by its partner, inside out."""
  closers: list[str] = []
  for c in sequence:
    if c in _PAIRS:
      closers.append(_PAIRS[c])
    elif not closers or closers.pop() != c:
      return False
  return not closers


def _letters(rng: np.random.Generator) -> str:
  alphabet = list('ABCDEFGHIJKLMNOPQRSTUVWXYZ')
  chosen = rng.choice(alphabet, size=rng.integers(3, 7), replace=False)
  return ''.join(rng.choice(chosen, size=rng.integers(5, 11)))


def _lcs(rng: np.random.Generator, answer: int) -> Item:
  while True:
    first = _letters(rng)
    # A shuffled and padded relative of the first string: unrelated ones have too little in common.
    second = ''.join(rng.permutation(list(first + _letters(rng)))[: rng.integers(5, 11)])
    if longest_common_subsequence(first, second) == answer:
      context = f'Strings: {first} and {second}\nQuestion: How long is their longest common subsequence?\nAnswer:'
      return Item(context, str(answer))


def _balanced(rng: np.random.Generator, length: int) -> str:
  """A valid sequence: at each place either opens or closes, as far as the rest of the length allows."""
  opened: list[str] = []
  text = ''
  while len(text) < length:
    must_open, must_close = not opened, len(opened) == length - len(text)
    if must_open or (not must_close and rng.random() < 0.5):
      opened.append(str(rng.choice(list(_PAIRS))))
      text += opened[-1]
    else:
      text += _PAIRS[opened.pop()]
  return text


def _brackets(rng: np.random.Generator, valid: bool) -> Item:
  length = int(rng.choice(_LENGTHS))
  while True:
    text = list(_balanced(rng, length))
    if not valid:
      # Mixed up or with one bracket changed, so that neither length nor mere counts give the answer away.
      if rng.random() < 0.5:
        text = list(rng.permutation(text))
      else:
        text[rng.integers(len(text))] = str(rng.choice(list('()[]{}')))
    sequence = ''.join(text)
    if brackets_valid(sequence) == valid:
      context = f'Brackets: {" ".join(sequence)}\nQuestion: Is every bracket closed in order?\nAnswer:'
      return Item(context, 'Valid' if valid else 'Invalid')


def generate(count: int, seed: int) -> list[Item]:
  """`count` different items: subsequences and brackets in turn, answers in turn within each.

  A longer list begins with the shorter one of the same seed.
  """
  rng = prng.numpy_stream(seed, 'cs_algorithms')
  items: list[Item] = []
  seen: set[str] = set()
  while len(items) < count:
    turn = len(items) // 2
    if len(items) % 2 == 0:
      item = _lcs(rng, LCS_ANSWERS[turn % len(LCS_ANSWERS)])
    else:
      item = _brackets(rng, turn % 2 == 0)
    if item.context not in seen:
      seen.add(item.context)
      items.append(item)
  return items
