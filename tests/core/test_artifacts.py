"""Artifacts: whole or absent, and refused when they are not what was asked for."""

import dataclasses
import errno
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.errors import UserError

IDENTITY = Identity('pool', 1, {'pool.length': 8, 'pool.kinds': ('a', 'b')}, {})


def make(workdir, identity=IDENTITY, **files):
  out = artifacts.begin(workdir, identity)
  (out / 'deep').mkdir(exist_ok=True)
  (out / 'deep' / 'er.txt').write_text('deep')
  for name, text in (files or {'one': 'text'}).items():
    (out / name).write_text(text)
  return artifacts.commit(workdir, identity, {'rows': 3}, Cost(out))


def test_committed_stage_opens_with_all_it_was_given(workdir):
  made = make(workdir)
  found = artifacts.open_stage(workdir, 'pool')
  assert found.manifest == made.manifest
  assert found.manifest['identity'] == IDENTITY.as_json()
  assert found.semantics == {'rows': 3}
  assert found.settings['pool.kinds'] == ['a', 'b']
  assert set(found.manifest['files']) == {'one', 'deep/er.txt'}
  assert {'python', 'jax', 'numpy'} <= found.manifest['versions'].keys()
  found.verify()
  assert [p.name for p in workdir.iterdir()] == ['pool']


def test_nothing_is_there_before_the_commit(workdir):
  assert artifacts.open_stage(workdir, 'pool') is None
  artifacts.begin(workdir, IDENTITY)
  assert artifacts.open_stage(workdir, 'pool') is None
  assert artifacts.begun(workdir, 'pool') == IDENTITY.as_json()


@pytest.mark.parametrize(
  ('other', 'phrase'),
  [
    (Identity('pool', 1, {'pool.length': 9, 'pool.kinds': ('a', 'b')}, {}), 'pool.length was 8, now 9'),
    (
      Identity('pool', 1, {'pool.length': 8, 'pool.kinds': ('b', 'a')}, {}),
      'pool.kinds was ["a", "b"], now ["b", "a"]',
    ),
    (Identity('pool', 1, {'pool.length': 8}, {}), 'pool.kinds was ["a", "b"], now absent'),
    (Identity('pool', 2, IDENTITY.settings, {}), 'format version was 1, now 2'),
    (Identity('pool', 1, IDENTITY.settings, {'targets': 'ab'}), 'the targets it read is another one now'),
  ],
)
def test_mismatch_is_named(other, phrase):
  assert artifacts.differences(IDENTITY.as_json(), other.as_json()) == [phrase]
  assert artifacts.differences(other.as_json(), other.as_json()) == []


def test_flipped_byte_missing_file_and_other_size_are_noticed(workdir):
  made = make(workdir, one='abcd')
  file = made.path / 'one'
  for damage, words in ((b'abXd', 'has changed'), (b'abc', '3 bytes where 4')):
    file.write_bytes(damage)
    with pytest.raises(UserError, match=words) as caught:
      made.verify()
    assert str(file) in str(caught.value) and f'delete {made.path}' in str(caught.value)
  file.unlink()
  with pytest.raises(UserError, match='is missing'):
    made.verify()


@pytest.mark.parametrize('name', ['../outside', '/etc/passwd', 'a/../../b'])
def test_manifest_that_points_outside_is_refused(workdir, name):
  made = make(workdir)
  manifest = json.loads((made.path / 'manifest.json').read_text())
  manifest['files'][name] = {'bytes': 0, 'sha256': ''}
  (made.path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='leaves the folder'):
    artifacts.open_stage(workdir, 'pool')


def test_link_that_leads_outside_is_refused(workdir, tmp_path):
  made = make(workdir)
  name = next(iter(made.manifest['files']))
  outside = tmp_path / 'outside'
  (made.path / name).rename(outside)
  (made.path / name).symlink_to(outside)  # the bytes are right
  with pytest.raises(UserError, match='lies outside of it'):
    made.verify()
  (made.path / name).unlink()
  outside.rename(made.path / 'other')
  (made.path / name).symlink_to(made.path / 'other')
  made.verify()


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', 'a/../../x'])
def test_name_from_a_file_stays_inside(tmp_path, name):
  with pytest.raises(UserError, match='lies outside of it'):
    artifacts.inside(tmp_path, name)
  assert artifacts.inside(tmp_path, 'a/../b') == tmp_path / 'a/../b'


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"identity": {}}', '7', 'null'])
def test_unreadable_manifest_is_one_line_with_the_way_out(workdir, text):
  made = make(workdir)
  (made.path / 'manifest.json').write_text(text)
  with pytest.raises(UserError) as caught:
    artifacts.open_stage(workdir, 'pool')
  assert 'manifest.json is unreadable' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_digest_depends_on_settings_and_content_and_not_on_cost(workdir, tmp_path):
  a = make(workdir)
  others = []
  for number, (identity, files) in enumerate(
    [
      (IDENTITY, {'one': 'text'}), (IDENTITY, {'one': 'TEXT'}), (IDENTITY, {'two': 'text'}),
      (Identity('pool', 1, {'pool.length': 9}, {}), {'one': 'text'}),
    ]
  ):  # fmt: skip
    folder = tmp_path / str(number)
    folder.mkdir()
    Cost(artifacts.begin(folder, identity)).add(seconds=number + 1)
    others.append(make(folder, identity, **files).digest)
  assert others[0] == a.digest
  assert len({a.digest, *others}) == 4


