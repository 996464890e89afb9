"""Size and speed of the report: `python -m dsdm_jax.bench report --rows 100000`.

Renders the page of a run whose pool is the text of the installed packages, with random scores, intervals, arms and
results, and opens it in headless Chromium, if Chromium, chromedriver and `selenium` are installed. Prints one line of
JSON: megabytes of the page, the length at which texts are cut, seconds to render it, to the first paint and until
search and sort work, and seconds of a first search and of a first sort.
"""

import argparse
import json
import os
import shutil
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.config.validate import flatten
from dsdm_jax.configs import base
from dsdm_jax.core import prng
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import results
from dsdm_jax.evaluation.comparisons import Options
from dsdm_jax.report import explorer, page, report_data
from dsdm_jax.report.report_data import Evidence, Selected

_SOURCES = ('source', 'docs', 'licences', 'metadata', 'data')
_TASKS = ('docs', 'api_qa', 'cs_algorithms')
_METHODS = ('dsdm', 'random', 'random_one_epoch', 'bottom')
_SUFFIXES = ('.py', '.md', '.txt', '.rst', '.json', '.csv')
_LONGEST = 40_000  # characters of one file
_SEARCH = """
const box = document.getElementById('x-search'), began = performance.now();
box.value = arguments[0]; box.dispatchEvent(new Event('input'));
setTimeout(() => arguments[1](performance.now() - began - 150), 151);
"""  # the page itself waits 150 ms for more to be typed
_SORT = """
const list = document.getElementById('x-target'), began = performance.now();
list.selectedIndex = 2; list.dispatchEvent(new Event('change')); return performance.now() - began;
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--rows', type=int, default=100_000, help='of the pool and of the explorer (default: 1e5)')
  parser.add_argument('--characters', type=int, default=512, help='of a row (default: 512, about 128 tokens)')
  parser.add_argument('--repeats', type=int, default=3, help='number of times to open the page; medians are printed')
  parser.add_argument('--out', type=Path, help='file for the page')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  shown, began = random_evidence(flags.rows, flags.characters), time.perf_counter()
  options = base.get_config().report
  packed = explorer.pack(shown, flags.rows, options.explorer_bytes)
  html = page.render(shown, page.report_figures(shown), packed, options.examples)
  line: dict[str, Any] = {
    'rows': len(packed.row_N),
    'text_mb': sum(len(shown.text(n)) for n in range(flags.rows)) / 1e6,
    'page_mb': len(html.encode()) / 1e6,
    'cut_at': packed.characters,
    'make_s': time.perf_counter() - began,
  }
  with tempfile.TemporaryDirectory() as folder:
    file = (flags.out or Path(folder) / 'index.html').absolute()
    file.write_text(html, 'utf-8')
    line |= opened(file, flags.repeats)
  print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}))


def random_evidence(rows: int, characters: int) -> Evidence:
  """The evidence of a run with real text and heavy-tailed random scores; every arm selects a fifth of the pool.

  Raises:
    UserError: the installed packages have too little text.
  """
  g = prng.numpy_stream(0, 'bench', 'report')
  texts, names, document_N, offset_N = _texts(rows, characters)
  source_N = g.integers(0, len(_SOURCES), rows).astype(np.int8)
  scores = {task: (g.standard_t(4, rows) + (source_N == 1)).astype(np.float32) for task in (*_TASKS, 'mix')}
  reach = {
    task: (0.3 * np.abs(score_N) * g.uniform(0.5, 2, rows)).astype(np.float32) for task, score_N in scores.items()
  }
  order_N = np.argsort(-scores['mix'])
  fifth = rows // 5
  selected = []
  for method in _METHODS:
    for seed in range(3):
      draws = method.startswith('random')
      taken = {'dsdm': order_N[:fifth], 'bottom': order_N[-fifth:]}.get(method)
      name = f'{method}--{"any" if draws else "mix"}--{seed if draws else 0}'
      drawn = g.permutation(rows)[:fifth] if taken is None else taken
      selected.append(Selected(method, 'any' if draws else 'mix', seed, drawn, 4.0, name))
  return Evidence(
    results=_results(selected, g),
    sources=_SOURCES,
    source_N=source_N,
    document_N=document_N,
    offset_N=offset_N,
    documents=[{'id': name} for name in names],
    planted_N=np.full(rows, -1),
    scores=scores,
    reach=reach,
    examples={},
    selected=selected,
    curves=[],
    leaks=[],
    leakage={'guarded': [], 'masked': True, 'documents': 0, 'rows': 0, 'by_task': {}, 'trained': []},
    tokens=10_000_000,
    multiplier=None,
    lds=None,
    cost={stage: {'seconds': 60.0, 'flop': 1e12, 'bytes': 1_000_000} for stage in report_data.STAGES},
    versions={},
    environment={},
    config=flatten(base.get_config()),
    text=texts.__getitem__,
  )


def _texts(rows: int, characters: int) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
  """Texts of rows in random order, names of documents, and the document and offset of each row."""
  folders = {sysconfig.get_path('purelib'), sysconfig.get_path('stdlib')}
  files = sorted(
    {
      Path(at, name)
      for folder in folders
      for at, _, names in os.walk(folder)
      for name in names
      if name.endswith(_SUFFIXES)
    }
  )
  files = [files[i] for i in prng.numpy_stream(0, 'bench', 'files').permutation(len(files))]
  pieces: list[tuple[str, int, int]] = []
  names: list[str] = []
  for file in files:
    text = file.read_bytes().decode('utf-8', 'replace')[:_LONGEST]
    names.append(f'source/{file.parent.name}/{file.name}')
    pieces += [(text[i : i + characters], len(names) - 1, i) for i in range(0, len(text) - characters, characters)]
    if len(pieces) >= rows:
      break
  if len(pieces) < rows:
    raise UserError(f'--rows={rows}: the installed packages have text for {len(pieces)}; use fewer rows or characters')
  order = prng.numpy_stream(0, 'bench', 'rows').permutation(rows)
  taken = [pieces[n] for n in order]
  return [t for t, _, _ in taken], names, np.array([d for _, d, _ in taken]), np.array([at for _, _, at in taken])


def _results(selected: list[Selected], g: np.random.Generator) -> dict[str, Any]:
  rows = [{'method': s.method, 'target_mix': s.target_mix, 'seed': s.seed} for s in selected]
  gain_R = np.array([[0.2, 0.0, 0.05, -0.3][_METHODS.index(s.method)] for s in selected])[:, None]
  items = {}
  for task in _TASKS:
    for split in ('target', 'holdout'):
      hardness_I = g.normal(-4.6, 0.8, 100)
      items[f'logprob__{task}__{split}'] = (hardness_I + gain_R + g.normal(0, 0.1, (len(rows), 100))).astype(np.float32)
      items[f'accuracy__{task}__{split}'] = (g.random((len(rows), 100)) < 0.1).astype(np.float32)
  return results.results(results.Items(items), rows, Options())


def opened(file: Path, repeats: int) -> dict[str, Any]:
  """Seconds in Chromium, or the reason why it cannot be started."""
  try:
    from selenium import webdriver
  except ImportError:
    return {'browser': 'selenium is not installed (requirements-test.txt)'}
  chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  driver = shutil.which('chromedriver')
  if chromium is None or driver is None:
    return {'browser': 'Chromium and chromedriver are not installed'}
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for argument in ('headless=new', 'no-sandbox', 'disable-gpu', 'disable-dev-shm-usage', 'window-size=1280,900'):
    options.add_argument(f'--{argument}')
  seconds_of: dict[str, list[float]] = {}
  version = ''
  for _ in range(repeats):  # a new browser each time, without a cache
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
      version = browser.capabilities['browserVersion']
      for name, seconds in _open(browser, file).items():
        seconds_of.setdefault(name, []).append(seconds)
    finally:
      browser.quit()
  return {name: statistics.median(values) for name, values in seconds_of.items()} | {'browser': f'Chromium {version}'}


def _open(browser: Any, file: Path) -> dict[str, float]:
  browser.set_script_timeout(60)
  began = time.perf_counter()
  browser.get(file.as_uri())
  while browser.execute_script("return document.getElementById('explorer').dataset.ready") != 'yes':
    if time.perf_counter() - began > 60:
      raise UserError(f'the explorer of {file} did not open in 60 s')
    time.sleep(0.02)
  ready = time.perf_counter() - began
  run_script: Callable[..., Any] = browser.execute_script
  paints = run_script("return performance.getEntriesByType('paint').map(e => [e.name, e.startTime])")
  return {
    'first_paint_s': dict(paints)['first-paint'] / 1e3,
    'usable_s': ready,
    'search_s': browser.execute_async_script(_SEARCH, 'license') / 1e3,
    'sort_s': run_script(_SORT) / 1e3,
  }
