"""Models of Hugging Face's transformers in local folders: `Weights` reads one into the decoder, `write` writes one.

The folder is what `save_pretrained` writes: `config.json` and one or many safetensors files, with an index if many.
`FAMILIES` has one entry for each model type. A tensor of the folder is a view of one of our parameters (`_views`), and
both directions copy through it in slices: nothing but the parameters and one tensor is in memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from dsdm_jax.config.schema import Model
from dsdm_jax.config.values import brief, head_size, norm_epsilon
from dsdm_jax.core import storage
from dsdm_jax.errors import UserError

_DTYPES = {'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
# Unsigned integers of their size, and the lowest of NaN and infinity without the sign.
_BITS = {'F32': (np.uint32, 0x7F800000), 'F16': (np.uint16, 0x7C00), 'BF16': (np.uint16, 0x7F80)}
_FLOAT32 = np.dtype(np.float32)
_INDEX = 'model.safetensors.index.json'
_MOST_JSON = 64 * 2**20  # bytes of config.json and of the index
_SLICE = 2**19  # numbers of a tensor that are read at once: they fit into caches while they are transposed
_THREADS = 8
_SHARD = 2**27  # bytes of a file that `write` writes; safetensors holds them twice
_PADDING = 10  # an embedding table may have one row of padding for every so many tokens of the vocabulary
# Keys that do not say what a model computes.
_FREE = ('factory', 'size', 'weights', 'init_std', 'scan_layers', 'remat', 'attention', 'compute_dtype')
_STANDARD = {key: value for key, value in Model().model_dump().items() if key not in _FREE}


@dataclasses.dataclass(frozen=True)
class Family:
  """One `model_type` of transformers.

  Attributes:
    architecture: its class there.
    fields: (our key, field of config.json, its value where the file has none). `int` as value: the file must have it;
      None: another key says it.
    names: our module → theirs; `{}` is replaced by q, k and v, or by gate and up. `blocks` is what precedes the
      number of a block in the names of its modules.
    shared: our keys that have the same value in all its models.
    activations: of the MLP there → our `mlp`; the first of equals is written.
    supported: field → its only value that the decoder supports, which is also the one where the file has none.
    rotary: share and base where the file has none; None: positions are learned.
    rotary_names: fields for share and base outside `rope_parameters`.
    qkv: how a matrix for queries, keys and values is stored: in three parts, in one head by head as here, or in one
      with all queries first.
    transposed: linear layers are [outputs, inputs].
    window: field that says whether `sliding_window` counts; '' if it always does, None if never.
    gemma: norm scales are stored minus one, and embeddings are multiplied by √width.
  """

  architecture: str
  fields: tuple[tuple[str, str, Any], ...]
  names: Mapping[str, str]
  shared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  activations: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: {'silu': 'swiglu', 'gelu_pytorch_tanh': 'geglu', 'gelu_new': 'geglu'}
  )
  supported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rotary: tuple[float, float] | None = (1.0, 10_000.0)
  rotary_names: tuple[str, str] = ('partial_rotary_factor', 'rope_theta')
  qkv: Literal['parts', 'heads', 'queries'] = 'parts'
  transposed: bool = True
  window: str | None = None
  gemma: bool = False


_GELUS = {'gelu_new': 'gelu', 'gelu_pytorch_tanh': 'gelu', 'gelu': 'gelu_exact'}
_SIZES = (
  ('layers', 'num_hidden_layers', int),
  ('width', 'hidden_size', int),
  ('heads', 'num_attention_heads', int),
  ('mlp_width', 'intermediate_size', int),
)
_ROTARY_SIZES = (*_SIZES, ('kv_heads', 'num_key_value_heads', int), ('norm_epsilon', 'rms_norm_eps', 1e-6))
_UNTIED = ('tied_embeddings', 'tie_word_embeddings', False)
_NAMES = {
  'embedding': 'model.embed_tokens',
  'norm': 'model.norm',
  'head': 'lm_head',
  'blocks': 'model.layers',
  'attention_norm': 'input_layernorm',
  'mlp_norm': 'post_attention_layernorm',
  'attention/qkv': 'self_attn.{}_proj',
  'attention/q_norm': 'self_attn.q_norm',
  'attention/k_norm': 'self_attn.k_norm',
  'attention/out': 'self_attn.o_proj',
  'mlp/up': 'mlp.{}_proj',
  'mlp/down': 'mlp.down_proj',
}
_RMS = {'norm': 'rmsnorm', 'bias': False}
_GEMMA_FIELDS = (
  *_ROTARY_SIZES,
  ('head_size', 'head_dim', 256),
  ('tied_embeddings', 'tie_word_embeddings', True),
)
_GEMMA: dict[str, Any] = {
  'names': {
    **_NAMES,
    'attention_post_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm',
    'mlp_post_norm': 'post_feedforward_layernorm',
  },
  'activations': {'gelu_pytorch_tanh': 'geglu'},
  'supported': {'attention_bias': False, 'use_bidirectional_attention': False},
  'window': '',
  'gemma': True,
}
FAMILIES: Mapping[str, Family] = {
  'gpt2': Family(
    'GPT2LMHeadModel',
    (
      ('layers', 'n_layer', int),
      ('width', 'n_embd', int),
      ('heads', 'n_head', int),
      ('mlp_width', 'n_inner', None),
      ('mlp', 'activation_function', 'gelu_new'),
      ('norm_epsilon', 'layer_norm_epsilon', 1e-5),
      ('tied_embeddings', 'tie_word_embeddings', True),
    ),
    {
      'embedding': 'transformer.wte',
      'positions': 'transformer.wpe',
      'norm': 'transformer.ln_f',
      'head': 'lm_head',
      'blocks': 'transformer.h',
      'attention_norm': 'ln_1',
      'mlp_norm': 'ln_2',
      'attention/qkv': 'attn.c_attn',
      'attention/out': 'attn.c_proj',
      'mlp/up': 'mlp.c_fc',
      'mlp/down': 'mlp.c_proj',
    },
    activations=_GELUS,
    supported={'scale_attn_by_inverse_layer_idx': False, 'scale_attn_weights': True},
    rotary=None,
    qkv='queries',
    transposed=False,
  ),
  'gpt_neox': Family(
    'GPTNeoXForCausalLM',
    (
      *_SIZES,
      ('mlp', 'hidden_act', 'gelu'),
      ('norm_epsilon', 'layer_norm_eps', 1e-5),
      ('parallel_residual', 'use_parallel_residual', True),
      _UNTIED,
    ),
    {
      'embedding': 'gpt_neox.embed_in',
      'norm': 'gpt_neox.final_layer_norm',
      'head': 'embed_out',
      'blocks': 'gpt_neox.layers',
      'attention_norm': 'input_layernorm',
      'mlp_norm': 'post_attention_layernorm',
      'attention/qkv': 'attention.query_key_value',
      'attention/out': 'attention.dense',
      'mlp/up': 'mlp.dense_h_to_4h',
      'mlp/down': 'mlp.dense_4h_to_h',
    },
    activations=_GELUS,
    supported={'attention_bias': True},
    rotary=(0.25, 10_000.0),
    rotary_names=('rotary_pct', 'rotary_emb_base'),
    qkv='heads',
  ),
  'llama': Family(
    'LlamaForCausalLM',
    (
      *_SIZES,
      ('kv_heads', 'num_key_value_heads', None),
      ('head_size', 'head_dim', None),
      ('norm_epsilon', 'rms_norm_eps', 1e-6),
      ('mlp', 'hidden_act', 'silu'),
      ('bias', 'attention_bias', False),
      ('bias', 'mlp_bias', False),
      _UNTIED,
    ),
    _NAMES,
    {'norm': 'rmsnorm'},
  ),
  'mistral': Family(
    'MistralForCausalLM',
    (*_ROTARY_SIZES, ('head_size', 'head_dim', None), ('mlp', 'hidden_act', 'silu'), _UNTIED),
    _NAMES,
    _RMS,
    window='',
  ),
  'qwen2': Family(
    'Qwen2ForCausalLM',
    (*_ROTARY_SIZES, ('head_size', 'head_dim', None), ('mlp', 'hidden_act', 'silu'), _UNTIED),
    _NAMES,
    _RMS | {'qkv_bias': True},
    window='use_sliding_window',
  ),
  'qwen3': Family(
    'Qwen3ForCausalLM',
    (*_ROTARY_SIZES, ('head_size', 'head_dim', 128), ('mlp', 'hidden_act', 'silu'), _UNTIED),
    _NAMES,
    _RMS | {'qk_norm': 'head'},
    supported={'attention_bias': False},
    window='use_sliding_window',
  ),
  'olmo2': Family(
    'Olmo2ForCausalLM',
    (
      *_SIZES,
      ('kv_heads', 'num_key_value_heads', None),
      ('head_size', 'head_dim', None),
      ('norm_epsilon', 'rms_norm_eps', 1e-5),
      ('mlp', 'hidden_act', 'silu'),
      _UNTIED,
    ),
    _NAMES | {'attention_norm': 'post_attention_layernorm', 'mlp_norm': 'post_feedforward_layernorm'},
    _RMS | {'qk_norm': 'all', 'norm_place': 'post'},
    supported={'attention_bias': False},
  ),
  'gemma2': Family(
    'Gemma2ForCausalLM',
    (
      *_GEMMA_FIELDS,
      ('mlp', 'hidden_activation', 'gelu_pytorch_tanh'),
      ('attention_cap', 'attn_logit_softcapping', 50.0),
      ('logit_cap', 'final_logit_softcapping', 30.0),
    ),
    shared=_RMS | {'norm_place': 'both'},
    **_GEMMA,
  ),
  'gemma3_text': Family(
    'Gemma3ForCausalLM',
    (
      *_GEMMA_FIELDS,
      ('mlp', 'hidden_activation', 'gelu_pytorch_tanh'),
      ('logit_cap', 'final_logit_softcapping', 0.0),
    ),
    shared=_RMS | {'norm_place': 'both', 'qk_norm': 'head'},
    rotary=(1.0, 1_000_000.0),
    **_GEMMA | {'supported': _GEMMA['supported'] | {'attn_logit_softcapping': None}},  # transformers ignores it
  ),
}
_KNOWN = f'model types that load are {", ".join(FAMILIES)}'


def model_keys(folder: str) -> dict[str, Any]:
  """Returns the keys of the config section `model` that the model in `folder` determines.

  Raises:
    UserError: there is no such model, or it needs something that the decoder does not support.
  """
  return _keys(_read_config(folder), folder)


def _keys(theirs: Mapping[str, Any], folder: str) -> dict[str, Any]:
  family = FAMILIES[theirs['model_type']]
  for field, value in {'quantization_config': None, **family.supported}.items():
    given = theirs.get(field, value)
    if given != value and given is not None:
      raise _unsupported(folder, field, given, f'only {json.dumps(value)}')
  keys: dict[str, Any] = dict(family.shared)
  for key, field, standard in family.fields:
    if key == 'kv_heads' and not family.gemma and theirs.get(field, standard) is None:
      continue  # as many as heads
    value = _field(theirs, field, standard, folder)
    if key == 'mlp':
      if value not in tuple(family.activations):
        raise _unsupported(folder, field, value, f'only {", ".join(family.activations)}')
      value = family.activations[value]
    if value is None:
      continue
    if keys.get(key, value) != value:
      raise _unsupported(folder, field, value, f'only the value of {next(f for k, f, _ in family.fields if k == key)}')
    keys[key] = value
  keys = {'kv_heads': keys['heads'], 'mlp_width': 4 * keys['width']} | keys
  if family.rotary is not None:
    keys |= {'positions': 'rope'} | _rotary(theirs, family, keys['layers'], folder)
  if family.gemma:
    keys['embedding_scale'] = keys['width'] ** 0.5
    scalar = _field(theirs, 'query_pre_attn_scalar', keys['head_size'], folder)
    if scalar != keys['head_size']:
      raise _unsupported(folder, 'query_pre_attn_scalar', scalar, f'only head_dim, which is {keys["head_size"]}')
  return _normal(_STANDARD | keys)


def _normal(keys: Mapping[str, Any]) -> dict[str, Any]:
  """`keys` in the form that is equal for models which compute the same."""
  result = {key: keys[key] for key in _STANDARD}
  if result['head_size'] * result['heads'] == result['width']:
    result['head_size'] = 0
  result['norm_epsilon'] = norm_epsilon(ConfigDict(result))
  result['qkv_bias'] = result['qkv_bias'] and not result['bias']
  result['rotary_scaling'] = tuple(result['rotary_scaling'])
  unused = () if result['positions'] == 'rope' else ('rotary_share', 'rotary_base', 'rotary_scaling')
  if result['positions'] != 'rope' or result['rotary_global_every'] == 1:
    unused = (*unused, 'rotary_global_every', 'rotary_local_base')
  result['rotary_global_every'] = min(result['rotary_global_every'], result['layers'] + 1)
  return result | {key: _STANDARD[key] for key in unused}


def _rotary(theirs: Mapping[str, Any], family: Family, layers: int, folder: str) -> dict[str, Any]:
  assert family.rotary is not None
  name = 'rope_scaling' if theirs.get('rope_scaling') else 'rope_parameters'
  rope: Any = theirs.get(name) or {}
  local: Any = {}
  by_type = isinstance(rope, dict) and 'full_attention' in rope
  if by_type:  # Gemma 3, by the type of a layer
    rope, local = rope['full_attention'] or {}, rope.get('sliding_attention') or {}
  kinds: dict[Any, tuple[str, ...]] = {
    'default': (),
    'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings'),
  }
  kind = rope.get('rope_type', rope.get('type', 'default')) if isinstance(rope, dict) else rope
  if not isinstance(rope, dict) or not isinstance(local, dict) or kind not in tuple(kinds):
    raise _unsupported(folder, name, kind, f'only the types {", ".join(kinds)}')
  if family.architecture == 'Gemma3ForCausalLM' and name == 'rope_parameters' and rope and not by_type:
    raise _unsupported(folder, name, rope, 'only with full_attention and sliding_attention')
  (share, base), (share_name, base_name) = family.rotary, family.rotary_names
  keys: dict[str, Any] = {
    'rotary_share': _number(rope, 'partial_rotary_factor', _number(theirs, share_name, share, folder), folder),
    'rotary_base': _number(rope, 'rope_theta', _number(theirs, base_name, base, folder), folder),
    'rotary_scaling': tuple(_number(rope, part, None, folder) for part in kinds[kind]),
  }
  if share_name != 'rotary_pct' and keys['rotary_share'] != share:
    raise _unsupported(folder, 'partial_rotary_factor', keys['rotary_share'], f'only {share}')
  if keys['rotary_scaling'][:1] == (1.0,):  # as if there were none
    keys['rotary_scaling'] = ()
  if local or family.architecture == 'Gemma3ForCausalLM':
    local_base = _number(local, 'rope_theta', _number(theirs, 'rope_local_base_freq', 10_000.0, folder), folder)
    types = theirs.get('layer_types') or _layer_types(layers, _field(theirs, 'sliding_window_pattern', 6, folder))
    every = next((n for n in range(1, layers + 2) if types == _layer_types(layers, n)), None)
    if (kind := local.get('rope_type', 'default')) != 'default':
      raise _unsupported(folder, f'{name}.sliding_attention.rope_type', kind, 'only default')
    if every is None:
      raise _unsupported(folder, 'layer_types', types, 'only a full_attention layer after equally many others')
    keys |= {'rotary_global_every': every, 'rotary_local_base': local_base}
  return keys


def _layer_types(layers: int, every: int) -> list[str]:
  return ['sliding_attention' if (layer + 1) % every else 'full_attention' for layer in range(layers)]


def _unsupported(folder: str, field: str, value: Any, supported: str) -> UserError:
  return UserError(
    f'{folder}: config.json has {field} = {brief(value)}, which the decoder does not support ({supported}); {_KNOWN}'
  )


def _field(theirs: Mapping[str, Any], name: str, standard: Any, folder: str) -> Any:
  """The value of a field, of the type of `standard`; null is 0.0 for a number and otherwise as if it were missing."""
  value = theirs.get(name)
  if isinstance(standard, float):
    return 0.0 if name in theirs and value is None else _number(theirs, name, standard, folder)
  if value is None and standard is not int:
    return standard
  if isinstance(standard, bool):
    if type(value) is not bool:
      raise UserError(
        f'{folder}: config.json has {name} = {brief(value)}, which must be true or false; copy the file again'
      )
  elif not isinstance(standard, str) and (type(value) is not int or value < 1):
    rule = f'has {name} = {brief(value)}, which must be a whole number above 0' if name in theirs else f'has no {name}'
    raise UserError(f'{folder}: config.json {rule}; copy the file again from where the model was saved')
  return value


def _number(theirs: Mapping[str, Any], name: str, standard: float | None, folder: str) -> float:
  value = theirs.get(name, standard)
  if type(value) not in (int, float) or not abs(value) < 1e30:  # also false for NaN
    raise UserError(f'{folder}: config.json has {name} = {brief(value)}, which must be a number; copy the file again')
  return float(value)


def check(folder: str, config: ConfigDict, length: int = 1, vocab_size: int | None = None) -> None:
  """Checks what can be known of the weights without the pool: files, names, shapes, types, and that they are finite.

  Args:
    folder: of the model.
    config: of the decoder, with the keys that `model_keys` returns.
    length: tokens of a row.
    vocab_size: of the pool; None if it is not known.

  Raises:
    UserError: as `Weights`.
  """
  weights = Weights(folder, config, vocab_size, length)
  for path, shape in _shapes(config, weights.vocab_size, length).items():
    weights.read(path, shape, check_only=True)


def _shapes(config: ConfigDict, vocab_size: int, length: int) -> dict[str, tuple[int, ...]]:
  """Path → shape of all parameters of the decoder, layer by layer."""
  from flax import nnx  # imports JAX, which a run that reuses everything does without

  from dsdm_jax.lm import decoder

  one = ConfigDict(Model().model_dump() | config.to_dict() | {'layers': 1, 'scan_layers': False})
  model = nnx.eval_shape(lambda: decoder.build(one, vocab_size, length, nnx.Rngs(0)))
  shapes = {}
  for path, x in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    name = '/'.join(map(str, path))
    for layer in range(config.layers if name.startswith('blocks/') else 1):
      shapes[name.replace('blocks/0/', f'blocks/{layer}/', 1)] = x.shape
  return shapes


class Weights:
  """The parameters of a model in a folder. Each is read when it is asked for.

  Args:
    folder: of the model.
    config: of the decoder, with the keys that `model_keys` returns.
    vocab_size: of the pool. A table with up to a tenth more rows counts as padded (Pythia) and loses its last rows.
      None takes that of the model.
    length: tokens of a row; learned positions beyond it are dropped.

  Raises:
    UserError: the model has another vocabulary, fewer positions or a shorter window; or a tensor is missing, has
      another shape, or has a number that is not finite.
  """

  def __init__(self, folder: str, config: ConfigDict, vocab_size: int | None, length: int):
    theirs = _read_config(folder)
    self._config, self._family, self._tensors = config, FAMILIES[theirs['model_type']], _Tensors(Path(folder))
    rows = self._tensors.shape(f'{self._family.names["embedding"]}.weight')[0]
    self.vocab_size = rows if vocab_size is None else vocab_size
    if not self.vocab_size <= rows <= self.vocab_size + self.vocab_size // _PADDING:
      padding = self.vocab_size // _PADDING
      beside = ', with its config.json beside tokenizer.json' if rows < self.vocab_size else ''
      more = f' (a padded table has up to {padding} rows more)' if rows > self.vocab_size else ''
      raise UserError(
        f'model.weights = {folder!r} has a vocabulary of {rows} and the pool one of {vocab_size}{more}; tokenize the '
        "pool with that model's own vocabulary" + beside
      )
    most, what, way_out = math.inf, '', ''
    if self._family.rotary is None:
      most, what = self._tensors.shape(f'{self._family.names["positions"]}.weight')[0], 'positions'
    elif theirs.get('max_position_embeddings') is not None:
      factor = config.rotary_scaling[0] if len(config.rotary_scaling) == 1 else 1.0  # some count without it
      most = int(_field(theirs, 'max_position_embeddings', int, folder) * factor)
      what = 'positions by its max_position_embeddings'
      way_out = ', or raise that number in its config.json for longer rows'
    window, counts = theirs.get('sliding_window'), self._family.window
    if window is not None and (counts == '' or (counts and _field(theirs, counts, False, folder))):
      size = _field(theirs, 'sliding_window', int, folder)
      if size < most:
        most, what, way_out = size, 'tokens in its sliding_window', ''
    if most < length:
      raise UserError(
        f'model.weights = {folder!r} has {most} {what} and rows have {length} tokens; set --config.pool.'
        f'length={most} or less{way_out}'
      )

  def dtype(self, path: str, shape: Sequence[int]) -> np.dtype[Any]:
    """The dtype in which the files have the matrix at `path`; float32 for others, and where files differ."""
    if path.rpartition('/')[2] not in ('kernel', 'embedding'):
      return _FLOAT32
    empty = np.broadcast_to(np.float32(0), shape)
    parts = [view for layer in _layers(path, empty) for view in _views(self._family, self._config, *layer)]
    kinds = {self._tensors.dtype(name) for name, _, _ in parts}
    return np.dtype(_DTYPES.get(kinds.pop(), _FLOAT32)) if len(kinds) == 1 else _FLOAT32

  def read(
    self, path: str, shape: Sequence[int], dtype: np.dtype[Any] = _FLOAT32, check_only: bool = False
  ) -> np.ndarray:
    """The parameter at `path`; of all layers where `path` ('blocks/mlp/up/kernel') has no number of a layer.

    Args:
      path: in the decoder.
      shape: of the parameter.
      dtype: of the result: float32, or what `dtype` returns.
      check_only: read the tensors and return zeros that take no memory.
    """
    if check_only:
      result = np.broadcast_to(np.float32(0), shape)
    else:  # whole pages: they go back to the system when the array is deleted, and JAX on CPU takes them as they are
      pages = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
      with contextlib.suppress(OSError, AttributeError):  # no huge pages here
        pages.madvise(mmap.MADV_HUGEPAGE)
      result = np.frombuffer(pages, dtype).reshape(shape)
    for layer_path, x in _layers(path, result):
      for name, view, theirs in _views(self._family, self._config, layer_path, x):
        offset = float(self._family.gemma and path.endswith('scale'))
        self._tensors.read(name, theirs, None if check_only else view, offset)
    return result


def _layers(path: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
  """(path with the number of a layer, its parameter) for each layer of a stack; otherwise `path` and `x`."""
  first, _, rest = path.partition('/')
  if first != 'blocks' or rest[0].isdigit():
    yield path, x
    return
  for layer, part in enumerate(x):
    yield f'blocks/{layer}/{rest}', part


def _views(
  family: Family, config: ConfigDict, path: str, x: np.ndarray
) -> Iterator[tuple[str, np.ndarray, tuple[int, ...]]]:
  """(their name, view of `x`, their shape) for each tensor that holds a part of our parameter `x` at `path`.

  A view may have more axes than the tensor, which is then this view with its first axes joined.
  """
  module, _, kind = path.rpartition('/')
  at = ''
  if module.startswith('blocks/'):
    _, layer, module = module.split('/', 2)
    at = f'{family.names["blocks"]}.{layer}.'
  name = f'{at}{family.names[module]}.{"bias" if kind == "bias" else "weight"}'

  def outputs_first(part: np.ndarray) -> np.ndarray:
    return np.moveaxis(part, 0, -1) if kind == 'kernel' else part

  if module == 'attention/qkv' and family.qkv != 'heads':
    group, size = config.heads // config.kv_heads, head_size(config)
    groups = x.reshape(*x.shape[:-1], config.kv_heads, group + 2, size)
    if family.qkv == 'queries':
      yield name, np.moveaxis(groups, -2, -3), x.shape
      return
    for letter, part in (('q', groups[..., :group, :]), ('k', groups[..., group, :]), ('v', groups[..., group + 1, :])):
      outputs = config.heads * size if letter == 'q' else config.kv_heads * size
      yield name.format(letter), outputs_first(part), (outputs, *x.shape[:-1])
  elif module == 'mlp/up' and config.mlp in ('swiglu', 'geglu'):
    for half, column in (('gate', 0), ('up', 1)):
      view = outputs_first(x[..., column::2])
      yield name.format(half), view, view.shape
  else:
    view = outputs_first(x) if family.transposed or module == 'head' else x
    yield name, view, view.shape


class _Tensors:
  """The tensors of a folder by name; files may omit the leading `transformer.`, `gpt_neox.` or `model.` of a name.

  Slices are read from the file and not through safetensors, which reads its head again for each.

  Args:
    folder: of the model. Where it has an index, that says which file has which tensor; other files are not read.

  Raises:
    UserError: a file is missing or damaged, or two files have the same tensor.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._files: dict[str, Path] = {}
    self._heads: dict[str, dict[str, Any]] = {}  # tensor → its dtype, shape, and offsets in its file
    index = _index(folder)
    names = sorted(set(index.values())) or sorted(file.name for file in folder.glob('*.safetensors'))
    for name in names:
      head = _head(folder / name)
      for tensor in sorted(head):
        if index and index.get(tensor) != name:
          continue
        if tensor in self._files:
          raise UserError(
            f'{folder}: {self._files[tensor].name} and {name} both have the tensor {tensor}; keep the files of one '
            'model only'
          )
        self._files[tensor], self._heads[tensor] = folder / name, head[tensor]
    if not names:
      raise UserError(f'{folder} contains no *.safetensors file; save the model there with safe_serialization')
    for tensor, name in index.items():
      if tensor not in self._files:
        raise UserError(f'{folder}: {_INDEX} names the tensor {tensor}, which {name} lacks; copy the files again')

  def _stored(self, name: str) -> str:
    stored = name if name in self._files else name.partition('.')[2]
    if stored not in self._files:
      raise UserError(f'{self._folder}: no tensor {name}; files are missing, or belong to another model')
    return stored

  def shape(self, name: str) -> tuple[int, ...]:
    return tuple(self._heads[self._stored(name)]['shape']) or (0,)

  def dtype(self, name: str) -> str:
    return str(self._heads[self._stored(name)]['dtype'])

  def read(self, name: str, shape: Sequence[int], into: np.ndarray | None, offset: float = 0.0) -> None:
    """Checks the tensor with this name and shape, and copies it, plus `offset`, into an array.

    A vocabulary or positions beyond those in `shape` are only checked.

    Raises:
      UserError: it is missing, has another shape or dtype, or a number that is not finite.
    """
    stored = self._stored(name)
    head = self._heads[stored]
    actual, dtype = tuple(head['shape']), head['dtype']
    longer = name.endswith(_TABLES) and actual[:1] > tuple(shape[:1]) and actual[1:] == tuple(shape[1:])
    if actual != tuple(shape) and not longer:
      raise UserError(
        f'{self._folder}: tensor {name} is {" × ".join(map(str, actual))} and config.json asks for '
        f'{" × ".join(map(str, shape))}; the files belong to another model'
      )
    if dtype not in _DTYPES:
      raise UserError(f'{self._folder}: tensor {name} has dtype {dtype}; save the model in one of {", ".join(_DTYPES)}')
    bits, infinity = _BITS[dtype]
    row = math.prod(actual[1:])
    joined = 1 if into is None else shape[0] // len(into)  # rows of the tensor for each index of the view
    step = max(1, _SLICE // max(1, joined * row)) * joined

    def copy(start: int) -> None:
      part = np.empty((min(step, actual[0] - start), *actual[1:]), bits)
      with open(self._files[stored], 'rb', buffering=0) as file:
        file.seek(head['begin'] + start * row * part.itemsize)
        _fill(file, part)
      if not _is_finite(part, infinity):
        raise UserError(
          f'{self._folder}: tensor {name} has a number that is not finite (NaN or infinite); copy the file again, '
          'or use a checkpoint from before the training diverged'
        )
      if into is not None and start < shape[0]:
        here = into[start // joined : (start + step) // joined]
        part = part[: len(here) * joined].reshape(here.shape)
        if dtype == 'F16' and here.dtype == np.float32:
          part = part.view(np.float16).astype(np.float32).view(np.uint32)
        # As integers: NumPy holds its lock while it copies bfloat16.
        _copy(part, here.view(f'u{here.itemsize}'))
        if offset:
          here += np.float32(offset)

    starts = range(0, actual[0], step)
    if len(starts) == 1:
      copy(0)
      return
    # One thread is slower than many disks.
    with concurrent.futures.ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0)))) as threads:
      for _ in threads.map(copy, starts):
        pass


