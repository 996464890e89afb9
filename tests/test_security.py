"""Data is never executed: what ruff's rules (`S` and the bans in pyproject.toml) cannot see."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / 'dsdm_jax').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')])
SHELL = re.compile(r'(.*/)?(ba|da|k|z|fi|c|tc)?sh|(.*/)?busybox')
RUN_THIS = re.compile(r'-[A-Za-z]*c')  # -c, -lc: the next word is a program


def findings(source: str) -> list[str]:
  """One phrase for each place in `source` that could execute data."""
  result = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call):
      if ast.unparse(node.func) == 'compile':
        result.append(f'line {node.lineno} calls compile')
      given = {k.arg: ast.unparse(k.value) for k in node.keywords}
      if given.get('shell', 'False') != 'False' or given.get('allow_pickle', 'False') != 'False':
        result.append(f'line {node.lineno} asks for a shell or pickles')
    result += [f'line {node.lineno} {problem}' for problem in programs(node)]
  return result


def programs(node: ast.AST) -> list[str]:
  """Problems with the words of a list or call: a program for a shell, or a program that is built at run time."""
  if isinstance(node, (ast.List, ast.Tuple)):
    words = node.elts
  elif isinstance(node, ast.Call):
    words = node.args
  else:
    return []
  texts = [word.value if isinstance(word, ast.Constant) and isinstance(word.value, str) else None for word in words]
  result = []
  for place, text in enumerate(texts):
    if text is None or not RUN_THIS.fullmatch(text):
      continue
    if any(before is not None and SHELL.fullmatch(before) for before in texts[:place]):
      result.append('gives a shell a program')
    elif place + 1 < len(words) and not _is_fixed(words[place + 1]):
      result.append('gives an interpreter a program that is built at run time')
  return result


def _is_fixed(word: ast.expr) -> bool:
  """Whether a word is a literal, or a constant: by convention, its name is in capitals."""
  return isinstance(word, ast.Constant) or (isinstance(word, ast.Name) and word.id.isupper())


def test_no_data_is_executed():
  problems = {str(path.relative_to(ROOT)): findings(path.read_text()) for path in SOURCES}
  assert {path: result for path, result in problems.items() if result} == {}


@pytest.mark.parametrize(
  ('source', 'count'),
  [
    ('np.load(x)', 0),
    ('np.load(x, allow_pickle=True)', 1),
    ('np.load(x, allow_pickle=flag)', 1),
    ('subprocess.run(x, shell=True)', 1),
    ('subprocess.run([x])', 0),
    ("compile(x, 'f', 'exec')", 1),
    ('re.compile(x)', 0),
    ("subprocess.run(['bash', '-c', f'rm {x}'])", 1),
    ("subprocess.Popen(('/bin/sh', '-ec', 'ls'))", 1),
    ("command = ['env', 'A=1', 'zsh', '-lc', x]", 1),
    ("os.execlp('sh', 'sh', '-c', x)", 1),
    ("subprocess.run([sys.executable, '-c', x])", 1),
    ("subprocess.run([sys.executable, '-c', f'print({x})'])", 1),
    ("subprocess.run([sys.executable, '-c', 'print(1)', x])", 0),
    ("subprocess.run([sys.executable, '-I', '-c', _PROGRAM, x])", 0),
    ("subprocess.run(['bash', script, x])", 0),
    ("subprocess.run(['wc', '-c', 'file'])", 0),
  ],
)
def test_the_scan_finds_problems(source, count):
  assert len(findings(source)) == count


# `bash -c` is allowed: a command for another machine is one string, whose words launch/tpu.sh quotes with %q.
EVALUATES = re.compile(r'^[^#\n]*(?<![\w-])eval\b', re.MULTILINE)


@pytest.mark.parametrize(
  ('line', 'seen'),
  [
    ('  eval "$1"', True),
    ('x && eval "$1"', True),
    ('x; eval "$1"', True),
    ('# nothing is given to eval', False),
    ('evaluate --all', False),
  ],
)
def test_the_scan_of_scripts_finds_eval(line, seen):
  assert bool(EVALUATES.search(f'set -eu\n{line}\n')) == seen


def test_scripts_evaluate_nothing():
  for script in (ROOT / 'launch').glob('*.sh'):
    assert not EVALUATES.search(script.read_text()), script
