"""Artifacts: finished or absent, and refused when they are not what was asked for."""

import contextlib
import errno
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsdm_jax import cli
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.errors import UserError
from tests.conftest import FAULTS
from tests.helpers.workdirs import change_manifest

IDENTITY = Identity('pool', 1, {'pool.length': 8, 'pool.kinds': ('a', 'b')}, {})
OTHER = Identity('pool', 1, {'pool.length': 9}, {})


def make(workdir, identity=IDENTITY, **files):
  out = artifacts.begin(workdir, identity)
  (out / 'deep').mkdir(exist_ok=True)
  (out / 'deep' / 'er.txt').write_text('deep')
  for name, text in (files or {'one': 'text'}).items():
    (out / name).write_text(text)
  return artifacts.commit(workdir, identity, {'rows': 3}, Cost(out))


def test_finished_stage_opens_with_all_that_was_written(workdir):
  made = make(workdir)
  artifact = artifacts.open_stage(workdir, 'pool')
  assert artifact == made == artifacts.open_folder(workdir / 'pool')
  assert artifact.identity == IDENTITY.as_json()
  assert artifact.semantics == {'rows': 3}
  assert artifact.settings['pool.kinds'] == ['a', 'b']
  assert set(artifact.manifest['files']) == {'one', 'deep/er.txt'}
  assert {'python', 'jax', 'numpy'} <= artifact.manifest['versions'].keys()
  artifact.verify()
  assert sorted(p.name for p in (workdir / 'pool').iterdir()) == sorted([artifact.path.name, 'manifest.json'])


def test_nothing_is_finished_before_the_commit(workdir):
  assert artifacts.open_stage(workdir, 'pool') is None
  out = artifacts.begin(workdir, IDENTITY)
  assert artifacts.open_stage(workdir, 'pool') is None
  assert artifacts.begun(workdir, 'pool') == IDENTITY.as_json()
  assert artifacts.unfinished(workdir, 'pool') == [out]


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
    (Identity('pool', 1, IDENTITY.settings, {'targets': 'ab'}), 'its input targets has changed'),
  ],
)
def test_difference_is_named(other, phrase):
  assert artifacts.differences(IDENTITY.as_json(), other.as_json()) == [phrase]
  assert artifacts.differences(other.as_json(), other.as_json()) == []


def test_flipped_byte_missing_file_and_other_size_are_noticed(workdir):
  made = make(workdir, one='abcd')
  file = made.path / 'one'
  for damage, words in ((b'abXd', 'has changed'), (b'abc', '3 bytes where 4')):
    file.write_bytes(damage)
    with pytest.raises(UserError, match=words) as caught:
      made.verify()
    assert str(file) in str(caught.value) and f'delete {workdir / "pool"} and' in str(caught.value)
  file.unlink()
  with pytest.raises(UserError, match='is missing'):
    made.verify()


@pytest.mark.parametrize('name', ['../outside', '/etc/passwd', 'a/../../b'])
def test_manifest_that_points_outside_is_refused(workdir, name):
  make(workdir)
  change_manifest(workdir, 'pool', lambda manifest: manifest['files'].update({name: {'bytes': 0, 'sha256': ''}}))
  with pytest.raises(UserError, match='leaves the folder'):
    artifacts.open_stage(workdir, 'pool')


@pytest.mark.parametrize('attempt', ['..', '../other', 'a', 7])
def test_manifest_of_an_attempt_elsewhere_is_refused(workdir, attempt):
  make(workdir)
  change_manifest(workdir, 'pool', lambda manifest: manifest.update(attempt=attempt))
  with pytest.raises(UserError, match='manifest.json is unreadable'):
    artifacts.open_stage(workdir, 'pool')


def test_link_that_leads_outside_is_refused(workdir, tmp_path):
  made = make(workdir)
  name = next(iter(made.manifest['files']))
  outside = tmp_path / 'outside'
  (made.path / name).rename(outside)
  (made.path / name).symlink_to(outside)  # the bytes are right
  with pytest.raises(UserError, match='is outside it'):
    made.verify()
  (made.path / name).unlink()
  outside.rename(made.path / 'other')
  (made.path / name).symlink_to(made.path / 'other')
  made.verify()