def _is_finite(bits: np.ndarray, infinity: int) -> bool:
  """Whether no number is NaN or infinite, by their bits: as signed integers, and as unsigned ones with the sign."""
  if not bits.size:
    return True
  sign = 1 << 8 * bits.itemsize - 1
  return int(bits.view(f'i{bits.itemsize}').max()) < infinity and int(bits.max()) < sign + infinity


def _copy(bits: np.ndarray, into: np.ndarray) -> None:
  """Copies the bits of a slice of a tensor; those of bfloat16 also as float32.

  Where the slice is transposed, 8 bytes are moved at once, and then taken apart, which takes less time.
  """
  shift = 8 * (into.itemsize - bits.itemsize)
  count = 8 // bits.itemsize  # neighbours in the last axis
  parts = [(bits, into)]
  if into.ndim > 1 and into.strides[-1] > into.itemsize and not bits.shape[-1] % count:
    wide = np.ascontiguousarray(bits.reshape(-1, bits.shape[-1]).view(np.uint64).T)
    apart, ours = wide.view(bits.dtype).reshape(*wide.shape, count), np.moveaxis(into, -1, 0)
    parts = [(apart[..., k].reshape(ours[k::count].shape), ours[k::count]) for k in range(count)]
  for source, target in parts:
    if shift:
      np.left_shift(source, shift, out=target, dtype=into.dtype)
    else:
      target[...] = source


