"""What parsing raises becomes one line that names the flag."""

import pytest
from absl import flags

from dsdm_jax.core.command_line import explain

ARGV = ['dsdm_jax', '--config=mine.py', '--config.pool.lenght=3', '--workdir=w']


@pytest.mark.parametrize(
  ('error', 'start'),
  [
    (KeyError('\'lenght\'\nDid you mean "length" instead of "lenght"?'), '--config.pool.lenght=3: '),
    (AttributeError("no field 'lenght'"), '--config.pool.lenght=3: '),
    (SyntaxError('invalid syntax'), '--config=mine.py: SyntaxError: invalid syntax; '),
    (AttributeError("module 'm' has no attribute 'get_config'"), '--config=mine.py: AttributeError: '),
    (ZeroDivisionError(), '--config=mine.py: ZeroDivisionError: ZeroDivisionError; '),
    (flags.UnrecognizedFlagError('workdri'), "Unknown command line flag 'workdri'"),
  ],
)
def test_line(error, start):
  line = explain(error, ARGV)
  assert line.startswith(start)
  assert '\n' not in line
  assert '; ' in line
