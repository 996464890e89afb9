"""A model of others serves as the proxy without a step of training."""

import json

import jax
import numpy as np
import pytest

from configs import base
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
  tensors = write_gpt2(tmp_path / 'gpt2', vocab_size=320, width=16, mlp_width=48, positions=40)
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
  trainer = Trainer(config.model, config.proxies.train, 320, 32, mesh.make_mesh(config.mesh, jax.devices()[:1]))
  params = flat(load_state(files_of(copied, 'proxies') / 'proxy_0', trainer).params)
  np.testing.assert_array_equal(params['embedding/embedding'], tensors['wte.weight'])
  np.testing.assert_array_equal(params['positions/embedding'], tensors['wpe.weight'][:32])
  np.testing.assert_array_equal(params['blocks/0/mlp/down/kernel'], tensors['h.0.mlp.c_proj.weight'])
