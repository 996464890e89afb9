"""The page as text: complete, self-contained, escaped, the same bytes each time."""

import base64
import dataclasses
import hashlib
import re
import shlex
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from configs import base
from dsdm_jax.config import methods
from dsdm_jax.core.artifacts import Cost
from dsdm_jax.core.progress import Log
from dsdm_jax.core.stage import Context
from dsdm_jax.evaluation import results
from dsdm_jax.evaluation.comparisons import Options
from dsdm_jax.report import explorer, figures, page, report, tables
from tests.report.conftest import TASKS, multiplier


class _Seen(HTMLParser):
  """Collects tags, ids, what is referred to, and the text of every <pre>."""

  def __init__(self, html: str):
    super().__init__()
    self.tags, self.ids, self.references, self.attributes, self.pre = [], [], [], set(), []
    self._in_pre = False
    self.feed(html)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    for name, value in attrs:
      self.attributes.add(name)
      if name == 'id':
        self.ids.append(value)
      if name in ('href', 'src', 'xlink:href', 'action', 'data', 'srcset'):
        self.references.append(value)
    if tag == 'pre':
      self._in_pre = True
      self.pre.append('')

  def handle_endtag(self, tag):
    self._in_pre = self._in_pre and tag != 'pre'

  def handle_data(self, data):
    if self._in_pre:
      self.pre[-1] += data


class _Blank:
  """In the place of a figure, where the test is not about figures: drawing takes most of the time."""

  def svg(self, name: str) -> str:
    return f'<svg id="{name}"></svg>'


_EMPTY = explorer.Packed('', '', np.zeros(0, int), None)


_WHOLE_PROMPTS = {
  'shots': {'0': 90},
  'lost_shots': 0,
  'contexts_cut': 0,
  'tokens_cut': 0,
  'most_tokens_cut': 0,
  'shortened': 0,
}


def render(shown, drawings, examples: int = 1) -> str:
  return page.render(shown, dict.fromkeys(drawings, _Blank()), _EMPTY, examples)


@pytest.fixture(scope='module')
def seen(html) -> _Seen:
  return _Seen(html)


def test_refers_to_nothing_outside(seen, html):
  ids = set(seen.ids)
  for reference in seen.references:
    assert reference == 'data:,' or (reference.startswith('#') and reference[1:] in ids), reference
  # Inside styles as well; namespaces are names and load nothing.
  assert set(re.findall(r'url\((.)', html)) <= {'#'}
  assert '@import' not in html


def test_ids_are_unique_and_links_resolve(seen, html):
  assert len(seen.ids) == len(set(seen.ids))
  assert set(re.findall(r'url\(#([^)]+)\)', html)) <= set(seen.ids)


def test_foreign_text_stays_text(seen, hostile):
  assert not {'img', 'iframe', 'object', 'embed', 'form'} & set(seen.tags)
  assert seen.tags.count('script') == 3  # two blocks of data, and the explorer
  assert not {name for name in seen.attributes if name.startswith('on')}
  assert hostile in seen.pre


def test_policy_comes_before_anything_it_governs_and_allows_one_script(html):
  start = html.index('Content-Security-Policy')
  assert start < min(html.index('<style'), html.index('<link'))
  policy = unescape(html[start : html.index('">', start)])
  assert "default-src 'none'" in policy
  assert not {"'unsafe-eval'", 'http:', 'https:', 'blob:'} & set(policy.split())
  script = html[html.rindex('<script>') + len('<script>') : html.rindex('</script>')]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert re.findall(r'script-src ([^;]*);', policy) == [f"'sha256-{digest}'"]


def test_script_sets_text_and_never_markup(repo_root):
  script = (repo_root / 'dsdm_jax/report/templates/explorer.js').read_text()
  for word in ('innerHTML', 'outerHTML', 'insertAdjacent', 'document.write', 'eval(', 'Function(', 'fetch(', 'import('):
    assert word not in script, word