@pytest.mark.parametrize('name', ['../x', '/etc/passwd', 'a/../../x'])
def test_name_from_a_file_stays_inside(tmp_path, name):
  with pytest.raises(UserError, match='is outside it'):
    artifacts.inside(tmp_path, name)
  assert artifacts.inside(tmp_path, 'a/../b') == tmp_path / 'a/../b'


@pytest.mark.parametrize('text', ['', '{', '[]', '{}', '{"attempt": {}}', '7', 'null'])
def test_unreadable_manifest_is_one_line_with_the_way_out(workdir, text):
  make(workdir)
  (workdir / 'pool' / 'manifest.json').write_text(text)
  with pytest.raises(UserError) as caught:
    artifacts.open_stage(workdir, 'pool')
  assert 'manifest.json is unreadable' in str(caught.value)
  assert f'delete {workdir / "pool"} and' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_changed_manifest_and_one_of_an_older_version_are_refused(workdir):
  make(workdir)
  file = workdir / 'pool' / 'manifest.json'
  manifest = json.loads(file.read_text())
  file.write_text(json.dumps(manifest | {'semantics': {'rows': 4}}))
  with pytest.raises(UserError, match='its checksum is wrong'):
    artifacts.open_stage(workdir, 'pool')
  del manifest['attempt'], manifest['sha256']
  file.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='pool was written by an older version of dsdm_jax; use another --workdir'):
    artifacts.open_stage(workdir, 'pool')


def spend(attempt: Path, seconds: float, job: int = 0, **parts: float) -> None:
  """As of a process that worked for `seconds`, saved, and was killed."""
  cost = Cost(attempt, job)
  cost._began -= seconds
  cost.parts |= parts
  cost.save()
  cost._began -= 100  # work that is lost


def test_files_that_are_named_like_notes_are_files(workdir):
  """As those of a selector that is named `cost_aware`."""
  names = ['cost_aware--mix--0.json', 'costs.json', 'cost_/1.json', 'cost_1.jsonl', 'a/cost.json', 'a/begun.json']
  out = artifacts.begin(workdir, IDENTITY)
  spend(out, 3, job=1)
  for name in names:
    storage.write_text(out / name, '[]')
  made = make(workdir)
  assert made.manifest['files'].keys() == {*names, 'one', 'deep/er.txt'}
  assert made.manifest['cost']['seconds'] == pytest.approx(3, abs=1)


def test_digest_depends_on_settings_and_content_and_not_on_cost(workdir, tmp_path):
  a = make(workdir)
  others = []
  variants = [
    (IDENTITY, {'one': 'text'}),
    (IDENTITY, {'one': 'TEXT'}),
    (IDENTITY, {'two': 'text'}),
    (OTHER, {'one': 'text'}),
  ]
  for number, (identity, files) in enumerate(variants):
    folder = tmp_path / str(number)
    spend(artifacts.begin(folder, identity), number + 1)
    others.append(make(folder, identity, **files).digest)
  assert others[0] == a.digest
  assert len({a.digest, *others}) == 4


def test_digest_of_models_is_that_of_their_training_and_not_of_the_bytes_of_a_checkpoint(tmp_path):
  def trained(name: str, record: str, saved: str):
    out = artifacts.begin(tmp_path / name, IDENTITY)
    (out / 'proxy_0/12/d').mkdir(parents=True)
    (out / f'proxy_0/12/d/{saved}').write_text(saved)
    return make(tmp_path / name, **{'proxy_0.jsonl': record, 'subset_0.npy': 'rows'})

  one, again, other = trained('a', 'loss 3', 'f00'), trained('b', 'loss 3', 'ba5'), trained('c', 'loss 4', 'f00')
  assert one.digest == again.digest != other.digest
  (again.path / 'proxy_0/12/d/ba5').write_text('bad')
  with pytest.raises(UserError, match='proxy_0/12/d/ba5 has changed'):
    again.verify()


