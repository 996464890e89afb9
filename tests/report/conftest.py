"""A finished run in miniature, in the formats of the stages, with text that tries to break out of the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from configs import base
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.data.pool import passes
from dsdm_jax.evaluation import results
from dsdm_jax.evaluation.comparisons import Options
from dsdm_jax.report import explorer, page, report_data
from tests.helpers import scores as saved_scores

HOSTILE = (
  '<script>document.title = "owned"; console.error("ran")</script>'
  '<img src="http://127.0.0.1:9/x.png" onerror="document.title=\'owned\'">'
  '</pre></details></style><iframe src="http://127.0.0.1:9/"></iframe> &amp; \u2028 {{ 7 * 7 }}'
)
SOURCES = ('source', 'docs', 'licences', 'metadata', 'data')
TASKS = ('docs', 'api_qa', 'cs_algorithms')
METHODS = {'dsdm': 0.17, 'random': 0.0, 'random_one_epoch': 0.04, 'bottom': -0.38}
CONFIG = {
  'seed': 0,
  'pool.max_bytes': 1_000_000,
  'targets.tasks': list(TASKS),
  'selection.targets': ['mix'],
  'selection.examples': 400,
  'model.factory': '<script>:x',
}
# A mix of ranks has no intervals.
SCORES = {'tasks': list(TASKS), 'mix': 'rank', 'half_width': dict.fromkeys(TASKS, 2.0)}
ROWS, PICKED, SEEDS, ITEMS, PEAKS = 3000, 400, 3, 90, 5


def texts(row: int) -> str:
  """The text of a row of the made-up pool; the best row for `docs` is hostile."""
  if row == 7:
    return HOSTILE
  if row == 13:
    return '=HYPERLINK("http://127.0.0.1:9/", "ran")'
  body = 'def area(radius: float) -> float:\n  """Returns the area of a circle."""\n  return 3.14159 * radius**2\n'
  return f'# row {row}\n' + body * 3


def build(folder: Path) -> dict[str, Artifact]:
  """Writes the artifacts below `folder` and returns them by stage."""
  g = np.random.Generator(np.random.Philox(5))
  for stage in report_data.STAGES:
    (folder / stage).mkdir()
  length = {'bytes': 4000, 'tokens': 1100, 'text': ''}
  source_N = g.choice(5, ROWS, p=(0.35, 0.2, 0.15, 0.1, 0.2)).astype(np.int8)
  documents = [
    {**length, 'id': f'{SOURCES[i % 5]}/package-{i}/module_{i}.py', 'source': SOURCES[i % 5]} for i in range(ROWS // 10)
  ]
  documents[0]['id'] = 'docs/<b onmouseover=alert(1)>/x.md'
  pool = folder / 'pool'
  planted_N = np.full(ROWS, -1, np.int32)
  planted_N[11] = 0
  (pool / 'rows').mkdir()
  origins = {
    'source': source_N,
    'document': (np.arange(ROWS) // 10).astype(np.int32),
    'offset': np.zeros(ROWS, np.int32),
    'planted': planted_N,
    'order': np.arange(len(documents)),
  }
  for name, array in origins.items():
    np.save(pool / 'rows' / f'{name}.npy', array)
  storage.write_json(pool / 'sources.json', list(SOURCES))
  passes.write_table(pool / 'documents' / '000000.parquet', documents)
  leaks = [
    {
      'id': f'docs/copy-{i}/a.md',
      'task': 'docs',
      'item': f'docs/{i}',
      'words': 'returns an iterator over <i>all</i>',
      'passages': 2,
      'more': [{'task': 'api_qa', 'item': 'api_qa/9', 'words': 'a second <b>passage</b>'}],
    }
    for i in range(3)
  ]
  _write_lines(folder / 'leakage' / 'leaks.jsonl', leaks)
  _write_lines(folder / 'leakage' / 'phrases.jsonl', [])
  counts = {'documents': 3, 'rows': 7}
  found = {'guarded': list(TASKS), 'masked': True, **counts, 'by_task': {'docs': counts}}
  storage.write_json(folder / 'leakage' / 'card.json', found)
  np.save(folder / 'leakage' / 'mask.npy', np.arange(ROWS) < 7)
  np.save(folder / 'proxies' / 'subset_0.npy', np.arange(4, ROWS))

  score_TN = g.standard_t(4, (3, ROWS)) + 1.2 * (source_N == 1)
  score_TN[0, 7], score_TN[:, 11] = 30.0, 12.0
  mix_N = score_TN.mean(axis=0)
  arrays = {f'score_{task}_N': score_TN[i].astype(np.float32) for i, task in enumerate(TASKS)}
  arrays |= {f'score_{task}_CN': score_TN[[i, i]].astype(np.float32) for i, task in enumerate(TASKS)}
  for i, task in enumerate(TASKS):  # its first two examples: what is best for the task itself, and the other way round
    order_N = np.argsort(-score_TN[i])
    ends_M = np.concatenate([order_N[:PEAKS], order_N[::-1][:PEAKS]])
    arrays[f'example_rows_{task}_EM'] = np.stack([ends_M, np.roll(ends_M, PEAKS)]).astype(np.int32)
    arrays[f'example_score_{task}_EM'] = np.stack([score_TN[i][ends_M], -score_TN[i][np.roll(ends_M, PEAKS)]]).astype(
      np.float32
    )
    _write_lines(
      folder / 'targets' / f'{task}.target.jsonl',
      [
        {'id': str(e), 'context': f'What is {task} {e}? {HOSTILE}', 'answer': f'answer {e}', 'document': 'd'}
        for e in (0, 1)
      ],
    )
    arrays[f'error_{task}_N'] = g.uniform(0.01, 0.5, ROWS).astype(np.float32) * (np.arange(ROWS) != 5)
  saved_scores.save(folder / 'datamodel', **arrays, score_mix_N=mix_N.astype(np.float32))

  order_N = np.argsort(-mix_N)
  runs, logs = [], np.arange(10, 201, 10)
  for method in METHODS:
    for seed in range(SEEDS):
      target = 'any' if method.startswith('random') else 'mix'
      drawn = seed if target == 'any' else 0
      name = f'{method}--{target}--{seed}'
      rows = {
        'dsdm': order_N[:PICKED],
        'bottom': order_N[-PICKED:],
        'random': g.permutation(ROWS)[:PICKED],
        'random_one_epoch': g.permutation(ROWS)[: 4 * PICKED],
      }[method]
      if seed == drawn:
        storage.save_npz(
          folder / 'selection' / f'{name}.npz', rows=np.sort(rows), weights=np.ones(len(rows), np.float32)
        )
      runs.append(
        {
          'name': name,
          'selection': f'{method}--{target}--{drawn}',
          'method': method,
          'target': target,
          'seed': seed,
          'examples': len(rows),
          'epochs': 1 if method == 'random_one_epoch' else 4,
        }
      )
      easier = 0.6 if method == 'bottom' else 0.1 * (method == 'dsdm')
      losses = 4.2 + 2.5 * np.exp(-logs / 40) - easier + g.normal(0, 0.03, len(logs))
      _write_lines(
        folder / 'pretraining' / f'{name}.jsonl',
        [
          {'step': int(s), 'loss': float(x), 'learning_rate': 1e-3, 'seconds': 0.1, 'tokens': int(s) * 4096}
          for s, x in zip(logs, losses, strict=True)
        ],
      )
  storage.write_json(folder / 'selection' / 'index.json', runs)
  _evaluation(folder, runs, g)
  spent = (4, 0.3, 1.2, 61, 38, 0.5, 2.4, 0.8, 118, 0.1, 14)
  flop = (0, 0, 0, 3.1e12, 2.2e12, 0, 4e10, 0, 6.2e12, 0, 9e11)
  return {
    stage: Artifact(
      folder / stage,
      {
        'cost': {'seconds': float(s), 'flop': float(f)},
        'semantics': SCORES if stage == 'datamodel' else {},
        'identity': {'settings': flatten(base.get_config())},
        'versions': {'jax': '0.10.2'},
        'files': {'documents/000000.parquet': {'bytes': 1_500}, 'two': {'bytes': 2_000_000}}
        | ({'subset_0.npy': {'bytes': 0}} if stage == 'proxies' else {})
        | ({name: {'bytes': 0} for name in storage.files(folder / stage)} if stage == 'datamodel' else {}),
      },
    )
    for stage, s, f in zip(report_data.STAGES, spent, flop, strict=True)
  }


def _evaluation(folder: Path, runs: list[dict], g: np.random.Generator) -> None:
  rows = [{'method': r['method'], 'target_mix': r['target'], 'seed': r['seed']} for r in runs]
  items, lines = {}, {}
  for task, strength in zip(TASKS, (1.0, 0.8, 0.0), strict=True):
    for split in ('target', 'holdout'):
      hardness_I = g.normal(-4.6, 0.8, ITEMS)
      taste = {m: g.normal(0, 0.12, ITEMS) for m in METHODS}
      items[f'logprob__{task}__{split}'] = np.stack(
        [
          hardness_I
          + strength * METHODS[r['method']]
          + taste[r['method']]
          + g.normal(0, 0.02)
          + g.normal(0, 0.15, ITEMS)
          for r in rows
        ]
      ).astype(np.float32)
      items[f'accuracy__{task}__{split}'] = (g.random((len(rows), ITEMS)) < 0.1).astype(np.float32)
    # Models beat the lines of all tasks but the last.
    for line, height in (('bigram', -0.9), ('5-gram', 0.2 if task == TASKS[-1] else -0.8)):
      lines[f'{line}__logprob__{task}__holdout'] = items[f'logprob__{task}__holdout'] + np.float32(height)
  summary = results.results(results.Items(items, lines=lines), rows, Options())
  storage.write_json(folder / 'evaluation' / 'results.json', summary)


def _write_lines(path: Path, records: list[dict]) -> None:
  storage.write_text(path, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in records))


@pytest.fixture(scope='session')
def inputs(tmp_path_factory) -> dict[str, Artifact]:
  return build(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='session')
def shown(inputs) -> report_data.Evidence:
  return report_data.load(inputs, CONFIG, texts)


@pytest.fixture(scope='session')
def hostile() -> str:
  return HOSTILE


def multiplier() -> dict:
  """`multiplier.json` of a made-up ladder: one reading inside it, one above its end."""
  curve = [
    {
      'flop': 1e12 * 2**i,
      'seconds': 4.1 * 2**i,
      'value': -4.8 + 0.1 * i,
      'low': -4.85 + 0.1 * i,
      'high': -4.75 + 0.1 * i,
    }
    for i in range(4)
  ]
  common = {
    'target_mix': 'mix',
    'split': 'holdout',
    'metric': 'logprob',
    'flop_final': 2e12,
    'seconds_final': 9.0,
    'flop_selection': 5e12,
    'seconds_selection': 20.0,
    'uses': 1,
    'needs_flop_selection_below': 3e12,
    'needs_seconds_selection_below': 11.0,
  }
  inside = {'estimate': 5e12, 'low': 3e12, 'high': None, 'text': '5e12 [3e12, > 8e12]'}
  above = {'estimate': None, 'low': 8e12, 'high': None, 'text': '> 8e12'}
  arms = [
    common
    | {
      'method': 'dsdm',
      'task': task,
      'value': value,
      'equivalent': read,
      'gross': read | {'text': text},
      'net': read | {'text': '0.9 [0.6, > 1.5]'},
      'equivalent_seconds': read | {'text': '21 [13, > 33]'},
      'gross_seconds': read | {'text': '2.3 [1.4, > 3.7]'},
      'net_seconds': read | {'text': '0.7 [0.4, > 1.1]'},
    }
    for task, value, read, text in (('docs', -4.57, inside, '2.5 [1.5, > 4]'), ('mean', -4.3, above, '> 4'))
  ]
  curves = [{'task': task, 'split': 'holdout', 'metric': 'logprob', 'points': curve} for task in ('docs', 'mean')]
  return {
    'confidence': 0.95,
    'uses': 1,
    'unit': {},
    'rungs': [],
    'law': None,
    'curves': curves,
    'arms': arms,
    'notes': ['<i>Conditional</i> on one selection.'],
  }


@pytest.fixture(scope='session')
def drawings(shown) -> dict:
  return page.report_figures(shown)


@pytest.fixture(scope='session')
def packed(shown) -> explorer.Packed:
  return explorer.pack(shown, 100_000, 10_000_000)


@pytest.fixture(scope='session')
def html(shown, drawings, packed) -> str:
  return page.render(shown, drawings, packed, 10)
