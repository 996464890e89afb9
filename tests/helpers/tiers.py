"""Which tests `launch/test.sh` runs: with --fast, by default (this is what CI runs), and with --all.

A test belongs to the smallest tier that no line here moves it out of. docs/testing.md says why these were moved.
"""

import pytest

# Only with --all. Each component keeps a shorter test in the default tier.
FULL = (
  'tests/data/pool/test_beam.py',
  'tests/faults/test_kill.py::test_kill_where_data_is_made_again',
  'tests/faults/test_kill.py::test_validation_that_is_killed',
  'tests/faults/test_soak.py',
  'tests/faults/test_two_processes.py',
  'tests/plan/test_compile.py::test_the_papers_scale_compiles_and_fits',
  'tests/study/test_study.py',
  'tests/test_colab.py::test_runs_from_start_to_end',
)
# Not with --fast, beside what is marked slow, browser or peers.
SLOW = ('tests/faults/', 'tests/test_wheel.py')
# A test that uses one of these waits for a whole run, for another environment, or for a browser.
SLOW_FIXTURES = {'beam', 'browser', 'copied', 'finished', 'libtpu', 'peers', 'server'}


def mark(item: pytest.Item) -> None:
  """Adds the marker `full` or `slow` to a test that these lists name."""
  if item.nodeid.startswith(FULL):
    item.add_marker(pytest.mark.full)
  fixtures = SLOW_FIXTURES.intersection(getattr(item, 'fixturenames', ()))
  if fixtures or item.nodeid.startswith(SLOW) or any(map(item.get_closest_marker, ('browser', 'peers'))):
    item.add_marker(pytest.mark.slow)
