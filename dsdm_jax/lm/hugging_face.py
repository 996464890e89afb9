"""Weights of Hugging Face's GPT-2 and GPT-NeoX (Pythia), read from a local folder into our decoder.

The folder is what `save_pretrained` leaves: `config.json` and safetensors files, one or many. The file format is a JSON
header and raw bytes, mapped and not read, so that a large model is never held twice.
"""

import functools
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.core.errors import UserError

_DTYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_GELUS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_exact'}
_EPSILON = 1e-5  # of our layer norms
_OUTER = 65_536  # bytes hashed of either end of a file


def model_keys(folder: str) -> dict[str, Any]:
  """The keys of `configs/base.py`'s `model` that the model in `folder` fixes.

  Raises:
    UserError: there is no such model, or the decoder has no such part.
  """
  found = _config(Path(folder))
  kind = found.get('model_type')
  if kind not in ('gpt2', 'gpt_neox'):
    raise UserError(f'{folder}: config.json says model_type {kind!r}; gpt2 and gpt_neox (Pythia) can be read')
  keys = _gpt2_keys(found) if kind == 'gpt2' else _neox_keys(found)
  epsilon = found.get('layer_norm_epsilon' if kind == 'gpt2' else 'layer_norm_eps', _EPSILON)
  gelu = found.get('activation_function' if kind == 'gpt2' else 'hidden_act', 'gelu_new' if kind == 'gpt2' else 'gelu')
  odd = [
    said for said, wrong in (
      (f'layer norms with epsilon {epsilon}', epsilon != _EPSILON),
      (f'activation {gelu!r}', gelu not in _GELUS),
      ('attention weights that are scaled by layer', found.get('scale_attn_by_inverse_layer_idx', False)),
      ('attention weights that are not scaled', not found.get('scale_attn_weights', True)),
      ('attention without biases', not found.get('attention_bias', True)),
    ) if wrong
  ]  # fmt: skip
  if odd:
    raise UserError(f'{folder}: config.json asks for {" and ".join(odd)}, which the decoder does not have')
  return keys | {'mlp': _GELUS[gelu], 'norm': 'layernorm', 'bias': True, 'kv_heads': keys['heads']}


def _gpt2_keys(found: Mapping[str, Any]) -> dict[str, Any]:
  return {
    'layers': found['n_layer'], 'width': found['n_embd'], 'heads': found['n_head'],
    'mlp_width': found.get('n_inner') or 4 * found['n_embd'], 'positions': 'learned', 'parallel_residual': False,
    'tied_embeddings': found.get('tie_word_embeddings', True),
  }  # fmt: skip


def _neox_keys(found: Mapping[str, Any]) -> dict[str, Any]:
  rope = found.get('rope_parameters') or {}
  if rope.get('rope_type', 'default') != 'default' or found.get('rope_scaling'):
    raise UserError(
      f'config.json asks for rotary positions of type {rope.get("rope_type")!r}; default ones can be read'
    )
  return {
    'layers': found['num_hidden_layers'], 'width': found['hidden_size'], 'heads': found['num_attention_heads'],
    'mlp_width': found['intermediate_size'], 'positions': 'rope',
    'rotary_share': float(rope.get('partial_rotary_factor', found.get('rotary_pct', 0.25))),
    'rotary_base': float(rope.get('rope_theta', found.get('rotary_emb_base', 10_000))),
    'parallel_residual': found.get('use_parallel_residual', True),
    'tied_embeddings': found.get('tie_word_embeddings', False),
  }  # fmt: skip


def parameters(folder: str, config: ConfigDict, vocab_size: int, length: int) -> dict[str, np.ndarray]:
  """Path of each parameter of the decoder → its value, float32; blocks are stacked where `config.scan_layers`.

  Args:
    config: of the model, with the keys that `model_keys` gives.
    vocab_size: of the pool.
    length: tokens of a row; learned positions beyond it are left out.

  Raises:
    UserError: the model has another vocabulary, fewer positions, or a tensor is missing or of another shape.
  """
  tensors = _Tensors(Path(folder))
  gpt2 = _config(Path(folder))['model_type'] == 'gpt2'
  embedding = tensors.get('transformer.wte.weight' if gpt2 else 'gpt_neox.embed_in.weight')
  if len(embedding) != vocab_size:
    raise UserError(
      f'model.weights = {folder!r} has a vocabulary of {len(embedding)} and the pool one of {vocab_size}; tokenize the '
      "pool with that model's own vocabulary"
    )
  found = {'embedding/embedding': embedding}
  if gpt2:
    positions = tensors.get('transformer.wpe.weight')
    if len(positions) < length:
      raise UserError(
        f'model.weights = {folder!r} has {len(positions)} positions and rows have {length} tokens; set --config.pool.'
        f'length={len(positions)} or less'
      )
    found['positions/embedding'] = positions[:length]
  read: Callable[[_Tensors, int, ConfigDict], dict[str, np.ndarray]] = _gpt2_block if gpt2 else _neox_block
  found |= _norm(tensors, 'transformer.ln_f' if gpt2 else 'gpt_neox.final_layer_norm', 'norm')
  blocks = [read(tensors, layer, config) for layer in range(config.layers)]
  if config.scan_layers:
    found |= {f'blocks/{path}': np.stack([block[path] for block in blocks]) for path in blocks[0]}
  else:
    found |= {f'blocks/{layer}/{path}': value for layer, block in enumerate(blocks) for path, value in block.items()}
  if not config.tied_embeddings:
    found['head/kernel'] = tensors.get('lm_head.weight' if gpt2 else 'embed_out.weight').T
  return {path: np.asarray(value, np.float32) for path, value in found.items()}


