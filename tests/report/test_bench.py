"""`python -m dsdm_jax.bench report` on a small pool: the page it makes is one, and the browser opens it."""

import json

import pytest

from dsdm_jax.bench import __main__ as bench

pytestmark = pytest.mark.browser


def test_report_bench(capsys, tmp_path):
  page = tmp_path / 'page.html'
  assert bench.main(['report', '--rows', '300', '--characters', '200', '--repeats', '1', '--out', str(page)]) == 0
  line = json.loads(capsys.readouterr().out)
  assert line['rows'] == 300 and line['cut_at'] is None and line['text_mb'] <= 0.06 < line['page_mb'] < 2
  assert line['page_mb'] * 1e6 == pytest.approx(page.stat().st_size, rel=0.01)
  if not line['browser'].startswith('Chromium 1'):
    pytest.skip(line['browser'])
  assert 0 < line['first_paint_s'] < line['usable_s'] and line['search_s'] > 0 and line['sort_s'] > 0
