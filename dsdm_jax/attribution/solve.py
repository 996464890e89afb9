"""The datamodels whose scores are averaged: one for each checkpoint, or the joint one of all; and their solutions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dsdm_jax.attribution import damping, datamodel
from dsdm_jax.attribution.accumulators import Partials
from dsdm_jax.attribution.damping import Choice
from dsdm_jax.attribution.datamodel import Blocks, Progress, RowSource, Solution
from dsdm_jax.attribution.features import Features
from dsdm_jax.attribution.target_weights import Columns


@dataclasses.dataclass(frozen=True)
class Member:
  """One datamodel.

  Attributes:
    source: features of the pool.
    targets: phi_TJ of each task.
    blocks: of the Gram matrix.
    name: under which work on it is kept.
    equal: columns that are brought to the same mean square first, checkpoint by checkpoint (joint); or none.
  """

  source: RowSource
  targets: Sequence[np.ndarray]
  blocks: Blocks
  name: str
  equal: Blocks = ()


def open_members(features: Features, tasks: Sequence[str], gram: str, unit_norm: bool) -> Iterator[Member]:
  """Members as `datamodel.gram` and `datamodel.unit_norm` want them."""

  def source(checkpoint: int) -> RowSource:
    store = features.pool(checkpoint)
    return datamodel.UnitNorm(store) if unit_norm else store

  def target(task: str, checkpoint: int) -> np.ndarray:
    phi_TJ = features.target(task, checkpoint)
    return datamodel.unit_rows(phi_TJ) if unit_norm else phi_TJ

  if gram == 'joint':
    sources = [source(c) for c in range(features.checkpoints)]
    stops = np.cumsum([s.dimension for s in sources]).tolist()
    joint = datamodel.Concatenated(sources)
    phi = [np.concatenate([target(t, c) for c in range(features.checkpoints)], axis=1) for t in tasks]
    yield Member(
      joint, phi, datamodel.whole(joint.dimension), 'joint', tuple(zip([0, *stops[:-1]], stops, strict=True))
    )
    return
  layered = by_layers(gram, features.semantics['projection'])
  blocks = layer_blocks(features.semantics) if layered else datamodel.whole(features.dimension)
  for checkpoint in range(features.checkpoints):
    yield Member(source(checkpoint), [target(t, checkpoint) for t in tasks], blocks, f'{checkpoint}')


def by_layers(gram: str, projection: str) -> bool:
  """Whether `datamodel.gram` asks for one block per layer of features of `features.projection`."""
  return gram == 'layers' or (gram == 'auto' and projection == 'two_sided')


def layer_blocks(semantics: Mapping[str, Any]) -> Blocks:
  """Columns of each layer, each of a scanned stack apart, from what a two-sided features stage says of itself."""
  blocks = []
  for layer in semantics['layers']:
    size = layer['a'] * layer['b']
    for i in range(int(np.prod(layer['stack']))):
      blocks.append((layer['start'] + i * size, layer['start'] + (i + 1) * size))
  return tuple(blocks)


@dataclasses.dataclass(frozen=True)
class Solved:
  """Attributes: solution of each member; spectrum of each block of each member; how the damping was chosen, if it was.

  `damping` is the relative one that the solutions stand at.
  """

  solutions: list[Solution]
  spectra: list[list[dict[str, Any]]]
  damping: float
  choice: Choice | None


def solve(
  members: Sequence[Member],
  table: Sequence[Columns],
  options: ConfigDict,
  mesh: Mesh | None,
  progress: Progress,
  partials: Partials,
) -> Solved:
  """Solutions of all members for the columns of all tasks, at `datamodel.damping`."""
  solutions, spectra = [], []
  for member in members:
    system = _System(member, table, options, mesh, progress, partials)
    spectra.append(system.spectra)
    solutions.append(system.solve(options.damping, overwrite=True)[0])
  return Solved(solutions, spectra, options.damping, None)


def solve_auto(
  members: Sequence[Member],
  table: Sequence[Columns],
  options: ConfigDict,
  mesh: Mesh | None,
  progress: Progress,
  partials: Partials,
  seen_PN: np.ndarray,
  output_PT: Sequence[np.ndarray],
) -> Solved:
  """Solutions at the damping that agrees best with differences in output between held-out proxies (see `damping`).

  Args:
    members: one for each checkpoint, as many for each of at least three proxies, those of one after the other.
    seen_PN: whether proxy p trained on row n.
    output_PT: for each task, the output of each of its examples at the end of each proxy's training.
  """
  candidates = [options.damping * factor for factor in damping.FACTORS]
  pairs = damping.held_out_pairs(len(seen_PN), len(members) // len(seen_PN))
  by_candidate: list[list[Solution]] = [[] for _ in candidates]
  predicted: list[list[np.ndarray]] = [[] for _ in table]  # of each task: [K, pairs of one scorer, T]
  spectra = []
  for index, member in enumerate(members):
    system = _System(member, table, options, mesh, progress, partials)
    spectra.append(system.spectra)
    sum_PJ = datamodel.sums(member.source, seen_PN)
    difference_DJ = np.stack([sum_PJ[a] - sum_PJ[b] for scorer, a, b in pairs if scorer == index])
    found = []
    for solutions, candidate in zip(by_candidate, candidates, strict=True):
      solution, u_JD = system.solve(candidate, difference_DJ, overwrite=candidate == candidates[-1])
      solutions.append(solution)
      found.append(u_JD)
    for task, phi_TJ in zip(predicted, member.targets, strict=True):
      task.append(np.stack([(phi_TJ.astype(np.float64) @ u_JD).T for u_JD in found]))
  choice = damping.choose(
    candidates[damping.FIXED],
    candidates,
    [np.concatenate(task, axis=1) for task in predicted],
    [np.stack([o[a] - o[b] for _, a, b in pairs]) for o in output_PT],
    [c.weight_KT[c.resample_rows] for c in table],
  )
  return Solved(by_candidate[candidates.index(choice.damping)], spectra, choice.damping, choice)


class _System:
  """The linear system of one member: its Gram matrix and the targets' columns."""

  def __init__(
    self,
    member: Member,
    table: Sequence[Columns],
    options: ConfigDict,
    mesh: Mesh | None,
    progress: Progress,
    partials: Partials,
  ):
    self._blocks, self._recentre = member.blocks, options.recentre
    self._parts = datamodel.gram(member.source, member.blocks, mesh, progress, partials, f'gram_{member.name}')
    self._scale_J = datamodel.equalise(self._parts[0], member.equal) if member.equal else None
    phi = [self._scaled(phi_TJ) for phi_TJ in member.targets]
    datamodel.blend(self._parts, member.blocks, phi, options.target_share)
    self._right_KJ = np.concatenate([c.weight_KT @ phi_TJ for c, phi_TJ in zip(table, phi, strict=True)])
    self.spectra = [
      {'columns': list(c), **datamodel.spectrum(part)} for c, part in zip(member.blocks, self._parts, strict=True)
    ]

  def _scaled(self, phi: np.ndarray) -> np.ndarray:
    return phi if self._scale_J is None else phi * self._scale_J

  def solve(
    self, relative: float, more_DJ: np.ndarray | None = None, *, overwrite: bool = False
  ) -> tuple[Solution, np.ndarray]:
    """The solution for the targets' columns, to be multiplied with features as stored; and u_JD of `more_DJ`."""
    right = self._right_KJ if more_DJ is None else np.concatenate([self._right_KJ, self._scaled(more_DJ)])
    found = datamodel.solve(self._parts, self._blocks, right, relative, recentre=self._recentre, overwrite=overwrite)
    u_JK = found.u_JK if self._scale_J is None else found.u_JK * self._scale_J[:, None]
    count = len(self._right_KJ)
    return dataclasses.replace(found, u_JK=u_JK[:, :count]), u_JK[:, count:]