def test_every_section_has_its_content(seen, html, shown):
  for section in (
    'result',
    'next',
    'means',
    'training',
    'sources',
    'overlap',
    'scores',
    'explorer',
    'one',
    'examples',
    'guard',
    'cost',
    'limits',
    'settings',
  ):
    assert f'<section id="{section}"' in html
  assert seen.tags.count('svg') == 3 + 3 + 1 + 1 + 4  # tasks, their lines, losses, sources, targets with the mix
  # Targets × best and worst × ten, config, versions, a row of the explorer, a target example, and what to do next.
  assert len(seen.pre) == 4 * 2 * 10 + 4 + 3
  for c in shown.results['comparisons']:
    assert f'{abs(c["difference"]):.3f}' in html
  assert 'planted' in html
  assert '3.1\u202f×\u202f10¹²' in html
  assert 'made <em>once</em>' in html
  assert '2 MB' in html
  assert 'Do the scores predict' not in html  # this run has no validation


def test_stage_writes_page_and_picture(inputs, tmp_path, monkeypatch):
  class Pool:
    def __init__(self, artifact):
      assert artifact is inputs['pool']

    def text(self, row):
      return f'text of row {row}'

  monkeypatch.setattr('dsdm_jax.data.pool.pool.Pool', Pool)
  log, cost = Log(tmp_path, 'report', enabled=False), Cost(tmp_path)
  report.run(Context(base.get_config(), tmp_path, inputs, log, cost))
  written = (tmp_path / 'index.html').read_text('utf-8')
  assert 'text of row 7<' in written
  assert 'datamodel.damping = ' in written
  assert (tmp_path / 'result.svg').read_text('utf-8').rstrip().endswith('</svg>')
  names = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.*') if p.parent != tmp_path}
  assert {'figures/forest-docs.png', 'figures/overlap.png', 'data/rows.csv', 'data/comparisons.csv'} <= names
  assert not [name for name in names if (tmp_path / name).stat().st_size < 50]


def test_same_bytes_again(html, shown):
  assert page.render(shown, page.report_figures(shown), explorer.pack(shown, 100_000, 10_000_000), 10) == html


def test_validation_is_shown_where_there_is_one(shown, drawings):
  record = {'setting': 'plain', 'family': 'halves', 'low': 0.1, 'high': 0.5, 'subsets': 9}
  found = [record | {'predictor': name, 'lds': lds} for name, lds in (('weak', 0.11), ('<b>strong</b>', 0.33))]
  html = render(dataclasses.replace(shown, lds={'by_example': found, 'by_task': []}), drawings)
  part = html[html.index('<section id="lds">') :]
  assert part.index('&lt;b&gt;strong') < part.index('>weak<')
  assert '0.33 <small>[0.10,\u00a00.50]' in part


def test_multiplier_is_shown_where_there_is_a_ladder(shown, html, drawings):
  assert 'worth in compute' not in html
  laddered = dataclasses.replace(shown, multiplier=multiplier())
  drawn = {name: d for name, d in page.report_figures(laddered).items() if name.startswith('multiplier')}
  assert list(drawn) == ['multiplier-docs', 'multiplier-mean']
  made = render(laddered, [*drawings, *drawn])
  part = made[made.index('<section id="multiplier">') : made.index('<section id="training">')]
  assert '2.5 [1.5, &gt; 4]' in part
  assert 'mean of all tasks' in part
  assert '&lt;i&gt;Conditional' in part
  assert 'ladder of random data' in drawn['multiplier-docs'].svg('x')
  assert 'multiplier.csv' in dict(tables.csv_files(laddered, np.arange(3)))


def test_number_that_could_not_be_given(shown, drawings):
  results = {**shown.results}
  for part in ('summary', 'comparisons', 'lines'):
    results[part] = [{**row, 'low': None, 'high': None, 'verdict': 'no evidence'} for row in results[part]]
  assert '<td class="n" data-label="interval">–</td>' in render(dataclasses.replace(shown, results=results), drawings)


