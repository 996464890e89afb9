"""Lets lm-evaluation-harness ask our models, in JAX: all its tasks, metrics and tables, without an export.

    from lm_eval import simple_evaluate
    from dsdm_jax.evaluation.lm_eval import HarnessModel

    simple_evaluate(HarnessModel('RUN', arm='dsdm'), tasks=['arc_easy', 'wikitext'])

Importing this module also registers the name dsdm_jax: `model='dsdm_jax', model_args='workdir=RUN,arm=dsdm,seed=1'`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config import schema
from dsdm_jax.core import prng, storage
from dsdm_jax.core.mesh import batch_shards, make_mesh, place
from dsdm_jax.core.storage import Location
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.model_export import TrainedModel
from dsdm_jax.evaluation.scoring import Scorer
from dsdm_jax.evaluation.suite import Sequences
from dsdm_jax.lm import partition
from dsdm_jax.training.step import Trainer

try:
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from lm_eval.utils import get_rolling_token_windows
except ImportError as error:
  raise UserError(f'lm-evaluation-harness is not installed ({error}): pip install lm_eval') from error

_NEW_TOKENS = 256  # where a task does not say how many to generate, as in the harness


@register_model('dsdm_jax')
class HarnessModel(LM):
  """A model of a finished run.

  A text is at most as long as the run's rows, `pool.length`: of a longer one the beginning is left out, so that the
  answer remains. Prompts begin with the begin mark of the vocabulary, if it has one.

  Args:
    workdir, arm, seed, proxy, checkpoint: which model, as `model_export.TrainedModel`.
    batch_size: texts at once.
    begin_with_end_mark: without a begin mark, put an end mark before each prompt, as the run's evaluation does. The
      harness does not for an exported folder.
    **more: arguments that the harness gives to all models, such as its device; they have no effect.

  Raises:
    UserError: as `TrainedModel`.
  """

  def __init__(
    self,
    workdir: str | Location,
    arm: str = '',
    seed: int = 0,
    proxy: int | None = None,
    checkpoint: str | Location | None = None,
    batch_size: int | str = 32,
    begin_with_end_mark: bool = False,
    **more: Any,
  ):
    super().__init__()
    del more
    folder = storage.locate(checkpoint) if checkpoint else None
    self.model = TrainedModel(storage.locate(workdir), arm, seed, proxy, folder)
    pool, config = self.model.pool, schema.config_dict()
    config.pretraining.train.optimizer = 'sgd'  # no moments in memory
    self._length, self._encoder = pool.length, pool.encoder
    shape = ConfigDict(self.model.config.to_dict() | {'weights': ''})  # the parameters come from the checkpoint
    compiled = Trainer(shape, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
    rows = int(batch_size) if str(batch_size).isdigit() else 32
    shards = batch_shards(compiled.mesh)
    self._scorer = Scorer(compiled, -(-rows // shards) * shards, self._encoder.pad)
    params = self.model.parameters()
    self._state = compiled.init(prng.stream(0, 'evaluation'))._replace(
      params=jax.tree_util.tree_map_with_path(
        lambda path, x: place(params[partition.path_name(path)], x.sharding), compiled.abstract.params
      )
    )
    self._sequences = Sequences(self._encoder, self._length, begin_with_end_mark)

  @property
  def tokenizer_name(self) -> str:
    """A name for the harness's cache of requests."""
    return f'dsdm_jax-{self.model.pool.digest[:16]}'

  def loglikelihood(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
    """(log-probability of the continuation in nats, whether each of its tokens is the argmax) of each request."""
    del options
    return self._scored(self._sequences.pair(*request.args[:2]) for request in requests)

  def loglikelihood_rolling(self, requests: Sequence[Any], **options: Any) -> list[float]:
    """The log-probability of each whole text, in windows that the harness cuts; a mark precedes the first."""
    del options
    windows, owners = [], []
    for index, request in enumerate(requests):
      ids = self._encoder.encode(request.args[0])
      # A sequence of ours holds the last predicted token too.
      for before, predicted in get_rolling_token_windows(ids, self._encoder.begin, self._length - 1, 1):
        windows.append((np.asarray([*before, predicted[-1]], np.int32), len(predicted)))
        owners.append(index)
    total_R = np.zeros(len(requests))
    np.add.at(total_R, np.asarray(owners, int), [total for total, _ in self._scored(windows)])
    return total_R.tolist()

  def generate_until(self, requests: Sequence[Any], **options: Any) -> list[str]:
    """Greedy continuations, up to a stop text of the request, the end mark, or its number of tokens.

    Raises:
      UserError: a request samples, or its tokens leave no room for a prompt.
    """
    del options
    ends_V = np.arange(self._encoder.size) == self._encoder.eos
    of_steps: dict[int, list[int]] = {}
    for index, request in enumerate(requests):
      wanted, task = request.args[1], request.task_name
      steps = int(wanted.get('max_gen_toks', wanted.get('max_new_tokens', _NEW_TOKENS)))
      if wanted.get('do_sample') and wanted.get('temperature', 1.0):
        raise UserError(f'a request of {task} samples, and models here answer greedily; set do_sample: false')
      if steps >= self._length:
        raise UserError(
          f'a request of {task} generates {steps} tokens and rows have {self._length}; set max_gen_toks of its '
          'generation_kwargs to less'
        )
      of_steps.setdefault(steps, []).append(index)
    texts = [''] * len(requests)
    for steps, indices in of_steps.items():
      prompts = [self._sequences.prompt(requests[index].args[0], steps) for index in indices]
      answers = self._scorer.generate(self._state, prompts, steps, self._length, ends_V)
      for index, ids in zip(indices, answers, strict=True):
        stops = np.flatnonzero(ends_V[ids])
        text = self._encoder.decode(ids[: stops[0]] if len(stops) else ids)
        until = requests[index].args[1].get('until') or ()
        for stop in [until] if isinstance(until, str) else until:
          text = text.split(stop)[0] if stop else text
        texts[index] = text
    return texts

  def _scored(
    self, sequences: Iterator[tuple[np.ndarray, int]] | list[tuple[np.ndarray, int]]
  ) -> list[tuple[float, bool]]:
    pairs = list(sequences)
    answers = self._scorer.answers(
      self._state, [ids for ids, _ in pairs], np.asarray([count for _, count in pairs]), self._length
    )
    return list(zip(answers.total_P.tolist(), answers.greedy_P.tolist(), strict=True))
