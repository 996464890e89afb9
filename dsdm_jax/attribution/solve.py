"""The datamodels of one run, one for each checkpoint or a joint one of all, and their solutions for the targets."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.linalg
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import damping, datamodel, ekfac
from dsdm_jax.attribution.accumulators import Accumulator, Progress
from dsdm_jax.attribution.damping import Choice
from dsdm_jax.attribution.datamodel import Directions, Solution
from dsdm_jax.attribution.quantization import Blocks, column_blocks
from dsdm_jax.attribution.sources import Concatenated, RowSource, UnitNorm, unit_rows
from dsdm_jax.attribution.store import Features
from dsdm_jax.core import prng
from dsdm_jax.core.stage import Context
from dsdm_jax.data.targets.targets import Examples

Mode = Literal['checkpoints', 'joint']


@dataclasses.dataclass(frozen=True)
class TargetWeights:
  """Weightings of one task's examples, each a right-hand side of the linear system.

  A score is linear in the target's feature, so a weighting costs a column of one matrix product and no pass of its own.

  Attributes:
    weight_KT: float64; row 0 is the mean of all, then come the groups, the first examples one by one, the resamples.
      Each row sums to 1.
    group_T: int32, the group of each example.
    clusters: documents that the examples come from, or the examples themselves if no documents are known; with
      `by_group` the groups.
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
    cls,
    documents: Sequence[str],
    groups: int,
    resamples: int,
    seed: int,
    task: str,
    examples: int = 0,
    by_group: bool = False,
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
      by_group: resamples draw groups in place of documents, so that mean and resamples are sums over groups.
    """
    names, cluster_T = np.unique(np.asarray(documents), return_inverse=True)
    if len(names) == 1:
      cluster_T = np.arange(len(documents))
    clusters = int(cluster_T.max()) + 1
    count = len(cluster_T)
    groups = min(groups, clusters)
    order = prng.numpy_stream(seed, 'datamodel', 'groups', task).permutation(clusters)
    group_T = (order % groups)[cluster_T].astype(np.int32)
    draws = clusters
    if by_group:
      # One fewer than there are, whose variance is that of the mean without bias; it matters for a few groups.
      cluster_T, clusters, draws = group_T.astype(np.int64), groups, groups - 1
    resamples = resamples if clusters > 1 else 0
    rng = prng.numpy_stream(seed, 'datamodel', 'bootstrap', task)
    drawn_RM = rng.multinomial(draws, np.full(clusters, 1 / clusters), size=resamples)
    examples = min(examples, count)
    group_GT = group_T[None] == np.arange(groups)[:, None]
    weight_KT = np.concatenate([np.ones((1, count)), group_GT, np.eye(examples, count), drawn_RM[:, cluster_T]])
    weight_KT = weight_KT / weight_KT.sum(axis=1, keepdims=True)
    return cls(weight_KT, group_T, clusters, groups, resamples, examples)

  @property
  def basis_BT(self) -> np.ndarray:
    """The weightings of which, `by_group`, all others are sums: of the groups, then of single examples."""
    return self.weight_KT[self.group_rows.start : self.example_rows.stop]

  @property
  def combination_BK(self) -> np.ndarray:
    """weight_KT = combination_BKᵀ basis_BT, if resamples are drawn `by_group`."""
    groups_GT, examples = self.weight_KT[self.group_rows], slice(self.groups, self.groups + self.examples)
    # Groups share no example.
    combination_BK = np.zeros((self.groups + self.examples, len(self.weight_KT)))
    combination_BK[: self.groups] = groups_GT @ self.weight_KT.T / np.square(groups_GT).sum(axis=1, keepdims=True)
    combination_BK[:, self.example_rows] = 0
    combination_BK[examples, self.example_rows] = np.eye(self.examples)
    return combination_BK

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
    norm_CK: √(ḡᵀPḡ) of the mean of each of K tasks by EK-FAC, nearly the standard deviation of its scores; None with a
      Gram matrix.
  """

  mode: Mode
  members: Sequence[Member]
  solutions: Sequence[Solution]
  spectra: Sequence[list[dict[str, Any]]]
  damping: float
  choice: Choice | None = None
  norm_CK: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class HeldOutProxies:
  """What the proxies really output, to choose the damping by. Needs mode 'checkpoints' and at least three proxies.

  Attributes:
    seen_PN: whether proxy p trained on row n.
    output_PT: for each task, the output of each of its examples at the end of each proxy's training.
  """

  seen_PN: np.ndarray
  output_PT: Sequence[np.ndarray]

  def pairs(self, members: int) -> list[tuple[int, int, int]]:
    return damping.held_out_pairs(len(self.seen_PN), members // len(self.seen_PN))


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


def by_ekfac(
  features: Features,
  context: Context,
  examples: Sequence[Examples],
  weights: Sequence[TargetWeights],
  damping: float,
) -> Solved:
  """Solutions of all checkpoints by EK-FAC: u is a direction in parameter space for each group and example.

  A host solves some directions of one matrix at a time, and the devices hold the result in parts.
  """
  extractor = features.extractor()
  combination_BK = scipy.linalg.block_diag(*(w.combination_BK for w in weights))
  first = np.cumsum([0, *(len(w.weight_KT) for w in weights[:-1])])  # the means of all examples of each task
  members, solutions, spectra, norms = [], [], [], []
  for checkpoint in range(features.checkpoints):
    factors = extractor.factors(checkpoint)
    parts = [
      extractor.mean_gradients(checkpoint, e.tokens_TL, e.weights_TL, w.basis_BT)
      for e, w in zip(examples, weights, strict=True)
    ]
    directions, columns, lambdas, conditions, found, square_C = {}, [], [], [], [], 0.0
    scale_B = np.full(len(combination_BK), np.finfo(np.float32).tiny, np.float64)
    for path, f in factors.items():
      damped_SIO, placed, begin = f.damped(damping), [], 0
      mean_XC, v_XC = np.zeros((2, damped_SIO.size, len(first)))  # of all examples of each task
      for mean_bSIO in extractor.whole.blocks(parts, path):
        v_bSIO, own = f.solve(mean_bSIO, damped_SIO), slice(begin, begin + len(mean_bSIO))
        scale_B[own] = np.maximum(scale_B[own], np.abs(v_bSIO).max(axis=(1, 2, 3)))
        for total_XC, x in ((mean_XC, mean_bSIO), (v_XC, v_bSIO)):
          total_XC += x.reshape(len(x), -1).T @ combination_BK[own][:, first]
        placed.append(extractor.whole.place(path, v_bSIO))
        begin = own.stop
      directions[path] = ekfac.joined(placed)
      square_C = square_C + np.einsum('xc,xc->c', mean_XC, v_XC)
      columns.append(v_XC if context.first else np.zeros((0, len(first))))
      sides = [len(side[0]) for side in (f.in_SII, f.out_SOO) if side is not None]
      context.add_flop(4.0 * directions[path].size * sum(sides))
      for number, (square, damped) in enumerate(zip(f.square_SIO.astype(np.float64), damped_SIO, strict=True)):
        mean = float(square.mean()) or 1.0
        lambdas.append(damping * float(square.mean()))
        conditions.append(float(damped.max() / (damped.min() or 1.0)))
        found.append(
          {
            'parameter': path if len(damped_SIO) == 1 else f'{path}, matrix {number} of the stack',
            'largest_over_mean': float(square.max()) / mean,
            'smallest_over_mean': float(square.min()) / mean,
            'effective_rank': float(square.sum() ** 2 / (np.square(square).sum() or 1.0)),
          }
        )
    members.append(Member(features.pool(checkpoint), (), (), f'{checkpoint}'))
    u_JC = np.concatenate(columns)
    scaled = {path: ekfac.scaled(v, scale_B.astype(np.float32)) for path, v in directions.items()}
    u_JB = Directions(scaled, scale_B, dict(zip(first.tolist(), u_JC.T, strict=True)))
    solutions.append(Solution(u_JB, tuple(lambdas), tuple(conditions), combination_BK))
    spectra.append(found)
    norms.append(np.sqrt(np.maximum(square_C, 0)))
  return Solved('checkpoints', members, solutions, spectra, damping, norm_CK=np.stack(norms))


def solve(
  mode: Mode,
  members: Sequence[Member],
  weights: Sequence[TargetWeights],
  options: ConfigDict,
  mesh: Mesh | None,
  progress: Progress,
  accumulator: Accumulator,
  held_out: HeldOutProxies | None = None,
  only: Sequence[int] | None = None,
) -> Solved:
  """Solutions of all members for the weightings of all tasks, or of some.

  Args:
    mode, members: as `open_members` returns them.
    weights: of each task.
    options: `config.datamodel`.
    mesh, progress, accumulator: as for `datamodel.gram`.
    held_out: measured outputs, by which the damping is chosen (see `damping`); None takes `datamodel.damping`.
    only: places of the tasks to solve for; None for all. All of them choose the damping.
  """
  places = range(len(weights)) if only is None else only
  candidates = [options.damping] if held_out is None else [options.damping * factor for factor in damping.FACTORS]
  solutions: list[list[Solution]] = [[] for _ in candidates]
  pairs = [] if held_out is None else held_out.pairs(len(members))
  predicted: list[list[np.ndarray]] = [[] for _ in weights]  # of each task: [K, pairs of one scorer, T]
  spectra = []
  for index, member in enumerate(members):
    blocks = member.blocks
    parts = datamodel.gram(member.source, blocks, mesh, progress, accumulator, f'gram_{member.name}')
    scale_J = datamodel.equalise(parts[0], member.equal) if member.equal else None
    phi = [phi_TJ if scale_J is None else phi_TJ * scale_J for phi_TJ in member.targets]
    datamodel.blend(parts, blocks, phi, options.target_share)
    spectra.append([{'columns': list(c), **datamodel.spectrum(part)} for c, part in zip(blocks, parts, strict=True)])
    none_KJ, groups = np.zeros((0, member.source.dimension)), [len(weights[place].weight_KT) for place in places]
    right_KJ = np.concatenate([none_KJ, *(weights[place].weight_KT @ phi[place] for place in places)])
    count = len(right_KJ)
    if held_out is not None:
      sum_PJ = datamodel.sums(member.source, held_out.seen_PN, accumulator, f'sums_{member.name}')
      difference_DJ = np.stack([sum_PJ[a] - sum_PJ[b] for scorer, a, b in pairs if scorer == index])
      right_KJ = np.concatenate([right_KJ, difference_DJ if scale_J is None else difference_DJ * scale_J])
      groups.append(len(difference_DJ))
    u_KJD = []
    for candidate, by_member in zip(candidates, solutions, strict=True):
      last = candidate == candidates[-1]
      solution = datamodel.solve(
        parts, blocks, right_KJ, candidate, recentre=options.recentre, overwrite=last, groups=groups
      )
      u_JK = solution.u_JK if scale_J is None else solution.u_JK * scale_J[:, None]  # for features as stored
      by_member.append(dataclasses.replace(solution, u_JK=u_JK[:, :count]))
      u_KJD.append(u_JK[:, count:])
    if held_out is not None:
      for task, phi_TJ in zip(predicted, member.targets, strict=True):
        task.append(np.stack([(phi_TJ.astype(np.float64) @ u_JD).T for u_JD in u_KJD]))
  if held_out is None:
    return Solved(mode, members, solutions[0], spectra, options.damping)
  choice = damping.choose(
    candidates[damping.FIXED],
    candidates,
    [np.concatenate(task, axis=1) for task in predicted],
    [np.stack([o[a] - o[b] for _, a, b in pairs]) for o in held_out.output_PT],
    [w.weight_KT[w.resample_rows] for w in weights],
  )
  return Solved(mode, members, solutions[candidates.index(choice.damping)], spectra, choice.damping, choice)
