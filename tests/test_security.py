"""Data is never executed: what ruff's rules (`S` and the bans in pyproject.toml) cannot see, and hostile files."""

import ast
import csv
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsdm_jax
from dsdm_jax.attribution import score_files
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.progress import Log
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import readers, sources, vocabulary
from dsdm_jax.data.pool.pool import write_array
from dsdm_jax.data.targets import benchmarks, tfds_items
from dsdm_jax.errors import UserError, visible, visible_lines
from dsdm_jax.lm import hugging_face

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


class Payload:
  """Unpickles to a call that leaves a file, as a hostile file would."""

  def __init__(self, ran: Path):
    self.ran = ran

  def __reduce__(self) -> tuple[Callable, tuple]:
    return Path.touch, (self.ran,)


def foreign_class(dataset: Path) -> None:
  """Lets the dataset's features name a class of the module `canary`."""
  features = json.loads((dataset / 'features.json').read_text())
  features['featuresDict']['features']['tokens']['pythonClassName'] = 'canary.Feature'
  (dataset / 'features.json').write_text(json.dumps(features))


def workdir(folder: Path, payload: bytes) -> None:
  """A pool stage whose `features.json` names a foreign class, with manifest and checksums of the same hand."""
  identity = artifacts.Identity('pool', 1, {}, {})
  out = artifacts.begin(folder, identity)
  tokens_NL = np.arange(16, dtype=np.uint16).reshape(2, 8)
  write_array(out / 'dataset', tokens_NL)
  foreign_class(out / 'dataset')
  (out / 'card.json').write_text(json.dumps({'rows': 2, 'length': 8, 'vocab_size': 300}))
  (out / 'rows.pickle').write_bytes(payload)
  artifacts.commit(folder, identity, {}, artifacts.Cost(out))
  assert (dsdm_jax.load(folder).pool.tokens([1, 0]) == tokens_NL[::-1]).all()


def tfds_pool(folder: Path, payload: bytes) -> None:
  write_array(folder, np.arange(16, dtype=np.uint16).reshape(2, 8))
  foreign_class(folder)
  list(readers.read(sources.units(sources.parse(f'tfds:{folder}'))[0]))


def tfds_benchmark(folder: Path, payload: bytes) -> None:
  write_array(folder / 'lambada' / '1.0.0', np.arange(16, dtype=np.uint16).reshape(2, 8))
  foreign_class(folder / 'lambada' / '1.0.0')
  info = folder / 'lambada' / '1.0.0' / 'dataset_info.json'
  info.write_text(info.read_text().replace('"pool"', '"lambada"'))
  list(tfds_items.read('lambada:test', str(folder)))


def parquet_pool(folder: Path, payload: bytes) -> None:
  import pyarrow as pa
  import pyarrow.parquet as pq

  table = pa.table({'text': [payload]})
  pq.write_table(table.replace_schema_metadata({b'pandas': payload, b'ARROW:schema': payload}), folder / 'a.parquet')
  problem = next(iter(readers.read(sources.units(sources.parse(f'parquet:{folder}/*.parquet'))[0])))
  raise UserError(str(problem))


def targets(folder: Path, payload: bytes) -> None:
  (folder / 'mine.jsonl').write_bytes(payload)
  benchmarks.of_file(str(folder / 'mine.jsonl'))


def scores_npy(folder: Path, payload: bytes) -> None:
  np.save(folder / 's.npy', np.array([None, None]), allow_pickle=True)
  data = (folder / 's.npy').read_bytes()
  (folder / 's.npy').write_bytes(data[:128] + payload)
  score_files.read(folder / 's.npy', 2)


def scores_pt(folder: Path, payload: bytes) -> None:
  with zipfile.ZipFile(folder / 's.pt', 'w') as archive:
    archive.writestr('s/data.pkl', payload)
    archive.writestr('s/data/0', bytes(8))
  score_files.read(folder / 's.pt', 2)


def selection(folder: Path, payload: bytes) -> None:
  buffer = io.BytesIO()
  np.save(buffer, np.array([None]), allow_pickle=True)
  with zipfile.ZipFile(folder / 'a.npz', 'w') as archive:
    archive.writestr('rows.npy', buffer.getvalue()[:128] + payload)
  Selection.load(folder, 'a')


def weights(folder: Path, payload: bytes) -> None:
  (folder / 'config.json').write_text(
    json.dumps({'model_type': 'gpt2', 'auto_map': {'AutoModel': 'canary.Model'}, 'architectures': ['canary.Model']})
  )
  (folder / 'pytorch_model.bin').write_bytes(payload)
  (folder / 'modeling.py').write_text('import canary')
  hugging_face.model_keys(str(folder))


