"""Tables without pandas, and summaries, as a terminal and a notebook print them."""

import numpy as np
import pytest

from dsdm_jax.report import notebook
from dsdm_jax.report.notebook import Table, View


def test_table_without_pandas(tmp_path):
  table = Table({'score': np.arange(3) / 2, 'text': ['a', '<b>', '=1+1']}, [7, 8, 9], 'row')
  assert table.columns == list(table) == ['score', 'text'] and len(table) == 3
  assert table['score'].tolist() == [0.0, 0.5, 1.0]
  assert table.to_dict('records')[1] == {'score': 0.5, 'text': '<b>'}
  assert table.head(2).index.tolist() == [7, 8]
  assert repr(table).split('\n') == [
    'row  score  text',
    '  7      0     a',
    '  8    0.5   <b>',
    '  9      1  =1+1',
    '[3 lines × 2 columns]',
  ]
  assert '&lt;b&gt;' in table._repr_html_() and '<b>' not in table._repr_html_()
  table.to_csv(tmp_path / 'a.csv')
  assert (tmp_path / 'a.csv').read_text() == table.to_csv() == "row,score,text\n7,0.0,a\n8,0.5,<b>\n9,1.0,'=1+1\n"
  with pytest.raises(KeyError, match='no column'):
    table['other']


def test_long_tables_print_their_ends():
  printed = repr(Table({'x': np.arange(1_000), 'text': ['y' * 100 + '\x1b[2J'] * 1_000}))
  assert len(printed.split('\n')) == notebook._LINES + 3 and '999' in printed
  assert '\x1b' not in printed and max(map(len, printed.split('\n'))) < 80


def test_records_that_lack_keys():
  table = notebook.Table({'a': [1, None], 'b': [[1], [2, 3]]})
  assert table['a'].tolist() == [1, None] and table['b'].tolist() == [[1], [2, 3]]


def test_a_view_prints_foreign_text_as_text():
  class SomeView(View):
    def facts(self):
      yield 'name', '<script>alert(1)</script>\x1b[2J'

  assert repr(SomeView()) == 'some\n  name  <script>alert(1)</script>\\x1b[2J'
  assert '<script' not in SomeView()._repr_html_()
