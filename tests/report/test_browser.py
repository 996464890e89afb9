"""The page in a real browser: nothing logged, nothing loaded, nothing run, readable at the width of a phone."""

import csv
import io
import json
import shutil
import time

import numpy as np
import pytest

from dsdm_jax.report import figures, page
from tests.report.conftest import texts

pytestmark = pytest.mark.browser


@pytest.fixture(scope='module')
def browser():
  webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
  chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
  driver = shutil.which('chromedriver')
  if not (chromium and driver):
    pytest.skip('Chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)')
  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for argument in (
    'headless=new',
    'no-sandbox',
    'disable-gpu',
    'disable-dev-shm-usage',
    'disable-background-networking',
  ):
    options.add_argument(f'--{argument}')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  # The driver's path is given, so that selenium does not look for one to download.
  chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
  yield chrome
  chrome.quit()


def _until(browser, script: str) -> None:
  limit = time.monotonic() + 20
  while not browser.execute_script(script):
    assert time.monotonic() < limit, (script, browser.get_log('browser'))
    time.sleep(0.02)


def _open(browser, path, ready: bool = True) -> tuple[list, list[str]]:
  """Console messages, and addresses asked for, while `path` loads."""
  browser.get('about:blank')
  for kind in ('browser', 'performance'):
    browser.get_log(kind)
  browser.get(path.as_uri())
  browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
  if ready:
    _until(browser, "return document.getElementById('explorer').dataset.ready === 'yes'")
  events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
  asked = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
  return browser.get_log('browser'), asked


@pytest.fixture(scope='module')
def opened(browser, html, tmp_path_factory):
  path = tmp_path_factory.mktemp('page') / 'index.html'
  path.write_text(html, 'utf-8')
  return (*_open(browser, path), path)


def test_no_console_message_and_no_network(opened):
  console, asked, path = opened
  assert console == []
  assert [url for url in asked if not url.startswith('data:')] == [path.as_uri()]


def test_foreign_text_is_shown_and_not_run(opened, browser, hostile):
  assert 'owned' not in browser.title
  assert browser.execute_script('return document.scripts.length') == 1  # the explorer; its data are gone when read
  assert browser.execute_script("return document.querySelectorAll('img, iframe').length") == 0
  assert hostile in browser.execute_script("return [...document.querySelectorAll('pre')].map(p => p.textContent)")


@pytest.mark.parametrize('width', [360, 768, 1280])
def test_fits_the_width(opened, browser, width):
  """Wide tables scroll in their own boxes; the page itself does not scroll sideways."""
  browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride', {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': True}
  )
  assert browser.execute_script('return document.documentElement.clientWidth') == width
  assert browser.execute_script('return document.documentElement.scrollWidth') <= width
  empty = (
    "return [...document.querySelectorAll('figure svg')].filter(s => s.getBoundingClientRect().width < 200).length"
  )
  assert browser.execute_script(empty) == 0


@pytest.mark.parametrize('width', [360, 500, 768, 1000, 1280])
def test_the_explorer_has_no_gaps_beside_its_controls(opened, browser, width):
  """Each line of controls ends at the right edge, with one arm, two and none to choose."""
  browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride', {'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': True}
  )
  ends = """
    const e = document.getElementById('x-relation');
    e.value = arguments[0]; e.dispatchEvent(new Event('change'));
    const box = document.getElementById('x-controls').getBoundingClientRect(), ends = new Map();
    for (const label of document.querySelectorAll('#x-controls label')) {
      const at = label.getBoundingClientRect();
      if (at.width) ends.set(Math.round(at.top), Math.max(ends.get(Math.round(at.top)) || 0, at.right));
    }
    return [...ends.values()].map((right) => box.right - right);
  """
  for relation in ('both', 'a', 'all'):
    gaps = browser.execute_script(ends, relation)
    assert gaps and max(map(abs, gaps)) < 1, (relation, gaps)


def test_lines_of_wide_tables_are_blocks_on_a_phone(opened, browser):
  """Each value is beside its name, and no column is a sliver."""
  browser.execute_cdp_cmd(
    'Emulation.setDeviceMetricsOverride', {'width': 360, 'height': 800, 'deviceScaleFactor': 1, 'mobile': True}
  )
  wide = """
    const wide = (table) => table.scrollWidth > table.parentElement.clientWidth + 1;
    return [...document.querySelectorAll('table.stack')].filter(wide).length
  """
  assert browser.execute_script(wide) == 0
  shown = "return getComputedStyle(document.querySelector('table.main td'), '::before').content"
  assert browser.execute_script(shown) == '"DsDm against"'


