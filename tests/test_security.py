"""No code is made of data: nothing unpickled, evaluated or put together for a shell. No secret is written down."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / 'dsdm_jax').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')])
# pickletools only reads opcodes, see attribution/imported.py.
MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal'}
CALLS = {'eval', 'exec', 'compile', 'os.system', 'os.popen', 'yaml.load', 'np.load', 'numpy.load', 'torch.load'}
NUMPY = {'np.load', 'numpy.load'}  # refuses pickles unless asked


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
  return found


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
  ],
)
def test_the_scan_sees_what_it_looks_for(source, count):
  assert len(findings(source)) == count


def test_scripts_evaluate_nothing():
  for script in (ROOT / 'launch').glob('*.sh'):
    assert not re.search(r'^\s*eval\b', script.read_text(), re.MULTILINE), script
