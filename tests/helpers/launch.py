"""Stand-ins for the programs that launch scripts start: a Python for run.sh, a gcloud for tpu.sh."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

FAKE = """#!/usr/bin/env bash
case "$1 $2" in
  "-c import "*fs) [[ -f "{log}/pip" && $(<"{log}/pip") == *" ${{2#import }}=="* ]] ;;
  "-c "*) exit {suits} ;;
  "--version "*) echo Python {version} ;;
  "-m venv") mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
  "-m pip") [[ $3 == --version ]] || echo "$*" >>"{log}/pip" ;;
  "-m dsdm_jax.main" | "-m dsdm_jax.cli")
    printf '%s' "${{GLIBC_TUNABLES:-}}" >"{log}/tunables"
    shift 2 && printf '%s\\n' "$@" >"{log}/main" && exit "${{EXIT_CODE:-0}}" ;;
esac
"""
TOOLS = 'bash dirname basename cat cmp cp rm mkdir env'.split()


class Checkout:
  """A copy of the launch scripts in a folder with a space in its name, and a PATH with only the tools they need."""

  def __init__(self, folder: Path, repo: Path):
    self.root = folder / 'a repository'
    self.log = folder / 'log'
    self.path = folder / 'bin'
    self.system = folder / 'system'  # its /sys and /dev
    for new in (self.root, self.log, self.path, self.system):
      new.mkdir()
    shutil.copytree(repo / 'launch', self.root / 'launch')
    for file in (*repo.glob('requirements*.txt'), repo / 'requirements.lock'):
      shutil.copy(file, self.root)
    for tool in TOOLS:
      program = shutil.which(tool)
      assert program is not None
      (self.path / tool).symlink_to(program)

  def add_python(self, name: str, suits: bool = True, version: str = '3.12.1') -> Path:
    file = self.path / name
    file.write_text(FAKE.format(suits=int(not suits), version=version, log=self.log))
    file.chmod(0o755)
    return file

  def run(
    self, *arguments: str, cwd: Path | None = None, script: str = 'run.sh', **environment: str
  ) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['bash', self.root / 'launch' / script, *arguments],
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


# Each call is one line, its words separated by \x1f. `describe`, `create` and `scp` answer with the next word of the
# file of their name, and repeat the last one: OK, a state, or the name of an error. The exit code of the run is the
# content of `exit_code`, once the run was started `runs` times.
GCLOUD = """#!/usr/bin/env bash
[[ $1 != alpha ]] || {{ shift && printf '%s %s\\n' "$3" "$4" >>{log}/alpha; }}
printf '%s\\x1f' "$@" >>{log}/calls
echo >>{log}/calls
if [[ $4 == describe || $4 == create || $4 == scp ]]; then
  read -r word more <{log}/$4
  echo "${{more:-$word}}" >{log}/$4
  if [[ -f {log}/error_$word ]]; then
    printf 'ERROR: (gcloud.compute.tpus.%s.%s) %s\\n' "$3" "$4" "$(<{log}/error_$word)" >&2
    exit 1
  fi
  [[ $4 != describe ]] || echo "$word"
fi
if [[ $* == *'cat dsdm_jax/exit_code'* ]]; then
  calls=$(<{log}/calls) started=0
  while [[ $calls == *nohup* ]]; do calls=${{calls#*nohup}} started=$((started + 1)); done
  ((started < $(<{log}/runs))) || cat {log}/exit_code
fi
"""
ERRORS = {
  'GONE': "NOT_FOUND: Resource 'projects/p/locations/us-west4-a/nodes/mine' was not found",
  'OFFLINE': 'UNAVAILABLE: failed to connect to all addresses',
  'FULL': '{"code": 8, "message": "There is no more capacity in the zone \\"us-west4-a\\"; try another zone"}',
}


class Cloud:
  def __init__(self, folder: Path, repo: Path):
    self.log, self.script = folder / 'log', repo / 'launch' / 'tpu.sh'
    self.log.mkdir()
    (folder / 'bin').mkdir()
    stand_in = folder / 'bin' / 'gcloud'
    stand_in.write_text(GCLOUD.format(log=shlex.quote(str(self.log))))
    stand_in.chmod(0o755)
    for word, error in ERRORS.items():
      (self.log / f'error_{word}').write_text(error)
    self.environment = {**os.environ, 'PATH': f'{folder / "bin"}:{os.environ["PATH"]}'}
    self.answer()

  def answer(
    self, states: str = 'READY', exit_code: int = 0, runs: int = 1, create: str = 'OK', scp: str = 'OK'
  ) -> None:
    given = {'describe': states, 'exit_code': exit_code, 'runs': runs, 'create': create, 'scp': scp}
    for name, value in given.items():
      (self.log / name).write_text(f'{value}\n')

  def run(self, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      ['bash', self.script, *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=600
    )

  def calls(self) -> list[list[str]]:
    file = self.log / 'calls'
    return [line.split('\x1f')[2:-1] for line in file.read_text().splitlines()] if file.exists() else []

  def alpha(self) -> set[str]:
    """Verbs that were asked of the alpha track."""
    file = self.log / 'alpha'
    return set(file.read_text().splitlines()) if file.exists() else set()

  def verbs(self) -> list[str]:
    """'tpu-vm create' and so on, without what only looks."""
    found = [' '.join(call[:2]) for call in self.calls()]
    return [
      verb for verb, call in zip(found, self.calls(), strict=True) if 'describe' not in verb and 'tail' not in str(call)
    ]
