"""Checkpoints are checked before Orbax reads them."""

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.errors import UserError


def test_restoring_opens_no_array_to_learn_its_shape(tmp_path, monkeypatch):
  """TensorStore leaks 5 kB each time that Orbax describes one."""
  state = {'layer': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}, 'step': jnp.int32(1)}
  other = {**state, 'layer': {'w': jnp.ones((2, 4)), 'b': jnp.ones(3)}}
  message = (
    r'\(layer.w is \(2, 4\) in the model and \(2, 3\) in the checkpoint\); it is damaged or belongs to another model'
  )
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.close()
    with pytest.raises(UserError, match=message):
      checkpoints.restore(other)
    with pytest.raises(UserError, match=r'step is missing in the model and \(\) in the checkpoint'):
      checkpoints.restore({'layer': state['layer']})
    described: list[str] = []
    describe = ocp.StandardCheckpointHandler.metadata
    monkeypatch.setattr(
      ocp.StandardCheckpointHandler, 'metadata', lambda self, path: described.append(path.name) or describe(self, path)
    )
    np.testing.assert_array_equal(checkpoints.restore(state)[0]['layer']['w'], state['layer']['w'])
    assert described == []


@pytest.mark.parametrize('text', [None, '', '[]', '{}'])
def test_a_checkpoint_with_damaged_checksums_is_refused(tmp_path, text):
  state = {'w': jnp.ones(3)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.close()
    file = tmp_path / '1' / 'checksums.json'
    file.unlink()
    if text is not None:
      file.write_text(text)
    with pytest.raises(UserError, match='checksums.json is damaged or missing'):
      checkpoints.restore(state)
