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

from dsdm_jax.errors import UserError

_DTYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_GELUS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_exact'}
_EPSILON = 1e-5  # of our layer norms
_PADDING = 10  # a table whose rows exceed the vocabulary by one in so many, or less, is a padded one
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
  keys = (_gpt2_keys if kind == 'gpt2' else _neox_keys)(found, folder)
  epsilon = found.get('layer_norm_epsilon' if kind == 'gpt2' else 'layer_norm_eps', _EPSILON)
  gelu = found.get('activation_function' if kind == 'gpt2' else 'hidden_act', 'gelu_new' if kind == 'gpt2' else 'gelu')
  odd = [
    said for said, wrong in (
      (f'layer norms with epsilon {epsilon}', epsilon != _EPSILON),
      (f'activation {gelu!r}', gelu not in tuple(_GELUS)),
      ('attention weights that are scaled by layer', found.get('scale_attn_by_inverse_layer_idx', False)),
      ('attention weights that are not scaled', not found.get('scale_attn_weights', True)),
      ('attention without biases', not found.get('attention_bias', True)),
    ) if wrong
  ]  # fmt: skip
  if odd:
    raise UserError(f'{folder}: config.json asks for {" and ".join(odd)}, which the decoder does not have')
  return keys | {'mlp': _GELUS[gelu], 'norm': 'layernorm', 'bias': True, 'kv_heads': keys['heads']}


def _gpt2_keys(found: Mapping[str, Any], folder: str) -> dict[str, Any]:
  layers, width, heads = (_whole(found, name, folder) for name in ('n_layer', 'n_embd', 'n_head'))
  return {
    'layers': layers, 'width': width, 'heads': heads,
    'mlp_width': _whole(found, 'n_inner', folder) if found.get('n_inner') else 4 * width, 'positions': 'learned',
    'parallel_residual': False, 'tied_embeddings': found.get('tie_word_embeddings', True),
  }  # fmt: skip


def _neox_keys(found: Mapping[str, Any], folder: str) -> dict[str, Any]:
  rope = found.get('rope_parameters') or {}
  kind = rope.get('rope_type', 'default') if isinstance(rope, dict) else rope
  if not isinstance(rope, dict) or kind != 'default' or found.get('rope_scaling'):
    raise UserError(f'{folder}: config.json asks for rotary positions of type {kind!r}; default ones can be read')
  turned = {
    'rotary_share': rope.get('partial_rotary_factor', found.get('rotary_pct', 0.25)),
    'rotary_base': rope.get('rope_theta', found.get('rotary_emb_base', 10_000)),
  }
  for key, value in turned.items():
    if type(value) not in (int, float):
      raise UserError(f'{folder}: config.json has {value!r} for {key}, which is a number; copy it again')
  names = ('num_hidden_layers', 'hidden_size', 'num_attention_heads', 'intermediate_size')
  layers, width, heads, mlp_width = (_whole(found, name, folder) for name in names)
  return {
    'layers': layers, 'width': width, 'heads': heads, 'mlp_width': mlp_width, 'positions': 'rope',
    **{key: float(value) for key, value in turned.items()},
    'parallel_residual': found.get('use_parallel_residual', True),
    'tied_embeddings': found.get('tie_word_embeddings', False),
  }  # fmt: skip


def _whole(found: Mapping[str, Any], name: str, folder: str) -> int:
  value = found.get(name)
  if type(value) is not int or value < 1:
    said = f'has {name} = {value!r}, which is no whole number above 0' if name in found else f'has no {name}'
    raise UserError(f'{folder}: config.json {said}; copy it again from where the model was saved')
  return value


def parameters(folder: str, config: ConfigDict, vocab_size: int, length: int) -> dict[str, np.ndarray]:
  """Path of each parameter of the decoder → its value, float32; blocks are stacked where `config.scan_layers`.

  Args:
    config: of the model, with the keys that `model_keys` gives.
    vocab_size: of the pool. Tables of up to a tenth more rows are padded ones, as Pythia's, and lose their last rows.
    length: tokens of a row; learned positions beyond it are left out.

  Raises:
    UserError: the model has another vocabulary, fewer positions, or a tensor is missing or of another shape.
  """
  tensors = _Tensors(Path(folder))
  gpt2 = _config(Path(folder))['model_type'] == 'gpt2'
  width = config.width
  embedding = tensors.get('transformer.wte.weight' if gpt2 else 'gpt_neox.embed_in.weight', None, width)
  rows = len(embedding)
  if not vocab_size <= rows <= vocab_size + vocab_size // _PADDING:
    more = f' (a padded table has up to {vocab_size // _PADDING} rows more)' if rows > vocab_size else ''
    raise UserError(
      f'model.weights = {folder!r} has a vocabulary of {rows} and the pool one of {vocab_size}{more}; tokenize the '
      "pool with that model's own vocabulary"
    )
  found = {'embedding/embedding': embedding[:vocab_size]}
  if gpt2:
    positions = tensors.get('transformer.wpe.weight', None, width)
    if len(positions) < length:
      raise UserError(
        f'model.weights = {folder!r} has {len(positions)} positions and rows have {length} tokens; set --config.pool.'
        f'length={len(positions)} or less'
      )
    found['positions/embedding'] = positions[:length]
  read: Callable[[_Tensors, int, ConfigDict], dict[str, np.ndarray]] = _gpt2_block if gpt2 else _neox_block
  found |= _norm(tensors, 'transformer.ln_f' if gpt2 else 'gpt_neox.final_layer_norm', 'norm', width)
  blocks = [read(tensors, layer, config) for layer in range(config.layers)]
  if config.scan_layers:
    found |= {f'blocks/{path}': np.stack([block[path] for block in blocks]) for path in blocks[0]}
  else:
    found |= {f'blocks/{layer}/{path}': value for layer, block in enumerate(blocks) for path, value in block.items()}
  if not config.tied_embeddings:
    found['head/kernel'] = tensors.get('lm_head.weight' if gpt2 else 'embed_out.weight', rows, width)[:vocab_size].T
  return {path: np.asarray(value, np.float32) for path, value in found.items()}