def test_attempt_of_the_same_settings_is_resumed_and_any_other_discarded(workdir):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  spend(out, 2, part=5.0)
  assert artifacts.begin(workdir, IDENTITY) == out and (out / 'half').exists()
  resumed = Cost(out)
  assert (resumed.seconds, resumed.flop, resumed.parts) == (pytest.approx(2, abs=0.5), 0, {'part': 5})
  assert artifacts.begin(workdir, OTHER) != out
  assert not out.exists()


def test_jobs_that_begin_and_commit_at_once_share_one_attempt_and_each_has_its_cost(workdir, monkeypatch):
  monkeypatch.setattr(os, 'fsync', lambda _: None)
  with ThreadPoolExecutor(8) as threads:
    for number in range(20):
      identity = Identity('pool', 1, {'pool.length': number}, {})
      folder = workdir / str(number)
      outs = list(threads.map(lambda _, f=folder, i=identity: artifacts.begin(f, i, shared=True), range(8)))
      assert len(set(outs)) == 1
      assert artifacts.begun(folder, 'pool') == identity.as_json()
      assert [p.name for p in outs[0].iterdir()] == ['begun.json']
      for job in range(3):
        spend(outs[0], 1 + job, job)
      (outs[0] / 'file').write_text('x')
      again = Cost(outs[0], 2)
      again.flop = 30.0  # of the work of all jobs, which the last one goes through
      commits = threads.map(lambda _, f=folder, i=identity, c=again: artifacts.commit(f, i, {}, c), range(8))
      (made, *others) = list(commits)
      assert others == [made] * 7
      assert made.manifest['cost'] == {'seconds': pytest.approx(6, abs=1), 'flop': 30}
      assert made.manifest['files'].keys() == {'file'}
      assert artifacts.begin(folder, identity, shared=True) == made.path, 'a job that comes late'


def test_damaged_cost_is_named_and_not_charged(workdir, monkeypatch):
  """Emptied, torn, flipped, foreign and unreadable costs of this job and of another, before a commit and `verify`."""
  out = artifacts.begin(workdir, IDENTITY)
  for job in (0, 1):
    spend(out, 2, job, part=5.0)
  foreign = [artifacts.seal({'seconds': s, 'parts': p}) for s, p in ((-1, {}), ('a', {}), (1, []), (1, {'a': {}}))]
  for job, name in enumerate(('cost.json', 'cost_1.json')):
    whole = (out / name).read_bytes()
    for data in (*_damages_of_a_note(whole), *foreign):
      (out / name).write_bytes(data)
      with pytest.raises(UserError, match=rf'{name} is unreadable .*; restore it, or delete it'):
        Cost(out, job)
      with pytest.raises(UserError, match=name):
        artifacts.commit(workdir, IDENTITY, {}, Cost(out, 1 - job))
      [finding] = artifacts.inspect(workdir)
      assert (finding.kind, finding.path) == ('damaged', out / name)
    (out / name).write_bytes(whole)
  with monkeypatch.context() as patched:
    patched.setattr(Path, 'read_bytes', _fails(errno.EIO))
    with pytest.raises(UserError, match='Input/output error'):
      Cost(out)
  assert Cost(out).of_all_jobs()['seconds'] == pytest.approx(4, abs=1)


def _fails(code: int):
  def fail(*_, **__):
    raise OSError(code, os.strerror(code))

  return fail


def test_attempt_of_other_packages_is_another(workdir, monkeypatch):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  mine = artifacts.versions()

  def now(**changed):
    monkeypatch.setattr(artifacts, 'versions', lambda: {k: v for k, v in {**mine, **changed}.items() if v})

  # A package that decides nothing, a patch release of Python, and packages that appear or disappear.
  now(ml_collections='9', tensorstore='9', python=f'{mine["python"]}9', libtpu='9', scipy=None)
  assert artifacts.other_versions(out) == {}
  artifacts.check_versions(workdir, IDENTITY)
  assert artifacts.begin(workdir, IDENTITY) == out and (out / 'half').exists()
  now(jaxlib='9', python='4.0.1')
  assert artifacts.other_versions(out) == {
    'python': ('.'.join(mine['python'].split('.')[:2]), '4.0'),
    'jaxlib': (mine['jaxlib'], '9'),
  }
  with pytest.raises(UserError, match=f'jaxlib was {mine["jaxlib"]}, now 9; install these again'):
    artifacts.check_versions(workdir, IDENTITY)
  artifacts.check_versions(workdir, OTHER)  # other settings are another error
  assert artifacts.begin(workdir, IDENTITY, shared=True) != out and (out / 'half').exists()
  assert not (artifacts.begin(workdir, IDENTITY) / 'half').exists()
  assert [*artifacts.unfinished(workdir, 'pool')] == [artifacts.begin(workdir, IDENTITY)]


