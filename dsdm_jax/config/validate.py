"""Checks of a config, before any device is touched: each finding is one line that says the key and the way out.

`configs/base.py` gives every key and its type, `config_rules` what its values must be, and `check_devices` looks at
the machine. Keys of `model` and `proxies.model` are special: where the factory is a stranger's, texts among them may
be what it likes and there may be more of them.
"""

import difflib
import importlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dsdm_jax.config import bounds, mixture_parts
from dsdm_jax.config.config_rules import (
  BATCHES,
  MODELS,
  RELATIONS,
  RULES,
  SIZES,
  TRAINS,
  model_relations,
)  # fmt: skip
from dsdm_jax.config.pool_rules import EVALUATED, SOURCE_KINDS, guarded
from dsdm_jax.config.rule import CALLABLE
from dsdm_jax.configs import base
from dsdm_jax.errors import UserError

_PASSWORD = re.compile(r'://[^/\s@:]*:[^/\s@]+@')
# What addresses carry in their query to be let in: ?access_token=, &X-Amz-Signature=, ?api-key=, &sig= of Azure.
_TOKEN = re.compile(
  r'://\S*?[?&;#]([\w.-]*(?:token|secret|password|passwd|signature|credential|(?:api|access|secret|account)[_-]?key(?:id)?)'
  r'|sig|key|pwd|pass|auth)=[^&;#\s]',
  re.IGNORECASE,
)
_WIDEST, _LARGEST = 2**63, 1e300
_SHOWN = 200  # characters of a value that are repeated
_OUR_FACTORY = base.get_config().model.factory


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Dotted key → value that JSON can hold, in the config's order: references resolved, tuples as lists."""
  return {key: list(v) if isinstance(v, tuple) else v for key, v in _leaves(config, '')}


