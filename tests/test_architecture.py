"""The shape of the code, as far as import-linter and ruff cannot check it; both are configured in pyproject.toml."""

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
