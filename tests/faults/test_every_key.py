"""Every key of `configs/base.py` with values of every wrong kind and size, alone and together: one line, or valid."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.errors import UserError
from tests.config.test_config import FLAT, put
from tests.conftest import FAULTS

HUGE = 2**63
ODD = (
  None, True, 0, -1, 1, 2**62, HUGE, -HUGE - 1, 10**400, 0.0, -1.0, 0.5, 1e30, 1e300, -1e300, float('nan'),
  float('inf'), '', ' ', 'a\nb', 'x' * 9_000, 'x' * 20_000, '../..', '$(reboot)', 'a:b', b'a', (), ('',), ('a', 'a'),
  (None,), (1.0, -1.0), ('x:y',), ('docs',) * 20_000, ('x' * 20_000,), '(' * 9_000, 'a{9999999999}',
  'b1=' + '-' * 9_000 + '1', 'b1=\0', ('9' * 400, '1'), ('dsdm rows=' + '9' * 400,), 'host:99999',
  'v5e:99999x99999', [['a']], {'a': 1}, object(),
)  # fmt: skip
NUMBERS = {key: value for key, value in FLAT.items() if type(value) in (int, float)}


def error_of(values: dict[str, object]) -> str:
  """The error of validation; '' for none."""
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
    assert len(line) < 4_000, line
    return line
  return ''


def wrong(key: str) -> dict[str, tuple[object, str]]:
  """A value of another type, sign and size, each with the start of its error; a text has no sign, a bool no size."""
  default, shown = FLAT[key], f'config key {key} = '
  other = {bool: 2, int: 1.5, float: '0.1', str: 7, list: 7}[type(default)]
  result = {'type': (other, f'{shown}{other!r} must be ')}
  if key in NUMBERS:
    number = type(default)  # ConfigDict makes it one of the key's
    below = number(-2 if key == 'mesh.data' else -1)  # where -1 is all devices
    result['sign'] = (below, f'{shown}{below} must ')
    large = 2**62 if number is int else 1e31
    result['size'] = (large, f'{shown}{large} must be ')
  elif isinstance(default, str):
    result['size'] = (
      'x' * 20_000,
      f'{shown}{"x" * 199!r}'[:-1] + '… has 20,000 characters and must have at most 10,000; ',
    )
  elif isinstance(default, list):
    part = 0.1 if key == 'validation.drops' else 'docs'
    result['size'] = ((part,) * 20_000, 'has 20,000 parts and must have at most 10,000; ')
    if part == 'docs':
      result['size of a part'] = (('x' * 20_000,), 'has 20,000 characters and must have at most 10,000; ')
  return result


@pytest.mark.parametrize('key', FLAT)
def test_wrong_type_sign_and_size_of_every_key(key, count):
  for kind, (value, words) in wrong(key).items():
    line = error_of({key: value})
    assert line.startswith(f'config key {key} = ') and words in line, (kind, line)
    count('config values tried')


@pytest.mark.parametrize(('number', 'key'), list(enumerate(FLAT)))
def test_one_key(number, key, count):
  refused = 0
  values = ODD if FAULTS else ODD[number % 4 :: 4]
  for value in values:
    refused += bool(error_of({key: value}))
  assert refused >= len(values) // 3
  count('config values tried', len(values))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  values=st.dictionaries(st.sampled_from(sorted(FLAT)), st.integers(0, len(ODD) - 2), min_size=2, max_size=4).map(
    lambda chosen: {key: ODD[i] for key, i in chosen.items()}
  )
)
def test_keys_together(values, count):
  error_of(values)
  count('config values tried', len(values))