@pytest.mark.parametrize('versions', [None, 7, [], {}, {'jax': 7}, {'jax': None}])
def test_attempt_without_versions_is_resumed(workdir, versions):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'half').write_text('x')
  note = IDENTITY.as_json() if versions is None else {**IDENTITY.as_json(), 'versions': versions}
  (out / 'begun.json').write_bytes(artifacts.seal(note))
  artifacts.check_versions(workdir, IDENTITY)
  assert artifacts.begun(workdir, 'pool') == IDENTITY.as_json()
  assert (artifacts.begin(workdir, IDENTITY) / 'half').exists()


def test_commit_replaces_an_older_artifact(workdir):
  old = make(workdir, one='old')
  new = make(workdir, OTHER, two='new')
  artifact = artifacts.open_stage(workdir, 'pool')
  artifact.verify()
  assert artifact == new and artifact.settings == {'pool.length': 9}
  assert not old.path.exists() and not (new.path / 'one').exists()


class Killed(BaseException):
  pass


def _killing(calls: int):
  """Lets `calls` calls pass and kills at the next."""
  left = iter(range(calls))

  def wrap(function):
    def called(*arguments, **options):
      if next(left, None) is None:
        raise Killed
      return function(*arguments, **options)

    return called

  return wrap


WRITES = ('write_bytes', 'create', 'delete', 'copy')  # of storage: a kill may fall before each of them


@pytest.mark.parametrize('calls', range(9))
def test_kill_before_any_write_of_a_rerun_loses_nothing(workdir, monkeypatch, calls):
  old = make(workdir, one='old')
  with monkeypatch.context() as patch:
    wrap = _killing(calls)
    for name in WRITES:
      patch.setattr(storage, name, wrap(getattr(storage, name)))
    with contextlib.suppress(Killed):
      make(workdir, OTHER, two='new')
  artifact = artifacts.open_stage(workdir, 'pool')
  artifact.verify()
  assert artifact.identity in (IDENTITY.as_json(), OTHER.as_json())
  artifacts.sweep(workdir, ['pool'])
  for attempt in artifacts.unfinished(workdir, 'pool'):  # none lacks a file that a resume would trust
    if attempt.name == old.path.name:
      assert (attempt / 'one').read_text() == 'old' and (attempt / 'deep/er.txt').exists()
  new = make(workdir, OTHER, two='new')
  artifacts.discard_others(workdir, ['pool'])
  new.verify()
  assert sorted(p.name for p in (workdir / 'pool').iterdir()) == sorted([new.path.name, 'manifest.json'])


@pytest.mark.parametrize('calls', range(5))
def test_kill_before_any_write_of_a_repair_loses_nothing(workdir, monkeypatch, calls):
  made = make(workdir, one='text', two='text', three='text')
  (made.path / 'two').write_text('next')
  (made.path / 'three').unlink()
  with monkeypatch.context() as patch:
    wrap = _killing(calls)
    for name in WRITES:
      patch.setattr(storage, name, wrap(getattr(storage, name)))
    with contextlib.suppress(Killed):
      artifacts.reopen(made)
  artifact = artifacts.open_stage(workdir, 'pool')
  if artifact is not None:
    assert artifacts.reopen(artifact)
  assert artifacts.begin(workdir, IDENTITY) == made.path
  assert not (made.path / 'two').exists() and (made.path / 'one').read_text() == 'text'