def test_digest_of_models_is_that_of_their_training_and_not_of_the_bytes_of_a_save(tmp_path):
  def trained(name: str, record: str, saved: str):
    (tmp_path / name).mkdir()
    out = artifacts.begin(tmp_path / name, IDENTITY)
    (out / 'proxy_0/12/d').mkdir(parents=True)
    (out / f'proxy_0/12/d/{saved}').write_text(saved)
    return make(tmp_path / name, **{'proxy_0.jsonl': record, 'subset_0.npy': 'rows'})

  one, again, other = trained('a', 'loss 3', 'f00'), trained('b', 'loss 3', 'ba5'), trained('c', 'loss 4', 'f00')
  assert one.digest == again.digest != other.digest
  (again.path / 'proxy_0/12/d/ba5').write_text('bad')
  with pytest.raises(UserError, match='proxy_0/12/d/ba5 has changed'):
    again.verify()
  # Of what was committed before the key was there, which later stages know by its digest, all files count.
  before = [
    dataclasses.replace(a, manifest={k: v for k, v in a.manifest.items() if k != 'models'}) for a in (one, again)
  ]
  content = {k: one.manifest[k] for k in ('identity', 'files')}
  assert before[0].digest == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
  assert before[0].digest != before[1].digest


def test_unfinished_attempt_of_the_same_settings_is_gone_on_with_and_any_other_discarded(workdir):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  Cost(out).add(seconds=2, flop=5)
  assert (artifacts.begin(workdir, IDENTITY) / 'half').exists()
  assert (Cost(out).seconds, Cost(out).flop) == (2, 5)
  assert not (artifacts.begin(workdir, Identity('pool', 2, {}, {})) / 'half').exists()


def test_jobs_that_begin_at_once_share_one_folder_and_each_keeps_its_cost(workdir):
  with ThreadPoolExecutor(8) as threads:
    for number in range(20):
      identity = Identity('pool', 1, {'pool.length': number}, {})
      folder = workdir / str(number)
      outs = list(threads.map(lambda _, f=folder, i=identity: artifacts.begin(f, i), range(8)))
      assert set(outs) == {folder / 'pool.part'}
      assert artifacts.begun(folder, 'pool') == identity.as_json()
      assert [p.name for p in folder.iterdir()] == ['pool.part']
  for job in range(3):
    Cost(outs[0], job).add(seconds=1 + job, flop=10)
  again = Cost(outs[0], 2)
  assert again.seconds == 3
  made = artifacts.commit(folder, identity, {}, again)
  assert made.manifest['cost'] == {'seconds': 6, 'flop': 30}
  assert [p.name for p in made.path.iterdir()] == ['manifest.json']


