"""Scoring: from a model to the log-probabilities of answers, and from these to whether an item is right.

The main rules are LLM-Foundry's. Choices are also scored with lm-evaluation-harness's `acc` (highest summed
log-probability) and `acc_norm` (highest log-probability per character of the choice). A *pair* is a context and an
answer: one way in which an item's text can continue.
"""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.core import flops
from dsdm_jax.core.mesh import fetch, place
from dsdm_jax.evaluation.suite import Request, Suite
from dsdm_jax.lm.decoder import Decoder
from dsdm_jax.lm.decoding import greedy
from dsdm_jax.training.step import Trainer, TrainState

METRICS: Mapping[str, str] = {
  'logprob': "mean over the right answer's tokens of log p, nats; higher is better",
  'accuracy': 'share of right items by the rule of the task',
  'acc': 'share of items whose right choice has the highest summed log-probability (lm-evaluation-harness)',
  'acc_norm': 'the same per character of the choice (lm-evaluation-harness)',
}


@dataclasses.dataclass(frozen=True)
class Answers:
  """The log-probabilities that a model gives to the answers of all pairs.

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
  """Language modelling, one pair per item: right if the argmax is right at every token, teacher-forced."""
  return {'logprob': answers.mean_P, 'accuracy': answers.greedy_P.astype(np.float64)}


def lowest_cross_entropy(
  answers: Answers, item_P: np.ndarray, gold_I: np.ndarray, characters_P: np.ndarray
) -> dict[str, np.ndarray]:
  """Multiple choice and schemas: right if the gold pair has the lowest mean cross-entropy per token.

  All three rules break ties in favour of the first pair.

  Args:
    answers: of all pairs; the pairs of a schema have the same answer after different contexts.
    item_P: the item of each pair, from 0, not decreasing.
    gold_I: the right pair of each item (index into P).
    characters_P: length of each answer without its leading white space.

  Returns:
    'logprob' of the gold pair (mean per token), 'accuracy', 'acc' and 'acc_norm', each float64 [I].
  """
  rules = {
    'accuracy': answers.mean_P,
    'acc': answers.total_P.astype(np.float64),
    'acc_norm': answers.total_P.astype(np.float64) / np.maximum(characters_P, 1),
  }
  right = {name: (_best(value_P, item_P) == gold_I).astype(np.float64) for name, value_P in rules.items()}
  return {'logprob': answers.mean_P[gold_I], **right}


def _best(value_P: np.ndarray, item_P: np.ndarray) -> np.ndarray:
  """The pair with the highest value of each item; the first of equals."""
  order_P = np.lexsort((np.arange(len(value_P)), -value_P, item_P))
  first_P = np.concatenate([[True], np.diff(item_P[order_P]) > 0])
  return order_P[first_P]


_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + '‘’´`', ' '))


def normalized(text: str) -> str:
  """TriviaQA's normal form: lower case, without punctuation and the articles a, an, the; single spaces."""
  words = text.lower().translate(_PUNCTUATION).split()
  return ' '.join(word for word in words if not re.fullmatch('a|an|the', word))


def alias_prefix(outputs: Sequence[str], aliases: Sequence[Sequence[str]]) -> np.ndarray:
  """Generation: 1 if the normalised output begins with a normalised alias that is not empty, float64 [I].

  Where all aliases of an item are empty in the normal form (A, %), the output must begin with one in lower case, and a
  letter or digit of it must end there.
  """

  def is_right(output: str, own: Sequence[str]) -> bool:
    prefixes = [prefix for alias in own if (prefix := normalized(alias))]
    said = output.strip().lower()
    if prefixes:
      return normalized(output).startswith(tuple(prefixes))
    wanted = [alias.strip().lower() for alias in own]
    return any(re.match(rf'{re.escape(x)}(?!\w)' if x[-1].isalnum() else re.escape(x), said) for x in wanted)

  return np.array([is_right(*pair) for pair in zip(outputs, aliases, strict=True)], np.float64)


