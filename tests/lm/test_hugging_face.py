"""Hugging Face's GPT-2 and GPT-NeoX give the logits of transformers; unreadable folders are reported."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import save_file as save

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.core import mesh
from dsdm_jax.errors import UserError
from dsdm_jax.lm import decoder, hugging_face
from dsdm_jax.training.step import Trainer
from tests.conftest import ROOT
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
  folder.mkdir(exist_ok=True)
  save(tensors, folder / 'model.safetensors')
  shape = {'vocab_size': vocab_size, 'n_embd': width, 'n_layer': 1, 'n_head': 2, 'n_positions': positions}
  (folder / 'config.json').write_text(json.dumps(shape | {'model_type': 'gpt2', 'n_inner': mlp_width}))
  return tensors


@pytest.fixture(scope='module')
def theirs(peers, tmp_path_factory) -> Path:
  """Folders of the models in peer_logits.py, each with <name>.npz beside it, as transformers made them."""
  folder = tmp_path_factory.mktemp('theirs')
  run_peers(peers, folder)
  return folder


def run_peers(peers, *folders: Path) -> None:
  done = subprocess.run(
    [peers, Path(__file__).with_name('peer_logits.py'), *folders],
    env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]


def trainer_of(folder: Path, length: int = LENGTH, vocab_size: int = VOCAB, frozen: bool = False, **keys) -> Trainer:
  config = base.get_config()
  config.model.weights = str(folder)
  config = checks.resolve(config, hugging_face.model_keys)
  checks.validate(config)
  config.model.update(keys)
  grid = mesh.make_mesh(config.mesh, jax.devices()[:1])
  return Trainer(config.model, config.pretraining.train, vocab_size, length, grid, frozen)


FAMILIES = {
  'gpt2': (True, False), 'pythia': (False,), 'neox_in_a_row': (True,), 'padded': (False,), 'llama': (False, True),
  'llama3': (False,), 'llama_biased': (True,), 'mistral': (False,), 'qwen2': (False, True), 'qwen3': (True,),
  'olmo2': (False,), 'gemma2': (True,), 'gemma3': (False,),
}  # fmt: skip
SHORT = {'gpt2', 'pythia', 'llama3'}  # of each kind of positions, also at another length


@pytest.mark.peers
@pytest.mark.parametrize(('name', 'deep'), [(name, deep) for name, deeps in FAMILIES.items() for deep in deeps])
def test_logits_agree_with_transformers(theirs, name, deep):
  trainer = trainer_of(theirs / name, scan_layers=deep)
  state = trainer.init(jax.random.key(0))
  with np.load(theirs / f'{name}.npz') as found:
    assert found['logits_BLV'].shape[-1] == (104 if name == 'padded' else VOCAB)
    lengths = (found['tokens_BL'], 'logits_BLV'), (found['tokens_BL'][:, -9:], 'short_BLV')
    for tokens_BL, wanted in lengths[: 1 + (name in SHORT)]:
      logits_BLV = trainer.logits(state.params, state.rest, tokens_BL)
      np.testing.assert_allclose(logits_BLV, found[wanted][..., :VOCAB], atol=1e-4)
    assert np.abs(found['logits_BLV']).max() > 1  # so 1e-4 says something


NATIVE = {  # keys of `model` → the model type that it is exported as; tests/pipeline/test_model_export.py has gpt2
  'gpt_neox': {'positions': 'rope', 'rotary_share': 0.5, 'parallel_residual': True, 'mlp': 'gelu_exact'},
  'llama': {'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'tied_embeddings': False},
}
NATIVE['llama'] |= {'kv_heads': 1, 'scan_layers': True, 'rotary_scaling': (8.0, 1.0, 4.0, 32.0)}


@pytest.mark.peers
def test_what_is_written_is_read_to_the_bit_and_opens_in_transformers(theirs, peers, tmp_path, monkeypatch):
  monkeypatch.setattr(hugging_face, '_SHARD', 40_000)  # several files
  wanted, files = {}, set()
  for name in [name for name in FAMILIES if name != 'padded']:
    with np.load(theirs / f'{name}.npz') as found:
      wanted[name] = found['logits_BLV']
    config = base.model()
    config.update(hugging_face.model_keys(str(theirs / name)))
    write(tmp_path / name, config, weights(theirs / name, config))
    files |= {file.name for file in (tmp_path / name).iterdir()}
  tokens_BL = np.load(theirs / 'llama.npz')['tokens_BL']
  for kind, keys in NATIVE.items():
    config = base.model()
    config.update({'width': 32, 'mlp_width': 48, 'init_std': 0.3} | keys)
    model = decoder.build(config, VOCAB, LENGTH, nnx.Rngs(0))
    params = {'/'.join(map(str, path)): x[...] for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert write(tmp_path / f'native_{kind}', config, params) == kind
    wanted[f'native_{kind}'] = nnx.jit(lambda model, tokens_BL: model(tokens_BL))(model, tokens_BL)
  run_peers(peers, tmp_path, theirs)
  for name, logits_BLV in wanted.items():
    np.testing.assert_allclose(np.load(tmp_path / f'{name}.npy'), logits_BLV, atol=1e-4)
    assert np.abs(logits_BLV).max() > 1
  assert 'model-00004-of-00004.safetensors' in files


def weights(folder: Path, config: ConfigDict) -> dict[str, np.ndarray]:
  read = hugging_face.Weights(str(folder), config, VOCAB, LENGTH)
  return {path: read.read(path, shape) for path, shape in hugging_face._shapes(config, VOCAB, LENGTH).items()}


def write(folder: Path, config: ConfigDict, params: dict) -> str:
  """Writes a model, compares what is read from it, and returns its type."""
  theirs = hugging_face.their_config(config, VOCAB, LENGTH)
  folder.mkdir()
  hugging_face.write(folder, config, theirs, params)
  keys = hugging_face.model_keys(str(folder))
  assert keys == hugging_face._normal(config.to_dict())
  read = hugging_face.Weights(str(folder), config, VOCAB, LENGTH)
  for path, x in params.items():
    np.testing.assert_array_equal(read.read(path, x.shape), x)
  return theirs['model_type']


@pytest.mark.parametrize(
  ('keys', 'words'),
  [
    ({'positions': 'rope', 'kv_heads': 1}, 'the closest, gpt_neox, needs kv_heads = 2 .it is 1.'),
    ({'bias': False}, 'the closest, gpt2, needs bias = True .it is False.'),
    ({'norm': 'rmsnorm', 'positions': 'rope', 'bias': False}, "llama, needs mlp = 'swiglu' .it is 'gelu'."),
  ],
)
def test_a_model_that_no_family_computes_is_refused_with_the_reason(keys, words):
  config = base.model()
  config.update(keys)
  with pytest.raises(UserError, match=words):
    hugging_face.their_config(config, VOCAB, LENGTH)


@pytest.mark.parametrize('name', ['quickstart', 'paper', 'c4_dsdm', 'v5e_8', 'validation'])
def test_the_models_of_all_configs_can_be_exported(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  config = checks.resolve(config, hugging_face.model_keys)
  for model in (config.model, config.proxies.model):
    assert hugging_face.their_config(model, 1_000, 128)['model_type'] in ('gpt2', 'gpt_neox')


def test_bfloat16_is_rounded_and_a_gemma_keeps_its_scales(tmp_path):
  config = base.model()
  config.update({'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'geglu', 'bias': False, 'norm_place': 'both'})
  config.update({'embedding_scale': 8.0, 'logit_cap': 30.0})
  shapes, random = hugging_face._shapes(config, VOCAB, LENGTH), np.random.default_rng(0)
  params = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
  theirs = hugging_face.their_config(config, VOCAB, LENGTH)
  assert theirs['model_type'] == 'gemma2'
  for dtype, tolerance in (('float32', 2**-24), ('bfloat16', 2**-8)):  # half an ulp of the largest value that is stored
    (tmp_path / dtype).mkdir()
    hugging_face.write(tmp_path / dtype, config, theirs, params, dtype)
    found = weights(tmp_path / dtype, config)
    for path, x in params.items():
      limit = tolerance * np.maximum(np.abs(x - path.endswith('scale')), np.abs(x))
      exact = dtype == 'float32' and not path.endswith('scale')
      assert (np.abs(found[path] - x) <= (0 if exact else 2 * limit)).all()


@pytest.mark.parametrize(('scaling', 'most'), [((), LENGTH), ((2.0,), 2 * LENGTH)])
def test_rows_beyond_the_positions_of_a_rotary_model_are_refused(tmp_path, scaling, most):
  config = base.model()
  config.update({'positions': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'rotary_scaling': scaling})
  shapes = hugging_face._shapes(config, VOCAB, LENGTH)
  write(tmp_path / 'model', config, {path: np.ones(shape, np.float32) for path, shape in shapes.items()})
  folder, file = str(tmp_path / 'model'), tmp_path / 'model/config.json'
  hugging_face.check(folder, config, most)
  words = (
    rf'has {most} positions by its max_position_embeddings and rows have {most + 1} tokens; set .*length={most} or '
    'less, or raise that number in its config.json'
  )
  with pytest.raises(UserError, match=words):
    hugging_face.check(folder, config, most + 1)
  theirs = json.loads(file.read_text())
  file.write_text(json.dumps(theirs | {'max_position_embeddings': 0}))
  with pytest.raises(UserError, match='max_position_embeddings = 0, which must be a whole number above 0'):
    hugging_face.check(folder, config, most)
  del theirs['max_position_embeddings']
  file.write_text(json.dumps(theirs))
  hugging_face.check(folder, config, most + 1)


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
  (copy / 'config.json').write_text(json.dumps(config | {'model_type': 'bloom'}))
  refused("model_type = 'bloom'; model types that load are gpt2, gpt_neox, llama, mistral, qwen2, qwen3, olmo2", copy)
  refused('has 24 tokens in its sliding_window and rows have 25 tokens; set .*length=24', theirs / 'mistral', length=25)


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
    (
      {'activation_function': 'relu'},
      "activation_function = 'relu', which .* .only gelu_new, .*; model types",
    ),
    ({'activation_function': ['gelu']}, "activation_function = \\['gelu'\\], which the decoder does not support"),
    ({'scale_attn_weights': False}, 'scale_attn_weights = False, which the decoder does not support .only true'),
    ({'n_inner': 40}, r'tensor transformer.h.0.mlp.c_\w+.weight is .* and config.json asks for .*40.*; the files'),
    ({'n_embd': 32}, r'tensor transformer.h.0.\S+ is .* and config.json asks for .*32.*; the files'),
    ({}, 'config.json has no n_head; copy the file again'),
    ({'n_head': 'x' * 10_000}, r'n_head = .x{50,300}…, which must be a whole number above 0'),
    ({'tie_word_embeddings': 'no'}, "tie_word_embeddings = 'no', which must be true or false"),
    ([], 'config.json cannot be read .it holds list and not an object'),
    (b'[' * 100_000, 'config.json cannot be read .maximum recursion depth'),
    (b'{"n_head": ' + b'9' * 5_000 + b'}', 'config.json cannot be read'),
  ],
)
def test_config_that_does_not_fit_the_tensors_is_reported_in_one_line(tmp_path, change, words):
  write_gpt2(tmp_path / 'model', vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  file = tmp_path / 'model/config.json'
  config = json.loads(file.read_text())
  if change == {}:
    del config['n_head']
  changed = config | change if isinstance(change, dict) else change
  file.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
  refused(tmp_path / 'model', words, imported='n_inner' in list(change))


def _header(file: Path, change: Callable[[dict], object]) -> None:
  """Rewrites the header of a safetensors file as `change` returns it."""
  data = file.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = change(json.loads(data[8 : 8 + size]))
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size :])


def _with(header: dict, name: str, **entry) -> dict:
  return header | {name: header[name] | entry}


def _damage_tensor(folder: Path, name: str, value: float, dtype: str = '<f4') -> None:
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  tensors[name].reshape(-1)[-1] = value
  save({key: x.astype(dtype) for key, x in tensors.items()}, folder / 'model.safetensors')


HEADERS = {
  'overlapping': (lambda h: _with(h, 'ln_f.bias', data_offsets=h['ln_f.weight']['data_offsets']), 'not a complete'),
  'negative': (lambda h: _with(h, 'ln_f.bias', data_offsets=[-64, 0]), 'not a complete'),
  'reversed': (lambda h: _with(h, 'ln_f.bias', data_offsets=h['ln_f.bias']['data_offsets'][::-1]), 'not a complete'),
  'past the end': (lambda h: _with(h, 'ln_f.bias', data_offsets=[2**60, 2**60 + 64]), 'not a complete'),
  'list': (lambda h: list(h), 'not a complete'),
  'text': (lambda h: b'"header"', 'not a complete'),
  'deep': (lambda h: b'{"a":' + b'[' * 100_000, 'not a complete'),
  'number as shape': (lambda h: _with(h, 'ln_f.bias', shape=16), 'not a complete'),
  'huge shape': (lambda h: _with(h, 'ln_f.bias', shape=[2**62, 2**62]), 'not a complete'),
  'unknown type': (lambda h: _with(h, 'ln_f.bias', dtype='F33'), 'not a complete'),
  'no tensors': (lambda h: {}, 'not a complete'),
}


@pytest.mark.parametrize('kind', HEADERS)
def test_header_of_a_damaged_file_is_refused_in_one_line(tmp_path, kind):
  change, words = HEADERS[kind]
  write_gpt2(tmp_path, vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  _header(tmp_path / 'model.safetensors', change)
  refused(tmp_path, words, imported=kind == 'overlapping')


def refused(folder: Path, words: str, imported: bool = False) -> None:
  """The check before the pool is read, and the import itself where asked, refuse the model in one short line."""
  for read in (checked, lambda folder: trainer_of(folder).init(jax.random.key(0)))[: 1 + imported]:
    with pytest.raises(UserError, match=words) as caught:
      read(folder)
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 1_000 and str(folder) in str(caught.value)


def checked(folder: Path) -> None:
  config = base.get_config()
  config.model.weights = str(folder)
  config = checks.resolve(config, hugging_face.model_keys)
  checks.validate(config)
  hugging_face.check(str(folder), config.model)


@pytest.mark.parametrize(('value', 'dtype'), [(np.nan, '<f4'), (-np.inf, 'bfloat16'), (np.inf, '<f2')])
def test_a_number_that_is_not_finite_is_named_with_its_tensor(tmp_path, monkeypatch, dtype, value):
  monkeypatch.setattr(hugging_face, '_SLICE', 100)
  write_gpt2(tmp_path, vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  _damage_tensor(tmp_path, 'h.0.mlp.c_fc.weight', 1.0, dtype)
  checked(tmp_path)
  _damage_tensor(tmp_path, 'h.0.mlp.c_fc.weight', value, dtype)
  refused(tmp_path, r'tensor transformer\.h\.0\.mlp\.c_fc\.weight has a number that is not finite', imported=True)


def test_the_index_says_which_file_has_which_tensor(tmp_path):
  tensors = write_gpt2(tmp_path, vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  whole, index = tmp_path / 'model.safetensors', tmp_path / 'model.safetensors.index.json'
  names = sorted(tensors)
  parts = {'a.safetensors': names[:5], 'b.safetensors': names[5:]}
  for name, of_part in parts.items():
    save({key: tensors[key] for key in of_part}, tmp_path / name)
  refused(tmp_path, r'a\.safetensors and model\.safetensors both have the tensor')
  save({key: x + 1 for key, x in tensors.items()}, whole)
  files = {key: name for name, of_part in parts.items() for key in of_part}
  index.write_text(json.dumps({'weight_map': files}))
  found = flat(trainer_of(tmp_path).init(jax.random.key(0)).params)
  np.testing.assert_array_equal(found['embedding/embedding'], tensors['wte.weight'])
  for weight_map, words in (
    (files | {names[0]: 'c.safetensors'}, r'c\.safetensors is not a complete safetensors file'),
    (files | {names[0]: 'b.safetensors'}, rf'names the tensor {names[0]}, which b\.safetensors lacks'),
    (files | {names[0]: '../a.safetensors'}, 'weight_map must map tensors to names of files in that folder'),
    (files | {names[0]: 3}, 'weight_map must map'),
    (['a.safetensors'], 'weight_map must map'),
  ):
    index.write_text(json.dumps({'weight_map': weight_map}))
    refused(tmp_path, words)
  index.write_text('[' * 100_000)
  refused(tmp_path, 'index.json cannot be read')
  index.unlink()
  whole.unlink()
  os.mkfifo(whole)  # nobody writes to it
  refused(tmp_path, 'no such file')


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_weights_are_read_exactly(tmp_path, dtype):
  tensors = write_gpt2(tmp_path / 'model', vocab_size=VOCAB, width=16, mlp_width=48, positions=40)
  half = {name: x.astype(jax.numpy.dtype(dtype)) for name, x in tensors.items()}
  save(half, tmp_path / 'model/model.safetensors')
  found = flat(trainer_of(tmp_path / 'model').init(jax.random.key(0)).params)
  np.testing.assert_array_equal(found['embedding/embedding'], half['wte.weight'].astype(np.float32))
  assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}  # to train them
  frozen = trainer_of(tmp_path / 'model', frozen=True).init(jax.random.key(0))
  kept = flat(frozen.params)
  assert {path.rpartition('/')[2] for path, x in kept.items() if x.dtype == dtype} == {'kernel', 'embedding'}
  for path, x in kept.items():
    np.testing.assert_array_equal(x.astype(np.float32), found[path])
  assert not jax.tree.leaves(frozen.opt_state)
  save({name: x.astype(np.int8) for name, x in tensors.items()}, tmp_path / 'model/model.safetensors')
  with pytest.raises(UserError, match='has dtype I8; save the model in one of F32, F16, BF16'):
    trainer_of(tmp_path / 'model').init(jax.random.key(0))


_SIZES = {'num_hidden_layers': 2, 'hidden_size': 32, 'num_attention_heads': 4, 'intermediate_size': 64}
_ALL = 'load are gpt2, gpt_neox, llama, mistral, qwen2, qwen3, olmo2, gemma2, gemma3_text'
_GEMMA = {'model_type': 'gemma2', 'num_key_value_heads': 4, 'head_dim': 8}


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'num_hidden_layers': None}, 'num_hidden_layers = None, which must be a whole number above 0'),
    ({'rotary_pct': 'a quarter'}, "has rotary_pct = 'a quarter', which must be a number"),
    ({'rope_parameters': {'rope_type': 'yarn'}}, "rope_parameters = 'yarn', which .* .only the types default, linear"),
    ({'rope_scaling': {'type': 'dynamic'}}, "rope_scaling = 'dynamic', which"),
    ({'rope_parameters': 'yarn'}, "rope_parameters = 'yarn', which"),
    ({'attention_bias': False}, 'attention_bias = False, which'),
    ({'model_type': 'llama', 'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor = 0.5, which'),
    ({'model_type': 'llama', 'attention_bias': True}, 'mlp_bias = False, which .* .only the value of attention_bias'),
    ({'model_type': 'llama', 'rope_scaling': {'rope_type': 'llama3'}}, 'has factor = None, which must be a number'),
    ({'model_type': 'qwen3', 'num_key_value_heads': 2, 'attention_bias': True}, 'attention_bias = True, which'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quantization_config = .*gptq.*, which .* .only null.'),
    (
      _GEMMA
      | {
        'model_type': 'gemma3_text',
        'rope_parameters': {
          'full_attention': {'rope_type': 'default'},
          'sliding_attention': {'rope_type': 'linear', 'factor': 8.0},
        },
      },
      "has rope_parameters.sliding_attention.rope_type = 'linear', which .* .only default.",
    ),
    (
      _GEMMA | {'model_type': 'gemma3_text', 'rope_parameters': {'rope_theta': 1e5}},  # transformers ignores it
      'rope_parameters = .*100000.0.*, which .* .only with full_attention and sliding_attention',
    ),
    (_GEMMA | {'num_key_value_heads': None}, 'num_key_value_heads = None, which must be a whole number above 0'),
    (_GEMMA | {'query_pre_attn_scalar': 144}, 'query_pre_attn_scalar = 144, which .* .only head_dim, which is 8'),
    (_GEMMA | {'model_type': 'gemma3_text', 'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping = 50.0, which'),
    (_GEMMA | {'model_type': 'gemma3_text', 'layer_types': ['full_attention', 'sliding_attention']}, 'layer_types = '),
  ],
)
def test_what_the_decoder_cannot_say_is_reported_in_one_line(tmp_path, change, words):
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt_neox'} | _SIZES | change))
  with pytest.raises(UserError, match=words) as caught:
    hugging_face.model_keys(str(tmp_path))
  message = str(caught.value)
  assert str(tmp_path) in message and (message.endswith(_ALL) or 'which must be' in message)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2', 'qwen3', 'olmo2'])
def test_a_model_without_a_number_of_key_heads_has_one_for_each_head(tmp_path, family):
  config = {'model_type': family} | _SIZES | {'num_key_value_heads': None}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert hugging_face.model_keys(str(tmp_path))['kv_heads'] == _SIZES['num_attention_heads']


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


_READ = """
import pathlib, re, sys, jax
from configs import base
from dsdm_jax.config import validate
from dsdm_jax.core import mesh
from dsdm_jax.lm import hugging_face
from dsdm_jax.training.step import Trainer

