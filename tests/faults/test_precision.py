"""Features kept in bfloat16 or int8 choose the rows that float32 chooses, but for few; the suite prints how many."""

import shutil

import pytest

from dsdm_jax.attribution import compare
from tests.pipeline import runs

SHARE = 0.25  # of the pool that a selection takes


@pytest.mark.slow
@pytest.mark.parametrize(('dtype', 'least'), [('bfloat16', 0.97), ('int8', 0.9)])
def test_top_rows_of_narrow_features_are_those_of_float32(server, finished, tmp_path, count, dtype, least):
  """The same pool, targets and proxies; of scores of every target, and of the mix."""

  def scores(kept: str) -> dict:
    folder, log = tmp_path / kept, tmp_path / f'{kept}.log'
    for stage in ('pool', 'targets', 'proxies'):
      shutil.copytree(finished / stage, folder / stage)
    for stage in ('features', 'datamodel'):
      flags = (runs.TINY, f'--workdir={folder}', f'--stage={stage}', f'--config.features.store_dtype={kept}')
      assert server.start(log, *flags).wait(300) == 0, log.read_text()[-3000:]
    assert f'{kept} keeps ' in log.read_text()
    return compare.load(folder, 'mix')

  exact = scores('float32')
  narrow = compare.load(finished, 'mix') if dtype == 'bfloat16' else scores(dtype)
  assert exact.keys() == narrow.keys()
  for target, score_N in exact.items():
    top, found = (set((-s).argsort(kind='stable')[: round(SHARE * len(s))].tolist()) for s in (score_N, narrow[target]))
    assert len(top & found) >= least * len(top), target
    count(f'top rows by float32 looked for in those by {dtype}', len(top))
    count(f'top rows by float32 found in those by {dtype}', len(top & found))