def test_kill_while_checksums_are_taken_keeps_the_work(workdir, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(artifacts, 'checksums', lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      make(workdir, one='work')
  assert (artifacts.begin(workdir, IDENTITY) / 'one').read_text() == 'work'


def test_attempt_of_other_packages_is_another(workdir, monkeypatch):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  mine = artifacts.versions()

  def now(**changed):
    monkeypatch.setattr(artifacts, 'versions', lambda: {k: v for k, v in {**mine, **changed}.items() if v})

  # What decides nothing, a mended Python, and a package that came or went with no part in the work.
  now(ml_collections='9', tensorstore='9', python=f'{mine["python"]}9', libtpu='9', scipy=None)
  assert artifacts.other_versions(workdir, 'pool') == {}
  artifacts.check_versions(workdir, IDENTITY)
  assert (artifacts.begin(workdir, IDENTITY) / 'half').exists()
  now(jaxlib='9', python='4.0.1')
  assert artifacts.other_versions(workdir, 'pool') == {
    'python': ('.'.join(mine['python'].split('.')[:2]), '4.0'), 'jaxlib': (mine['jaxlib'], '9')
  }  # fmt: skip
  with pytest.raises(UserError, match=f'jaxlib was {mine["jaxlib"]}, now 9; install these again'):
    artifacts.check_versions(workdir, IDENTITY)
  artifacts.check_versions(workdir, Identity('pool', 2, {}, {}))  # other settings are told as such
  assert not (artifacts.begin(workdir, IDENTITY) / 'half').exists()


@pytest.mark.parametrize('versions', [None, 7, [], {}, {'jax': 7}, {'jax': None}])
def test_attempt_that_does_not_say_its_packages_is_gone_on_with(workdir, versions):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  note = IDENTITY.as_json() if versions is None else {**IDENTITY.as_json(), 'versions': versions}
  (out / 'begun.json').write_text(json.dumps(note))
  artifacts.check_versions(workdir, IDENTITY)
  assert artifacts.begun(workdir, 'pool') == IDENTITY.as_json()
  assert (artifacts.begin(workdir, IDENTITY) / 'half').exists()


def test_commit_over_an_older_artifact(workdir):
  make(workdir, one='old')
  newer = Identity('pool', 1, {'pool.length': 9}, {})
  make(workdir, newer, two='new')
  found = artifacts.open_stage(workdir, 'pool')
  found.verify()
  assert found.settings == {'pool.length': 9}
  assert not (found.path / 'one').exists()
  assert [p.name for p in workdir.iterdir()] == ['pool']


@pytest.mark.parametrize('point', ['manifest written', 'old one moved away', 'new one in place'])
def test_kill_inside_the_commit_loses_nothing(workdir, monkeypatch, point):
  """Each point at which a kill may fall leaves a state that the next start can finish."""
  make(workdir, one='old')
  newer = Identity('pool', 1, {'pool.length': 9}, {})

  class Killed(BaseException):
    pass

  def killed(*_):
    raise Killed

  with monkeypatch.context() as patch:
    if point == 'manifest written':
      patch.setattr(artifacts, 'finish_commit', killed)
    elif point == 'new one in place':
      patch.setattr(artifacts.shutil, 'rmtree', lambda *a, ignore_errors=False: None if ignore_errors else killed())
    else:
      rename = os.rename

      def second(self, target):
        if self.name.endswith('.part'):
          raise Killed
        rename(self, target)

      patch.setattr(artifacts.Path, 'rename', second)
    with pytest.raises(Killed):
      make(workdir, newer, two='new')
  assert artifacts.open_stage(workdir, 'pool') is not None or artifacts.pending_commit(workdir, newer)
  if point != 'new one in place':
    assert artifacts.pending_commit(workdir, newer)
    artifacts.finish_commit(workdir, 'pool')
  found = artifacts.open_stage(workdir, 'pool')
  found.verify()
  assert found.manifest['identity'] == newer.as_json()


def test_atomic_write_replaces_or_leaves_alone(tmp_path, monkeypatch):
  file = tmp_path / 'a.json'
  storage.write_json(file, {'b': 1, 'a': [1.5]})
  first = file.read_bytes()
  storage.write_json(file, {'a': [1.5], 'b': 1})
  assert file.read_bytes() == first, 'equal values are equal bytes'

  def full(_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    storage.write_json(file, {'a': 2})
  assert file.read_bytes() == first
  assert [p.name for p in tmp_path.iterdir()] == ['a.json'], 'no temporary file is left'
  with pytest.raises(ValueError, match='JSON compliant'):
    storage.write_json(file, {'a': float('nan')})
  assert file.read_bytes() == first


def test_equal_arrays_are_equal_bytes(tmp_path):
  arrays = {'x_N': np.arange(5, dtype=np.int32), 'y': np.array(['a', 'b'])}
  storage.save_npz(tmp_path / 'a.npz', **arrays)
  storage.save_npz(tmp_path / 'b.npz', **arrays)
  assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
  with np.load(tmp_path / 'a.npz') as found:
    np.testing.assert_array_equal(found['x_N'], arrays['x_N'])


def test_what_a_kill_left_half_written_is_swept_away_and_nothing_else(workdir):
  part = artifacts.begin(workdir, artifacts.Identity('pool', 1, {}, {}))
  kept = {part / 'rows.npy', part / '.hidden', part / 'begun.json', workdir / '.mine.12345678'}
  gone = {part / '.rows.npy.ab_34xyz', workdir / '.pool.part.0a1b2c3d' / 'begun.json'}
  for file in kept | gone:
    file.parent.mkdir(exist_ok=True)
    file.write_text(file.read_text() if file.is_file() else 'x')
  artifacts.sweep(workdir)
  assert all(file.is_file() for file in kept)
  assert not any(file.exists() or (file.parent.name.startswith('.') and file.parent.exists()) for file in gone)


def test_a_damaged_stage_is_opened_anew_without_what_is_damaged(workdir):
  made = make(workdir, one='text', two='text', three='text')
  assert artifacts.reopen(workdir, made) == []
  (workdir / 'pool/two').write_text('next')
  (workdir / 'pool/three').unlink()
  said = artifacts.reopen(workdir, made)
  assert [phrase.split('pool/')[1] for phrase in said] == ['three is missing', 'two has changed since it was written']
  part = artifacts.part_folder(workdir, 'pool')
  assert artifacts.open_stage(workdir, 'pool') is None and artifacts.begun(workdir, 'pool') == IDENTITY.as_json()
  assert json.loads((part / 'begun.json').read_text())['versions'] == made.manifest['versions']
  assert not artifacts.pending_commit(workdir, IDENTITY)
  assert artifacts.begin(workdir, IDENTITY) == part
  assert {p.name for p in part.iterdir() if not artifacts.is_note(p)} == {'one', 'deep'}
  for name in ('two', 'three'):
    (part / name).write_text('text')
  again = artifacts.commit(workdir, IDENTITY, {'rows': 3}, Cost(part))
  assert again.digest == made.digest and again.manifest['cost'] == made.manifest['cost']
