"""Hugging Face's GPT-2 and GPT-NeoX give the logits of transformers; unreadable folders are reported."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.core import mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import hugging_face, partition
from dsdm_jax.training.step import Trainer
from tests.training.test_step import flat

VOCAB, LENGTH = 96, 24


def write_gpt2(folder: Path, vocab_size: int, width: int, mlp_width: int, positions: int) -> dict[str, np.ndarray]:
  """Saves a GPT-2 of one layer and two heads with random weights; returns its tensors."""
  shapes: dict[str, tuple[int, ...]] = {'wte.weight': (vocab_size, width), 'wpe.weight': (positions, width)}
  linear = {'attn.c_attn': (width, 3 * width), 'attn.c_proj': (width, width)}
  linear |= {'mlp.c_fc': (width, mlp_width), 'mlp.c_proj': (mlp_width, width)}
  for name, (inputs, outputs) in linear.items():
    shapes |= {f'h.0.{name}.weight': (inputs, outputs), f'h.0.{name}.bias': (outputs,)}
  for name in ('h.0.ln_1', 'h.0.ln_2', 'ln_f'):
    shapes |= {f'{name}.weight': (width,), f'{name}.bias': (width,)}
  rng = np.random.default_rng(0)
  tensors = {name: (0.2 * rng.normal(size=shape)).astype('<f4') for name, shape in shapes.items()}
  folder.mkdir()
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  shape = {'vocab_size': vocab_size, 'n_embd': width, 'n_layer': 1, 'n_head': 2, 'n_positions': positions}
  (folder / 'config.json').write_text(json.dumps(shape | {'model_type': 'gpt2', 'n_inner': mlp_width}))
  return tensors


@pytest.fixture(scope='module')
def theirs(peers, tmp_path_factory) -> Path:
  """Folders of the models in peer_logits.py, each with <name>.npz beside it, as transformers made them."""
  folder = tmp_path_factory.mktemp('theirs')
  done = subprocess.run(
    [peers, Path(__file__).with_name('peer_logits.py'), folder],
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return folder


def trainer_of(folder: Path, length: int = LENGTH, vocab_size: int = VOCAB, **keys) -> Trainer:
  config = base.get_config()
  config.model.weights = str(folder)
  config = checks.resolve(config, hugging_face.model_keys)
  checks.validate(config)
  config.model.update(keys)
  grid = mesh.make_mesh(config.mesh, jax.devices()[:1])
  return Trainer(config.model, config.pretraining.train, vocab_size, length, grid)


@pytest.mark.peers
@pytest.mark.parametrize(
  ('name', 'deep'), [('gpt2', False), ('gpt2', True), ('pythia', False), ('neox_in_a_row', True), ('padded', False)]
)
def test_logits_agree_with_transformers(theirs, name, deep):
  trainer = trainer_of(theirs / name, scan_layers=deep)
  state = trainer.init(jax.random.key(0))
  with np.load(theirs / f'{name}.npz') as found:
    logits_BLV = trainer.logits(state.params, state.rest, found['tokens_BL'])
    assert found['logits_BLV'].shape[-1] == (104 if name == 'padded' else VOCAB)
    np.testing.assert_allclose(logits_BLV, found['logits_BLV'][..., :VOCAB], atol=1e-4)
    assert np.abs(found['logits_BLV']).max() > 1  # so 1e-4 says something


@pytest.mark.peers
@pytest.mark.parametrize('deep', [False, True])
def test_modern_variant_is_the_llama_of_transformers(theirs, deep):
  """Rotary positions, RMSNorm, SwiGLU, an untied head, and four heads of queries on two of keys."""
  config = base.get_config()
  config.model.update({'layers': 2, 'width': 32, 'heads': 4, 'kv_heads': 2, 'mlp_width': 48, 'scan_layers': deep})
  config.model.update({'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu'})
  config.model.update({'bias': False, 'tied_embeddings': False})
  grid = mesh.make_mesh(config.mesh, jax.devices()[:1])
  trainer = Trainer(config.model, config.pretraining.train, VOCAB, LENGTH, grid)
  tensors = safetensors.numpy.load_file(theirs / 'llama' / 'model.safetensors')
  found = {
    'embedding/embedding': tensors.pop('model.embed_tokens.weight'),
    'norm/scale': tensors.pop('model.norm.weight'),
    'head/kernel': tensors.pop('lm_head.weight').T,
  }
  blocks = [_llama_block(tensors, f'model.layers.{layer}') for layer in range(2)]
  for path in blocks[0]:
    if deep:
      found[f'blocks/{path}'] = np.stack([block[path] for block in blocks])
    else:
      found |= {f'blocks/{layer}/{path}': block[path] for layer, block in enumerate(blocks)}
  assert not tensors, 'all of the model has its place'
  state = trainer.init(jax.random.key(0))

  def put(path, x):
    value = found.pop(partition.path_name(path))
    assert value.shape == x.shape
    return jax.numpy.asarray(value)

  params = jax.tree_util.tree_map_with_path(put, state.params)
  assert not found
  with np.load(theirs / 'llama.npz') as wanted:
    logits_BLV = trainer.logits(params, state.rest, wanted['tokens_BL'])
    np.testing.assert_allclose(logits_BLV, wanted['logits_BLV'], atol=1e-4)
    assert np.abs(wanted['logits_BLV']).max() > 1


def _llama_block(tensors: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
  """Takes a layer out of `tensors` and lays it out as ours, written out row by row."""
  q, k, v = (tensors.pop(f'{at}.self_attn.{name}_proj.weight') for name in 'qkv')  # [outputs, inputs]
  heads_of_8 = [q[:8], q[8:16], k[:8], v[:8], q[16:24], q[24:], k[8:], v[8:]]  # two queries, their key, their value
  gate, up = (tensors.pop(f'{at}.mlp.{name}_proj.weight') for name in ('gate', 'up'))
  alternating = [row for pair in zip(gate, up, strict=True) for row in pair]
  return {
    'attention_norm/scale': tensors.pop(f'{at}.input_layernorm.weight'),
    'attention/qkv/kernel': np.concatenate(heads_of_8).T,
    'attention/out/kernel': tensors.pop(f'{at}.self_attn.o_proj.weight').T,
    'mlp_norm/scale': tensors.pop(f'{at}.post_attention_layernorm.weight'),
    'mlp/up/kernel': np.stack(alternating).T,
    'mlp/down/kernel': tensors.pop(f'{at}.mlp.down_proj.weight').T,
  }


@pytest.mark.peers
def test_unreadable_folders_are_reported_in_one_line(theirs, tmp_path):
  def refused(words: str, folder: Path, **keys) -> None:
    with pytest.raises(UserError, match=words) as caught:
      trainer_of(folder, **keys).init(jax.random.key(0))
    assert '\n' not in str(caught.value)

  refused('config.json cannot be read', tmp_path / 'nowhere')
  refused('has a vocabulary of 96 and the pool one of 64', theirs / 'gpt2', vocab_size=64)
  refused('has 40 positions and rows have 64 tokens', theirs / 'gpt2', length=64)
  copy = Path(shutil.copytree(theirs / 'pythia', tmp_path / 'pythia'))
  file = copy / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-1000])
  refused('is not a complete safetensors file', copy)
  file.unlink()
  refused('contains no .*safetensors file', copy)
  config = json.loads((copy / 'config.json').read_text())
  (copy / 'config.json').write_text(json.dumps(config | {'model_type': 'llama'}))
  refused("model_type 'llama'", copy)
  (copy / 'config.json').write_text(json.dumps(config | {'hidden_act': 'relu', 'layer_norm_eps': 1e-6}))
  refused("epsilon 1e-06 and activation 'relu'", copy)


def test_vocabulary_that_is_larger_than_the_table_or_much_smaller_is_refused(tmp_path):
  tensors = write_gpt2(tmp_path / 'model', vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  found = flat(trainer_of(tmp_path / 'model', vocab_size=88).init(jax.random.key(0)).params)
  np.testing.assert_array_equal(found['embedding/embedding'], tensors['wte.weight'][:88])
  for vocab_size, words in (
    (97, 'has a vocabulary of 96 and the pool one of 97; tokenize'),
    (87, r'has a vocabulary of 96 and the pool one of 87 \(a padded table has up to 8 rows more\); tokenize'),
  ):
    with pytest.raises(UserError, match=words):
      trainer_of(tmp_path / 'model', vocab_size=vocab_size).init(jax.random.key(0))


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'n_head': None}, 'config.json has n_head = None, which must be a whole number above 0; copy the file again'),
    ({'n_layer': '1'}, "config.json has n_layer = '1', which must be a whole number above 0"),
    ({'activation_function': ['gelu']}, "asks for activation \\['gelu'\\]"),
    ({'n_inner': 40}, r'tensor transformer.h.0.mlp.c_fc.weight is 16 × 48 and config.json asks for 16 × 40; the files'),
    ({'n_embd': 32}, 'tensor transformer.wte.weight is 96 × 16 and config.json asks for any × 32; the files'),
    ({}, 'config.json has no n_head; copy the file again'),
  ],
)
def test_config_that_does_not_fit_the_tensors_is_reported_in_one_line(tmp_path, change, words):
  write_gpt2(tmp_path / 'model', vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  file = tmp_path / 'model/config.json'
  config = json.loads(file.read_text())
  if not change:
    del config['n_head']
  file.write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=words) as caught:
    trainer_of(tmp_path / 'model').init(jax.random.key(0))
  assert '\n' not in str(caught.value)
  assert str(tmp_path / 'model') in str(caught.value)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_weights_are_read_exactly(tmp_path, dtype):
  tensors = write_gpt2(tmp_path / 'model', vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  half = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in tensors.items()}
  safetensors.numpy.save_file(half, tmp_path / 'model/model.safetensors')
  found = flat(trainer_of(tmp_path / 'model').init(jax.random.key(0)).params)
  np.testing.assert_array_equal(found['embedding/embedding'], half['wte.weight'].astype(np.float32))
  safetensors.numpy.save_file(
    {'wte.weight': tensors['wte.weight'].astype(np.int8)}, tmp_path / 'model/model.safetensors'
  )
  with pytest.raises(UserError, match='has dtype I8; save the model in one of F32, F16, BF16'):
    trainer_of(tmp_path / 'model').init(jax.random.key(0))


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({}, 'has no num_hidden_layers; copy the file again'),
    ({'rotary_pct': 'a quarter'}, "has 'a quarter' for rotary_share, which must be a number"),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "asks for rotary positions of type 'yarn'"),
    ({'rope_parameters': 'yarn'}, "asks for rotary positions of type 'yarn'"),
  ],
)
def test_incomplete_neox_config_is_reported_in_one_line(tmp_path, change, words):
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt_neox'} | change))
  with pytest.raises(UserError, match=words) as caught:
    hugging_face.model_keys(str(tmp_path))
  assert str(tmp_path) in str(caught.value)


@pytest.mark.peers
def test_config_keys_that_contradict_the_model_are_reported(theirs):
  config = base.get_config()
  config.model.weights, config.model.width = str(theirs / 'pythia'), 48
  with pytest.raises(UserError, match=r'model.width = 48 is 32 in model.weights'):
    checks.resolve(config, hugging_face.model_keys)


def test_rotation_of_a_share_leaves_the_rest_and_keeps_lengths():
  from dsdm_jax.lm.decoder import rotate

  x_BLHK = np.random.default_rng(0).normal(size=(1, 5, 2, 8)).astype(np.float32)
  y_BLHK = np.asarray(rotate(x_BLHK, share=0.5, base=100.0))
  np.testing.assert_array_equal(y_BLHK[..., 4:], x_BLHK[..., 4:])
  np.testing.assert_array_equal(y_BLHK[:, 0], x_BLHK[:, 0])
  for place in range(5):  # pairs (0, 2) and (1, 3) turn by place · 100^(0, −1/2)
    for pair, speed in ((0, 1.0), (1, 0.1)):
      a, b = x_BLHK[0, place, 0, pair], x_BLHK[0, place, 0, pair + 2]
      turned = complex(a, b) * np.exp(1j * place * speed)
      found = complex(y_BLHK[0, place, 0, pair], y_BLHK[0, place, 0, pair + 2])
      assert abs(found - turned) < 1e-6 * 5


def test_parallel_residual_reads_the_same_input_twice():
  from dsdm_jax.lm.decoder import Block

  config = base.model()
  config.update({'width': 16, 'heads': 2, 'kv_heads': 2, 'mlp_width': 32, 'parallel_residual': True})
  block = Block(config, nnx.Rngs(0))
  x_BLD = jax.random.normal(jax.random.key(1), (2, 6, 16))
  wanted = x_BLD + block.attention(block.attention_norm(x_BLD)) + block.mlp(block.mlp_norm(x_BLD))
  np.testing.assert_allclose(block(x_BLD), wanted, atol=1e-6)


def test_the_index_decides_which_files_are_read(tmp_path):
  folder = tmp_path / 'sharded'
  tensors = write_gpt2(folder, VOCAB, 8, 16, LENGTH)
  trainer = trainer_of(folder)
  wanted = flat(trainer.init(jax.random.key(0)).params)
  half = len(tensors) // 2
  names = {name: f'model-{1 + (i >= half)}.safetensors' for i, name in enumerate(tensors)}
  for file in set(names.values()):
    safetensors.numpy.save_file({n: tensors[n] for n in tensors if names[n] == file}, folder / file)
  (folder / hugging_face._INDEX).write_text(json.dumps({'weight_map': names}))
  # Left over from another save: other values, and a tensor that the index places elsewhere.
  safetensors.numpy.save_file({name: 0 * value for name, value in tensors.items()}, folder / 'model.safetensors')
  stray = {n: tensors[n] for n in tensors if names[n] == 'model-2.safetensors'} | {
    'wte.weight': 0 * tensors['wte.weight']
  }
  safetensors.numpy.save_file(stray, folder / 'model-2.safetensors')
  found = flat(trainer_of(folder).init(jax.random.key(0)).params)
  assert found.keys() == wanted.keys()
  for path, value in wanted.items():
    np.testing.assert_array_equal(found[path], value)
  (folder / 'model-2.safetensors').unlink()
  with pytest.raises(UserError, match=r'index\.json lists model-2\.safetensors, which is missing \(1 of 2 files\)'):
    hugging_face.digest(str(folder))
  for damaged in ('[]', '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}', '{', '[' * 9_999):
    (folder / hugging_face._INDEX).write_text(damaged)
    with pytest.raises(UserError, match="has no 'weight_map'"):
      hugging_face.tensor_files(folder)
