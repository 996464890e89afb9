"""Loads weights of Hugging Face's GPT-2 and GPT-NeoX (Pythia) from a local folder into the decoder.

The folder is what `save_pretrained` writes: `config.json` and one or many safetensors files. Tensors are read one by
one, so that a large model is in memory once.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import safetensors
from ml_collections import ConfigDict

from dsdm_jax.errors import UserError

_DTYPES = ('F32', 'F16', 'BF16')
_GELUS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_exact'}
_EPSILON = 1e-5  # of the decoder's layer norms
_PADDING = 10  # an embedding table may have one row of padding for every so many tokens of the vocabulary
_INDEX = 'model.safetensors.index.json'
_OUTER = 65_536  # bytes that are hashed at each end of a file


def model_keys(folder: str) -> dict[str, Any]:
  """Returns the keys of the config section `model` that the model in `folder` determines.

  Raises:
    UserError: there is no such model, or it needs something that the decoder does not support.
  """
  theirs = _config(Path(folder))
  kind = theirs.get('model_type')
  if kind not in ('gpt2', 'gpt_neox'):
    raise UserError(f'{folder}: config.json has model_type {kind!r}; gpt2 and gpt_neox (Pythia) are supported')
  keys = (_gpt2_keys if kind == 'gpt2' else _neox_keys)(theirs, folder)
  epsilon = theirs.get('layer_norm_epsilon' if kind == 'gpt2' else 'layer_norm_eps', _EPSILON)
  gelu = theirs.get('activation_function' if kind == 'gpt2' else 'hidden_act', 'gelu_new' if kind == 'gpt2' else 'gelu')
  unsupported = {
    f'layer norms with epsilon {epsilon}': epsilon != _EPSILON,
    f'activation {gelu!r}': gelu not in tuple(_GELUS),
    'attention weights that are scaled by layer': theirs.get('scale_attn_by_inverse_layer_idx', False),
    'attention weights that are not scaled': not theirs.get('scale_attn_weights', True),
    'attention without biases': not theirs.get('attention_bias', True),
  }
  if any(unsupported.values()):
    needs = ' and '.join(name for name, needed in unsupported.items() if needed)
    raise UserError(f'{folder}: config.json asks for {needs}, which the decoder does not support')
  return keys | {'mlp': _GELUS[gelu], 'norm': 'layernorm', 'bias': True, 'kv_heads': keys['heads']}


def _gpt2_keys(theirs: Mapping[str, Any], folder: str) -> dict[str, Any]:
  width = _positive(theirs, 'n_embd', folder)
  return {
    'layers': _positive(theirs, 'n_layer', folder),
    'width': width,
    'heads': _positive(theirs, 'n_head', folder),
    'mlp_width': _positive(theirs, 'n_inner', folder) if theirs.get('n_inner') else 4 * width,
    'positions': 'learned',
    'parallel_residual': False,
    'tied_embeddings': theirs.get('tie_word_embeddings', True),
  }


def _neox_keys(theirs: Mapping[str, Any], folder: str) -> dict[str, Any]:
  rope = theirs.get('rope_parameters') or {}
  kind = rope.get('rope_type', 'default') if isinstance(rope, dict) else rope
  if not isinstance(rope, dict) or kind != 'default' or theirs.get('rope_scaling'):
    raise UserError(f'{folder}: config.json asks for rotary positions of type {kind!r}; only default is supported')
  rotary = {
    'rotary_share': rope.get('partial_rotary_factor', theirs.get('rotary_pct', 0.25)),
    'rotary_base': rope.get('rope_theta', theirs.get('rotary_emb_base', 10_000)),
  }
  for key, value in rotary.items():
    if type(value) not in (int, float):
      raise UserError(f'{folder}: config.json has {value!r} for {key}, which must be a number; copy the file again')
  return {
    'layers': _positive(theirs, 'num_hidden_layers', folder),
    'width': _positive(theirs, 'hidden_size', folder),
    'heads': _positive(theirs, 'num_attention_heads', folder),
    'mlp_width': _positive(theirs, 'intermediate_size', folder),
    'positions': 'rope',
    **{key: float(value) for key, value in rotary.items()},
    'parallel_residual': theirs.get('use_parallel_residual', True),
    'tied_embeddings': theirs.get('tie_word_embeddings', False),
  }


def _positive(theirs: Mapping[str, Any], name: str, folder: str) -> int:
  value = theirs.get(name)
  if type(value) is not int or value < 1:
    problem = f'has {name} = {value!r}, which must be a whole number above 0' if name in theirs else f'has no {name}'
    raise UserError(f'{folder}: config.json {problem}; copy the file again from where the model was saved')
  return value


def parameters(folder: str, config: ConfigDict, vocab_size: int, length: int) -> dict[str, np.ndarray]:
  """Returns path → value (float32) for all parameters of the decoder; blocks are stacked where `config.scan_layers`.

  Args:
    folder: of the model.
    config: of the decoder, with the keys that `model_keys` returns.
    vocab_size: of the pool. A table with up to a tenth more rows counts as padded (Pythia) and loses its last rows.
    length: tokens of a row; learned positions beyond it are dropped.

  Raises:
    UserError: the model has another vocabulary or fewer positions, or a tensor is missing or has another shape.
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
  values = {'embedding/embedding': embedding[:vocab_size]}
  if gpt2:
    positions = tensors.get('transformer.wpe.weight', None, width)
    if len(positions) < length:
      raise UserError(
        f'model.weights = {folder!r} has {len(positions)} positions and rows have {length} tokens; set --config.pool.'
        f'length={len(positions)} or less'
      )
    values['positions/embedding'] = positions[:length]
  read: Callable[[_Tensors, int, ConfigDict], dict[str, np.ndarray]] = _gpt2_block if gpt2 else _neox_block
  values |= _norm(tensors, 'transformer.ln_f' if gpt2 else 'gpt_neox.final_layer_norm', 'norm', width)
  blocks = [read(tensors, layer, config) for layer in range(config.layers)]
  if config.scan_layers:
    values |= {f'blocks/{path}': np.stack([block[path] for block in blocks]) for path in blocks[0]}
  else:
    values |= {f'blocks/{layer}/{path}': value for layer, block in enumerate(blocks) for path, value in block.items()}
  if not config.tied_embeddings:
    values['head/kernel'] = tensors.get('lm_head.weight' if gpt2 else 'embed_out.weight', rows, width)[:vocab_size].T
  return {path: np.asarray(value, np.float32) for path, value in values.items()}