def select(flat: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
  """The keys of `flat` that are, or lie below, one of `prefixes` ('pool' takes 'pool.length' and not 'pools').

  Raises:
    ValueError: a prefix that takes no key: a slip in the code that named it.
  """
  chosen: dict[str, Any] = {}
  for prefix in prefixes:
    taken = {key: v for key, v in flat.items() if key == prefix or key.startswith(prefix + '.')}
    if not taken:
      raise ValueError(f'no config key is or lies below {prefix!r}')
    chosen.update(taken)
  return {key: v for key, v in flat.items() if key in chosen}


def validate(config: ConfigDict) -> None:
  """Checks all that can be known without a device: keys, types, values, values together.

  Raises:
    UserError: the first finding, in one line that names the key, its value, the rule and the way out.
  """
  found, wanted = dict(_leaves(config, '')), dict(_leaves(base.get_config(), ''))
  for key, value in found.items():  # first, as what is said of other slips repeats the value
    _check_no_secret(key, value)
  _check_keys(found, wanted)
  for key, value in found.items():
    _check_type(key, value, wanted.get(key, value))
    if said := bounds.too_large(key, value):
      raise _finding(key, value, said, _suggest(key, wanted.get(key, value)))
  theirs = tuple(f'{model}.' for model in MODELS if found[f'{model}.factory'] != _OUR_FACTORY)
  for key, rule in RULES.items():
    free = key.startswith(theirs) and isinstance(wanted[key], str) and not key.endswith('.factory')
    if not free and not rule.holds(found[key]):
      raise _finding(key, found[key], rule.text, _suggest(key, wanted[key]))
  ours = (model for model in MODELS if f'{model}.' not in theirs)
  for relation in (*RELATIONS, *(relation for model in ours for relation in model_relations(model))):
    values = [found[key] for key in relation.keys]
    if not relation.holds(*values):
      shown = [_brief(value) for value in values]
      raise _finding(relation.keys[0], values[0], relation.text.format(*shown), relation.way_out.format(*shown))


def resolve(config: ConfigDict, keys_of: Callable[[str], dict[str, Any]]) -> ConfigDict:
  """`config` with what stands for something else put in; itself where there is nothing of the kind.

  These are the shapes that `size` or `weights` of a model name, and 'evaluated' in `pool.leakage_benchmarks`.

  Args:
    config: the whole config, of the right types.
    keys_of: folder of weights → keys of `model` and their values.

  Raises:
    UserError: such a key was set as well, to something else; or as `keys_of`.
  """
  flat = flatten(config)
  if EVALUATED in flat['pool.leakage_benchmarks']:
    config = ConfigDict(config).copy_and_resolve_references()
    config.pool.leakage_benchmarks = guarded(flat['pool.leakage_benchmarks'], flat['evaluation.tasks'])
  if not any(flat[f'{model}.{key}'] for model in MODELS for key in ('size', 'weights')):
    return config
  default = base.model()
  config = ConfigDict(config).copy_and_resolve_references()
  for model, section in zip(MODELS, (config.model, config.proxies.model), strict=True):
    named = 'weights' if section.weights else 'size'
    if not section[named]:
      continue
    free: dict[str, Any] = {}
    if named == 'weights':
      shape = keys_of(section.weights)
    else:
      shape = dict(zip(('layers', 'width', 'heads'), SIZES[section.size], strict=True))
      free = {'kv_heads': shape['heads'], 'mlp_width': 4 * shape['width']}
    # What nobody set for this model: the default, and for proxies what they follow.
    unset = {key: (default[key], *([flat[f'model.{key}']] if model != 'model' else [])) for key in default}
    for key, value in shape.items():
      if section[key] not in (value, *unset[key]):
        rule = f'is {value} in {model}.{named} = {section[named]!r}'
        raise _finding(f'{model}.{key}', section[key], rule, f"leave one out: --config.{model}.{named}=''")
    section.update(shape | {key: value for key, value in free.items() if section[key] in unset[key]})
  return config


def check_devices(config: ConfigDict, device_count: int, batches: Collection[str] = BATCHES) -> None:
  """Checks mesh and batch sizes against a machine of `device_count` devices, all processes together.

  Args:
    config: a valid one.
    device_count: of the machine.
    batches: keys of the batches that its devices are to share.

  Raises:
    UserError: the mesh does not take all devices, or a batch does not divide over `mesh.data`.
  """
  data, model = config.mesh.data, config.mesh.model
  if device_count % model:
    rule = f'must divide the number of devices, {device_count}'
    raise _finding('mesh.model', model, rule, 'set --config.mesh.model=1 or another divisor')
  if data == -1:
    data = device_count // model
  if data * model != device_count:
    rule = f'times mesh.model = {model} must be the number of devices, {device_count}'
    raise _finding('mesh.data', data, rule, 'set --config.mesh.data=-1 to take them all')
  flat = flatten(config)
  for key in (key for key in BATCHES if key in batches):
    batch = flat[key]
    if batch % data:
      near = max(data, round(batch / data) * data)
      rule = f'must be a multiple of the {data} devices that share a batch (mesh.data)'
      raise _finding(key, batch, rule, f'set --config.{key}={near}, or a larger --config.mesh.model')
  for train in TRAINS:
    parts, batch = flat[f'{train}.microbatches'], flat[f'{train}.batch_size']
    if f'{train}.batch_size' in batches and batch % (parts * data):
      rule = (
        f'must cut {train}.batch_size = {batch} into multiples of the {data} devices that share a batch (mesh.data)'
      )
      raise _finding(f'{train}.microbatches', parts, rule, f'set --config.{train}.microbatches=1')


def check_callables(config: ConfigDict) -> None:
  """Imports every function that the config names, so that a slip in a name shows before the first stage.

  Raises:
    UserError: as `load_callable`.
  """
  flat = flatten(config)
  for key in (*(f'{model}.factory' for model in MODELS), 'features.output_fn'):
    load_callable(flat[key], key)
  for line in flat['pool.sources']:
    head = line.partition(' | ')[0].strip()
    if ':' in head and head.partition(':')[0] not in SOURCE_KINDS:
      load_callable(head, 'pool.sources')
  parts = [part for part in map(mixture_parts.parse, flat['mixture.parts']) if part is not None]
  for key, methods in (('selection.methods', flat['selection.methods']), ('mixture.parts', [p.method for p in parts])):
    for method in methods:
      if ':' in method:
        load_callable(method, key)


def load_callable(name: str, key: str = '') -> Callable[..., Any]:
  """The function that 'package.module:function' names; `key` is the config key that holds it, for the message.

  Raises:
    UserError: not of that form, no such module or function, the module fails while imported, or not callable.
  """
  said = f'{key} = {name!r}' if key else repr(name)
  if not CALLABLE.fullmatch(name):
    raise UserError(f"{said} must be 'package.module:function'; give a module and a function in it")
  module_name, _, function_name = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # a boundary: any failure of a stranger's module is reported
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(
      f'{said}: module {module_name} cannot be imported ({reason}); mend it, or start where Python finds it'
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    what = 'has no such function' if function is None else f'has a {type(function).__name__} of that name, no function'
    near = difflib.get_close_matches(function_name, [n for n in dir(module) if callable(getattr(module, n))], n=1)
    raise UserError(f'{said}: {module.__file__} {what}; ' + (f'is it {near[0]}?' if near else 'name one that is there'))
  return function


def nested(flat: Mapping[str, Any]) -> ConfigDict:
  """A config of these keys: what `flatten` makes flat."""
  config: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split('.')
    section = config
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return ConfigDict(config)


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _check_keys(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  for key in found.keys() - wanted.keys():
    if any(w.startswith(key + '.') for w in wanted):
      raise _finding(key, found[key], 'must be a section of keys', 'leave it as configs/base.py makes it')
  for key in sorted(wanted.keys() - found.keys()):
    raise UserError(f'config has no key {key}; begin from configs.base.get_config() and change that')
  for key in sorted(found.keys() - wanted.keys()):
    section = next((m for m in MODELS if key.startswith(m + '.') and found[f'{m}.factory'] != _OUR_FACTORY), None)
    if section is None:
      near = difflib.get_close_matches(key, wanted, n=1)
      hint = f'is it {near[0]}?' if near else 'configs/base.py has all keys'
      raise UserError(f'config key {key} = {found[key]!r} is unknown; {hint}')


def _check_type(key: str, value: Any, default: Any) -> None:
  """`value` must be of the type of `default`; an int will do for a float, a list for a tuple of texts or of numbers."""
  kinds = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', tuple: 'a tuple of texts'}
  numbers = isinstance(default, tuple) and bool(default) and isinstance(default[0], float)
  if numbers:
    kinds[tuple] = 'a tuple of numbers'
  kind = kinds.get(type(default))
  if kind is None:
    raise _finding(key, value, f'must be {", ".join(kinds.values())}', 'give one of these')
  if isinstance(default, tuple):
    right = isinstance(value, (tuple, list)) and all(
      isinstance(v, (int, float) if numbers else str) and not isinstance(v, bool) for v in value
    )
  elif isinstance(default, float):
    right = type(value) in (int, float) and -_LARGEST <= value <= _LARGEST  # NaN is neither; an int may be wider
  else:
    right = type(value) is type(default)
    if right and type(value) is int and not -_WIDEST <= value < _WIDEST:
      raise UserError(f'config key {key} = {hex(value)[:20]}… is wider than 64 bits; {_suggest(key, default)}')
  if not right:
    raise _finding(key, value, f'must be {kind}, and is {_kind(value)}', _suggest(key, default))


def _check_no_secret(key: str, value: Any) -> None:
  """Every value ends up in manifests, logs and the report."""
  for text in value if isinstance(value, (tuple, list)) else (value,):
    if not isinstance(text, str):
      continue
    looked_at = text[: bounds.CHARACTERS]  # a longer one is refused
    what = 'a password (…://user:password@…)' if _PASSWORD.search(looked_at) else ''
    if found := _TOKEN.search(looked_at):
      what = f'a secret in an address (…?{found.group(1)}=…)'
    if what:
      raise UserError(
        f'config key {key} holds {what}, which would be written into manifests and the report; leave it out and give '
        "it by the environment, as that service's client asks"
      )


def _kind(value: Any) -> str:
  return str(value) if isinstance(value, float) and not math.isfinite(value) else type(value).__name__


def _suggest(key: str, default: Any) -> str:
  said = f'"{default!r}"' if isinstance(default, tuple) else str(default)
  return f'for example --config.{key}={said}'


def _finding(key: str, value: Any, rule: str, way_out: str) -> UserError:
  return UserError(f'config key {key} = {_cut(_repr(value))} {rule}; {way_out}')


def _repr(value: Any) -> str:
  try:
    return ' '.join(repr(value).split())
  except ValueError:  # Python writes out no number of thousands of digits
    return f'{type(value).__name__} with a number of thousands of digits'


def _cut(text: str) -> str:
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'


def _brief(value: Any) -> Any:
  """`value`, or what is shown of it where it is long."""
  if isinstance(value, str):
    return _cut(value)
  return _cut(_repr(value)) if isinstance(value, (tuple, list)) else value
