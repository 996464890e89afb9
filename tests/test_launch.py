"""launch/run.sh with a fake Python, which records its arguments."""

import os
import re
import sys

import pytest

from tests.helpers.launch import Checkout


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
  ('arguments', 'passed'),
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
def test_arguments_override_defaults(checkout, arguments, passed):
  checkout.add_python('python3')
  done = checkout.run(*arguments)
  assert done.returncode == 0, done.stderr
  assert checkout.main_arguments() == passed


def test_defaults_in_another_folder_are_those_of_the_repository(checkout, tmp_path):
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


@pytest.mark.parametrize(
  ('workdir', 'package'), [(['--workdir=gs://bucket/a run'], 'gcsfs'), (['--workdir', 's3://bucket/run'], 's3fs')]
)
def test_the_client_of_an_object_store_is_installed_once(checkout, workdir, package):
  checkout.add_python('python3')
  for _ in range(2):
    assert checkout.run(*workdir).returncode == 0
    assert checkout.installations() == 2
  assert re.search(rf' {package}==\d\S+ -c ', (checkout.log / 'pip').read_text())


def test_the_command_dsdm_is_installed_and_gets_its_arguments(checkout, tmp_path):
  checkout.add_python('python3')
  words = ['export', '--workdir', 'my run', '--arm', 'dsdm']
  done = checkout.run(*words, script='dsdm.sh', cwd=tmp_path, EXIT_CODE='2')
  assert done.returncode == 2 and checkout.main_arguments() == words and checkout.installations() == 1


def test_exit_code_is_that_of_the_run(checkout):
  checkout.add_python('python3')
  assert checkout.run(EXIT_CODE='2').returncode == 2


@pytest.mark.parametrize('installed', [True, False])
def test_unsupported_or_missing_python_is_one_line(checkout, installed):
  if installed:
    checkout.add_python('python3', suits=False, version='3.9.2')
  done = checkout.run()
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert 'needs Python 3.11' in done.stderr
  assert ('Python 3.9.2' if installed else 'no Python') in done.stderr
  assert not (checkout.root / '.venv').exists()


def test_python_of_uv_is_preferred(checkout, tmp_path):
  checkout.add_python('python3.12', version='3.12.0')
  managed = checkout.add_python('managed', version='3.11.99')
  uv = checkout.path / 'uv'
  uv.write_text(f'#!/usr/bin/env bash\necho "{managed}"\n')
  uv.chmod(0o755)
  done = checkout.run()
  assert done.returncode == 0
  assert 'with Python 3.11.99' in done.stderr


def test_path_of_the_report_is_printed(checkout):
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
def test_tpu_is_detected_by_its_pci_ids(checkout, vendor, device, files):
  checkout.add_python('python3')
  _plug_in(checkout, vendor, device)
  assert checkout.run('--install').returncode == 0
  assert re.findall(r'-r .*?/(requirements\S*txt)', (checkout.log / 'pip').read_text()) == files
  assert not (checkout.log / 'main').exists()


@pytest.mark.parametrize(('variable', 'file'), [('', 'requirements-cuda.txt'), ('tpu', 'requirements-tpu.txt')])
def test_gpu_is_detected_by_its_device_file_unless_the_variable_is_set(checkout, variable, file):
  checkout.add_python('python3')
  (checkout.system / 'dev').mkdir()
  (checkout.system / 'dev' / 'nvidia0').touch()
  assert checkout.run('--install', DSDM_JAX_ACCELERATOR=variable).returncode == 0
  assert file in (checkout.log / 'pip').read_text()


def test_unknown_accelerator_is_one_line(checkout):
  checkout.add_python('python3')
  done = checkout.run('--install', DSDM_JAX_ACCELERATOR='gpu')
  assert done.returncode == 2
  assert done.stderr.splitlines() == ['launch/run.sh: DSDM_JAX_ACCELERATOR=gpu must be tpu, cuda or cpu']


@pytest.mark.parametrize('accelerator', ['tpu', 'cuda'])
def test_requirements_of_accelerators_are_pinned_and_disjoint(repo_root, accelerator):
  def pins(name: str) -> list[str]:
    lines = (line.partition('#')[0].strip() for line in (repo_root / name).read_text().splitlines())
    return [line for line in lines if line]

  added = pins(f'requirements-{accelerator}.txt')
  assert added
  assert [pin for pin in added if not re.fullmatch(r'[\w.-]+==[\w.]+', pin)] == []
  known = {pin.partition('==')[0] for pin in pins('requirements.txt')}
  assert not known & {pin.partition('==')[0] for pin in added}
  if accelerator == 'cuda':  # the plugin and jax must have the same version
    jax = next(pin for pin in pins('requirements.txt') if pin.startswith('jax=='))
    assert {pin.partition('==')[2] for pin in added if pin.startswith('jax-')} == {jax.partition('==')[2]}
