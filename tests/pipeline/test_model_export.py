"""Models of a finished run, exported and opened by transformers, and imported again."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from flax import nnx, traverse_util

from dsdm_jax import cli
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation.model_export import TrainedModel
from dsdm_jax.lm import hugging_face
from dsdm_jax.training import trained
from dsdm_jax.training.step import abstract_model
from tests.helpers.workdirs import files_of
from tests.pipeline import runs


@pytest.mark.peers
def test_exported_models_open_in_transformers(finished, peers, tmp_path, capsys):
  checkpoint = files_of(finished, 'pretraining') / 'random--any--0'
  for name, flags in {
    'arm': ('--arm', 'dsdm', '--seed', '1'),
    'proxy': ('--proxy', '1', '--dtype', 'bfloat16'),
    'checkpoint': ('--checkpoint', str(checkpoint)),
  }.items():
    assert cli.main(['export', 'model', '--workdir', str(finished), *flags, '--out', str(tmp_path / name)]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[0].startswith('dsdm--mix--1 as gpt2 in float32; ') and said[1].startswith('proxy_1 as gpt2 in bfloat16; ')

  model = TrainedModel(finished, 'dsdm--mix', 1)
  params = model.parameters()
  read = hugging_face.Weights(str(tmp_path / 'arm'), model.config, model.pool.vocab_size, model.pool.length)
  for path, x in params.items():
    np.testing.assert_array_equal(read.read(path, x.shape), x)

  texts = [model.pool.text(row) for row in range(6)]
  (tmp_path / 'texts').write_text(json.dumps(texts))
  done = subprocess.run(
    [peers, Path(__file__).with_name('peer_open.py'), tmp_path / 'texts', *(tmp_path / n for n in ('arm', 'proxy'))],
    env=runs.environment(1, HF_HUB_OFFLINE='1', PYTHONPATH=''),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3_000:]
  facts = json.loads((tmp_path / 'arm.json').read_text())
  encoder = model.pool.encoder
  assert facts['ids'] == [encoder.encode(text) for text in texts] and facts['decoded'] == texts
  assert facts['eos'] == facts['stops'] == encoder.eos and facts['generated'] <= 6
  assert json.loads((tmp_path / 'proxy.json').read_text())['dtype'] == 'torch.bfloat16'
  tokens_BL = np.array([x[:16] for x in facts['ids']], np.int32)
  for name, exported, tolerance in (('arm', model, 1e-4), ('proxy', TrainedModel(finished, proxy=1), 0.05)):
    graphdef, state = nnx.split(abstract_model(exported.config, model.pool.vocab_size, model.pool.length))
    values = exported.parameters()
    path = {name: tuple(int(x) if x.isdigit() else x for x in name.split('/')) for name in values}
    nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict({path[name]: x for name, x in values.items()}))
    logits_BLV = nnx.merge(graphdef, state)(tokens_BL)
    np.testing.assert_allclose(np.load(tmp_path / f'{name}.npy'), logits_BLV, atol=tolerance)


def test_the_card_has_data_selection_and_results(finished, tmp_path):
  TrainedModel(finished, 'dsdm').write(tmp_path, 'float32')
  card = (tmp_path / 'README.md').read_text()
  results = json.loads((finished / 'results.json').read_text())
  own = [row for row in results['summary'] if row['method'] == 'dsdm']
  assert own and all(f'| {row["logprob"]:.4f} | {row["low"]:.4f} to {row["high"]:.4f} |' in card for row in own)
  compared = [row for row in results['comparisons'] if row['method'] == 'dsdm']
  assert compared and all(f'{row["difference"]:+.4f} | {row["low"]:.4f} to' in card for row in compared)
  assert '32 rows, chosen by' in card and '"method": "dsdm"' in card and '| docs |' in card


def test_what_cannot_be_exported_is_refused(finished, tmp_path, monkeypatch):
  def refused(words: str, *arguments, **named) -> None:
    with pytest.raises(UserError, match=words) as caught:
      TrainedModel(finished, *arguments, **named).parameters()
    assert '\n' not in str(caught.value)

  refused('has the arms dsdm--mix, random--any, .* with the seeds 0, 1; name one of each', 'dsdm', 7)
  refused('has the arms', 'nothing')
  refused('proxy_9 does not exist', proxy=9)
  refused('cannot be read .it contains no checkpoint', checkpoint=tmp_path)
  refused('cannot be read .*in the checkpoint', checkpoint=_of_another_shape(finished, tmp_path))
  monkeypatch.setattr(trained, 'OUR_FACTORY', 'another')
  refused('is dsdm_jax.lm.decoder:build, a custom model, which has no counterpart', 'dsdm')


def _of_another_shape(finished: Path, tmp_path: Path) -> Path:
  """A checkpoint of one array."""
  from dsdm_jax.core.checkpoints import Checkpoints

  with Checkpoints(tmp_path / 'other') as checkpoints:
    checkpoints.save(1, {'params': {'w': np.zeros(3, np.float32)}}, {})
  return tmp_path / 'other'