def test_best_rows_are_the_highest_scores(shown, html):
  """The first row shown for `docs` is the arg max of its scores, the first of the worst the arg min."""
  docs = html[html.index('<summary>docs<') :]
  rows = [int(n.replace(',', '')) for n in re.findall(r'<span class="row">row ([\d,]+)</span>', docs)[:20]]
  order_N = np.argsort(-shown.scores['docs'], kind='stable')
  assert rows[:10] == order_N[:10].tolist()
  assert rows[10:] == order_N[::-1][:10].tolist()


def test_arms_of_several_targets_are_told_apart(shown, drawings):
  """With an arm for one target alone each targeted arm names its target, and random arms do not."""
  results = {**shown.results}
  for part in ('summary', 'comparisons', 'lines'):
    extra = [{**row, 'target_mix': 'docs'} for row in results[part] if row['method'] == 'dsdm']
    results[part] = results[part] + extra
  selected = [*shown.selected, dataclasses.replace(shown.selected[0], target_mix='docs')]
  curves = [*shown.curves, dataclasses.replace(shown.curves[0], target_mix='docs')]
  several = dataclasses.replace(shown, results=results, selected=selected, curves=curves)
  html = page.render(several, page.report_figures(several), _EMPTY, 1)
  assert 'DsDm for docs' in html
  assert 'DsDm for all targets together' in html
  assert 'random, same epochs for' not in html
  assert html.count('training loss, nats per token') > 1
  ids = _Seen(html).ids
  assert len(ids) == len(set(ids))


def with_benchmarks(shown):
  """The run asked two benchmarks besides, one of them with choices."""
  arms = list(dict.fromkeys((s.method, s.target_mix) for s in shown.selected))
  runs = [{'method': m, 'target_mix': t, 'seed': seed} for m, t in arms for seed in range(3)]
  g, items = np.random.default_rng(0), {}
  for name in ('docs__holdout', 'piqa__benchmark', 'winograd__benchmark'):
    items[f'logprob__{name}'] = g.normal(-4, 1, (len(runs), 30))
    items[f'accuracy__{name}'] = (g.random((len(runs), 30)) < 0.4).astype(float)
  for metric in ('acc', 'acc_norm'):
    items[f'{metric}__piqa__benchmark'] = (g.random((len(runs), 30)) < 0.6).astype(float)
  found = results.results(results.Items(items), runs, Options())
  return dataclasses.replace(shown, results=found)


def test_benchmarks_have_a_table_and_are_not_called_held_out(shown):
  asked = with_benchmarks(shown)
  html = render(asked, page.report_figures(asked))
  assert '<figcaption>piqa (benchmark)</figcaption>' in html and '<figcaption>docs</figcaption>' in html
  assert '<a href="#benchmarks">' in html and 'and on items of benchmarks' in html
  section = html[html.index('<section id="benchmarks"') : html.index('<section id="training"')]
  assert '<th class="n">mean of all benchmarks</th>' in section
  for row in (r for r in asked.results['summary'] if r['split'] == 'benchmark'):
    assert f'{100 * row["accuracy"]:.1f}\u00a0%\n        <small>' in section
    low, high = 100 * row['accuracy_low'], 100 * row['accuracy_high']
    assert f'[{low:.1f},\u00a0{high:.1f}]' in section and 0 <= low <= high <= 100
    if row['task'] == 'piqa':
      assert f'acc {100 * row["acc"]:.1f}\u00a0%, acc_norm {100 * row["acc_norm"]:.1f}\u00a0%' in section
  assert section.count('acc_norm') == 1 + len({r['method'] for r in asked.results['summary']})


