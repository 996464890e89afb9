"""Units that a rerun takes over: the same digest, undamaged files, and nothing half after a kill."""

from pathlib import Path

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact, Cost, Identity
from dsdm_jax.core.units import Units

OLD, NEW = (Identity('targets', 1, {'targets.tasks': tasks}, {}) for tasks in (['a', 'b'], ['a', 'b', 'c']))


def _files(name: str) -> list[str]:
  return [f'{name}.npy', f'{name}/']


def _begin(workdir: Path, identity: Identity) -> tuple[Units, Cost, Path]:
  out = artifacts.begin(workdir, identity)
  cost = Cost(out)
  return Units(out, artifacts.open_stage(workdir, 'targets'), cost), cost, out


def _made(workdir: Path) -> Artifact:
  """A finished stage of the units a and b, which took 10 and 20 seconds."""
  units, cost, out = _begin(workdir, OLD)
  assert units.take({'a': {'of': 1}, 'b': {'of': 2}}, _files) == frozenset()
  for number, name in enumerate('ab'):
    storage.write_bytes(out / f'{name}.npy', name.encode())
    storage.write_bytes(out / name / 'deep' / 'part', name.encode())
    storage.mark(out / f'{name}.npy')
    cost.parts |= {name: 10.0 * (number + 1), f'{name} flop': 3.0, f'{name}b': 7.0}
  return artifacts.commit(workdir, OLD, {}, cost, units.as_json())


def test_only_what_is_the_same_is_taken_over(tmp_path: Path):
  made = _made(tmp_path)
  assert made.manifest['units']['a']['files'] == ['a.npy', 'a/deep/part']
  units, cost, out = _begin(tmp_path, NEW)
  assert units.take({'a': {'of': 1}, 'b': {'of': 9}, 'c': {'of': 3}}, _files) == {'a'}
  assert [f for f in storage.files(out) if f.startswith(('a', 'b.', 'b/'))] == ['a.npy', 'a.npy.sha256', 'a/deep/part']
  assert storage.is_marked(out / 'a.npy')
  assert 10 <= cost.seconds < 20 and cost.parts == {'a': 10.0, 'a flop': 3.0}
  # Taken over once, however often the attempt is started.
  again = Cost(out)
  assert Units(out, artifacts.open_stage(tmp_path, 'targets'), again).take({'a': {'of': 1}}, _files) == {'a'}
  assert again.seconds < 20
  finished = artifacts.commit(tmp_path, NEW, {}, cost, units.as_json())
  assert not made.path.exists() and (finished.path / 'a' / 'deep' / 'part').read_bytes() == b'a'
  finished.verify()
  assert [finding.kind for finding in artifacts.inspect(tmp_path)] == ['whole']


def test_a_damaged_unit_is_computed_again(tmp_path: Path):
  made = _made(tmp_path)
  (made.path / 'a' / 'deep' / 'part').write_bytes(b'x')
  units, _, out = _begin(tmp_path, NEW)
  assert units.take({'a': {'of': 1}, 'b': {'of': 2}}, _files) == {'b'}
  assert not (out / 'a.npy').exists()


def test_nothing_half_stays_after_a_kill(tmp_path: Path):
  """The kill comes while files are taken over; then the finished stage is lost."""
  _made(tmp_path)
  units, _, out = _begin(tmp_path, NEW)
  storage.write_bytes(out / artifacts.PLACING, artifacts.seal({'units': ['a']}))
  storage.write_bytes(out / 'a' / 'deep' / 'part', b'a')
  lost = Units(out, None, Cost(out))
  assert lost.take({'a': {'of': 1}}, _files) == frozenset()
  assert storage.files(out) == ['begun.json']
  del units
