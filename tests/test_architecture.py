"""The shape of the code: who may import whom, what starts fast, how large a module may be."""

import ast
import json
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
# From the bottom up: each may import itself and what stands before it.
ORDER = (
  'errors config core data lm training attribution selection validation evaluation report api pipeline main'.split()
)
ANYTHING = {'plan', 'study', 'bench'}  # may import all; only main may import plan
SLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 'clu'}
MOST_LINES = 450

MODULES = sorted(PACKAGE.rglob('*.py'))


def room(module: str) -> str:
  """'core' of 'dsdm_jax.core.mesh'; '' of the package itself."""
  return module.partition('.')[2].partition('.')[0]


def name_of(path: Path) -> str:
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(source: str, module: str) -> set[str]:
  """Full names of all that `source` imports, in functions too; 'a.b' for both `import a.b` and `from a import b`."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{module} has a relative import in line {node.lineno}; write the whole name'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  return found


def violations(source: str, module: str) -> list[str]:
  """One phrase for each import of the project in `source` that the order does not allow."""
  here = room(module)
  phrases = []
  for name in sorted(imports(source, module)):
    there = room(name)
    if name.split('.')[0] != 'dsdm_jax' or not there or there == here or there.startswith('_'):
      continue
    if not here:
      allowed = there == 'api'  # the package itself opens runs for notebooks
    elif here in ANYTHING:
      allowed = there != 'main'
    elif there in ANYTHING:
      allowed = (here, there) == ('main', 'plan')
    else:
      allowed = here in ORDER and there in ORDER and ORDER.index(there) < ORDER.index(here)
    if not allowed:
      phrases.append(f'{module} imports {name}')
  return phrases


def test_imports_go_one_way():
  assert MODULES
  found = [phrase for path in MODULES for phrase in violations(path.read_text(), name_of(path))]
  assert found == []


def test_every_room_has_its_place():
  rooms = {room(name_of(path)) for path in MODULES} - {''}
  assert rooms <= {*ORDER, *ANYTHING}


@pytest.mark.parametrize(
  ('module', 'source', 'count'),
  [
    ('dsdm_jax.core.mesh', 'from dsdm_jax.data import pool', 1),
    ('dsdm_jax.core.mesh', 'def f():\n  import dsdm_jax.data.pool.pool', 1),
    ('dsdm_jax.core.mesh', 'from dsdm_jax import lm, data, core', 2),
    ('dsdm_jax.data.pool.pool', 'from dsdm_jax.core import mesh\nimport dsdm_jax\nimport json', 0),
    ('dsdm_jax.selection.dsdm', 'from dsdm_jax.evaluation.results import table', 1),
    ('dsdm_jax.report.page', 'from dsdm_jax.evaluation import results', 0),
    ('dsdm_jax.pipeline', 'from dsdm_jax.plan import cost', 1),
    ('dsdm_jax', 'from dsdm_jax import api', 0),
    ('dsdm_jax', 'from dsdm_jax import pipeline', 1),
    ('dsdm_jax.main', 'from dsdm_jax.plan import cost\nfrom dsdm_jax import pipeline', 0),
    ('dsdm_jax.plan.cost', 'from dsdm_jax import pipeline', 0),
    ('dsdm_jax.utils', 'from dsdm_jax.core import mesh', 1),
  ],
)
def test_the_test_sees_what_is_wrong(module, source, count):
  assert len(violations(source, module)) == count


def test_slow_packages_are_imported_only_inside_functions():
  late = []
  for path in MODULES:
    for node in ast.parse(path.read_text()).body:
      names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
      names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
      late += [f'{name_of(path)} line {node.lineno}: {name}' for name in names if name.split('.')[0] in SLOW]
  assert late == []


@pytest.mark.parametrize('start', ['config', 'core', 'lm', 'training', 'attribution', 'selection'])
def test_array_code_runs_without_tensorflow(start):
  """In a process of its own: nothing that these import, however far away, brings in TensorFlow, seqio or TFDS."""
  names = [name_of(path) for path in MODULES if room(name_of(path)) == start]
  if not names:
    pytest.skip(f'dsdm_jax.{start} is not there')
  code = (
    'import importlib, json, sys\n'
    f'for name in {names}: importlib.import_module(name)\n'
    f'print(json.dumps(sorted(set({sorted(SLOW)}) & set(sys.modules))))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1]) == []


def test_modules_are_small_and_named_for_what_they_do():
  sizes = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
  assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES} == {}
  assert [name for name in sizes if name.split('.')[-1] in ('utils', 'util', 'helpers', 'misc', 'common')] == []


def test_main_stays_short():
  main = PACKAGE / 'main.py'
  if not main.is_file():
    pytest.skip('dsdm_jax/main.py is not there')
  assert len(main.read_text().splitlines()) <= 60


def test_randomness_comes_from_the_named_streams():
  """No module but core/prng.py makes a key or a NumPy generator; under eval_shape a key is a shape."""
  maker = re.compile(r'\brandom\.(PRNGKey|key|default_rng|RandomState|seed)\(|^import random$|^from random import')
  made = [
    f'{name_of(path)}: {line.strip()}'
    for path in MODULES
    if name_of(path) != 'dsdm_jax.core.prng'
    for line in path.read_text().splitlines()
    if maker.search(line) and 'eval_shape' not in line
  ]
  assert made == []


def test_config_is_never_read_with_a_default():
  """`config.get('key', default)` hides a slip of the pen: the key could not be set and nobody would hear of it."""
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