@pytest.mark.parametrize('method', ['dsdm', 'random'])
def test_a_run_with_one_arm_has_a_whole_page(shown, html, method):
  selected = [s for s in shown.selected if s.method == method]
  runs = [{'method': s.method, 'target_mix': s.target_mix, 'seed': s.seed} for s in selected]
  g = np.random.default_rng(0)
  items = {f'{metric}__docs__holdout': g.normal(-4, 1, (len(runs), 30)) for metric in ('logprob', 'accuracy')}
  alone = dataclasses.replace(
    shown,
    results=results.results(results.Items(items), runs, Options()),
    selected=selected,
    curves=[c for c in shown.curves if c.method == method],
  )
  assert 'No two arms of this run are compared' in render(alone, page.report_figures(alone))
  assert 'No two arms' not in html
  figures.forest_standalone(alone.results['comparisons'], 0.95, 'random')
  assert dict(tables.csv_files(alone, np.arange(3)))['comparisons.csv'].strip() == ''


def test_prompts_that_did_not_fit_are_in_a_table_and_most_of_them_in_the_headline(shown, html, drawings):
  lost = {'shots': {'3': 6, '0': 4}, 'lost_shots': 4, 'contexts_cut': 2, 'tokens_cut': 30, 'most_tokens_cut': 20}
  entries = [
    {'task': task, 'split': 'benchmark', 'n_items': 10, 'prompts': lost | {'shortened': shortened}}
    for task, shortened in (('piqa', 4), ('boolq', 6))
  ]
  page_with = render(dataclasses.replace(shown, results={**shown.results, 'tasks': entries}), drawings)
  assert (
    page_with.count(
      '>6 with 3, 4 with 0</td><td data-label="contexts cut">2 (by 15 tokens on average, at most 20)</td>'
    )
    == 2
  )
  assert '<p class="lead second">Most prompts of boolq (6 of 10) are longer than pool.length: they' in page_with
  assert 'Most prompts of piqa' not in page_with and 'id="prompts"' not in html


def test_means_over_tasks_and_accuracies_are_compared(shown, html):
  table = html[html.index('<summary>The same in tables') : html.index('<section id="means"')]
  every = [
    *shown.results['comparisons'],
    *shown.results['accuracy_comparisons'],
    *shown.results['means']['comparisons'],
  ]
  assert table.count('<span class="verdict') == len(every)
  assert table.count('<th scope="row">mean of all tasks</th>') == len(shown.results['means']['comparisons']) > 0


def test_colour_is_for_verdicts(shown, html):
  """Not for intervals that leave out zero: Holm's rule may refuse these a verdict."""
  c = {**shown.results['comparisons'][0], 'difference': 0.2, 'low': 0.1, 'high': 0.3}
  blue = figures.COLOURS['blue']
  for verdict, coloured in (('no evidence', False), ('better', True)):
    svg = figures.forest_standalone([{**c, 'verdict': verdict}], 0.95, 'random')
    assert (blue in svg[: svg.index('legend_1')]) == coloured
  assert 'even if their interval excludes zero' in html


def test_tasks_below_n_grams_are_marked_and_explained_in_the_headline(shown, html):
  """Of the run's three tasks, `cs_algorithms` has a 5-gram line above every arm."""
  lines = html[html.index('<section id="lines"') : html.index('<section id="training"')]
  assert (
    lines.count('<td data-label="">below n-grams</td>') == 4 == len({r['method'] for r in shown.results['summary']})
  )
  assert '<figcaption>cs_algorithms · below n-grams</figcaption>' in html
  header = html[html.index('<header>') : html.index('</header>')]
  assert 'On cs_algorithms, n-grams predict the right answers better than the models' in header
  assert 'still weaker than simple counting on 1 of 3 targets</h1>' in header
  marked = [c for c in shown.results['comparisons'] if c['below_ngrams']]
  assert {c['task'] for c in marked} == {'cs_algorithms'}
  svg = figures.forest_standalone([{**c, 'verdict': 'better'} for c in marked], 0.95, 'random')
  drawn = svg[: svg.index('legend_1')]
  assert figures.COLOURS['blue'] not in drawn