def test_damaged_stage_is_reopened_without_the_damaged_files(workdir):
  made = make(workdir, one='text', two='text', three='text')
  assert artifacts.reopen(made) == []
  (made.path / 'two').write_text('next')
  (made.path / 'three').unlink()
  (made.path / 'begun.json').write_text('{}')  # the manifest vouches for it no longer
  phrases = [phrase.split('/')[-1] for phrase in artifacts.reopen(made)]
  assert phrases == ['three is missing', 'two has changed since it was written']
  assert artifacts.open_stage(workdir, 'pool') is None and artifacts.begun(workdir, 'pool') == IDENTITY.as_json()
  assert json.loads((made.path / 'begun.json').read_text())['versions'] == made.manifest['versions']
  part = artifacts.begin(workdir, IDENTITY)
  assert part == made.path and artifacts.holds_work(part)
  assert artifacts.checksums(part).keys() == {'one', 'deep/er.txt'}
  for name in ('two', 'three'):
    (part / name).write_text('text')
  again = artifacts.commit(workdir, IDENTITY, {'rows': 3}, Cost(part))
  assert again.digest == made.digest
  assert again.manifest['cost']['flop'] == made.manifest['cost']['flop']
  assert again.manifest['cost']['seconds'] >= made.manifest['cost']['seconds']


def test_clean_up_deletes_what_a_kill_left_and_nothing_of_a_user(workdir):
  part = artifacts.begin(workdir, IDENTITY)
  kept = {part / 'rows.npy', part / '.hidden', part / 'begun.json', workdir / '.mine.12345678'}
  kept |= {workdir / 'pool' / name for name in ('index.html', '.notes.part.20240101', 'mine.part/a', 'features.old/a')}
  kept |= {workdir / name for name in ('mine.part/a', '.notes.part.20240101/a', 'pool.old/manifest.json')}
  half = workdir / 'pool/0123456789ab-0'
  gone = {part / '.rows.npy.ab_34xyz.dsdm', workdir / 'pool/.manifest.json.0a1b2c3d.dsdm', half / 'rows'}
  gone |= {workdir / '.results.json.0a1b2c3d.dsdm', part / 'a.zarr/c/0.__lock'}
  for file in kept | gone:
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text(file.read_text() if file.is_file() else 'x')
  (half / 'begun.json').write_bytes(artifacts.seal({'discarded': True}))  # killed while it was deleted
  (workdir / 'pool/ba9876543210-0').mkdir()  # killed before it had a note
  artifacts.sweep(workdir, ['pool'])
  artifacts.discard_others(workdir, ['pool'])
  assert all(file.is_file() for file in kept - {part / 'begun.json', part / 'rows.npy', part / '.hidden'})
  assert not any(file.exists() for file in gone)
  assert sorted(p.name for p in workdir.glob('pool/*-0')) == []


def _damages_of_a_note(data: bytes) -> list[bytes]:
  flips = [bytes(b ^ 1 << n % 8 if i == n else b for i, b in enumerate(data)) for n in range(0, len(data), 7)]
  return [b'', b'{}', data[:-9], b'null', b'[' * 100_000, *flips]


def test_note_that_cannot_be_read_is_named_and_nothing_is_deleted(workdir):
  """Emptied, torn, flipped, unreadable and lost notes, in everything that looks at them or cleans up."""
  part = artifacts.begin(workdir, IDENTITY)
  (part / 'half').write_text('x')
  note = part / 'begun.json'
  whole = note.read_bytes()

  def check() -> None:
    before = sorted(workdir.rglob('*'))
    for act in (
      lambda: artifacts.sweep(workdir, ['pool']),
      lambda: artifacts.begin(workdir, IDENTITY),
      lambda: artifacts.begin(workdir, OTHER),
      lambda: artifacts.discard_others(workdir, ['pool']),
      lambda: artifacts.begun(workdir, 'pool'),
      lambda: artifacts.check_versions(workdir, IDENTITY),
    ):
      with pytest.raises(UserError, match=r'begun\.json is (unreadable|missing).*; nothing was deleted'):
        act()
    assert sorted(workdir.rglob('*')) == before

  for data in _damages_of_a_note(whole):
    note.write_bytes(data)
    check()
  note.unlink()
  check()
  note.mkdir()  # a read that fails
  check()
  note.rmdir()
  note.write_bytes(whole)
  assert artifacts.begin(workdir, IDENTITY) == part and (part / 'half').is_file()


