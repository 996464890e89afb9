"""Checkpoints are checked before Orbax reads them."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dsdm_jax.core import storage
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


@pytest.mark.parametrize('address', ['s3', 'gs'], indirect=True)
def test_a_store_has_whole_checkpoints_or_none(address):
  folder = address / 'model'
  state = {'w': jnp.arange(8.0), 'n': jnp.int32(3)}
  like = jax.eval_shape(lambda: state)
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.latest is None
    for step in (1, 2):
      checkpoints.save(step, state, {'step': step})
  files = storage.files(folder)
  assert {name.partition('/')[0] for name in files} == {'2'} and '2/checksums.json' in files
  for name in files:  # an upload that a kill ends, before the file without which there is no checkpoint
    if name not in ('2/checksums.json', '2/commit_success.txt'):
      storage.copy(folder / name, folder / '3' / name.removeprefix('2/'))
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.latest == 2
    restored, record = checkpoints.restore(like)
    assert record == {'step': 2} and (restored['w'] == state['w']).all()
    checkpoints.save(3, {**state, 'n': jnp.int32(4)}, {'step': 3})
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.restore_part({'n': like['n']}, None)['n'] == 4
  changed = max(storage.files(folder), key=lambda name: ('/d/' in name, storage.size(folder / name)))
  storage.write_bytes(folder / changed, b'x' * storage.size(folder / changed))
  with Checkpoints(folder) as checkpoints, pytest.raises(UserError, match='has changed since it was written'):
    checkpoints.restore(like)