def tokenizer(folder: Path, payload: bytes) -> None:
  (folder / 'tokenizer.json').write_text(
    json.dumps({'model': {'type': 'canary.Model', 'vocab': {}}, 'pre_tokenizer': {'type': 'canary'}})
  )
  (folder / 'tokenizer_config.json').write_text(json.dumps({'auto_map': {'AutoTokenizer': ['canary.Model', None]}}))
  vocabulary.save(str(folder / 'tokenizer.json'), folder)


def sentencepiece(folder: Path, payload: bytes) -> None:
  (folder / 'x.model').write_bytes(payload)
  vocabulary.save(str(folder / 'x.model'), folder)


@pytest.mark.parametrize(
  ('read', 'refused'),
  [
    (workdir, False),
    *((f, True) for f in (tfds_pool, tfds_benchmark, parquet_pool, targets, scores_npy, scores_pt, selection)),
    *((f, True) for f in (weights, tokenizer, sentencepiece)),
  ],
)
def test_no_file_runs_code(read: Callable, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  ran = tmp_path / 'ran'
  (tmp_path / 'canary.py').write_text(f'import pathlib; pathlib.Path({str(ran)!r}).touch()')
  monkeypatch.syspath_prepend(tmp_path)
  payload = pickle.dumps(Payload(ran))
  (folder := tmp_path / 'data').mkdir()
  if refused:
    with pytest.raises(UserError):
      read(folder, payload)
  else:
    read(folder, payload)
  assert not ran.exists() and 'canary' not in sys.modules


def unseen_prints(source: str) -> list[int]:
  """Lines that print text which went through none of `visible`, `visible_lines` and `UserError`."""
  result = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Call) and re.fullmatch(r'print|(sys\.std(out|err)|stream)\.write', ast.unparse(node.func)):
      texts = [ast.unparse(word) for word in node.args if not isinstance(word, ast.Constant)]
      allowed = r"visible|json\.dumps|f'dsdm(_jax)?: \{error\}(\\n)?'|_USAGE"
      result += [node.lineno for text in texts if not re.search(allowed, text)]
  return result


def test_text_of_others_is_printed_visibly():
  assert [len(unseen_prints(x)) for x in ('print(x)', 'print(visible(x))', "sys.stderr.write(f'{x}')")] == [1, 0, 1]
  paths = [path for path in SOURCES if 'bench' not in path.parts]
  lines = {str(path.relative_to(ROOT)): unseen_prints(path.read_text()) for path in paths}
  known = {
    'dsdm_jax/evaluation/results.py',
    'dsdm_jax/selection/summaries.py',
  }  # rich's consoles, printed visibly later
  assert {path for path, found in lines.items() if found} <= known


@given(st.text(max_size=4_000))
def test_visible_text_is_one_plain_line(text: str):
  shown = visible(text)
  assert shown.isprintable() and len(shown) <= 2_000 and visible(shown) == shown
  assert visible_lines(f'{text}\n{text}').count('\n') == 2 * text.count('\n') + 1


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('a\x1b[2Jb\r\nc\t', r'a\x1b[2Jb\r\nc\t'),
    ('\u202egpj.exe \u2066x\u2069', r'\u202egpj.exe \u2066x\u2069'),
    ('\x9b31m \x00 \x7f', r'\x9b31m \x00 \x7f'),
    ('half \ud800', r'half \ud800'),
    ('café 長江 🙂', 'café 長江 🙂'),
  ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, shown: str, capsys: pytest.CaptureFixture, tmp_path: Path):
  assert str(UserError(text)) == shown == str(pickle.loads(pickle.dumps(UserError(text))))
  Log(tmp_path, 'pool').warn(text.replace('\n', ''))
  assert capsys.readouterr().err.rstrip('\n').isprintable()


def test_long_messages_keep_their_end():
  message = str(UserError('x' * 5_000 + '; do this'))
  assert len(message) == 2_000 and message.endswith('; do this') and '(3,009 characters more)' in message


@pytest.mark.parametrize('cell', ['=1+1', '+cmd', '-x', '@SUM(A1)', '\tx', '\rx', ' =1', '＝1', '-1+2', '+inf', '\n=1'])
def test_cells_of_csv_files_are_no_formulas(cell: str):
  text = storage.csv_text((cell, 'b'), [(cell, -1.5), ('x', '-2e-3'), ('a=b', '+0.1')])
  assert list(csv.reader(io.StringIO(text, newline=''))) == [
    ["'" + cell.replace('\r', r'\r'), 'b'],
    ["'" + cell.replace('\r', r'\r'), '-1.5'],
    ['x', '-2e-3'],
    ['a=b', '+0.1'],
  ]


def test_all_csv_files_are_written_by_one_function():
  users = {
    str(path.relative_to(ROOT)) for path in SOURCES if re.search(r'csv\.(writer|DictWriter)|\.to_csv', path.read_text())
  }
  assert users == {'dsdm_jax/core/storage.py'}