def test_every_flipped_bit_of_a_manifest_is_an_error_or_changes_nothing(workdir, monkeypatch):
  made = make(workdir, one='text')
  file = workdir / 'pool/manifest.json'
  whole, same = file.read_bytes(), []
  for bit in range(8 * len(whole)):
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    monkeypatch.setattr(storage, 'read_bytes', lambda _, data=bytes(data): data)
    try:
      found = artifacts.open_stage(workdir, 'pool')
    except UserError as error:
      message = str(error)
    else:
      assert found == made
      same.append(bit)
      continue
    assert str(file) in message and '\n' not in message
  assert len(same) < 8 * len(whole) / 100, 'white space'


def test_readers_refuse_what_was_computed_from_another_input(workdir):
  """As after `--stage=pool --rerun`, after an interrupted one, and where a workdir was copied over another."""
  pool = make(workdir)
  scores = Identity('datamodel', 1, {}, {'pool': pool.digest})
  made = make(workdir, scores, scores='1 2')
  opened = artifacts.read(workdir, 'pool', 'datamodel')
  assert list(opened.values()) == [pool, made]
  with pytest.raises(UserError, match='has no finished selection, report; run these stages first'):
    artifacts.read(workdir, 'pool', 'selection', 'report')
  make(workdir, OTHER, one='other')
  for stages in (['pool', 'datamodel'], ['datamodel']):
    with pytest.raises(UserError, match='datamodel of .* was computed from another pool than the one that is there'):
      artifacts.read(workdir, *stages)
  with pytest.raises(UserError, match='another pool'):  # the pool changed after it was opened
    artifacts.read(workdir, 'pool', known={'datamodel': made})
  (artifacts.read(workdir, 'pool')['pool'].path / 'one').write_text('OTHER')
  with pytest.raises(UserError, match='one has changed'):
    artifacts.read(workdir, 'pool')
  shutil.rmtree(workdir / 'pool')
  assert artifacts.read(workdir, 'datamodel') == {'datamodel': made}


def test_stage_holds_what_its_manifest_lists(workdir):
  out = artifacts.begin(workdir, IDENTITY)
  for name in ('proxy_0/8/d/a', 'proxy_0/16/d/a', '.rows.npy.ab_34xyz.dsdm', 'a.zarr/c/0.__lock', '.nfs000012'):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text('x')
  made = make(workdir)
  assert made.manifest['files'].keys() == {'one', 'deep/er.txt', 'proxy_0/8/d/a', 'proxy_0/16/d/a'}
  shutil.copytree(made.path / 'proxy_0/16', made.path / 'proxy_0/99')  # as of an older copy
  (made.path / 'two').write_text('x')
  made.verify()
  assert made.last_step('proxy_0') == 16 and made.last_step('proxy_1') is None
  assert made.file('one') == made.path / 'one' and made.file('two') is None


@pytest.mark.parametrize('name', ['features_0.zarr/c/0/0', 'dataset/pool-train.array_record-00000'])
def test_a_large_store_or_pool_is_opened_by_the_sizes_of_its_files(workdir, monkeypatch, name):
  monkeypatch.setattr(artifacts, 'LARGE', 3)
  out = artifacts.begin(workdir, IDENTITY)
  (out / name).parent.mkdir(parents=True)
  (out / name).write_text('abcd')
  made = make(workdir)
  (made.path / name).write_text('abXd')
  made.verify()
  assert [file.name for file, _ in made.damaged(all_bytes=True)] == [name.rpartition('/')[2]]
  (made.path / name).write_text('abX')
  with pytest.raises(UserError, match='3 bytes where 4'):
    made.verify()