def _gpt2_block(tensors: '_Tensors', layer: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """GPT-2 keeps its matrices [inputs, outputs], and queries, keys and values of all heads one after another."""
  at, heads, width, mlp_width = f'transformer.h.{layer}', config.heads, config.width, config.mlp_width

  def by_head(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:-1], 3, heads, -1).swapaxes(-3, -2).reshape(x.shape)

  return {
    **_norm(tensors, f'{at}.ln_1', 'attention_norm', width),
    **_norm(tensors, f'{at}.ln_2', 'mlp_norm', width),
    'attention/qkv/kernel': by_head(tensors.get(f'{at}.attn.c_attn.weight', width, 3 * width)),
    'attention/qkv/bias': by_head(tensors.get(f'{at}.attn.c_attn.bias', 3 * width)),
    **_linear(tensors, f'{at}.attn.c_proj', 'attention/out', width, width, False),
    **_linear(tensors, f'{at}.mlp.c_fc', 'mlp/up', width, mlp_width, False),
    **_linear(tensors, f'{at}.mlp.c_proj', 'mlp/down', mlp_width, width, False),
  }


def _neox_block(tensors: '_Tensors', layer: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """GPT-NeoX keeps its matrices [outputs, inputs], and query, key and value head by head as we do."""
  at, width, mlp_width = f'gpt_neox.layers.{layer}', config.width, config.mlp_width
  return {
    **_norm(tensors, f'{at}.input_layernorm', 'attention_norm', width),
    **_norm(tensors, f'{at}.post_attention_layernorm', 'mlp_norm', width),
    **_linear(tensors, f'{at}.attention.query_key_value', 'attention/qkv', width, 3 * width, True),
    **_linear(tensors, f'{at}.attention.dense', 'attention/out', width, width, True),
    **_linear(tensors, f'{at}.mlp.dense_h_to_4h', 'mlp/up', width, mlp_width, True),
    **_linear(tensors, f'{at}.mlp.dense_4h_to_h', 'mlp/down', mlp_width, width, True),
  }


def _norm(tensors: '_Tensors', theirs: str, ours: str, width: int) -> dict[str, np.ndarray]:
  return {
    f'{ours}/scale': tensors.get(f'{theirs}.weight', width), f'{ours}/bias': tensors.get(f'{theirs}.bias', width),
  }  # fmt: skip


def _linear(
  tensors: '_Tensors', theirs: str, ours: str, inputs: int, outputs: int, turned: bool
) -> dict[str, np.ndarray]:
  kernel = tensors.get(f'{theirs}.weight', *((outputs, inputs) if turned else (inputs, outputs)))
  return {f'{ours}/kernel': kernel.T if turned else kernel, f'{ours}/bias': tensors.get(f'{theirs}.bias', outputs)}


class _Tensors:
  """All tensors of a folder by name; names of a bare model (no `transformer.` before them) are found as well."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob('*.safetensors')):
      self._found |= _mapped(file)
    if not self._found:
      raise UserError(f'{folder} holds no *.safetensors file; save the model there with safe_serialization')

  def get(self, name: str, *shape: int | None) -> np.ndarray:
    """The tensor of that name and shape; None stands for any length.

    Raises:
      UserError: it is missing, or has another shape.
    """
    bare = name.partition('.')[2]
    found = self._found.get(name, self._found.get(bare))
    if found is None:
      raise UserError(f'{self._folder}: no tensor {name}; the files are not all there, or of another model')
    if len(found.shape) != len(shape) or any(n not in (None, m) for m, n in zip(found.shape, shape, strict=True)):
      wanted = ' × '.join('any' if n is None else str(n) for n in shape)
      raise UserError(
        f'{self._folder}: tensor {name} is {" × ".join(map(str, found.shape))} and config.json asks for {wanted}; the '
        'files are of another model'
      )
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


def fingerprint(
  selected: Mapping[str, Any], settings: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
  """Digests of the folders that `model.weights` and `proxies.model.weights` name, for `Stage.fingerprint`."""
  del settings, previous
  keys = [key for key, value in selected.items() if key.endswith('model.weights') and value]
  return {f'SHA-256 of {key}': digest(selected[key]) for key in keys}


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