def test_accuracy_beside_nats_and_guessing_beside_accuracy(shown, drawings):
  tasks = [{'task': t, 'split': 'holdout', 'n_items': 90, 'chance': 0.25, 'prompts': _WHOLE_PROMPTS} for t in TASKS]
  html = render(dataclasses.replace(shown, results={**shown.results, 'tasks': tasks}), drawings)
  header = html[html.index('<header>') : html.index('</header>')]
  for c in (c for c in shown.results['comparisons'] if c['method'] == 'dsdm' and c['baseline'] != 'bottom'):
    right = {
      r['method']: r['accuracy'] for r in shown.results['summary'] if (r['task'], r['split']) == (c['task'], 'holdout')
    }
    line = next(x for x in header.split('<tr>') if f'>{c["task"]}<' in x and methods.label(c['baseline']) in x)
    for value in (right['dsdm'], right[c['baseline']], 0.25):
      assert f'{100 * value:.1f}\u00a0%' in line
    assert f'{abs(c["difference"]):.2f}' in line and (c['verdict'] in line)
  assert 'of the final model, which random data do not need' in header


def test_fewer_than_three_seeds_leave_no_verdict_on_the_page(shown, drawings):
  found = {**shown.results}
  for part in ('comparisons', 'accuracy_comparisons'):
    found[part] = [{**c, 'seeds': [2, 2], 'verdict': 'no evidence'} for c in found[part]]
  found['means'] = {**found['means'], 'comparisons': [{**c, 'seeds': [2, 2]} for c in found['means']['comparisons']]}
  html = render(dataclasses.replace(shown, results=found), drawings)
  assert 'class="verdict' not in html
  assert '--config.pretraining.seeds=3' in html[html.index('<section id="next"') : html.index('<section id="means"')]


def test_what_to_do_next_has_commands_for_this_run(shown):
  steps = {heading: command for heading, _, command in page.next_steps(shown)}
  export = steps['Export the selection and a model']
  assert 'dsdm export --workdir RUN --arm dsdm--mix --format parquet --out selection' in export
  assert 'dsdm export model --workdir RUN --arm dsdm--mix --seed 0 --out model' in export
  words = shlex.split(steps['Choose for another target'])
  assert words[-2] == f'--config.targets.tasks={(*TASKS, "my_task.jsonl")!r}'
  assert words[-1] == "--config.selection.targets=('mix', 'my_task')"
  assert '--config.pool.max_bytes=0 --config.selection.examples=4000' in steps['Use the whole pool']
  whole = dataclasses.replace(
    shown,
    config={
      **shown.config,
      'pool.max_bytes': 0,
      'targets.tasks': ['it"s $(rm).jsonl'],
      'selection.targets': ['it"s $(rm)'],
    },
  )
  steps = {heading: command for heading, _, command in page.next_steps(whole)}
  assert '--pool OTHER_RUN/pool' in steps['Score a larger pool']
  assert shlex.split(steps['Choose for another target'])[-2:] == [
    "--config.targets.tasks=('it\"s $(rm).jsonl', 'my_task.jsonl')",
    "--config.selection.targets=('it\"s $(rm)', 'my_task')",
  ]


def test_another_target_trains_the_models_of_a_mix_again_and_no_others(shown):
  def why(target):
    selected = [dataclasses.replace(s, target_mix=target) if s.target_mix == 'mix' else s for s in shown.selected]
    run = dataclasses.replace(shown, selected=selected)
    return next(why for heading, why, _ in page.next_steps(run) if heading == 'Choose for another target')

  assert 'models are trained again' in why('mix') and 'no model is trained' not in why('mix')
  assert 'models are trained again' not in why('+'.join(TASKS)) and 'no model is trained' in why('+'.join(TASKS))


def test_scores_for_a_target_are_shown_with_the_rows_of_the_arm_for_it(shown):
  first, *_ = (s for s in shown.selected if s.method == 'dsdm')
  one, *others = TASKS
  arms = ('+'.join(TASKS), '+'.join(others), one)
  run = dataclasses.replace(shown, selected=[dataclasses.replace(first, target_mix=name, name=name) for name in arms])
  assert [run.selected_for('dsdm', t).name for t in ('mix', one, others[0])] == [arms[0], one, arms[0]]
  assert run.selected_for('bottom', one) is None
  assert shown.selected_for('dsdm', one).target_mix in ('mix', one)


