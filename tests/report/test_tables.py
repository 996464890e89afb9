"""Overlaps against sets counted by hand, and CSV that reads back as what it was."""

import csv
import dataclasses
import io

import numpy as np
import pytest

from dsdm_jax.report import tables


def _selected(template, method, target, seed, rows):
  name = f'{method}--{target}--{seed}'
  return dataclasses.replace(
    template, method=method, target_mix=target, seed=seed, rows=np.array(rows), name=name, epochs=1
  )


def test_overlap_by_hand(shown):
  first = shown.selected[0]
  few = dataclasses.replace(
    shown,
    source_N=np.zeros(10, np.int8),
    selected=[
      _selected(first, 'dsdm', 'mix', 0, [0, 1, 2, 3]),
      _selected(first, 'random', 'any', 0, [2, 3, 4, 5]),
      _selected(first, 'random', 'any', 1, [3, 4, 5, 6]),
      _selected(first, 'bottom', 'mix', 0, [9, 8]),
    ],
  )
  found = tables.overlap(few)
  assert found.labels == ('DsDm', 'random, same epochs', 'bottom-ranked')
  nan = np.nan
  np.testing.assert_allclose(found.share_AB, [[nan, 3 / 8, 0], [3 / 8, 3 / 4, 0], [0, 0, nan]])
  np.testing.assert_allclose(found.chance_AB[0], [0.4, 0.4, 0.2])


def test_seeds_that_share_a_selection_count_once(shown):
  assert len(tables.draws(shown, ('dsdm', 'mix'))) == 1
  assert len(tables.draws(shown, ('random', 'any'))) == 3
  assert np.isnan(tables.overlap(shown).share_AB[0, 0])


@pytest.fixture(scope='module')
def files(shown):
  return dict(tables.csv_files(shown, np.array([5, 7, 11])))


def test_csv_reads_back(shown, files):
  assert set(files) == {
    f'{name}.csv'
    for name in (
      'summary comparisons accuracy_comparisons arms lines mean_summary mean_comparisons losses sources overlap cost '
      'rows'
    ).split()
  }
  read = {name: list(csv.DictReader(io.StringIO(text))) for name, text in files.items()}
  assert [float(c['difference']) for c in read['comparisons.csv']] == [
    c['difference'] for c in shown.results['comparisons']
  ]
  assert [(c['task'], c['metric'], float(c['difference'])) for c in read['mean_comparisons.csv']] == [
    (c['task'], c['metric'], c['difference']) for c in shown.results['means']['comparisons']
  ]
  rows = read['rows.csv']
  assert [row['row'] for row in rows] == ['5', '7', '11']
  assert [np.float32(row['score docs']) for row in rows] == shown.scores['docs'][[5, 7, 11]].tolist()
  assert [np.float32(row['reach docs']) for row in rows] == shown.reach['docs'][[5, 7, 11]].tolist()
  assert rows[1]['document'] == shown.documents[0]['id']  # which holds markup
  assert int(rows[2]['selections of DsDm']) == 1
  assert sum(float(r['share']) for r in read['sources.csv'] if r['selection'] == tables.POOL) == pytest.approx(1)
  assert [int(r['bytes']) for r in read['cost.csv']] == [2_001_500] * 10  # no ladder was run, and none is charged