def _gpt2_block(tensors: '_Tensors', layer: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """GPT-2 keeps its matrices [inputs, outputs], and queries, keys and values of all heads one after another."""
  at, heads = f'transformer.h.{layer}', config.heads

  def by_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 3, heads, -1).swapaxes(-3, -2).reshape(x.shape)

  return {
    **_norm(tensors, f'{at}.ln_1', 'attention_norm'),
    **_norm(tensors, f'{at}.ln_2', 'mlp_norm'),
    'attention/qkv/kernel': by_head(tensors.get(f'{at}.attn.c_attn.weight')),
    'attention/qkv/bias': by_head(tensors.get(f'{at}.attn.c_attn.bias')),
    **_linear(tensors, f'{at}.attn.c_proj', 'attention/out', False),
    **_linear(tensors, f'{at}.mlp.c_fc', 'mlp/up', False),
    **_linear(tensors, f'{at}.mlp.c_proj', 'mlp/down', False),
  }


def _neox_block(tensors: '_Tensors', layer: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """GPT-NeoX keeps its matrices [outputs, inputs], and query, key and value head by head as we do."""
  del config
  at = f'gpt_neox.layers.{layer}'
  return {
    **_norm(tensors, f'{at}.input_layernorm', 'attention_norm'),
    **_norm(tensors, f'{at}.post_attention_layernorm', 'mlp_norm'),
    **_linear(tensors, f'{at}.attention.query_key_value', 'attention/qkv', True),
    **_linear(tensors, f'{at}.attention.dense', 'attention/out', True),
    **_linear(tensors, f'{at}.mlp.dense_h_to_4h', 'mlp/up', True),
    **_linear(tensors, f'{at}.mlp.dense_4h_to_h', 'mlp/down', True),
  }


def _norm(tensors: '_Tensors', theirs: str, ours: str) -> dict[str, np.ndarray]:
  return {f'{ours}/scale': tensors.get(f'{theirs}.weight'), f'{ours}/bias': tensors.get(f'{theirs}.bias')}


def _linear(tensors: '_Tensors', theirs: str, ours: str, turned: bool) -> dict[str, np.ndarray]:
  kernel = tensors.get(f'{theirs}.weight')
  return {f'{ours}/kernel': kernel.T if turned else kernel, f'{ours}/bias': tensors.get(f'{theirs}.bias')}


class _Tensors:
  """All tensors of a folder by name; names of a bare model (no `transformer.` before them) are found as well."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob('*.safetensors')):
      self._found |= _mapped(file)
    if not self._found:
      raise UserError(f'{folder} holds no *.safetensors file; save the model there with safe_serialization')

  def get(self, name: str) -> np.ndarray:
    bare = name.partition('.')[2]
    found = self._found.get(name, self._found.get(bare))
    if found is None:
      raise UserError(f'{self._folder}: no tensor {name}; the files are not all there, or of another model')
    return found


def _mapped(file: Path) -> dict[str, np.ndarray]:
  try:
    with open(file, 'rb') as f:
      data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:start])
    arrays = {}
    for name, entry in header.items():
      if name == '__metadata__' or entry['dtype'] not in _DTYPES:
        continue  # masks and the like
      first, stop = entry['data_offsets']
      dtype = _DTYPES[entry['dtype']]
      flat = np.frombuffer(data, dtype, (stop - first) // dtype.itemsize, start + first)
      arrays[name] = flat.reshape(entry['shape'])
    return arrays
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{file} is no whole safetensors file ({error}); copy it again') from error


def _config(folder: Path) -> dict[str, Any]:
  file = folder / 'config.json'
  try:
    found = json.loads(file.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f'model.weights: {file} cannot be read ({error}); give a folder with config.json and *.safetensors'
    ) from error
  return found if isinstance(found, dict) else {}


def digest(folder: str) -> str:
  """Names the content of the folder: config, and of each file its size, its beginning with all shapes and its end."""
  files = sorted([*Path(folder).glob('*.safetensors'), Path(folder) / 'config.json'])
  return _digest(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()))


@functools.lru_cache(maxsize=16)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
  h = hashlib.sha256()
  for name, size, _ in files:
    with open(name, 'rb') as f:
      h.update(f'{Path(name).name}\x1f{size}\x1f'.encode() + f.read(_OUTER))
      f.seek(max(0, size - _OUTER), os.SEEK_SET)
      h.update(f.read(_OUTER))
  return h.hexdigest()