def test_colours_follow_the_dark_scheme(opened, browser):
  def ground(scheme):
    features = [{'name': 'prefers-color-scheme', 'value': scheme}]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': features})
    return browser.execute_script('return getComputedStyle(document.body).backgroundColor')

  assert ground('light') == 'rgb(255, 255, 255)'
  assert ground('dark') != 'rgb(255, 255, 255)'


class Explorer:
  """What a reader does with it, and what is then to be seen."""

  def __init__(self, browser):
    self.browser = browser

  def js(self, script: str, *arguments):
    return self.browser.execute_script(script, *arguments)

  def choose(self, name: str, value: str) -> None:
    self.js(
      "const e = document.getElementById('x-' + arguments[0]); e.value = arguments[1];"
      "e.dispatchEvent(new Event('change'))",
      name,
      value,
    )

  def arm(self, name: str, label: str) -> None:
    options = self.js("return [...document.getElementById('x-' + arguments[0]).options].map(o => o.text)", name)
    self.choose(name, str(next(i for i, text in enumerate(options) if text.startswith(label))))

  def search(self, words: str) -> None:
    before = self.count
    box = self.browser.find_element('id', 'x-search')
    box.clear()
    box.send_keys(words)
    _until(self.browser, f'return document.getElementById("x-count").textContent !== {json.dumps(before)}')

  @property
  def count(self) -> str:
    return self.js("return document.getElementById('x-count').textContent")

  @property
  def matches(self) -> int:
    return 0 if self.count.startswith('No row') else int(self.count.split()[0].replace(',', ''))

  @property
  def lines(self) -> list[str]:
    return self.js("return [...document.querySelectorAll('.x-row')].map(n => n.textContent)")

  def reset(self) -> None:
    for name, value in (('target', 'mix'), ('sort', 'high'), ('source', ''), ('relation', 'all')):
      self.choose(name, value)
    self.js("const e = document.getElementById('x-search'); e.value = ''; document.getElementById('x-dialog').close()")
    self.choose('sort', 'high')
    assert self.matches == 3000


@pytest.fixture
def explorer(opened, browser):
  browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
  still = [{'name': 'prefers-reduced-motion', 'value': 'reduce'}]  # a click comes after the page has scrolled
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': still})
  browser.set_window_size(1280, 900)
  found = Explorer(browser)
  found.reset()
  yield found
  found.reset()
  assert browser.get_log('browser') == []


def test_search_finds_text_and_documents(explorer):
  explorer.search('# ROW 1234')
  assert explorer.matches == 1
  assert '# row 1234 def area' in explorer.lines[0]
  explorer.search('package-42/')
  assert explorer.matches == 10
  explorer.search('no such words')
  assert explorer.matches == 0
  assert explorer.lines == []


def test_sorting_by_target_and_source(explorer, shown):
  for target in ('docs', 'mix'):
    explorer.choose('target', target)
    for sort, best in (('high', shown.scores[target].argmax()), ('low', shown.scores[target].argmin())):
      explorer.choose('sort', sort)
      place = explorer.js("return document.querySelector('.x-row').textContent")
      assert (f'# row {best} ' in place) or (best == 7 and '<script>' in place)
  explorer.choose('source', '3')
  assert explorer.matches == (shown.source_N == 3).sum()
  assert all('metadata' in line for line in explorer.lines)
  explorer.choose('source', '')
  explorer.choose('sort', 'row')
  assert '# row 0 ' in explorer.lines[0]


def test_intervals_stand_beside_scores_and_order_rows(explorer, shown):
  explorer.choose('target', 'docs')
  row = shown.scores['docs'].argmax()
  reach = float(shown.reach['docs'][row] / shown.scores['docs'].std())
  text = explorer.js("return document.querySelector('.x-row .x-reach').textContent")
  assert abs(float(text.removeprefix('± ')) - reach) <= 0.006 + 0.014 * reach
  low_N = shown.scores['docs'] - shown.reach['docs']
  explorer.choose('sort', 'sure')
  order_N = np.argsort(-low_N)
  assert f'# row {order_N[1]} ' in explorer.lines[1]
  explorer.browser.find_element('css selector', '.x-row').click()
  assert '±' in explorer.js("return document.getElementById('x-scores').textContent")
  widths = explorer.js("return [...document.querySelectorAll('.x-bar span')].map(n => n.getBoundingClientRect().width)")
  assert len(widths) == 3 and min(widths) > 0
  explorer.choose('target', 'mix')
  assert explorer.js("return document.querySelector('.x-row .x-reach')") is None


def test_comparing_two_arms(explorer, shown):
  arms = {}
  for s in shown.selected:
    arms.setdefault(s.method, set()).update(s.rows.tolist())
  explorer.choose('relation', 'both')
  explorer.arm('a', 'DsDm')
  explorer.arm('b', 'random, one')
  dsdm, other = arms['dsdm'], arms['random_one_epoch']
  wanted = {
    'a': len(dsdm),
    'not-a': 3000 - len(dsdm),
    'both': len(dsdm & other),
    'a-not-b': len(dsdm - other),
    'b-not-a': len(other - dsdm),
    'neither': 3000 - len(dsdm | other),
    'all': 3000,
  }
  for relation, count in wanted.items():
    explorer.choose('relation', relation)
    assert (relation, explorer.matches) == (relation, count)