def _fill(file: Any, x: np.ndarray) -> None:
  rest = x.data.cast('B') if x.size else memoryview(b'')
  while len(rest):
    read = file.readinto(rest)
    if not read:
      raise UserError(f'{file.name} became shorter while it was read; copy it again')
    rest = rest[read:]


# Tables of a vocabulary or of positions.
_TABLES = tuple(
  f'{family.names[module]}.weight'
  for family in FAMILIES.values()
  for module in ('embedding', 'positions', 'head')
  if module in family.names
)


def their_config(config: ConfigDict, vocab_size: int, length: int) -> dict[str, Any]:
  """The config.json of a decoder, in the first family that can say all of it.

  Raises:
    UserError: there is none; it names the family that comes closest, and the keys that it cannot say.
  """
  ours = _normal(config.to_dict())
  misses: list[tuple[str, dict[str, Any]]] = []
  for kind, family in FAMILIES.items():
    theirs: dict[str, Any] = {'architectures': [family.architecture], 'model_type': kind, 'vocab_size': vocab_size}
    theirs |= dict(family.supported)
    for key, field, standard in family.fields:
      value = ours[key]
      if key == 'head_size':
        value = head_size(config)
      if key == 'mlp':
        value = next((t for t, o in family.activations.items() if o == value), standard)
      theirs[field] = None if key.endswith('_cap') and not value else value
    if family.rotary is None:
      theirs['n_positions'] = length
    else:
      share, base = family.rotary_names
      theirs |= {'max_position_embeddings': length, base: ours['rotary_base']}
      theirs |= {share: ours['rotary_share']} if share == 'rotary_pct' else {}
      theirs |= {'rope_scaling': _scaling(ours['rotary_scaling'])} if ours['rotary_scaling'] else {}
    if family.window is not None:  # the decoder sees all tokens of a row
      theirs |= {'sliding_window': length if family.gemma else None}
    if family.gemma:
      theirs['query_pre_attn_scalar'] = head_size(config)
      if kind == 'gemma3_text':
        theirs |= {'rope_local_base_freq': ours['rotary_local_base']}
        theirs['layer_types'] = _layer_types(ours['layers'], ours['rotary_global_every'])
    read = _keys(theirs, kind)
    wrong = {key: read[key] for key in ours if read[key] != ours[key]}
    if not wrong:
      return theirs
    misses.append((kind, wrong))
  kind, wrong = min(misses, key=lambda miss: len(miss[1]))
  needs = ', '.join(f'{key} = {value!r} (it is {ours[key]!r})' for key, value in wrong.items())
  raise UserError(f'no model type of transformers computes what this decoder does; the closest, {kind}, needs {needs}')