@pytest.mark.parametrize('how', ['first', 'over a finished stage', 'with other settings'])
def test_jobs_that_commit_at_once_leave_one_whole_stage(workdir, count, monkeypatch, how):
  """The finished stage is never lost, whichever job wins; in threads, each with its own descriptors and locks."""
  monkeypatch.setattr(os, 'fsync', lambda _: None)  # a hundred times the time of the rest
  tries, jobs = 2_000 if FAULTS else 100, 3
  start = threading.Barrier(jobs)

  def commit(folder, identity, job) -> bool:
    out = artifacts.begin(folder, identity, shared=True)
    (out / f'part_{job}').write_text(str(job))
    start.wait(60)
    try:
      return artifacts.commit(folder, identity, {}, Cost(out, job)).identity == identity.as_json()
    except UserError as error:
      return 'was written by another run at this moment' not in str(error)

  with ThreadPoolExecutor(jobs) as threads:
    for number in range(tries):
      folder = workdir / str(number)
      if how != 'first':
        make(folder, OTHER, one='old')
      identities = [Identity('pool', 1, {'job': job if how == 'with other settings' else 0}, {}) for job in range(jobs)]
      won = list(threads.map(commit, [folder] * jobs, identities, range(jobs)))
      artifact = artifacts.open_stage(folder, 'pool')
      artifact.verify()
      assert won[artifact.settings['job']] and (how == 'with other settings' or all(won))
      assert artifact.identity == identities[artifact.settings['job']].as_json()
      assert len(artifact.manifest['files']) == (1 if how == 'with other settings' else jobs)
      shutil.rmtree(folder)
  count('commits at once', tries)


def test_stage_on_another_disk_can_be_replaced_and_repaired(workdir, tmp_path):
  """The folder of a stage, or of a whole workdir, is a link, or was moved or copied."""
  elsewhere = tmp_path / 'disk'
  elsewhere.mkdir()
  (workdir / 'pool').symlink_to(elsewhere)
  made = make(workdir, one='text', two='text')
  (made.path / 'two').unlink()
  assert artifacts.reopen(made) and artifacts.begin(workdir, IDENTITY) == made.path
  made = make(workdir, one='text', two='text')
  new = make(workdir, OTHER, one='new')
  new.verify()
  assert (workdir / 'pool').is_symlink() and not made.path.exists()
  moved = shutil.copytree(workdir, tmp_path / 'copy')
  assert artifacts.read(moved, 'pool')['pool'].digest == new.digest
  make(moved, IDENTITY).verify()
  new.verify()
  shutil.rmtree(elsewhere)
  for act in (lambda: artifacts.begin(workdir, IDENTITY), lambda: artifacts.open_stage(workdir, 'pool')):
    with pytest.raises(UserError, match=r'pool is a link to .*disk, which does not exist; mount that disk'):
      act()
  assert (workdir / 'pool').is_symlink()


def test_attempt_with_a_link_to_another_folder_is_not_committed(workdir, tmp_path):
  out = artifacts.begin(workdir, IDENTITY)
  for target, words in ((tmp_path / 'disk', 'is outside it'), (out / 'deep', 'is a link to a folder')):
    target.mkdir(exist_ok=True)
    (out / 'linked').symlink_to(target)
    with pytest.raises(UserError, match=words):
      artifacts.commit(workdir, IDENTITY, {}, Cost(out))
    (out / 'linked').unlink()
  assert artifacts.open_stage(workdir, 'pool') is None


def test_inspection_names_whatever_is_not_whole(workdir, tmp_path, capsys):
  def kinds() -> dict[str, str]:
    return {str(f.path.relative_to(workdir)): f.kind for f in artifacts.inspect(workdir)}

  pool = make(workdir)
  part = artifacts.begin(workdir, Identity('features', 1, {}, {'pool': pool.digest}))
  (part / 'basis_0.npz').write_text('x')
  storage.mark(part / 'basis_0.npz')
  attempt = f'pool/{pool.path.name}'
  assert kinds() == {attempt: 'whole', f'features/{part.name}': 'unfinished'}
  assert cli.main(['verify', str(workdir)]) == 0
  assert '1 unfinished, 1 whole' in capsys.readouterr().out
  (part / 'basis_0.npz').write_text('y')
  assert 'damaged and computed again: basis_0.npz' in next(f.text for f in artifacts.inspect(workdir))
  artifacts.publish(pool)
  (workdir / 'pool/one').unlink()
  for name in ('pool/mine.txt', f'{attempt}/mine.txt', 'pool/one', 'pool/.x.0a1b2c3d.dsdm'):
    (workdir / name).write_text('mine')
  make(workdir, Identity('datamodel', 1, {}, {'pool': 'another'}))
  artifacts.begin(workdir, OTHER, shared=True)
  (part / 'begun.json').write_text('{')
  found = kinds()
  superseded = artifacts._attempts(workdir, 'pool')[0]
  assert {name: kind for name, kind in found.items() if not name.startswith('datamodel')} == {
    attempt: 'whole', f'{attempt}/mine.txt': 'foreign', 'pool/mine.txt': 'foreign', 'pool/one': 'foreign',
    'pool/.x.0a1b2c3d.dsdm': 'superfluous', str(superseded.relative_to(workdir)): 'superfluous',
    f'features/{part.name}/begun.json': 'damaged',
  }  # fmt: skip
  assert 'damaged' in [kind for name, kind in found.items() if name.startswith('datamodel')]
  (superseded / 'half').write_text('work of an interrupted rerun')
  assert kinds()[str(superseded.relative_to(workdir))] == 'unfinished'
  (pool.path / 'one').write_text('TEXT')
  assert cli.main(['verify', str(workdir)]) == 2
  assert f'damaged     {attempt}/one: ' in capsys.readouterr().out
  assert cli.main(['verify', str(tmp_path / 'no')]) == cli.main(['verify', str(tmp_path)]) == 2
  assert capsys.readouterr().err.count('\n') == 2


