"""No code is made of data: nothing unpickled, evaluated or put together for a shell. No secret is written down."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / 'dsdm_jax').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')])
# pickletools only reads opcodes, see attribution/imported.py.
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}
CALLS = {
  'eval', 'exec', 'compile', 'os.system', 'os.popen', 'yaml.load', 'np.load', 'numpy.load', 'torch.load',
  'subprocess.getoutput', 'subprocess.getstatusoutput', 'asyncio.create_subprocess_shell',
}  # fmt: skip
NUMPY = {'np.load', 'numpy.load'}  # refuses pickles unless asked
SHELL = re.compile(r'(.*/)?(ba|da|k|z|fi|c|tc)?sh|(.*/)?busybox')
RUN_THIS = re.compile(r'-[A-Za-z]*c')  # -c, -lc: the next word is a program


def findings(source: str) -> list[str]:
  """What of `source` could run data; one phrase each."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
      names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
      found += [f'line {node.lineno} imports {name}' for name in names if name.split('.')[0] in MODULES]
    if isinstance(node, ast.Call):
      name = ast.unparse(node.func)
      given = {k.arg: ast.unparse(k.value) for k in node.keywords}
      if name in CALLS and not (name in NUMPY and given.get('allow_pickle', 'False') == 'False'):
        found.append(f'line {node.lineno} calls {name}')
      if given.get('shell', 'False') != 'False' or given.get('allow_pickle', 'False') != 'False':
        found.append(f'line {node.lineno} asks for a shell or pickles')
    found += [f'line {node.lineno} {said}' for said in programs(node)]
  return found


def programs(node: ast.AST) -> list[str]:
  """Of words in a list or given to a call: a shell that is given a program, and a program made at run time."""
  if isinstance(node, (ast.List, ast.Tuple)):
    words = node.elts
  elif isinstance(node, ast.Call):
    words = node.args
  else:
    return []
  texts = [word.value if isinstance(word, ast.Constant) and isinstance(word.value, str) else None for word in words]
  found = []
  for place, text in enumerate(texts):
    if text is None or not RUN_THIS.fullmatch(text):
      continue
    if any(before is not None and SHELL.fullmatch(before) for before in texts[:place]):
      found.append('gives a shell a program')
    elif place + 1 < len(words) and not _is_fixed(words[place + 1]):
      found.append('gives an interpreter a program that is made at run time')
  return found


def _is_fixed(word: ast.expr) -> bool:
  """A text as it stands, or the name of one: by convention in capitals."""
  return isinstance(word, ast.Constant) or (isinstance(word, ast.Name) and word.id.isupper())


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_data_is_run(path):
  assert findings(path.read_text()) == []


@pytest.mark.parametrize(
  ('source', 'count'),
  [
    ('import pickle', 1),
    ('from dill import load', 1),
    ('torch.load(x)', 1),
    ('import pickletools', 0),
    ('np.load(x)', 0),
    ('np.load(x, allow_pickle=True)', 2),
    ('np.load(x, allow_pickle=flag)', 2),
    ('subprocess.run(x, shell=True)', 1),
    ('subprocess.run([x])', 0),
    ('os.system(f"rm {x}")', 1),
    ('eval(x)', 1),
    ('re.compile(x)', 0),
    ("subprocess.run(['bash', '-c', f'rm {x}'])", 1),
    ("subprocess.Popen(('/bin/sh', '-ec', 'ls'))", 1),
    ("command = ['env', 'A=1', 'zsh', '-lc', x]", 1),
    ("os.execlp('sh', 'sh', '-c', x)", 1),
    ('subprocess.getoutput(x)', 1),
    ("subprocess.run([sys.executable, '-c', x])", 1),
    ("subprocess.run([sys.executable, '-c', f'print({x})'])", 1),
    ("subprocess.run([sys.executable, '-c', 'print(1)', x])", 0),
    ("subprocess.run([sys.executable, '-I', '-c', _PROGRAM, x])", 0),
    ("subprocess.run(['bash', script, x])", 0),
    ("subprocess.run(['wc', '-c', 'file'])", 0),
  ],
)
def test_the_scan_sees_what_it_looks_for(source, count):
  assert len(findings(source)) == count


# Not `bash -c`: a command for another machine is one text, whose words launch/tpu.sh quotes with %q.
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
def test_the_scan_of_scripts_sees_what_it_looks_for(line, seen):
  assert bool(EVALUATES.search(f'set -eu\n{line}\n')) == seen


def test_scripts_evaluate_nothing():
  for script in (ROOT / 'launch').glob('*.sh'):
    assert not EVALUATES.search(script.read_text()), script