def trainer(**keys):
  config = base.get_config()
  config.model.weights = sys.argv[1]
  config = validate.resolve(config, hugging_face.model_keys)
  config.model.update(keys)
  config.pretraining.train.optimizer = 'sgd'  # has no moments
  grid = mesh.make_mesh(config.mesh, jax.devices()[:1])
  return Trainer(config.model, config.pretraining.train, 8_000, 128, grid, frozen='bfloat16' in sys.argv)

def peak():  # bytes; ru_maxrss would begin with that of the process that started this one
  return 1024 * int(re.search('VmHWM: *(\\d+)', open('/proc/self/status').read().replace('\\t', ' '))[1])

own = trainer()
jax.block_until_ready(trainer(weights='', width=24, mlp_width=32, layers=1).init(jax.random.key(0)))
before = peak()
state = jax.block_until_ready(own.init(jax.random.key(0)))
print((peak() - before) / sum(file.stat().st_size for file in pathlib.Path(sys.argv[1]).glob('*.safetensors')))
"""


@pytest.mark.full
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_reading_takes_little_more_memory_than_the_folder(tmp_path, dtype):
  config = base.model()
  config.update({'layers': 24, 'width': 768, 'heads': 12, 'kv_heads': 4, 'mlp_width': 2_048, 'positions': 'rope'})
  config.update({'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'tied_embeddings': False})
  shapes, random = hugging_face._shapes(config, 8_000, 128), np.random.default_rng(0)
  params = {path: random.standard_normal(shape, np.float32) for path, shape in shapes.items()}
  hugging_face.write(tmp_path, config, hugging_face.their_config(config, 8_000, 128), params, dtype)
  done = subprocess.run(
    [sys.executable, '-c', _READ, str(tmp_path), dtype],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2_000:]
  assert 0.9 < float(done.stdout) < 1.3, done.stdout
