"""Artifacts: finished or absent, and refused when they are not what was asked for."""

import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Cost, Identity
from dsdm_jax.errors import UserError
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
  del manifest['attempt']
  file.write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='pool was written by an older version of dsdm_jax; use another --workdir'):
    artifacts.open_stage(workdir, 'pool')


def spend(attempt: Path, seconds: float, job: int = 0, **parts: dict[str, float]) -> None:
  """As of a process that worked for `seconds`, saved, and was killed."""
  cost = Cost(attempt, job)
  cost._began -= seconds
  cost.parts |= parts
  cost.save()
  cost._began -= 100  # work that is lost


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
  spend(out, 2, part={'flop': 5.0})
  assert artifacts.begin(workdir, IDENTITY) == out and (out / 'half').exists()
  resumed = Cost(out)
  assert (resumed.seconds, resumed.flop, resumed.parts) == (pytest.approx(2, abs=0.5), 0, {'part': {'flop': 5}})
  assert artifacts.begin(workdir, OTHER) != out
  assert not out.exists()


def test_jobs_that_begin_and_commit_at_once_share_one_attempt_and_each_has_its_cost(workdir):
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
  (out / 'begun.json').write_text(json.dumps(note))
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
  assert again.digest == made.digest and again.manifest['cost'] == made.manifest['cost']


def test_half_written_files_and_half_deleted_attempts_are_swept_and_nothing_else(workdir):
  part = artifacts.begin(workdir, IDENTITY)
  kept = {part / 'rows.npy', part / '.hidden', part / 'begun.json', workdir / '.mine.12345678'}
  kept |= {workdir / 'pool' / 'index.html'}
  gone = {part / '.rows.npy.ab_34xyz', workdir / 'pool/.manifest.json.0a1b2c3d', workdir / 'pool/0123456789ab-0/rows'}
  for file in kept | gone:
    file.parent.mkdir(exist_ok=True)
    file.write_text(file.read_text() if file.is_file() else 'x')
  artifacts.sweep(workdir, ['pool'])
  assert all(file.is_file() for file in kept)
  assert not any(file.exists() for file in gone) and not (workdir / 'pool/0123456789ab-0').exists()


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


def test_deleted_stage_is_not_finished(workdir):
  make(workdir)
  shutil.rmtree(workdir / 'pool')
  assert artifacts.open_stage(workdir, 'pool') is None and artifacts.unfinished(workdir, 'pool') == []
