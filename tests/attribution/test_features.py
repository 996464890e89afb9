"""What the features stage recomputes, with a trivial step."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from dsdm_jax.attribution import features, target_features
from dsdm_jax.core import artifacts
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.core.mesh import Team, make_mesh
from dsdm_jax.core.progress import Bar, Log
from dsdm_jax.core.stage import Context
from dsdm_jax.errors import UserError
from tests.pipeline.test_bad_input import _flip

ROWS, LENGTH, J = 10, 6, 4


class Step:
  """φ of a row: its first tokens."""

  dimension = J

  def apply(self, prepared, tokens_BL, weights_BL):
    del prepared, weights_BL
    return tokens_BL[:, :J].astype(jnp.float32)

  __call__ = apply

  def describe(self):
    return {'projection': 'dense'}


@dataclasses.dataclass
class Source:
  """Rows of the pool; notes which were computed."""

  rows: int = ROWS
  team: Team = Team()  # noqa: RUF009  frozen
  computed: list = dataclasses.field(default_factory=list)

  def charge(self):
    pass

  def ranges(self, bounds, watch):
    for start, stop in bounds:
      self.computed.append((start, stop))
      phi_BJ = np.arange(start * J, stop * J, dtype=np.float32).reshape(-1, J)
      if watch is not None:
        watch(start, jnp.asarray(phi_BJ))
      yield start, stop, phi_BJ


class Examples(types.SimpleNamespace):
  def __len__(self) -> int:
    return len(self.tokens_TL)


def _examples() -> dict[str, Examples]:
  ones_TL = np.ones((3, LENGTH), np.float32)
  return {
    task: Examples(tokens_TL=np.full((3, LENGTH), len(task), np.int32), weights_TL=ones_TL) for task in ('docs', 'code')
  }


def _context(workdir, seed: int) -> Context:
  config = base.get_config()
  config.features.shard_rows, config.features.batch_size, config.mesh.data = 4, 8, 8
  out = artifacts.begin(workdir, Identity('features', 2, {'seed': seed}, {}))
  return Context(config, out, {}, Log(workdir, 'features', enabled=False), Cost(out))


def _extract(context: Context) -> list[tuple[int, int]]:
  """One proxy's features; returns the row ranges of the pool that were computed."""
  source, step, bar = Source(), Step(), Bar(None, None, None, 'row')
  mesh = make_mesh(context.config.mesh)
  target_features.extract(context, step, lambda checkpoint: None, 0, _examples(), mesh, bar)
  described = {**step.describe(), 'dimension': J, 'rows': ROWS}
  features._extract_pool(context, source, 0, described, bar)
  assert features._complete(context, 0, described)
  return source.computed


def _cut(file):
  file.write_bytes(file.read_bytes()[:10])


@pytest.mark.parametrize('fault', [_flip, _cut])
def test_only_damaged_files_are_recomputed(tmp_path, fault):
  context = _context(tmp_path, 0)
  out = context.out
  assert _extract(context) == [(0, 4), (4, 8), (8, 10)]
  wanted = {file: file.read_bytes() for file in out.rglob('*') if file.is_file()}
  assert _extract(context) == []
  fault(out / 'features_0.zarr/c/2/0')
  fault(out / 'docs_0.npy')
  times = {file: file.stat().st_mtime_ns for file in wanted}
  assert _extract(context) == [(8, 10)]
  changed = {str(file.relative_to(out)) for file in wanted if file.stat().st_mtime_ns != times[file]}
  remade = {'features_0.zarr/c/2/0', 'features_0.done/000002.json', 'docs_0.npy', 'docs_0.npy.sha256'}
  assert changed - {'cost.json'} == remade
  assert all(file.read_bytes() == data for file, data in wanted.items() if file.name != 'cost.json')
  (out / 'fidelity_0.json').unlink()
  assert _extract(context) == [(0, 4)]


def test_files_of_another_run_are_refused_by_name(tmp_path):
  """A folder of another seed is copied over this one, without its record of the start."""
  (mine, theirs) = (_context(tmp_path / name, seed) for name, seed in (('mine', 0), ('theirs', 1)))
  _extract(mine)
  _extract(theirs)
  file, marker = 'features_0.zarr/c/1/0', 'features_0.done/000001.json'
  for name in (file, marker):
    (mine.out / name).write_bytes((theirs.out / name).read_bytes())
  with pytest.raises(UserError, match=rf'{file} is of a run with other settings.*{marker}'):
    _extract(mine)
