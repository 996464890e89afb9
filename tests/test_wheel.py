"""The wheel, installed into an environment of its own and used from a folder that is no checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The quickstart at the size of tests/pipeline/tiny.py, with one seed.
TINY = """
pool.max_bytes=60000 pool.max_document_bytes=2048 pool.length=32 pool.vocab_size=320 targets.max_examples=12
model.layers=1 model.width=16 model.mlp_width=32 features.dimension=64 features.shard_rows=256 proxies.epochs=0.25
features.projection=two_sided proxies.count=1
proxies.train.batch_size=16 pretraining.train.batch_size=16 proxies.train.warmup_steps=1
pretraining.train.warmup_steps=1 selection.examples=32 selection.epochs=2 pretraining.seeds=1 report.examples=2
"""
OVERRIDES = [f'--config.{override}' for override in TINY.split()]


def _run(command, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
  # launch/setup.sh puts the checkout on PYTHONPATH, where it would come before what is installed.
  inherited = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  return subprocess.run(
    command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False, timeout=600
  )


@pytest.fixture(scope='module')
def site_packages() -> Path:
  """The folder that holds the pinned requirements, JAX and setuptools among them."""
  spec = importlib.util.find_spec('jax')
  assert spec is not None
  assert spec.origin is not None
  return Path(spec.origin).parent.parent


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, site_packages) -> Path:
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  source.mkdir()
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  for name in ('dsdm_jax', 'configs'):
    shutil.copytree(ROOT / name, source / name, symlinks=True)
  command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '--no-index', '-w', folder, '.']
  done = _run(command, source, PYTHONPATH=str(site_packages))
  assert done.returncode == 0, done.stderr
  (built,) = folder.glob('*.whl')
  return built


@pytest.fixture(scope='module')
def programs(wheel, site_packages, tmp_path_factory) -> Path:
  """The folder with the programs of an environment in which the wheel is installed."""
  environment = tmp_path_factory.mktemp('environment')
  python = environment / 'bin' / 'python'
  install = ['-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', wheel]
  for command in (['-m', 'venv', '--without-pip', environment], install):
    done = _run([sys.executable, *command], environment)
    assert done.returncode == 0, done.stderr
  site = next((environment / 'lib').glob('python*/site-packages'))
  (site / 'requirements.pth').write_text(f'{site_packages}\n')
  return python.parent


@pytest.fixture
def folder(tmp_path) -> Path:
  """An empty folder but for a package `configs` of its own, which must not be imported."""
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / '__init__.py').write_text("raise RuntimeError('this is the configs package of a user')\n")
  return tmp_path


def test_wheel_holds_the_package_alone(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  assert {name.split('/')[0] for name in names} == {'dsdm_jax', 'dsdm_jax-0.1.0.dist-info'}
  assert {'dsdm_jax/configs/quickstart.py', 'dsdm_jax/py.typed', 'dsdm_jax/report/templates/report.html'} <= {*names}
  assert not [name for name in names if name.startswith('dsdm_jax/bench/')]
  assert any(name.startswith('dsdm_jax/study/') for name in names)


def test_smallest_run_beside_a_configs_package(programs, folder):
  arguments = ['--config=quickstart', '--workdir=run', *OVERRIDES]
  options = {'JAX_NUM_CPU_DEVICES': '1', 'JAX_NUMPY_RANK_PROMOTION': 'allow'}
  done = _run([programs / 'python', '-m', 'dsdm_jax.main', *arguments], folder, **options)
  assert done.returncode == 0, done.stderr[-3_000:]
  assert (folder / 'run' / 'report' / 'index.html').is_file()
  # The same run by the other way in: every stage is finished, and the config is found by its name again.
  results = (folder / 'run' / 'results.json').read_bytes()
  done = _run([programs / 'dsdm', 'run', *arguments], folder, **options)
  assert done.returncode == 0, done.stderr[-3_000:]
  assert (folder / 'run' / 'results.json').read_bytes() == results


def test_help_names_commands_and_configs(programs, folder):
  done = _run([programs / 'dsdm', '--help'], folder)
  assert done.returncode == 0, done.stderr
  assert all(f'\n  {command}' in done.stdout for command in ('  run', '  plan', '  export', '  study', '  bench'))
  assert 'quickstart' in _run([programs / 'dsdm', 'run', '--help'], folder).stdout


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['bench', 'features'], 'dsdm: benches are not installed'),
    (['run', '--workdir=run'], 'dsdm_jax: --config is missing'),
    (['study', '--config=no_such_config', '--workdir=run'], 'dsdm: --config=no_such_config is no Python file'),
  ],
)
def test_errors_are_one_line(programs, folder, arguments, message):
  done = _run([programs / 'dsdm', *arguments], folder)
  assert (done.returncode, done.stderr.count('\n')) == (2, 1)
  assert done.stderr.startswith(message)


def test_arguments_are_completed(programs, folder):
  line = 'dsdm run --config=quickstart_c'
  environment = {'_ARGCOMPLETE': '1', '_ARGCOMPLETE_STDOUT_FILENAME': str(folder / 'completions')}
  environment |= {'_ARGCOMPLETE_COMP_WORDBREAKS': '=', 'COMP_LINE': line, 'COMP_POINT': str(len(line))}
  _run([programs / 'dsdm'], folder, **environment)
  assert 'quickstart_controls' in (folder / 'completions').read_text()