def _gpt2_block(tensors: '_Tensors', layer: int, config: ConfigDict) -> dict[str, np.ndarray]:
  """GPT-2 stores matrices as [inputs, outputs]: the queries of all heads, then the keys, then the values."""
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
  """GPT-NeoX stores matrices as [outputs, inputs]: query, key and value head by head, as the decoder does."""
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
  scale, bias = (tensors.get(f'{theirs}.{name}', width) for name in ('weight', 'bias'))
  return {f'{ours}/scale': scale, f'{ours}/bias': bias}


def _linear(
  tensors: '_Tensors', theirs: str, ours: str, inputs: int, outputs: int, transposed: bool
) -> dict[str, np.ndarray]:
  kernel = tensors.get(f'{theirs}.weight', *((outputs, inputs) if transposed else (inputs, outputs)))
  bias = tensors.get(f'{theirs}.bias', outputs)
  return {f'{ours}/kernel': kernel.T if transposed else kernel, f'{ours}/bias': bias}


def tensor_files(folder: Path) -> list[Path]:
  """The tensor files of a model: those that its index lists, or all `*.safetensors` of a folder without one.

  Raises:
    UserError: the index cannot be read, or a file that it lists is missing.
  """
  place = _index(folder)
  if place is None:
    return sorted(folder.glob('*.safetensors'))
  files = [folder / name for name in sorted(set(place.values()))]
  if missing := [file.name for file in files if not file.is_file()]:
    listed = f'{missing[0]}, which is missing ({len(missing)} of {len(files)} files)'
    raise UserError(f'{folder / _INDEX} lists {listed}; copy the folder again')
  return files


def _index(folder: Path) -> dict[str, str] | None:
  """Name of each tensor → name of its file, or None if the folder has no index."""
  file = folder / _INDEX
  try:
    place = json.loads(file.read_bytes())['weight_map']
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    place = None
  if not isinstance(place, dict) or not all(isinstance(x, str) and Path(x).name == x for x in place.values()):
    raise UserError(f"{file} has no 'weight_map' from tensors to names of files in its folder; copy the file again")
  return place


class _Tensors:
  """All tensors of a folder by name; files may omit the leading `transformer.` or `gpt_neox.` of a name."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._files: dict[str, Any] = {}
    place = _index(folder)
    for file in tensor_files(folder):
      try:
        opened = safetensors.safe_open(file, framework='numpy')
      except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{file} is not a complete safetensors file ({error}); copy it again') from error
      names = opened.keys()
      self._files |= {name: opened for name in names if place is None or place.get(name) == file.name}
    if not self._files:
      raise UserError(f'{folder} contains no *.safetensors file; save the model there with safe_serialization')

  def get(self, name: str, *shape: int | None) -> np.ndarray:
    """Returns the tensor with this name and shape; None matches any length.

    Raises:
      UserError: it is missing, or has another shape or dtype.
    """
    stored = name if name in self._files else name.partition('.')[2]
    if stored not in self._files:
      raise UserError(f'{self._folder}: no tensor {name}; files are missing, or belong to another model')
    header = self._files[stored].get_slice(stored)
    actual, dtype = header.get_shape(), header.get_dtype()
    if len(actual) != len(shape) or any(n not in (None, m) for m, n in zip(actual, shape, strict=True)):
      wanted = ' × '.join('any' if n is None else str(n) for n in shape)
      raise UserError(
        f'{self._folder}: tensor {name} is {" × ".join(map(str, actual))} and config.json asks for {wanted}; the '
        'files belong to another model'
      )
    if dtype not in _DTYPES:
      raise UserError(f'{self._folder}: tensor {name} has dtype {dtype}; save the model in one of {", ".join(_DTYPES)}')
    return self._files[stored].get_tensor(stored)


def _config(folder: Path) -> dict[str, Any]:
  file = folder / 'config.json'
  try:
    values = json.loads(file.read_bytes())
  except (OSError, ValueError) as error:
    raise UserError(
      f'model.weights: {file} cannot be read ({error}); give a folder with config.json and *.safetensors'
    ) from error
  return values if isinstance(values, dict) else {}


def fingerprint(
  selected: Mapping[str, Any], settings: Mapping[str, Any], previous: Mapping[str, Any]
) -> dict[str, Any]:
  """Digests of the folders that `model.weights` and `proxies.model.weights` name, for `Stage.fingerprint`."""
  del settings, previous
  keys = [key for key, value in selected.items() if key.endswith('model.weights') and value]
  return {f'SHA-256 of {key}': digest(selected[key]) for key in keys}


def digest(folder: str) -> str:
  """Hash of the folder: its config, and the size, the head (with all shapes) and the tail of each tensor file."""
  files = sorted([*tensor_files(Path(folder)), Path(folder) / 'config.json', Path(folder) / _INDEX])
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
