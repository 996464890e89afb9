"""What other packages would leak is not asked of them."""

import jax.numpy as jnp
import numpy as np
import tensorstore

from dsdm_jax.core.checkpoints import Checkpoints


def test_saving_and_restoring_lists_no_metrics_of_tensorstore(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(tensorstore, 'experimental_collect_matching_metrics', lambda *a: asked.append(a) or [])
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {'step': 1})
  with Checkpoints(tmp_path) as checkpoints:
    restored, record = checkpoints.restore(state)
  np.testing.assert_array_equal(restored['w'], state['w'])
  assert record == {'step': 1}
  assert asked == []
