"""launch/tpu.sh with a fake gcloud, which records its arguments and answers from a script."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.helpers.launch import ERRORS, Cloud

WHERE = ('--zone=us-west4-a',)
NFS = '--nfs=10.0.0.2:/share'


@pytest.fixture
def cloud(tmp_path, repo_root) -> Cloud:
  return Cloud(tmp_path, repo_root)


@pytest.mark.parametrize(
  ('options', 'call'),
  [
    (
      ['--type=v5litepod-8'],
      ['tpu-vm', 'create', 'mine', *WHERE, '--accelerator-type=v5litepod-8', '--version=v2-alpha-tpuv5-lite'],
    ),
    (
      ['--type=v6e-256', '--spot', '--project=p', '--version=other'],
      ['tpu-vm', 'create', 'mine', *WHERE, '--project=p', '--accelerator-type=v6e-256', '--spot', '--version=other'],
    ),
    (
      ['--type=v5p-16', '--queued'],
      ['queued-resources', 'create', 'mine', *WHERE, '--accelerator-type=v5p-16', '--node-id=mine',
       '--runtime-version=v2-alpha-tpuv5'],
    ),
    (
      ['--type=v5p-16', '--slices=2', '--spot'],
      ['queued-resources', 'create', 'mine', *WHERE, '--accelerator-type=v5p-16', '--spot', '--node-count=2',
       '--node-prefix=mine', '--runtime-version=v2-alpha-tpuv5'],
    ),
  ],
)  # fmt: skip
def test_create(cloud, options, call):
  cloud.answer('WAITING_FOR_RESOURCES PROVISIONING ACTIVE')
  done = cloud.run('create', 'mine', *WHERE, '--poll=0', *options)
  assert done.returncode == 0, done.stderr
  assert cloud.calls()[0] == call
  assert len(cloud.calls()) == (4 if 'queued' in call[0] else 1)  # a queued one is waited for


@pytest.mark.parametrize('queued', [False, True])
def test_private_networks_reservations_and_accounts(cloud, tmp_path, queued):
  script = tmp_path / 'start.sh'
  script.write_text('#!/bin/sh\n')
  made_with = [
    '--network=n',
    '--subnetwork=s',
    '--internal-ips',
    '--service-account=a@b.iam',
    '--labels=team=x,cost=y',
    '--reserved',
    '--reservation=r',
  ]
  options = [*made_with, f'--startup-script={script}', '--tunnel-through-iap', '--type=v5p-8', '--poll=0']
  done = cloud.run('all', 'mine', *WHERE, *options, *(['--queued'] if queued else []))
  assert done.returncode == 0, done.stderr
  kind = 'queued-resources' if queued else 'tpu-vm'
  calls = cloud.calls()
  assert set(made_with) | {f'--metadata-from-file=startup-script={script}'} <= set(calls[0])
  assert '--tunnel-through-iap' not in calls[0]
  reached = [call for call in calls if call[1] in ('ssh', 'scp')]
  assert len(reached) >= 4 and all('--tunnel-through-iap' in call for call in reached)
  # gcloud 528: only its alpha track names a reservation, and tunnels to a TPU that was not queued.
  assert cloud.alpha() == {f'{kind} create', *([] if queued else ['tpu-vm ssh', 'tpu-vm scp'])}


def test_spot_without_a_share_is_warned_of(cloud):
  done = cloud.run('all', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0')
  assert done.returncode == 0 and 'a preemption loses the run' in done.stderr
  assert 'loses' not in cloud.run('all', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0', NFS).stderr


def test_with_an_address_as_workdir_no_share_is_needed(cloud, tmp_path):
  options = ('all', 'mine', *WHERE, '--type=v5litepod-16', '--spot', '--poll=0', '--')
  done = cloud.run(*options, '--workdir=gs://bucket/a run')
  assert (done.returncode, 'loses' in done.stderr) == (0, False), done.stderr
  (call,) = (call for call in cloud.calls() if 'nohup' in call[-1])
  folder = tmp_path / 'worker' / 'dsdm_jax' / 'launch'
  folder.mkdir(parents=True)
  (folder / 'run.sh').write_text('printf "%s\\n" "$@"; exit 3')
  environment = {**cloud.environment, 'HOSTNAME': 'w-0', 'HOME': str(tmp_path)}
  command = call[-1].removeprefix('--command=').replace('(nohup', '(exec').replace('&)', ')')
  subprocess.run(['bash', '-c', command], cwd=folder.parents[1], env=environment, check=True)
  printed = (folder.parent / 'run.log').read_text().splitlines()
  assert '--workdir=gs://bucket/a run' in printed and '--config.distributed.processes=4' in printed
  assert (folder.parent / 'exit_code').read_text() == '3\n'
  calls = (cloud.log / 'calls').read_text().split('\n')
  assert calls[-2].split('\x1f')[:-1] == ['storage', 'cp', '--quiet', 'run.log', 'gs://bucket/a run/logs/w-0.log']


def test_workers_get_a_python_that_is_new_enough(cloud):
  cloud.run('all', 'mine', *WHERE, '--type=v5litepod-8', '--poll=0')
  install, start = (call[-1] for call in cloud.calls() if call[1] == 'ssh' and 'launch/run.sh' in call[-1])
  assert 'uv python install 3.12' in install
  assert all('export PATH=$HOME/.local/bin:$PATH' in command for command in (install, start))
  # The shell accepts it, and a Python that suits is used as it is.
  check = install[install.index("(python3 -c 'import") : install.index(' && bash dsdm_jax/launch/run.sh')]
  assert subprocess.run(['bash', '-c', check], check=True, capture_output=True).stdout == b''


def test_failed_request_is_an_error(cloud):
  cloud.answer('ACCEPTED FAILED')
  done = cloud.run('create', 'mine', *WHERE, '--poll=0', '--type=v5p-16', '--queued')
  assert done.returncode == 2
  assert 'the request for mine is FAILED' in done.stderr


@pytest.mark.parametrize(
  ('type_', 'slices', 'processes'),
  [('v5litepod-8', 1, 1), ('v5litepod-16', 1, 4), ('v5p-16', 1, 2), ('v6e-8', 1, 1), ('v6e-256', 2, 128)],
)
def test_the_same_command_runs_on_every_worker(cloud, type_, slices, processes):
  given = ['--config=configs/v5e_8.py', "--config.selection.targets=('mix', 'docs')", '--workdir=/mnt/dsdm_jax/a b']
  done = cloud.run('run', 'mine', *WHERE, f'--type={type_}', f'--slices={slices}', NFS, '--', *given)
  assert done.returncode == 0, done.stderr
  (call,) = cloud.calls()
  assert call[:3] == ['queued-resources' if slices > 1 else 'tpu-vm', 'ssh', 'mine']
  assert '--worker=all' in call
  assert ('--node=all' in call) == (slices > 1)
  # What the worker's shell makes of it: bash -c LINE, and of that line in turn the words that run.sh is given.
  words = shlex.split(call[-1].removeprefix('--command='))
  line = words[words.index('-c') + 1]
  found = shlex.split(line.partition('; echo')[0])
  several = ['--config.distributed.coordinator=auto', f'--config.distributed.processes={processes}']
  assert found == ['bash', 'launch/run.sh', *given, *(several if processes > 1 else [])]


def test_setup_sends_the_checkout_and_mounts_the_share(cloud):
  done = cloud.run('setup', 'mine', *WHERE, '--type=v5litepod-16', '--nfs=10.0.0.2:/share')
  assert done.returncode == 0, done.stderr
  send, install = cloud.calls()
  assert send[:2] == ['tpu-vm', 'scp']
  assert Path(send[2]).is_file()
  assert send[3:] == ['mine:dsdm_jax.tar.gz', *WHERE, '--worker=all']
  assert 'sudo mount 10.0.0.2:/share /mnt/dsdm_jax' in install[-1]
  assert install[-1].endswith('bash dsdm_jax/launch/run.sh --install')


def test_preempted_spot_tpu_is_created_again_and_the_run_resumes(cloud):
  cloud.answer('READY PREEMPTED READY', runs=2)
  done = cloud.run('all', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0')
  assert done.returncode == 0, done.stderr
  made = ['tpu-vm create', 'tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh']
  looked = ['tpu-vm ssh']  # at the exit code
  assert cloud.verbs() == [*made, *looked, 'tpu-vm delete', *made, *looked]
  assert 'mine is PREEMPTED; creating it again to resume the run' in done.stderr


RUN = ('--', '--config=configs/v5e_8.py')
MADE = ['tpu-vm scp', 'tpu-vm ssh', 'tpu-vm ssh', 'tpu-vm ssh']  # installed, started, its exit code read


def test_failed_describe_deletes_nothing(cloud):
  """A network that is down for a while says nothing about the TPU."""
  cloud.answer('OFFLINE OFFLINE READY', runs=0)
  done = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0', *RUN)
  assert done.returncode == 0, done.stderr
  assert set(cloud.verbs()) == {'tpu-vm ssh'}
  assert 'mine is UNKNOWN' in done.stderr
  assert ERRORS['OFFLINE'] in done.stderr


def test_preempted_tpu_is_requested_until_there_is_capacity(cloud):
  cloud.answer('PREEMPTED GONE GONE CREATING READY', create='FULL FULL OK', runs=1)
  done = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0', *RUN)
  assert done.returncode == 0, done.stderr
  # What is gone is not deleted again.
  assert cloud.verbs() == ['tpu-vm delete', *['tpu-vm create'] * 3, *MADE]
  assert done.stderr.count('cannot create mine now; trying again in 0 s') == 2
  assert 'There is no more capacity' in done.stderr


def test_queued_request_that_fails_after_a_preemption_is_repeated(cloud):
  cloud.answer('SUSPENDED FAILED WAITING_FOR_RESOURCES ACTIVE', runs=1)
  done = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--queued', '--spot', '--poll=0', *RUN)
  assert done.returncode == 0, done.stderr
  made = [verb.replace('tpu-vm', 'queued-resources') for verb in MADE]
  assert cloud.verbs() == [*['queued-resources delete', 'queued-resources create'] * 2, *made]


def test_tpu_preempted_during_setup_is_created_again(cloud):
  cloud.answer('PREEMPTED READY PREEMPTED READY', scp='OFFLINE OK', runs=1)
  done = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0', *RUN)
  assert done.returncode == 0, done.stderr
  recreate = ['tpu-vm delete', 'tpu-vm create']
  assert cloud.verbs() == [*recreate, 'tpu-vm scp', *recreate, *MADE]
  assert 'cannot set up mine now; trying again in 0 s' in done.stderr


def test_first_creation_that_fails_ends_the_command(cloud):
  cloud.answer(create='FULL OK')
  done = cloud.run('all', 'mine', *WHERE, '--type=v5litepod-8', '--spot', '--poll=0')
  assert done.returncode != 0
  assert cloud.verbs() == ['tpu-vm create']


def test_lost_on_demand_tpu_is_an_error(cloud):
  cloud.answer('READY GONE', runs=9)
  done = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--poll=0', *RUN)
  assert done.returncode == 2
  options = ' '.join(('mine', *WHERE, '--type=v5litepod-8', '--poll=0', *RUN))
  assert f'create it again with: bash launch/tpu.sh resume {options}\n' in done.stderr
  assert cloud.verbs() == ['tpu-vm ssh']
  cloud.answer('GONE')
  said = cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--poll=0').stderr
  assert said.endswith('--type=v5litepod-8 --poll=0 -- ARGUMENTS\n')


def test_exit_code_is_that_of_the_run(cloud):
  cloud.answer(exit_code=7, runs=0)
  assert cloud.run('watch', 'mine', *WHERE, '--type=v5litepod-8', '--poll=0').returncode == 7


def test_logs_and_delete_reach_every_worker(cloud, repo_root):
  options = ('mine', *WHERE, '--type=v5litepod-16', '--slices=2')
  assert cloud.run('logs', *options).returncode == 0
  assert len(cloud.calls()) == 8
  assert cloud.calls()[-1][2:] == [
    'mine:dsdm_jax/run.log',
    str(repo_root / 'logs' / 'mine' / '1-3.log'),
    *WHERE,
    '--worker=3',
    '--node=1',
  ]
  assert cloud.run('delete', *options).returncode == 0
  assert cloud.calls()[-1] == ['queued-resources', 'delete', 'mine', *WHERE, '--force', '--quiet']


def test_dry_run_prints_the_commands_only(cloud):
  options = ('mine', *WHERE, '--type=v5litepod-16', '--spot', NFS)
  arguments = ('--config=configs/v5e_8.py', '--workdir=/mnt/dsdm_jax/mine')
  done = cloud.run('all', *options, '--dry-run', '--', *arguments)
  assert done.returncode == 0, done.stderr
  assert cloud.calls() == []
  printed = [shlex.split(line)[3:] for line in done.stdout.splitlines()]
  cloud.answer()
  assert cloud.run('all', *options, '--poll=0', '--', *arguments).returncode == 0
  assert [call for call in cloud.calls() if 'describe' not in call][: len(printed)] == printed


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['start', 'mine'], 'unknown command start'),
    (['run', 'My'], 'must name the TPU'),
    (['run', 'mine', '--type=v6e-8'], '--zone is missing'),
    (['run', 'mine', *WHERE], '--type is missing'),
    (['run', 'mine', *WHERE, '--type=v9-8'], 'unknown --type=v9-8'),
    (['run', 'mine', *WHERE, '--type=v6e-8', '--config=x.py'], 'come after --'),
    (['run', 'mine', *WHERE, '--type=v6e-8', '--slices=0'], 'at least 1'),
    (['all', 'mine', *WHERE, '--type=v6e-8', '--poll=1m'], '--poll=1m must be a whole number of seconds'),
    (['run', 'mine', *WHERE, '--type=v6e-8', '--startup-script=missing.sh'], 'missing.sh cannot be read'),
    (['all', 'mine', *WHERE, '--type=v6e-16', '--', '--workdir=/mnt/dsdm_jax/a'], 'has 4 workers, which must share'),
    (['all', 'mine', *WHERE, '--type=v6e-8', '--slices=2', NFS, '--', '--workdir=runs/a'], 'has 2 workers, which must'),
    (
      ['all', 'mine', *WHERE, '--type=v6e-16', '--', '--workdir=gs:/bucket/a'],
      'or --workdir=gs://BUCKET/mine, after --',
    ),
    (
      ['resume', 'mine', *WHERE, '--type=v6e-16', NFS, *RUN],
      'add --nfs=SERVER:/SHARE, and --workdir=/mnt/dsdm_jax/mine',
    ),
    (['watch', 'mine', *WHERE, '--type=v6e-16', '--spot', *RUN], 'has 4 workers, which must share'),
    (['resume', 'mine', *WHERE, '--type=v6e-8'], 'resume starts the run again, with the arguments that it had'),
    (['watch', 'mine', *WHERE, '--type=v6e-8', '--spot'], 'watch --spot starts the run again'),
  ],
)
def test_bad_arguments_are_one_line(cloud, arguments, message):
  done = cloud.run(*arguments)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert message in done.stderr
  assert cloud.calls() == []