def test_a_selection_and_what_was_looked_for_are_downloaded(explorer, shown, hostile, tmp_path):
  explorer.browser.execute_cdp_cmd('Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(tmp_path)})

  def file(name: str, selector: str) -> str:
    explorer.js('document.querySelector(arguments[0]).click()', selector)
    limit = time.monotonic() + 20
    while not (tmp_path / name).is_file():
      assert time.monotonic() < limit, [*tmp_path.iterdir()]
      time.sleep(0.05)
    return (tmp_path / name).read_bytes().decode()

  rows = [*csv.DictReader(io.StringIO(file('dsdm--mix.csv', '#x-offer [data-form="csv"]'), newline=''))]
  best = np.argsort(-shown.scores['mix'], kind='stable')[:400]
  assert [int(row['row']) for row in rows][:20] == best[:20].tolist()  # scores in the page have 16 bits
  assert {int(row['row']) for row in rows} == set(best.tolist()) and len(rows) == 400
  best = np.array([int(row['row']) for row in rows])
  assert rows[0]['text'] == texts(int(best[0])) and rows[0]['source'] == shown.sources[shown.source_N[best[0]]]
  z_N = figures.standardised(shown.scores['docs'])
  np.testing.assert_allclose([float(row['score docs']) for row in rows], z_N[best], atol=2e-3)
  assert {row['selections of DsDm'] for row in rows} == {'1'}
  explorer.search('owned')
  (record,) = map(json.loads, file('rows.jsonl', '#x-files [data-form="jsonl"]').strip('\n').split('\n'))
  assert record['row'] == 7 and record['text'] == hostile
  explorer.search('hyperlink')
  (row,) = csv.DictReader(io.StringIO(file('rows.csv', '#x-files [data-form="csv"]'), newline=''))
  assert row['text'] == "'" + texts(13), 'a spreadsheet would run it'


def test_only_what_can_be_seen_is_built(explorer):
  assert 5 < len(explorer.lines) < 60
  explorer.js("document.getElementById('x-list').scrollTop = 58 * 2990")
  _until(explorer.browser, "return [...document.querySelectorAll('.x-row')].some(n => n.dataset.at === '2999')")
  assert len(explorer.lines) < 60


def test_a_row_opens_by_a_click_and_the_next_by_a_key(explorer, hostile):
  explorer.choose('target', 'docs')
  explorer.browser.find_element('css selector', '.x-row').click()
  body = "return document.getElementById('x-body').textContent"
  assert explorer.js("return document.getElementById('x-dialog').open")
  assert explorer.js(body) == hostile
  assert 'DsDm' in explorer.js("return document.getElementById('x-taken').textContent")
  assert 'top' in explorer.js("return document.getElementById('x-scores').textContent")
  explorer.browser.find_element('id', 'x-next').click()
  assert explorer.js(body) != hostile
  explorer.browser.find_element('id', 'x-previous').click()
  assert explorer.js(body) == hostile
  explorer.browser.find_element('id', 'x-close').click()
  assert not explorer.js("return document.getElementById('x-dialog').open")


def test_one_target_example_shows_what_helps_and_hurts_it(explorer, shown):
  explorer.choose('task', 'api_qa')
  first = shown.examples['api_qa'][0]
  assert explorer.js("return document.getElementById('x-answer').textContent") == first.answer
  for side, row in (('best', first.rows_M[0]), ('worst', first.rows_M[5])):
    text = explorer.js(f"return document.querySelector('#x-{side} li').textContent")
    assert f'# row {row}\n' in text or row == 7
    assert explorer.js(f"return document.querySelectorAll('#x-{side} li').length") == 5
  asked = explorer.browser.find_element('css selector', '#x-best button')
  explorer.js('arguments[0].scrollIntoView()', asked)
  asked.click()
  assert explorer.js("return document.getElementById('x-title').textContent") == f'Row {first.rows_M[0]:,}'


def test_the_watch_would_see_an_unescaped_page(browser, hostile, tmp_path):
  """The same text set without escaping is refused by the policy, and both watches above notice it."""
  path = tmp_path / 'bad.html'
  head = f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{page.policy("")}">'
  path.write_text(head + '<title>bad</title>' + hostile, 'utf-8')
  console, _ = _open(browser, path, ready=False)
  assert any('Content Security Policy' in entry['message'] for entry in console)
  assert browser.title == 'bad'
  assert browser.execute_script('return document.scripts.length') == 1
