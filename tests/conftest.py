"""The setting of every test: eight fake CPU devices, strict JAX, a compilation cache, no accelerator.

It is set in the environment before JAX is imported, so that processes started by tests have it too.
"""

import collections
import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_CACHE = ROOT / '.cache'
FAULTS = bool(os.environ.get('DSDM_FAULTS'))  # launch/test.sh --faults and --all: the long version of tests/faults


def _machine() -> str:
  """Names the kind of CPU, because a program compiled for another kind must not come from the cache."""
  info = Path('/proc/cpuinfo')
  flags = next((line for line in info.read_text().splitlines() if 'flags' in line), '') if info.is_file() else ''
  return hashlib.sha256(f'{platform.platform()} {flags}'.encode()).hexdigest()[:12]


_JAX_CACHE = str(_CACHE / 'jax' / _machine())
_inherited = os.environ.get('JAX_COMPILATION_CACHE_DIR') == _JAX_CACHE  # a process that tests/faults/server.py forked
assert _inherited or 'jax' not in sys.modules, 'JAX was imported before tests/conftest.py could set it up'
os.environ |= {
  'JAX_PLATFORMS': 'cpu',
  'JAX_NUM_CPU_DEVICES': '8',
  'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'false',  # collectives of two programs in flight can wait for each other's threads
  'PJRT_NPROC': '64',  # and one program's collective for a thread that a copy holds: XLA's pool has eight otherwise
  'JAX_NUMPY_RANK_PROMOTION': 'raise',
  # Programs run a few times: compiling takes longer than running.
  'XLA_FLAGS': '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
  '--xla_cpu_parallel_codegen_split_count=1 --xla_llvm_disable_expensive_passes=true',
  'JAX_COMPILATION_CACHE_DIR': _JAX_CACHE,
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3',
  'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'EPATH_USE_TF': 'false',  # which knows no emulator of Cloud Storage; epath looks once
  'TF_ENABLE_ONEDNN_OPTS': '0',
  'MPLBACKEND': 'agg',
  'HYPOTHESIS_STORAGE_DIRECTORY': str(_CACHE / 'hypothesis'),
  'PYTHONDONTWRITEBYTECODE': '1',
}

from hypothesis import settings  # noqa: E402  after the environment is set

from dsdm_jax.core.storage import Address  # noqa: E402
from tests.helpers import tiers  # noqa: E402

# Seeded, so that two runs test the same; a deadline would fail on compilation.
settings.register_profile('dsdm', deadline=None, derandomize=True, max_examples=1_000 if FAULTS else 50)
settings.load_profile('dsdm')


@pytest.fixture(scope='session', autouse=True)
def _signals_stay_with_pytest() -> Iterator[None]:
  """Keeps commands that tests call in this process from handling its signals for good, in later tests too."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('dsdm_jax.core.stopping.install', lambda: None)
    yield


@pytest.fixture(scope='session')
def stores() -> Iterator[Callable[[str], dict[str, str]]]:
  """Starts the emulator of 's3' or 'gs' once; returns the environment in which programs reach it."""
  from tests.helpers.stores import serving

  with contextlib.ExitStack() as stack:
    yield functools.cache(lambda kind: stack.enter_context(serving(kind)))


@pytest.fixture
def address(request, stores, monkeypatch, tmp_path) -> Address:
  """An empty folder in an emulated object store, S3 unless the test is parametrized with 'gs'."""
  kind = getattr(request, 'param', 's3')
  for name, value in stores(kind).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  return Address(f'{kind}://tests/{secrets.token_hex(8)}/run')


@pytest.fixture(scope='session')
def repo_root() -> Path:
  return ROOT


@pytest.fixture(scope='session')
def shared_data() -> Path:
  """A folder of benchmark and pool files beside the checkout; without it the test is skipped."""
  folder = ROOT.parent / 'shared' / 'data'
  if not folder.is_dir():
    pytest.skip('there is no folder shared/data beside this repository')
  return folder


def _other_python(variable: str, environment: str, requirements: str) -> Path:
  """The Python that `variable` names, or that of an environment made by launch/test.sh; without one, skips the test."""
  if variable in os.environ:
    return Path(os.environ[variable])
  folder = ROOT / environment
  if (lock := folder.with_suffix('.lock')).exists():  # launch/test.sh holds it while it installs
    with lock.open() as file:
      fcntl.flock(file, fcntl.LOCK_SH)
  if not (folder / 'installed.txt').is_file():  # written once all is installed
    pytest.skip(f'no environment with {requirements}; launch/test.sh makes {environment}')
  return folder / 'bin' / 'python'


@pytest.fixture(scope='session')
def peers() -> Path:
  """A Python that has the peers: packages of other people that tests compare with."""
  return _other_python('DSDM_JAX_PEERS', '.venv-peers', 'requirements-peers.txt')


@pytest.fixture(scope='session')
def libtpu() -> Path:
  """A Python that compiles for TPUs."""
  return _other_python('DSDM_JAX_TPU', '.venv-tpu', 'requirements-tpu.txt')


@pytest.fixture(scope='session')
def beam() -> Path:
  """A Python that has Apache Beam."""
  return _other_python('DSDM_JAX_BEAM', '.venv-beam', 'requirements-beam.txt')


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
  """An empty folder for one run."""
  folder = tmp_path / 'run'
  folder.mkdir()
  return folder


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
  """Adds to a number that pytest prints at the end: count('kills survived', 12)."""

  def add(name: str, number: int = 1) -> None:
    request.node.user_properties.append((f'counted: {name}', number))

  return add


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    tiers.mark(item)
  tiers.order(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  totals: collections.Counter[str] = collections.Counter()
  for report in terminalreporter.stats.get('passed', []):
    for name, value in report.user_properties:
      if name.startswith('counted: '):
        totals[name.removeprefix('counted: ')] += value
  if totals:
    terminalreporter.section('counted')
    for name, number in sorted(totals.items()):
      terminalreporter.write_line(f'{name}: {number:,}')
