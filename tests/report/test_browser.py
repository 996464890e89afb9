"""The page in a real browser: nothing logged, nothing loaded, nothing run, readable at the width of a phone."""

import json
import shutil

import pytest

from dsdm_jax.report import page

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


def _open(browser, path) -> tuple[list, list[str]]:
  """Console messages, and addresses asked for, while `path` loads."""
  browser.get('about:blank')
  for kind in ('browser', 'performance'):
    browser.get_log(kind)
  browser.get(path.as_uri())
  browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
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
  assert browser.execute_script('return document.scripts.length') == 0
  assert browser.execute_script("return document.querySelectorAll('img, iframe').length") == 0
  assert hostile in browser.execute_script("return [...document.querySelectorAll('pre')].map(p => p.textContent)")


@pytest.mark.parametrize('width', [360, 1280])
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


def test_colours_follow_the_dark_scheme(opened, browser):
  def ground(scheme):
    features = [{'name': 'prefers-color-scheme', 'value': scheme}]
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': features})
    return browser.execute_script('return getComputedStyle(document.body).backgroundColor')

  assert ground('light') == 'rgb(255, 255, 255)'
  assert ground('dark') != 'rgb(255, 255, 255)'


def test_the_watch_would_see_an_unescaped_page(browser, hostile, tmp_path):
  """The same text set without escaping is refused by the policy, and both watches above notice it."""
  path = tmp_path / 'bad.html'
  head = f'<!doctype html><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{page.POLICY}">'
  path.write_text(head + '<title>bad</title>' + hostile, 'utf-8')
  console, _ = _open(browser, path)
  assert any('Content Security Policy' in entry['message'] for entry in console)
  assert browser.title == 'bad'
  assert browser.execute_script('return document.scripts.length') == 1