def _scaling(numbers: Sequence[float]) -> dict[str, Any]:
  if len(numbers) == 1:
    return {'rope_type': 'linear', 'factor': numbers[0]}
  names = ('factor', 'low_freq_factor', 'high_freq_factor')
  return {
    'rope_type': 'llama3',
    **dict(zip(names, numbers, strict=False)),
    'original_max_position_embeddings': int(numbers[3]),
  }


def write(
  folder: Path,
  config: ConfigDict,
  theirs: Mapping[str, Any],
  params: Mapping[str, Any],
  dtype: str = 'float32',
  read: Callable[[Collection[str]], Mapping[str, Any]] | None = None,
) -> None:
  """Writes `config.json` and safetensors files, from which `Weights` reads the same parameters in float32.

  One file at a time is in memory, and the parameters that it has a part of.

  Args:
    folder: to write into.
    config: of the decoder.
    theirs: as `their_config` returns it.
    params: path → parameter, arrays of NumPy or JAX, or their shapes.
    dtype: of the files, float32 or bfloat16.
    read: paths → parameters, called for each file; None if `params` has arrays.
  """
  family, size = FAMILIES[theirs['model_type']], np.dtype(dtype).itemsize
  # What each file has: name of the tensor → (our path, the path and number of its layer, its place among the views).
  shards: list[dict[str, tuple[str, str, int | None, int]]] = [{}]
  total = used = 0
  for path, array in params.items():
    stacked = path.startswith('blocks/') and not path.split('/')[1].isdigit()
    for index, (layer_path, x) in enumerate(_layers(path, np.broadcast_to(np.float32(0), array.shape))):
      for part, (name, _, shape) in enumerate(_views(family, config, layer_path, x)):
        amount = math.prod(shape) * size
        if shards[-1] and used + amount > _SHARD:
          shards.append({})
          used = 0
        shards[-1][name] = path, layer_path, index if stacked else None, part
        total, used = total + amount, used + amount

  def tensor(array: Any, layer_path: str, layer: int | None, part: int) -> np.ndarray:
    ours = np.asarray(array if layer is None else array[layer])
    _, view, shape = list(_views(family, config, layer_path, ours))[part]
    offset = np.float32(family.gemma and layer_path.endswith('scale'))
    return np.ascontiguousarray(view - offset if offset else view).reshape(shape).astype(dtype, copy=False)

  names = [f'model-{n:05d}-of-{len(shards):05d}.safetensors' for n in range(1, len(shards) + 1)]
  names = names if len(shards) > 1 else ['model.safetensors']
  storage.write_json(folder / 'config.json', dict(theirs) | {'dtype': dtype, 'torch_dtype': dtype})
  held: dict[str, Any] = {}
  for file, shard in zip(names, shards, strict=True):
    paths = dict.fromkeys(path for path, *_ in shard.values())
    if read is None:
      held = {path: params[path] for path in paths}
    else:
      held = {path: held[path] for path in paths if path in held}
      held |= read([path for path in paths if path not in held])
    tensors = {name: tensor(held[path], at, layer, part) for name, (path, at, layer, part) in shard.items()}
    safetensors.numpy.save_file(tensors, folder / file, {'format': 'pt'})
    (folder / file).chmod((folder / 'config.json').stat().st_mode)  # the package lets no one else read it
    del tensors
  if len(shards) > 1:
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    storage.write_json(folder / _INDEX, {'metadata': {'total_size': total}, 'weight_map': weight_map})


