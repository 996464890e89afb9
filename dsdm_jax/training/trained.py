"""The trained models of a finished run, for readers outside of it: notebooks and exports."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.config.relations import OUR_FACTORY
from dsdm_jax.config.schema import Model
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.core.storage import Location
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.training.step import abstract_model


def stages(arm: str, proxy: int | None) -> tuple[str, ...]:
  """The stages that `Trained` reads."""
  return ('pool', *(('selection',) if arm else ()), 'pretraining' if proxy is None else 'proxies')


class Trained:
  """One model of a finished run: an arm's, a proxy, or a checkpoint of the same shape.

  Args:
    opened: the artifacts of `stages(arm, proxy)`.
    pool: of the run.
    arm: '<method>' or '<method>--<target>'; '' for none.
    seed: of the arm.
    proxy: number of a proxy; None for none.
    checkpoint: folder of Orbax checkpoints of the run's final models; None for none.

  Attributes:
    name: such as 'dsdm--mix--0' or 'proxy_0'.
    entry: of the selection's index: method, target, seed, selection; empty without an arm.
    config: the keys `model.*` of the run, or its `proxies.model.*`.

  Raises:
    UserError: no such model.
  """

  def __init__(
    self,
    opened: Mapping[str, Artifact],
    pool: Pool,
    arm: str = '',
    seed: int = 0,
    proxy: int | None = None,
    checkpoint: Location | None = None,
  ):
    self.pool, self.artifact = pool, opened['pretraining' if proxy is None else 'proxies']
    self.section = 'model' if proxy is None else 'proxies.model'
    self.entry: dict[str, Any] = {}
    if arm:
      index = storage.read_json(opened['selection'].path / 'index.json', list)
      arms = {f'{e["method"]}--{e["target"]}': e['method'] for e in index}
      named = [name for name, method in arms.items() if arm in (name, method)]
      matching = [e for e in index if f'{e["method"]}--{e["target"]}' in named and e['seed'] == seed]
      if len(matching) != 1:
        seeds = sorted({e['seed'] for e in index})
        raise UserError(
          f'arm {arm} with seed {seed} is not one model: {self.artifact.path.parent.parent} has the arms '
          f'{", ".join(arms)} with the seeds {", ".join(map(str, seeds))}; name one of each'
        )
      self.entry = matching[0]
    self.name = self.entry['name'] if arm else checkpoint.name if checkpoint else f'proxy_{proxy}'
    config = self.artifact.config
    keys = {k.removeprefix(f'{self.section}.'): v for k, v in config.items() if k.startswith(f'{self.section}.')}
    # Other attention is the same function, but not on every device.
    self.config = ConfigDict(Model().model_dump() | keys | {'attention': 'xla'})
    self.folder = checkpoint or self.artifact.path / self.name
    if not storage.is_folder(self.folder):
      raise UserError(f'{self.folder} does not exist; name a model of the run or a folder of checkpoints')
    self.step = None if checkpoint else self.artifact.last_step(self.name)

  def refuse_foreign(self, functions: Collection[str], way_out: str) -> None:
    """Raises a UserError if the workdir names a model function that is neither ours nor in `functions`.

    A workdir may come from anyone, and must not choose what is imported here.
    """
    if self.config.factory != OUR_FACTORY and self.config.factory not in functions:
      raise UserError(f'{self.section}.factory of the run is {self.config.factory}, a custom model{way_out}')

  def abstract(self) -> nnx.Module:
    """The model with shapes in place of arrays."""
    return abstract_model(self.config, self.pool.vocab_size, self.pool.length)

  def restored(self, parts: dict[str, nnx.State]) -> dict[str, nnx.State]:
    """Entries of the last checkpoint (name → shapes), on the first CPU."""
    with self.checkpoint() as restore:
      return restore(parts)

  @contextlib.contextmanager
  def checkpoint(self) -> Iterator[Callable[[dict[str, nnx.State]], dict[str, nnx.State]]]:
    """Yields a function as `restored`, which compares the files with their checksums once."""
    with Checkpoints(self.folder) as checkpoints:
      yield lambda parts: checkpoints.restore_part(parts, self.step)


class RunModel(Trained):
  """A trained model of a run, ready to compute.

  `model.logits(tokens_BL)` are its logits, and `model.module` is the Flax NNX module. Tokens are ids of the pool's
  vocabulary: `run.pool.tokens(rows)`, or for text of your own
  `[encoder.begin, *encoder.encode(text)]` with `encoder = run.pool.encoder`.
  """

  def __repr__(self) -> str:
    count = sum(x.size for x in jax.tree.leaves(nnx.state(self.abstract(), nnx.Param)))
    return f'{self.name}: {count:,} parameters, vocabulary of {self.pool.vocab_size:,}, {self.pool.length} tokens'

  @functools.cached_property
  def module(self) -> nnx.Module:
    """The Flax NNX module with the weights of the last checkpoint, on the default device."""
    graphdef, *states = nnx.split(self.abstract(), nnx.Param, ...)
    parts = {name: state for name, state in zip(('params', 'rest'), states, strict=True) if jax.tree.leaves(state)}
    restored = jax.device_put(self.restored(parts), jax.devices()[0])
    return nnx.merge(
      graphdef, *(restored.get(name, state) for name, state in zip(('params', 'rest'), states, strict=True))
    )

  @functools.cached_property
  def _forward(self) -> Any:
    return nnx.jit(lambda model, tokens_BL: model(tokens_BL))

  def logits(self, tokens_BL: Any) -> np.ndarray:
    """Logits after each token, float32 [B, L, V]. Position l predicts token l + 1.

    Args:
      tokens_BL: int [B, L], or [L] for one sequence; at most `pool.length` tokens, each an id of the vocabulary.

    Raises:
      UserError: another shape, too long, or an id that the vocabulary does not have.
    """
    tokens_BL = np.atleast_2d(np.asarray(tokens_BL))
    if tokens_BL.ndim != 2 or not np.issubdtype(tokens_BL.dtype, np.integer) or not tokens_BL.size:
      raise UserError(f'tokens must be whole numbers [B, L], got {tokens_BL.dtype} {list(tokens_BL.shape)}')
    if tokens_BL.shape[1] > self.pool.length:
      raise UserError(
        f'{tokens_BL.shape[1]} tokens are more than the {self.pool.length} that {self.name} was trained on'
      )
    if tokens_BL.min() < 0 or tokens_BL.max() >= self.pool.vocab_size:
      raise UserError(f'ids of tokens must be from 0 to {self.pool.vocab_size - 1}, got up to {tokens_BL.max()}')
    return np.asarray(self._forward(self.module, tokens_BL.astype(np.int32)), np.float32)
