"""What a model gives to answers, and how it goes on: the compiled part of evaluation."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsdm_jax.core import flops
from dsdm_jax.core.mesh import fetch, place
from dsdm_jax.evaluation import rules
from dsdm_jax.evaluation.questions import Request, is_choice
from dsdm_jax.lm.decoder import Decoder
from dsdm_jax.lm.decoding import greedy
from dsdm_jax.training.step import Trainer, TrainState


class Scorer:
  """Compiled scoring of batches for one model shape.

  A sequence is padded to a length that it alone decides, and every batch has `batch_size` rows: what a model gives to
  an item does not depend on the items around it.

  Args:
    trainer: of the model.
    batch_size: rows.
    pad: id that fills up sequences at their end.

  Attributes:
    flop: floating-point operations so far, padding included.
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
    """What a model gives to the tokens at `place_BA`, given all before each; 0 is no place.

    Returns:
      (summed log-probability, whether the argmax is right throughout), float32 and bool [B].
    """
    model = nnx.merge(self._trainer.graphdef, params, rest)
    before_BA1 = jnp.maximum(place_BA - 1, 0)[..., None]
    # Logits are the largest array of the model by far, and few of them are asked for.
    if isinstance(model, Decoder):
      logits_BAV = model.logits(jnp.take_along_axis(model.residual(tokens_BL), before_BA1, axis=1))
    else:
      logits_BAV = jnp.take_along_axis(model(tokens_BL), before_BA1, axis=1).astype(jnp.float32)
    token_BA = jnp.take_along_axis(tokens_BL, place_BA, axis=1)
    right_BA = jnp.take_along_axis(logits_BAV, token_BA[..., None], axis=-1)[..., 0]
    logprob_BA = right_BA - jax.nn.logsumexp(logits_BAV, axis=-1)
    asked_BA = place_BA > 0
    hit_BA = jnp.argmax(logits_BAV, axis=-1) == token_BA
    return jnp.sum(jnp.where(asked_BA, logprob_BA, 0.0), axis=1), jnp.all(hit_BA | ~asked_BA, axis=1)

  def score(self, state: TrainState, tokens_IL: np.ndarray, weights_IL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(logprob_I, accuracy_I): the mean over the tokens of weight 1, nats, and whether all are the argmax; float32."""
    places = [np.flatnonzero(weights_L) for weights_L in weights_IL]
    total_I, greedy_I = self._totals(state, list(tokens_IL), places, tokens_IL.shape[1])
    return total_I / np.maximum(weights_IL.sum(axis=1), 1), greedy_I.astype(np.float32)

  def answers(self, state: TrainState, ids_P: Sequence[np.ndarray], count_P: np.ndarray, length: int) -> rules.Answers:
    """What the model gives to the last `count_P` tokens of sequences of at most `length` tokens."""
    places = [np.arange(len(ids) - count, len(ids)) for ids, count in zip(ids_P, count_P, strict=True)]
    return rules.Answers(*self._totals(state, ids_P, places, length), np.asarray(count_P))

  def _totals(
    self, state: TrainState, ids_P: Sequence[np.ndarray], places: Sequence[np.ndarray], length: int
  ) -> tuple[np.ndarray, np.ndarray]:
    total_P, greedy_P = np.zeros(len(ids_P), np.float32), np.zeros(len(ids_P), bool)
    width_P = _widths([len(ids) for ids in ids_P], [-(-length * part // 4) for part in range(1, 5)])
    asked_P = _widths([len(place) for place in places], [8**power for power in range(1, 9)])
    for width, asked in sorted(set(zip(width_P, asked_P, strict=True))):
      chosen = np.flatnonzero((width_P == width) & (asked_P == asked))
      arrays = (
        _padded([ids_P[i] for i in chosen.tolist()], width, self._pad),
        _padded([places[i] for i in chosen.tolist()], asked, 0),
      )
      total_P[chosen], greedy_P[chosen] = self._batched(self._step, state, arrays)
    return total_P, greedy_P

  def generate(
    self, state: TrainState, prompts_I: Sequence[np.ndarray], steps: int, length: int, stop_V: np.ndarray
  ) -> list[np.ndarray]:
    """Greedy continuation of each prompt of at most `length` − `steps` tokens, at most `steps`; see `lm.decoding`."""
    outputs: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts_I)
    size_I = np.array([len(ids) for ids in prompts_I], np.int32)
    width_I = _widths(size_I, [-(-(length - steps) * part // 4) for part in range(1, 5)])
    for width in np.unique(width_I):
      chosen = np.flatnonzero(width_I == width)
      arrays = (_padded([prompts_I[i] for i in chosen.tolist()], width, self._pad), size_I[chosen])
      (made_IN,) = self._batched(self._greedy(steps), state, arrays, np.asarray(stop_V))
      for index, made_N in zip(chosen.tolist(), made_IN, strict=True):
        outputs[index] = made_N
    return outputs

  @functools.lru_cache(maxsize=4)  # noqa: B019  a Scorer lives as long as its stage
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
    """Calls `run` on batches, the last one filled up with its first row, and joins what it returns."""
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
  """For each size the first of the rising `steps` that holds it: what it is padded to."""
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
    request: see `requests.build`.
    length: L, positions of the model.
    generate: tokens that a generated answer may have.
    stop_V: bool, tokens that end a generated answer.
    decode: ids → text.
  """  # fmt: skip
  answers = scorer.answers(state, request.ids_P, request.count_P, length)
  if is_choice(request):
    return rules.lowest_cross_entropy(answers, request.item_P, request.gold_I, request.characters_P), []
  if not request.prompts_I:
    return rules.exact_argmax(answers), []
  made = scorer.generate(state, request.prompts_I, generate, length, stop_V)
  texts = [decode(ids_N[: _end(ids_N, stop_V)]).strip() for ids_N in made]
  return {'logprob': answers.mean_P, 'accuracy': rules.alias_prefix(texts, request.aliases_I)}, texts


def _end(ids_N: np.ndarray, stop_V: np.ndarray) -> int:
  stops = np.flatnonzero(stop_V[ids_N])
  return int(stops[0]) if len(stops) else len(ids_N)
