"""launch/run.sh, with a Python that only writes down what it is asked to do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FAKE = """#!/usr/bin/env bash
case "$1 $2" in
  "-c "*) exit {suits} ;;
  "--version "*) echo Python {version} ;;
  "-m venv") mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip") [[ $3 == --version ]] || echo "$*" >>"{log}/pip" ;;
  "-m dsdm_jax.main")
    printf '%s' "${{GLIBC_TUNABLES:-}}" >"{log}/tunables"
    shift 2 && printf '%s\\n' "$@" >"{log}/main" && exit "${{EXIT_CODE:-0}}" ;;
esac
"""
TOOLS = 'bash dirname basename cat cmp cp rm mkdir env'.split()


class Checkout:
  """A copy of the launch scripts in a folder with a space in its name, and a PATH with nothing but what they need."""

  def __init__(self, folder: Path, repo: Path):
    self.root = folder / 'a repository'
    self.log = folder / 'log'
    self.path = folder / 'bin'
    self.system = folder / 'system'  # its /sys and /dev
    for made in (self.root, self.log, self.path, self.system):
      made.mkdir()
    shutil.copytree(repo / 'launch', self.root / 'launch')
    for name in ('requirements.txt', 'requirements-tpu.txt', 'requirements-cuda.txt', 'requirements.lock'):
      shutil.copy(repo / name, self.root)
    for tool in TOOLS:
      found = shutil.which(tool)
      assert found is not None
      (self.path / tool).symlink_to(found)

  def add_python(self, name: str, suits: bool = True, version: str = '3.12.1') -> Path:
    file = self.path / name
    file.write_text(FAKE.format(suits=int(not suits), version=version, log=self.log))
    file.chmod(0o755)
    return file

  def run(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['bash', self.root / 'launch' / 'run.sh', *arguments],
      cwd=cwd or self.root,
      env={'PATH': str(self.path), 'DSDM_JAX_SYSTEM': str(self.system), **environment},
      capture_output=True,
      text=True,
      check=False,
    )

  def main_arguments(self) -> list[str]:
    return (self.log / 'main').read_text().splitlines()

  def installations(self) -> int:
    file = self.log / 'pip'
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def checkout(tmp_path, repo_root) -> Checkout:
  if os.name != 'posix':
    pytest.skip('the launch scripts need bash')
  return Checkout(tmp_path, repo_root)


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
@pytest.mark.parametrize(
  ('environment', 'tunables'),
  [
    ({}, 'glibc.malloc.hugetlb=1'),
    ({'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0'}, 'glibc.malloc.hugetlb=0'),
    ({'DSDM_JAX_ACCELERATOR': 'cuda'}, ''),
  ],
)
def test_huge_pages_are_on_where_there_is_no_accelerator(checkout, environment, tunables):
  checkout.add_python('python3')
  assert checkout.run(**environment).returncode == 0
  assert (checkout.log / 'tunables').read_text() == tunables


@pytest.mark.parametrize(
  ('given', 'handed_on'),
  [
    ([], ['--config=configs/quickstart.py', '--workdir=runs/quickstart']),
    (['--stage=pool'], ['--config=configs/quickstart.py', '--workdir=runs/quickstart', '--stage=pool']),
    (
      ['--config.model.layers=4'],
      ['--config=configs/quickstart.py', '--workdir=runs/quickstart', '--config.model.layers=4'],
    ),
    (
      ['--config=configs/x.py', '--config.model.layers=4'],
      ['--workdir=runs/x', '--config=configs/x.py', '--config.model.layers=4'],
    ),
    (['--config', '.pyenv/x.py:small'], ['--workdir=runs/x', '--config', '.pyenv/x.py:small']),
    (['--workdir=my results'], ['--config=configs/quickstart.py', '--workdir=my results']),
    (['--workdir', 'w', '--config=y.py'], ['--workdir', 'w', '--config=y.py']),
  ],
)
def test_defaults_give_way_to_what_is_given(checkout, given, handed_on):
  checkout.add_python('python3')
  done = checkout.run(*given)
  assert done.returncode == 0, done.stderr
  assert checkout.main_arguments() == handed_on


def test_from_another_folder_the_defaults_are_still_the_repositorys(checkout, tmp_path):
  checkout.add_python('python3')
  assert checkout.run(cwd=tmp_path).returncode == 0
  root = checkout.root
  assert checkout.main_arguments() == [f'--config={root}/configs/quickstart.py', f'--workdir={root}/runs/quickstart']


def test_installs_once_and_again_when_requirements_change(checkout):
  checkout.add_python('python3')
  for _ in range(2):
    assert checkout.run().returncode == 0
    assert checkout.installations() == 1
  with open(checkout.root / 'requirements.txt', 'a') as f:
    f.write('another==1.0\n')
  checkout.run()
  assert checkout.installations() == 2


def test_exit_code_of_the_run_is_handed_on(checkout):
  checkout.add_python('python3')
  assert checkout.run(EXIT_CODE='2').returncode == 2


@pytest.mark.parametrize('found', ['python3', None])
def test_too_old_or_no_python_is_told_in_one_line(checkout, found):
  if found:
    checkout.add_python(found, suits=False, version='3.9.2')
  done = checkout.run()
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert 'needs Python 3.11' in done.stderr
  assert ('Python 3.9.2' if found else 'no Python') in done.stderr
  assert not (checkout.root / '.venv').exists()


def test_uvs_python_comes_first(checkout, tmp_path):
  checkout.add_python('python3.12', version='3.12.0')
  managed = checkout.add_python('managed', version='3.11.99')
  uv = checkout.path / 'uv'
  uv.write_text(f'#!/usr/bin/env bash\necho "{managed}"\n')
  uv.chmod(0o755)
  done = checkout.run()
  assert done.returncode == 0
  assert 'with Python 3.11.99' in done.stderr


def test_says_which_page_to_open(checkout):
  checkout.add_python('python3')
  assert 'Open' not in checkout.run().stderr
  page = checkout.root / 'runs' / 'quickstart' / 'report' / 'index.html'
  page.parent.mkdir(parents=True)
  page.touch()
  assert 'Open runs/quickstart/report/index.html' in checkout.run().stderr


def _plug_in(checkout: Checkout, vendor: str, device: str) -> None:
  folder = checkout.system / 'sys' / 'bus' / 'pci' / 'devices' / '0000:00:05.0'
  folder.mkdir(parents=True)
  (folder / 'vendor').write_text(f'{vendor}\n')
  (folder / 'device').write_text(f'{device}\n')


@pytest.mark.parametrize(
  ('vendor', 'device', 'files'),
  [
    ('0x1ae0', '0x0063', ['requirements.txt', 'requirements-tpu.txt']),  # v5e
    ('0x1ae0', '0x0042', ['requirements.txt']),  # Google's network card
    ('0x8086', '0x0063', ['requirements.txt']),
  ],
)
def test_a_tpu_is_found_by_its_number_on_the_bus(checkout, vendor, device, files):
  checkout.add_python('python3')
  _plug_in(checkout, vendor, device)
  assert checkout.run('--install').returncode == 0
  assert re.findall(r'-r .*?/(requirements\S*txt)', (checkout.log / 'pip').read_text()) == files
  assert not (checkout.log / 'main').exists()


@pytest.mark.parametrize(('said', 'file'), [('', 'requirements-cuda.txt'), ('tpu', 'requirements-tpu.txt')])
def test_a_gpu_is_found_by_its_device_unless_another_accelerator_is_asked_for(checkout, said, file):
  checkout.add_python('python3')
  (checkout.system / 'dev').mkdir()
  (checkout.system / 'dev' / 'nvidia0').touch()
  assert checkout.run('--install', DSDM_JAX_ACCELERATOR=said).returncode == 0
  assert file in (checkout.log / 'pip').read_text()


def test_an_accelerator_that_is_none_is_told(checkout):
  checkout.add_python('python3')
  done = checkout.run('--install', DSDM_JAX_ACCELERATOR='gpu')
  assert done.returncode == 2
  assert done.stderr.splitlines() == ['launch/run.sh: DSDM_JAX_ACCELERATOR=gpu must be tpu, cuda or cpu']


@pytest.mark.parametrize('accelerator', ['tpu', 'cuda'])
def test_accelerators_pin_what_they_add_and_nothing_that_is_there_already(repo_root, accelerator):
  def pins(name: str) -> list[str]:
    lines = (line.partition('#')[0].strip() for line in (repo_root / name).read_text().splitlines())
    return [line for line in lines if line]

  added = pins(f'requirements-{accelerator}.txt')
  assert added
  assert [pin for pin in added if not re.fullmatch(r'[\w.-]+==[\w.]+', pin)] == []
  known = {pin.partition('==')[0] for pin in pins('requirements.txt')}
  assert not known & {pin.partition('==')[0] for pin in added}
  if accelerator == 'cuda':  # the plugin and jax only work together at one version
    jax = next(pin for pin in pins('requirements.txt') if pin.startswith('jax=='))
    assert {pin.partition('==')[2] for pin in added if pin.startswith('jax-')} == {jax.partition('==')[2]}
