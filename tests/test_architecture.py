"""The shape of the code, as far as import-linter and ruff cannot check it; both are configured in pyproject.toml."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'dsdm_jax'
MODULES = sorted(PACKAGE.rglob('*.py'))


def name_of(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def test_imports_follow_the_layers():
  program = shutil.which('lint-imports', path=Path(sys.executable).parent)
  assert program is not None, 'import-linter is not installed; see requirements-test.txt'
  done = subprocess.run([program, '--no-cache'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def test_array_code_runs_without_tensorflow():
  """In a new process, because third-party packages may import TensorFlow, seqio or TFDS too."""
  folders = ('config', 'core', 'lm', 'training', 'attribution', 'selection')
  names = [name_of(path) for folder in folders for path in sorted((PACKAGE / folder).rglob('*.py'))]
  assert names
  code = (
    'import importlib, sys\n'
    f'for name in {names}: importlib.import_module(name)\n'
    "print({'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 'clu'} & set(sys.modules))"
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == 'set()'


def test_modules_are_named_for_what_they_do():
  vague = {'utils', 'util', 'helpers', 'misc', 'common'}
  assert [name_of(path) for path in MODULES if path.stem in vague] == []


def test_folders_of_a_workdir_are_those_of_the_stages():
  from dsdm_jax import pipeline
  from dsdm_jax.core import artifacts

  assert [stage.name for stage in pipeline.STAGES] == list(artifacts.STAGES)


def test_main_stays_short():
  assert len((PACKAGE / 'main.py').read_text().splitlines()) <= 60


def test_config_is_never_read_with_a_default():
  """`config.get('key', default)` hides a typo: the key cannot be set, and no error says so."""
  read = re.compile(r'\bconfig(\.\w+)*\.get\(')
  assert [name_of(p) for p in MODULES if read.search(p.read_text())] == []


# Modules that may open files themselves, and whose files these are. All other files are artifacts.
OPENS_FILES = {
  'attribution.score_files': 'files that the user names',
  'core.artifacts': 'links in a workdir on a disk',
  'core.checkpoints': 'a folder on this machine, from which checkpoints are uploaded',
  'core.lock': 'locks of a disk, and /proc',
  'core.object_store': 'what it downloads',
  'core.storage': 'it is the way to artifacts',
  'core.command_line': 'the streams of the process',
  'core.compile_cache': 'a cache of this user',
  'core.progress': 'logs on this machine, which are uploaded',
  'data.files': 'input',
  'data.hub': 'input',
  'data.inputs': 'code that is imported',
  'data.pool.beam': 'local files of a pool that is built',
  'data.pool.build': 'likewise',
  'data.pool.layout': 'likewise',
  'data.pool.passes': 'likewise',
  'data.pool.pool': 'likewise',
  'data.pool.pretokenized': 'likewise, and input',
  'data.pool.installed_packages': 'input',
  'data.pool.readers': 'input',
  'data.pool.vocabulary': 'input',
  'data.targets.builtin': 'input',
  'data.targets.tfds_items': 'input',
  'lm.hugging_face': 'weights that are read, or written to a local folder',
  'plan.preflight': 'the space on a disk',
  'report.page': 'templates',
  'selection.documents': 'a local folder that the user names',
  'selection.export': 'likewise',
  'selection.sample': 'likewise',
  'selection.trainers': 'likewise',
  'study.results': 'files that the user names',
  'study.study': 'likewise',
}
OPENERS = {
  '': {'open'},
  'os': set('open remove unlink rename replace link symlink mkdir makedirs rmdir listdir scandir walk stat'.split()),
  'os.path': set('exists lexists isfile isdir getsize getmtime'.split()),
  'np': {'load', 'save', 'savez', 'memmap', 'fromfile'},
  'np.lib.format': {'open_memmap'},
  'pq': {'ParquetFile', 'ParquetWriter', 'read_table', 'write_table'},
  'parquet': {'ParquetFile', 'ParquetWriter', 'read_table', 'write_table'},
  'shutil': set('copy copy2 copytree disk_usage move rmtree'.split()),
  'glob': {'glob', 'iglob'},
  'safetensors': {'safe_open'},
}
METHODS = set(
  'chmod exists glob hardlink_to is_dir is_file iterdir mkdir read_bytes read_text rglob rmdir stat symlink_to tofile '
  'touch unlink write_bytes write_text'.split()
)
WRAPPERS = {'storage', 'object_store', 'files'}  # modules with functions of the same names


def opened_files(path: Path) -> list[str]:
  found = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      of, _, name = ast.unparse(node.func).rpartition('.')
      if name in OPENERS.get(of, ()) or (of and of not in (*OPENERS, *WRAPPERS) and name in METHODS):
        found.append(f'{path.relative_to(ROOT)}:{node.lineno}: {of}.{name}')
  return found


def test_artifacts_are_read_and_written_through_storage():
  """A workdir may be in an object store. There `core/storage.py` works, and what opens paths does not.

  mypy says the same of everything that is typed as a `Location`, as folders of artifacts are.
  """
  opening = {name_of(path).removeprefix('dsdm_jax.'): opened_files(path) for path in MODULES}
  opening = {name: found for name, found in opening.items() if not name.startswith('bench')}
  assert [line for name, found in opening.items() if name not in OPENS_FILES for line in found] == []
  assert [name for name in OPENS_FILES if not opening[name]] == [], 'these need no exception'


@pytest.mark.parametrize('requirement', ['requirements.txt', 'requirements-test.txt'])
def test_requirements_are_exact_and_agree_with_pyproject(requirement):
  lines = [line.partition('#')[0].strip() for line in (ROOT / requirement).read_text().splitlines()]
  pins = [line for line in lines if line]
  assert [pin for pin in pins if not re.fullmatch(r'[\w.-]+(\[\w+\])?==[\w.]+', pin)] == []
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  ranges = project['dependencies'] if requirement == 'requirements.txt' else project['optional-dependencies']['test']
  wanted = {r.name: r.specifier for r in map(Requirement, ranges)}
  pinned = {r.name: next(iter(r.specifier)).version for r in map(Requirement, pins)}
  assert wanted.keys() == pinned.keys()
  assert [name for name, version in pinned.items() if version not in wanted[name]] == []


def test_lock_pins_what_requirements_pins():
  lock = (ROOT / 'requirements.lock').read_text().splitlines()
  for line in (ROOT / 'requirements.txt').read_text().splitlines():
    pin = re.sub(r'\[\w+\]', '', line.partition('#')[0].strip())
    assert not pin or pin.lower() in [entry.lower() for entry in lock], pin


def test_shell_scripts():
  scripts = [*sorted((ROOT / 'launch').glob('*.sh')), ROOT / '.ci' / 'run']
  for script in scripts:
    subprocess.run(['bash', '-n', script], check=True)
  for script in (ROOT / '.ci' / 'run', ROOT / 'launch' / 'run.sh', ROOT / 'launch' / 'test.sh'):
    assert os.access(script, os.X_OK), f'{script} is not executable'
  if shutil.which('shellcheck') is None:
    pytest.skip('shellcheck is not installed')
  done = subprocess.run(['shellcheck', '-x', *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout
