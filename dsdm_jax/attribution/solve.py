"""The datamodels of one run, one for each checkpoint or a joint one of all, and their solutions for the targets."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import damping, datamodel
from dsdm_jax.attribution.accumulators import Accumulator, Progress
from dsdm_jax.attribution.damping import Choice
from dsdm_jax.attribution.datamodel import Solution
from dsdm_jax.attribution.quantization import Blocks, column_blocks
from dsdm_jax.attribution.sources import Concatenated, RowSource, UnitNorm, unit_rows
from dsdm_jax.attribution.store import Features
from dsdm_jax.core import prng

Mode = Literal['checkpoints', 'joint']


@dataclasses.dataclass(frozen=True)
class TargetWeights:
  """Weightings of one task's examples, each a right-hand side of the linear system.

  A score is linear in the target's feature, so a weighting costs a column of one matrix product and no pass of its own.

  Attributes:
    weight_KT: float64; row 0 is the mean of all, then come the groups, the first examples one by one, the resamples.
      Each row sums to 1.
    group_T: int32, the group of each example.
    clusters: documents that the examples come from; the examples themselves if no documents are known.
    groups, resamples, examples: how many rows of each kind.
  """

  weight_KT: np.ndarray
  group_T: np.ndarray
  clusters: int
  groups: int
  resamples: int
  examples: int = 0

  @classmethod
  def of_documents(
    cls, documents: Sequence[str], groups: int, resamples: int, seed: int, task: str, examples: int = 0
  ) -> 'TargetWeights':
    """Weightings for examples of `documents`.

    Examples of one document are not independent: they share a group, and resamples draw documents with replacement. If
    all examples name the same document, each counts as a document of its own.

    Args:
      documents: of each example, in order.
      groups: upper bound; at most one per document.
      resamples: bootstrap replicates; none if there is only one document, whose spread is unknown.
      seed: of the groups and of the resamples.
      task: names their random streams.
      examples: how many of the first examples are also scored one by one; at most all.
    """
    names, cluster_T = np.unique(np.asarray(documents), return_inverse=True)
    if len(names) == 1:
      cluster_T = np.arange(len(documents))
    clusters = int(cluster_T.max()) + 1
    count = len(cluster_T)
    groups = min(groups, clusters)
    order = prng.numpy_stream(seed, 'datamodel', 'groups', task).permutation(clusters)
    group_T = (order % groups)[cluster_T].astype(np.int32)
    resamples = resamples if clusters > 1 else 0
    rng = prng.numpy_stream(seed, 'datamodel', 'bootstrap', task)
    drawn_RM = rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    examples = min(examples, count)
    group_GT = group_T[None] == np.arange(groups)[:, None]
    weight_KT = np.concatenate([np.ones((1, count)), group_GT, np.eye(examples, count), drawn_RM[:, cluster_T]])
    weight_KT = weight_KT / weight_KT.sum(axis=1, keepdims=True)
    return cls(weight_KT, group_T, clusters, groups, resamples, examples)

  @property
  def group_rows(self) -> slice:
    return slice(1, 1 + self.groups)

  @property
  def example_rows(self) -> slice:
    return slice(1 + self.groups, 1 + self.groups + self.examples)

  @property
  def resample_rows(self) -> slice:
    return slice(1 + self.groups + self.examples, 1 + self.groups + self.examples + self.resamples)


@dataclasses.dataclass(frozen=True)
class Member:
  """One datamodel.

  Attributes:
    source: features of the pool.
    targets: phi_TJ of each task.
    blocks: of the Gram matrix.
    name: identifies its partial results.
    equal: columns that are first scaled to the same mean square, checkpoint by checkpoint (joint); or none.
  """

  source: RowSource
  targets: Sequence[np.ndarray]
  blocks: Blocks
  name: str
  equal: Blocks = ()


@dataclasses.dataclass(frozen=True)
class Solved:
  """All datamodels of a run.

  Attributes:
    mode: 'checkpoints': one member for each checkpoint, those of one proxy adjacent; 'joint': one member over the
      columns of several checkpoints.
    members, solutions: of each datamodel.
    spectra: of each block of each member.
    damping: the relative damping of the solutions.
    choice: how the damping was chosen, or None if it was fixed.
  """

  mode: Mode
  members: Sequence[Member]
  solutions: Sequence[Solution]
  spectra: Sequence[list[dict[str, Any]]]
  damping: float
  choice: Choice | None = None


def open_members(features: Features, tasks: Sequence[str], gram: str, unit_norm: bool) -> tuple[Mode, list[Member]]:
  """The mode and the members that `datamodel.gram` and `datamodel.unit_norm` ask for."""

  def source(checkpoint: int) -> RowSource:
    rows = features.pool(checkpoint)
    return UnitNorm(rows) if unit_norm else rows

  def target(task: str, checkpoint: int) -> np.ndarray:
    phi_TJ = features.target(task, checkpoint)
    return unit_rows(phi_TJ) if unit_norm else phi_TJ

  count = features.checkpoints
  if gram == 'joint':
    joint = Concatenated([source(c) for c in range(count)])
    phi = [np.concatenate([target(t, c) for c in range(count)], axis=1) for t in tasks]
    equal = tuple((c * features.dimension, (c + 1) * features.dimension) for c in range(count))
    member = Member(joint, phi, datamodel.whole(joint.dimension), 'joint', equal)
    return ('joint' if count > 1 else 'checkpoints'), [member]
  layered = by_layers(gram, features.semantics['projection'])
  blocks = column_blocks(features.semantics, features.dimension) if layered else datamodel.whole(features.dimension)
  return 'checkpoints', [Member(source(c), [target(t, c) for t in tasks], blocks, f'{c}') for c in range(count)]


def by_layers(gram: str, projection: str) -> bool:
  """Whether `datamodel.gram` asks for one block per layer of features of `features.projection`."""
  return gram == 'layers' or (gram == 'auto' and projection == 'two_sided')


def solve(
  mode: Mode,
  members: Sequence[Member],
  weights: Sequence[TargetWeights],
  options: ConfigDict,
  mesh: Mesh | None,
  progress: Progress,
  accumulator: Accumulator,
) -> Solved:
  """Solutions of all members for the weightings of all tasks, at `datamodel.damping`.

  Args:
    mode, members: as `open_members` returns them.
    weights: of each task.
    options: `config.datamodel`.
    mesh, progress, accumulator: as for `datamodel.gram`.
  """
  solutions, spectra = [], []
  for member in members:
    system = _System(member, weights, options, mesh, progress, accumulator)
    spectra.append(system.spectra)
    solutions.append(system.solve(options.damping, overwrite=True)[0])
  return Solved(mode, members, solutions, spectra, options.damping)


def solve_auto(
  members: Sequence[Member],
  weights: Sequence[TargetWeights],
  options: ConfigDict,
  mesh: Mesh | None,
  progress: Progress,
  accumulator: Accumulator,
  seen_PN: np.ndarray,
  output_PT: Sequence[np.ndarray],
) -> Solved:
  """As `solve`, at the damping that agrees best with output differences between held-out proxies (see `damping`).

  Args:
    members: one for each checkpoint, as many for each of at least three proxies, those of one proxy adjacent.
    seen_PN: whether proxy p trained on row n.
    output_PT: for each task, the output of each of its examples at the end of each proxy's training.
  """
  candidates = [options.damping * factor for factor in damping.FACTORS]
  pairs = damping.held_out_pairs(len(seen_PN), len(members) // len(seen_PN))
  by_candidate: list[list[Solution]] = [[] for _ in candidates]
  predicted: list[list[np.ndarray]] = [[] for _ in weights]  # of each task: [K, pairs of one scorer, T]
  spectra = []
  for index, member in enumerate(members):
    system = _System(member, weights, options, mesh, progress, accumulator)
    spectra.append(system.spectra)
    sum_PJ = datamodel.sums(member.source, seen_PN, accumulator, f'sums_{member.name}')
    difference_DJ = np.stack([sum_PJ[a] - sum_PJ[b] for scorer, a, b in pairs if scorer == index])
    u_KJD = []
    for solutions, candidate in zip(by_candidate, candidates, strict=True):
      solution, u_JD = system.solve(candidate, difference_DJ, overwrite=candidate == candidates[-1])
      solutions.append(solution)
      u_KJD.append(u_JD)
    for task, phi_TJ in zip(predicted, member.targets, strict=True):
      task.append(np.stack([(phi_TJ.astype(np.float64) @ u_JD).T for u_JD in u_KJD]))
  choice = damping.choose(
    candidates[damping.FIXED],
    candidates,
    [np.concatenate(task, axis=1) for task in predicted],
    [np.stack([o[a] - o[b] for _, a, b in pairs]) for o in output_PT],
    [w.weight_KT[w.resample_rows] for w in weights],
  )
  solutions = by_candidate[candidates.index(choice.damping)]
  return Solved('checkpoints', members, solutions, spectra, choice.damping, choice)


class _System:
  """The linear system of one member: its Gram matrix and the right-hand sides of all tasks."""

  def __init__(
    self,
    member: Member,
    weights: Sequence[TargetWeights],
    options: ConfigDict,
    mesh: Mesh | None,
    progress: Progress,
    accumulator: Accumulator,
  ):
    self._blocks, self._recentre = member.blocks, options.recentre
    self._parts = datamodel.gram(member.source, member.blocks, mesh, progress, accumulator, f'gram_{member.name}')
    self._scale_J = datamodel.equalise(self._parts[0], member.equal) if member.equal else None
    phi = [self._scaled(phi_TJ) for phi_TJ in member.targets]
    datamodel.blend(self._parts, member.blocks, phi, options.target_share)
    self._right_KJ = np.concatenate([w.weight_KT @ phi_TJ for w, phi_TJ in zip(weights, phi, strict=True)])
    self.spectra = [
      {'columns': list(c), **datamodel.spectrum(part)} for c, part in zip(member.blocks, self._parts, strict=True)
    ]

  def _scaled(self, phi: np.ndarray) -> np.ndarray:
    return phi if self._scale_J is None else phi * self._scale_J

  def solve(
    self, relative: float, more_DJ: np.ndarray | None = None, *, overwrite: bool = False
  ) -> tuple[Solution, np.ndarray]:
    """The solution for the targets, to be multiplied with features as stored; and u_JD of `more_DJ`."""
    right = self._right_KJ if more_DJ is None else np.concatenate([self._right_KJ, self._scaled(more_DJ)])
    solution = datamodel.solve(self._parts, self._blocks, right, relative, recentre=self._recentre, overwrite=overwrite)
    u_JK = solution.u_JK if self._scale_J is None else solution.u_JK * self._scale_J[:, None]
    count = len(self._right_KJ)
    return dataclasses.replace(solution, u_JK=u_JK[:, :count]), u_JK[:, count:]