def test_linked_stage_is_whole_and_can_be_reopened_alone(workdir, tmp_path):
  made = make(workdir, one='text', two='text')
  other = tmp_path / 'other'
  artifacts.link(made, other)
  linked = artifacts.open_stage(other, 'pool')
  linked.verify()
  assert linked.digest == made.digest and (linked.path / 'one').samefile(made.path / 'one')
  (linked.path / 'two').unlink()
  assert artifacts.reopen(linked)
  assert artifacts.begin(other, IDENTITY) == linked.path
  made.verify()


def test_link_that_is_killed_leaves_no_complete_file_without_its_cost(workdir, tmp_path, monkeypatch):
  out = artifacts.begin(workdir, IDENTITY)
  (out / 'model.jsonl').write_text('loss')
  storage.mark(out / 'model.jsonl')
  spend(out, 7, model=7.0)
  made, copy = make(workdir), storage.copy
  for left in range(1, 6):  # two files of `make`, the record, the cost and the note on the record
    other, copies = tmp_path / str(left), iter(range(left))
    monkeypatch.setattr(storage, 'copy', lambda *paths, copies=copies: next(copies) + 1 and copy(*paths))
    with contextlib.suppress(StopIteration):
      artifacts.link(made, other)
    part = other / 'pool' / out.name
    assert not storage.is_marked(part / 'model.jsonl') or Cost(part).parts == {'model': 7.0}
    assert (left == 5) == storage.is_marked(part / 'model.jsonl')
  assert artifacts.other_versions(part) == {}
  assert json.loads((part / 'begun.json').read_text())['versions'] == made.manifest['versions']


def test_published_files_are_those_of_the_artifact(workdir):
  made = make(workdir, one='text', two='text')
  artifacts.publish(made)
  assert (workdir / 'pool/one').read_text() == (workdir / 'pool/two').read_text() == 'text'
  new = make(workdir, OTHER, one='next')
  artifacts.publish(new)
  artifacts.publish(new)
  assert (workdir / 'pool/one').read_text() == 'next' and (workdir / 'pool/deep/er.txt').is_file()
  assert not (workdir / 'pool/two').exists()
  new.verify()
  for name in ('mine.txt', 'one', '.notes.part.20240101/a'):
    (workdir / 'pool' / name).parent.mkdir(exist_ok=True)
    (workdir / 'pool' / name).unlink(missing_ok=True)
    (workdir / 'pool' / name).write_text('mine')
  artifacts.publish(make(workdir, two='text'))
  assert not (workdir / 'pool/deep').joinpath('no').exists() and (workdir / 'pool/two').exists()
  for name in ('mine.txt', 'one', '.notes.part.20240101/a'):  # also a published file that somebody changed
    assert (workdir / 'pool' / name).read_text() == 'mine'


def test_deleted_stage_is_not_finished(workdir):
  make(workdir)
  shutil.rmtree(workdir / 'pool')
  assert artifacts.open_stage(workdir, 'pool') is None and artifacts.unfinished(workdir, 'pool') == []