class Scorer:
  """Compiled scoring of batches for one model shape.

  A sequence is padded to a length that depends on it alone, and every batch has `batch_size` rows. So an item's score
  does not depend on the other items.

  Args:
    trainer: of the model.
    batch_size: rows of every batch.
    pad: id that pads sequences at their end.

  Attributes:
    flop: floating-point operations so far, including padding.
  """

  def __init__(self, trainer: Trainer, batch_size: int, pad: int):
    self._trainer, self._batch_size, self._pad = trainer, batch_size, pad
    batch = trainer.batch_sharding
    self._shardings = (trainer.shardings.params, trainer.shardings.rest)
    self._step = jax.jit(self.apply, in_shardings=(*self._shardings, batch, batch), out_shardings=batch)
    self.flop = 0.0

  def apply(
    self, params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, place_BA: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Scores the tokens at positions `place_BA`, each given all tokens before it; position 0 is padding.

    Returns:
      (summed log-probability, whether the argmax is right at every position), float32 and bool [B].
    """
    model = nnx.merge(self._trainer.graphdef, params, rest)
    before_BA1 = jnp.maximum(place_BA - 1, 0)[..., None]
    # Logits are by far the largest array of the model, and only a few of them are needed.
    if isinstance(model, Decoder):
      logits_BAV = model.logits(jnp.take_along_axis(model.residual(tokens_BL), before_BA1, axis=1))
    else:
      logits_BAV = jnp.take_along_axis(model(tokens_BL), before_BA1, axis=1).astype(jnp.float32)
    token_BA = jnp.take_along_axis(tokens_BL, place_BA, axis=1)
    right_BA = jnp.take_along_axis(logits_BAV, token_BA[..., None], axis=-1)[..., 0]
    logprob_BA = right_BA - jax.nn.logsumexp(logits_BAV, axis=-1)
    scored_BA = place_BA > 0
    hit_BA = jnp.argmax(logits_BAV, axis=-1) == token_BA
    return jnp.sum(jnp.where(scored_BA, logprob_BA, 0.0), axis=1), jnp.all(hit_BA | ~scored_BA, axis=1)

  def score(self, state: TrainState, tokens_IL: np.ndarray, weights_IL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logprob_I, accuracy_I) over the tokens of weight 1: mean in nats, and whether all are the argmax; float32."""
    places = [np.flatnonzero(weights_L) for weights_L in weights_IL]
    total_I, greedy_I = self._totals(state, list(tokens_IL), places, tokens_IL.shape[1])
    return total_I / np.maximum(weights_IL.sum(axis=1), 1), greedy_I.astype(np.float32)

  def answers(self, state: TrainState, ids_P: Sequence[np.ndarray], count_P: np.ndarray, length: int) -> Answers:
    """Scores the last `count_P` tokens of sequences of at most `length` tokens."""
    places = [np.arange(len(ids) - count, len(ids)) for ids, count in zip(ids_P, count_P, strict=True)]
    return Answers(*self._totals(state, ids_P, places, length), np.asarray(count_P))

  def _totals(
    self, state: TrainState, ids_P: Sequence[np.ndarray], places: Sequence[np.ndarray], length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    total_P, greedy_P = np.zeros(len(ids_P), np.float32), np.zeros(len(ids_P), bool)
    width_P = _widths([len(ids) for ids in ids_P], [-(-length * part // 4) for part in range(1, 5)])
    # No more places than the sequence has: logits of padding cost as much as those of an answer.
    scored_P = np.minimum(_widths([len(place) for place in places], [8**power for power in range(1, 9)]), width_P)
    for width, scored in sorted(set(zip(width_P, scored_P, strict=True))):
      group = np.flatnonzero((width_P == width) & (scored_P == scored))
      arrays = (
        _padded([ids_P[i] for i in group.tolist()], width, self._pad),
        _padded([places[i] for i in group.tolist()], scored, 0),
      )
      total_P[group], greedy_P[group] = self._batched(self._step, state, arrays)
    return total_P, greedy_P

  def generate(
    self, state: TrainState, prompts_I: Sequence[np.ndarray], steps: int, length: int, stop_V: np.ndarray
  ) -> list[np.ndarray]:
    """At most `steps` greedy tokens after each prompt of at most `length` − `steps` tokens; see `lm.decoding`."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts_I)
    size_I = np.array([len(ids) for ids in prompts_I], np.int32)
    width_I = _widths(size_I, [-(-(length - steps) * part // 4) for part in range(1, 5)])
    for width in np.unique(width_I):
      group = np.flatnonzero(width_I == width)
      arrays = (_padded([prompts_I[i] for i in group.tolist()], width, self._pad), size_I[group])
      (ids_IN,) = self._batched(self._greedy(steps), state, arrays, np.asarray(stop_V))
      for index, ids_N in zip(group.tolist(), ids_IN, strict=True):
        outputs[index] = ids_N
    return outputs

  @functools.lru_cache(maxsize=4)  # noqa: B019  a Scorer lives only as long as its stage
  def _greedy(self, steps: int) -> Callable[..., tuple[jax.Array]]:
    def run(
      params: nnx.State, rest: nnx.State, tokens_BL: jax.Array, length_B: jax.Array, stop_V: jax.Array
    ) -> tuple[jax.Array]:
      model = nnx.merge(self._trainer.graphdef, params, rest)
      return (greedy(model, tokens_BL, length_B, steps, stop_V),)

    batch = self._trainer.batch_sharding
    return jax.jit(run, in_shardings=(*self._shardings, batch, batch, None), out_shardings=(batch,))

  def _batched(
    self,
    run: Callable[..., tuple[jax.Array, ...]],
    state: TrainState,
    arrays: tuple[np.ndarray, ...],
    *more: np.ndarray,
  ) -> list[np.ndarray]:
    """Calls `run` on batches, pads the last batch with copies of its first row, and joins the results."""
    count = len(arrays[0])
    batches = list(self._batches(arrays))
    self.flop += flops.count(run, state.params, state.rest, *batches[0], *more) * len(batches)
    parts = [
      fetch(run(state.params, state.rest, *place(batch, self._trainer.batch_sharding), *more)) for batch in batches
    ]
    return [np.concatenate(column)[:count] for column in zip(*parts, strict=True)]

  def _batches(self, arrays: tuple[np.ndarray, ...]) -> Iterator[tuple[np.ndarray, ...]]:
    for start in range(0, len(arrays[0]), self._batch_size):
      parts = tuple(x[start : start + self._batch_size] for x in arrays)
      missing = self._batch_size - len(parts[0])
      yield tuple(np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in parts)


def _widths(sizes: Sequence[int] | np.ndarray, steps: Sequence[int]) -> np.ndarray:
  """The padded size of each size: the first of the rising `steps` that is large enough."""
  steps_ = np.unique(np.maximum(steps, 2))
  return steps_[np.searchsorted(steps_, sizes)]


def _padded(rows: Sequence[np.ndarray], width: int, fill: int) -> np.ndarray:
  table = np.full((len(rows), width), fill, np.int32)
  for index, row in enumerate(rows):
    table[index, : len(row)] = row
  return table


def score_request(
  scorer: Scorer,
  state: TrainState,
  request: Request,
  length: int,
  generate: int,
  stop_V: np.ndarray,
  decode: Callable[[np.ndarray], str],
) -> tuple[dict[str, np.ndarray], list[str]]:
  """(metric → float64 [items], generated texts) of one model on one benchmark.

  Args:
    scorer: of the model's shape.
    state: the model.
    request: see `suite.build`.
    length: L, positions of the model.
    generate: maximum number of tokens of a generated answer.
    stop_V: bool, tokens that end a generated answer.
    decode: ids → text.
  """
  answers = scorer.answers(state, request.ids_P, request.count_P, length)
  if request.is_choice:
    return lowest_cross_entropy(answers, request.item_P, request.gold_I, request.characters_P), []
  if not request.prompts_I:
    return exact_argmax(answers), []
  texts = []
  for ids_N in scorer.generate(state, request.prompts_I, generate, length, stop_V):
    stops = np.flatnonzero(stop_V[ids_N])
    texts.append(decode(ids_N[: stops[0]] if len(stops) else ids_N).strip())
  return {'logprob': answers.mean_P, 'accuracy': alias_prefix(texts, request.aliases_I)}, texts


def evaluate(
  suite: Suite, scorer: Scorer, state: TrainState, task: str
) -> tuple[dict[str, np.ndarray], dict[tuple[str, str], list[str]]]:
  """(`<metric>__<task>__<split>` → values [items], (task, split) → generated texts) of one model on one task."""
  arrays: dict[str, np.ndarray] = {}
  texts: dict[tuple[str, str], list[str]] = {}
  for (name, split), examples in suite.examples.items():
    if name != task:
      continue
    logprob_I, accuracy_I = scorer.score(state, examples.tokens_TL, examples.weights_TL)
    arrays[f'logprob__{task}__{split}'], arrays[f'accuracy__{task}__{split}'] = logprob_I, accuracy_I
  requests = [request for request in suite.requests if request.key[0] == task]
  stop_V = suite.stop_V if any(request.prompts_I for request in requests) else np.zeros(0, bool)
  for request in requests:
    (name, split), decode = request.key, suite.encoder.decode
    values, generated = score_request(scorer, state, request, suite.length, suite.generate, stop_V, decode)
    arrays |= {f'{metric}__{name}__{split}': value_I for metric, value_I in values.items()}
    if generated:
      texts[name, split] = generated
  return arrays, texts