def test_the_selection_is_offered_only_if_the_page_holds_all_of_it(shown, drawings, packed):
  whole = page.render(shown, dict.fromkeys(drawings, _Blank()), packed, 1)
  assert 'id="x-offer"' in whole and 'The 400 rows that DsDm selected' in whole
  for less in (dataclasses.replace(packed, characters=80), dataclasses.replace(packed, row_N=packed.row_N[:100])):
    part = page.render(shown, dict.fromkeys(drawings, _Blank()), less, 1)
    assert 'id="x-offer"' not in part and 'has room for a part of them' in part


def test_leaks_are_listed_with_their_passages(html):
  part = html[html.index('<section id="guard"') : html.index('<section id="cost"')]
  assert part.count('returns an iterator over &lt;i&gt;all&lt;/i&gt;') == part.count('a second &lt;b&gt;passage') == 3
  assert 'docs, item docs/2' in part and 'api_qa, item api_qa/9' in part and '2 passages' in part


def test_of_many_sources_the_largest_eight_have_colours(shown, drawings):
  names = tuple(f'source {i}' for i in range(12))
  many = dataclasses.replace(shown, sources=names, source_N=(np.arange(3000) ** 2 // 750_000 % 12).astype(np.int8))
  groups = tables.groups(many, 8)
  count_S = np.bincount(many.source_N, minlength=12)
  assert groups.names[-1] == '4 others' and len(groups.names) == 9
  assert [names.index(name) for name in groups.names[:8]] == np.argsort(-count_S, kind='stable')[:8].tolist()
  assert groups.summed(count_S).sum() == 3000 and groups.summed(count_S)[-1] == np.sort(count_S)[:4].sum()
  assert tables.groups(dataclasses.replace(many, sources=names[:9], source_N=many.source_N % 9), 8).names[-1] in names
  drawn = figures.composition(groups.names, {'pool': groups.summed(count_S) / 3000}).svg('x')
  assert all(f'var(--{colour})' in drawn for colour in (*figures.SOURCE_COLOURS, figures.REST_COLOUR))
  html = render(many, drawings)
  assert 'The largest 8 of 12 sources' in html


def test_price_of_selecting(html, shown, drawings):
  """(3.1 + 2.2 + 0.04)e12 for proxies, features and datamodel, against 6.2e12 for twelve final models."""
  assert '5.3\u202f×\u202f10¹²' in html
  assert f'{5.34 / (6.2 / 12):.1f} of the final models' in html
  cost = {**shown.cost, 'selection': {**shown.cost['selection'], 'flop': 4e12}}
  assert f'{9.34 / (6.2 / 12):.1f} of the final models' in render(dataclasses.replace(shown, cost=cost), drawings)


def test_leaked_rows_are_shown(shown, drawings):
  """Of rows 0 to 6, the proxy trained on 4, 5 and 6."""
  text = ' '.join(re.sub('<[^>]*>', '', render(shown, drawings)).split())
  assert '3 documents of the pool have a passage' in text and 'They are in 7 of 3,000 rows, which no selection' in text
  assert 'each trained on at most 3 of these rows' in text and 'returns an iterator over' in text
  off = dataclasses.replace(shown, leakage={**shown.leakage, 'guarded': []})
  assert 'did not check' in render(off, drawings)
  listed = dataclasses.replace(shown, leakage={**shown.leakage, 'masked': False})
  assert 'which no selection takes' not in render(listed, drawings)


def test_no_leaks_and_no_text(shown, drawings):
  """Empty parts leave the page whole."""
  none = {**shown.leakage, 'documents': 0, 'rows': 0, 'by_task': {}}
  html = render(dataclasses.replace(shown, leaks=[], leakage=none, text=lambda row: ''), drawings)
  assert 'Some of these documents' not in html
