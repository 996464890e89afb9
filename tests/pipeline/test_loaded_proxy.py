"""A model of others serves as the proxy without a step of training."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import base
from dsdm_jax import cli
from dsdm_jax.config import validate as checks
from dsdm_jax.core import mesh
from dsdm_jax.lm import hugging_face
from dsdm_jax.training.loop import load_state
from dsdm_jax.training.step import Trainer
from tests.helpers.workdirs import files_of
from tests.lm.test_hugging_face import write_gpt2
from tests.pipeline import runs
from tests.training.test_step import flat


@pytest.mark.slow
def test_loaded_model_is_the_proxy(copied, tmp_path):
  tensors = write_gpt2(tmp_path / 'gpt2', vocab_size=320, width=16, mlp_width=48, positions=32)
  half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
  save_file(half, tmp_path / 'gpt2' / 'model.safetensors')
  flags = (
    runs.TINY, f'--workdir={copied}', '--rerun', '--stage=proxies', '--config.proxies.count=1',
    f'--config.proxies.model.weights={tmp_path / "gpt2"}', '--config.proxies.epochs=0',
  )  # fmt: skip
  runs.succeed(*flags)
  manifest = json.loads((copied / 'proxies/manifest.json').read_text())
  assert manifest['semantics']['steps'] == 0
  assert manifest['identity']['settings']['proxies.model.mlp_width'] == 48  # the folder says so
  assert manifest['identity']['settings']['proxies.model.weights'].startswith('content ')
  assert manifest['semantics']['given'] == {'proxies.model.weights': str(tmp_path / 'gpt2')}
  config = base.get_config()
  config.model.weights = str(tmp_path / 'gpt2')
  config = checks.resolve(config, hugging_face.model_keys)
  grid = mesh.make_mesh(config.mesh, jax.devices()[:1])
  trainer = Trainer(config.model, config.proxies.train, 320, 32, grid, frozen=True)
  params = flat(load_state(files_of(copied, 'proxies') / 'proxy_0', trainer).params)
  for path, name in {
    'embedding/embedding': 'wte.weight',
    'positions/embedding': 'wpe.weight',
    'blocks/0/mlp/down/kernel': 'h.0.mlp.c_proj.weight',
    'blocks/0/mlp_norm/scale': 'h.0.ln_2.weight',
  }.items():
    assert params[path].dtype == np.float32  # to compute with
    np.testing.assert_array_equal(params[path], half[name].astype(np.float32))

  # The checkpoint has the folder's dtype, and an export is the folder again, bit for bit.
  flags = ('--workdir', str(copied), '--proxy', '0', '--dtype', 'bfloat16', '--out', str(tmp_path / 'again'))
  assert cli.main(['export', 'model', *flags]) == 0
  again = load_file(tmp_path / 'again' / 'model.safetensors')
  assert {name.removeprefix('transformer.') for name in again} == set(half)
  for name, x in again.items():
    np.testing.assert_array_equal(x.view(np.uint16), half[name.removeprefix('transformer.')].view(np.uint16))
