"""Every key of `configs/base.py` with values of every wrong kind and size, alone and together: one line, or taken."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import base
from dsdm_jax.core import config as checks
from dsdm_jax.core.errors import UserError
from tests.conftest import FAULTS
from tests.core.test_config import FLAT, put

HUGE = 2**63
ODD = (
  None, True, 0, -1, 1, HUGE, -HUGE - 1, 10**400, 0.0, -1.0, 0.5, 1e300, -1e300, float('nan'), float('inf'), '', ' ',
  'a\nb', 'x' * 10_000, '../..', '$(reboot)', 'a:b', b'a', (), ('',), ('a', 'a'), (None,), (1.0, -1.0), ('x:y',),
  [['a']], {'a': 1}, object(),
)  # fmt: skip


def said(values: dict[str, object]) -> str:
  """What validation finds wrong; '' for nothing."""
  config = base.get_config()
  for key, value in values.items():
    try:
      put(config, key, value)
    except (TypeError, ValueError, OverflowError):  # ConfigDict's own refusal, which the command line explains
      return ''
  try:
    checks.validate(config)
  except UserError as error:
    line = str(error)
    assert '\n' not in line and '; ' in line, line
    assert len(line) < 25_000
    return line
  return ''


@pytest.mark.parametrize(('number', 'key'), list(enumerate(FLAT)))
def test_one_key(number, key, count):
  wrong = 0
  values = ODD if FAULTS else ODD[number % 4 :: 4]
  for value in values:
    line = said({key: value})
    wrong += bool(line)
    if type(value) is int and abs(value) >= HUGE and isinstance(FLAT[key], int) and not isinstance(FLAT[key], bool):
      assert line.startswith(f'config key {key} = '), (value, line)
  assert wrong >= len(values) // 3
  count('config values tried', len(values))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  values=st.dictionaries(
    st.sampled_from(sorted(FLAT)), st.integers(0, len(ODD) - 2), min_size=2, max_size=4
  ).map(lambda found: {key: ODD[i] for key, i in found.items()})
)  # fmt: skip
def test_keys_together(values, count):
  said(values)
  count('config values tried', len(values))