def _open(file: Path) -> Any:
  try:
    if not file.is_file():  # a pipe would wait for ever
      raise FileNotFoundError('no such file')
    return safetensors.safe_open(file, framework='numpy')
  except (OSError, safetensors.SafetensorError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(f'{file} is not a complete safetensors file ({reason}); copy it again') from error


def _head(file: Path) -> dict[str, dict[str, Any]]:
  """Tensor → its dtype, shape, and the byte of the file at which it begins."""
  with _open(file):  # checks all of it
    pass
  with open(file, 'rb') as opened:
    size = int.from_bytes(opened.read(8), 'little')
    head = json.loads(opened.read(size))
  head.pop('__metadata__', None)
  return {name: {**entry, 'begin': 8 + size + entry['data_offsets'][0]} for name, entry in head.items()}


def _index(folder: Path) -> dict[str, str]:
  """Tensor → file, of a model in several files; empty where there is no index."""
  file = folder / _INDEX
  if not file.exists():
    return {}
  files = _json(file).get('weight_map')
  if (
    not isinstance(files, dict)
    or not files
    or not all(isinstance(x, str) and x == Path(x).name for x in files.values())
  ):
    raise UserError(f'{file}: weight_map must map tensors to names of files in that folder; copy it again')
  return files


def _read_config(folder: str) -> dict[str, Any]:
  theirs = _json(Path(folder) / 'config.json')
  if theirs.get('model_type') not in tuple(FAMILIES):
    raise UserError(f'{folder}: config.json has model_type = {brief(theirs.get("model_type"))}; {_KNOWN}')
  return theirs


def _json(file: Path) -> dict[str, Any]:
  try:
    if file.stat().st_size > _MOST_JSON:
      raise ValueError(f'it has more than {_MOST_JSON:,} bytes')
    values = json.loads(file.read_bytes())
    if not isinstance(values, dict):
      raise ValueError(f'it holds {type(values).__name__} and not an object')
  except (OSError, ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'model.weights: {file} cannot be read ({reason}); give a folder with config.json and *.safetensors'
    ) from error
  return values
