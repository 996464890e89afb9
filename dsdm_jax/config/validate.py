"""Checks of a config before any device is used. An error is one line: the key, its value, the rule, and what to do."""

import difflib
import importlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Le, Lt
from ml_collections import ConfigDict
from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from dsdm_jax.config import schema
from dsdm_jax.config.relations import BATCHES, MODELS, OUR_FACTORY, TRAINS, broken
from dsdm_jax.config.schema import FIELDS
from dsdm_jax.config.values import (
  BREADTH,
  CALLABLE,
  EVALUATED,
  SOURCE_KINDS,
  MixturePart,
  brief,
  guarded,
  source_parts,
  task_name,
)
from dsdm_jax.errors import UserError

_MOST = 10_000  # characters of a text, parts of a tuple
# Credentials in an address: user:password@, ?access_token=, &X-Amz-Signature=, ?api-key=, &sig= of Azure.
_PASSWORD = re.compile(r'://[^/\s@:]*:[^/\s@]+@')
_TOKEN = re.compile(
  r'://\S*?[?&;#]([\w.-]*(?:token|secret|password|passwd|signature|credential|(?:api|access|secret|account)[_-]?key(?:id)?)'
  r'|sig|key|pwd|pass|auth)=[^&;#\s]',
  re.IGNORECASE,
)
# Layers, width and heads of the paper's models.
SIZES: Mapping[str, tuple[int, int, int]] = {
  '125M': (12, 768, 12),
  '356M': (24, 1_024, 16),
  '760M': (24, 1_536, 12),
  '1.3B': (24, 2_048, 16),
}
# Values of keys that only a custom model has.
_CUSTOM: TypeAdapter[Any] = TypeAdapter(
  StrictBool
  | Annotated[StrictInt, Ge(-(2**63)), Lt(2**63)]
  | Annotated[StrictFloat, Ge(-1e300), Le(1e300)]
  | StrictStr
  | tuple[StrictStr, ...]
  | tuple[StrictFloat, ...]
)
_TYPES = {
  'bool_type': 'True or False',
  'int_type': 'a whole number',
  'float_type': 'a number',
  'finite_number': 'a number',
  'string_type': 'text',
  'tuple_type': 'a tuple',
}


def flatten(config: ConfigDict) -> dict[str, Any]:
  """Dotted key → JSON value, in the config's order: references are resolved, tuples become lists."""
  return {key: list(v) if isinstance(v, tuple) else v for key, v in _leaves(config, '')}


def nested(flat: Mapping[str, Any]) -> ConfigDict:
  """The inverse of `flatten`."""
  return ConfigDict(_tree(flat))


def select(flat: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
  """The keys of `flat` that are, or lie below, one of `prefixes` ('pool' takes 'pool.length' and not 'pools').

  Raises:
    ValueError: a prefix selects no key.
  """
  selected: set[str] = set()
  for prefix in prefixes:
    keys = {key for key in flat if key == prefix or key.startswith(prefix + '.')}
    if not keys:
      raise ValueError(f'no config key is or lies below {prefix!r}')
    selected |= keys
  return {key: v for key, v in flat.items() if key in selected}


def whole_numbers(argv: Sequence[str]) -> list[str]:
  """`argv` with '--config.KEY=1e6' as '--config.KEY=1000000' where the key is an integer, whose flag refuses 1e6."""

  def whole(argument: str) -> str:
    match = re.fullmatch(r'--?config\.([\w.]+)=([+-]?\d[\d_]*(?:\.\d*)?(?:[eE]\+?\d{1,2})?)', argument)
    if match is None or match[1] not in FIELDS or type(FIELDS[match[1]].default) is not int:
      return argument
    number = Decimal(match[2])
    return f'--config.{match[1]}={int(number)}' if number == int(number) else argument

  return [whole(argument) for argument in argv]


def validate(config: ConfigDict) -> None:
  """Checks everything that can be known without a device: keys, types, values, relations.

  Raises:
    UserError: the first error.
  """
  flat = dict(_leaves(config, ''))
  for key, value in flat.items():  # first, since other errors repeat the value
    _check_no_secret(key, value)
  _check_keys(flat)
  for key, value in flat.items():
    long = value if isinstance(value, (tuple, list)) else (value,)
    for part in (value, *long):
      if isinstance(part, (str, tuple, list)) and len(part) > _MOST:
        kind = 'characters' if isinstance(part, str) else 'parts'
        raise _error(key, value, f'has {len(part):,} {kind} and must have at most {_MOST:,}')
    if key not in FIELDS:
      try:
        _CUSTOM.validate_python(tuple(value) if isinstance(value, list) else value)
      except ValidationError as error:
        rule = 'must be True or False, a whole number of 64 bits, a number, text, or a tuple of texts or numbers'
        raise _error(key, value, rule, 'give one of these') from error
  custom = tuple(f'{model}.' for model in MODELS if flat[f'{model}.factory'] != OUR_FACTORY)
  checked = {key: tuple(flat[key]) if isinstance(flat[key], list) else flat[key] for key in FIELDS}
  for key, value in checked.items():  # a custom model may give other meanings to the texts
    if key.startswith(custom) and isinstance(value, str) and not key.endswith('.factory') and _is_text(key):
      checked[key] = FIELDS[key].default
  try:
    valid = schema.Config.model_validate(_tree(checked))
  except ValidationError as error:
    first = error.errors(include_url=False)[0]
    key = '.'.join(part for part in first['loc'] if isinstance(part, str))
    raise _error(key, flat[key], *_explain(key, flat[key], dict(first))) from error
  for key, rule, way_out in broken(valid):
    raise _error(key, flat[key], rule, way_out)


def resolve(config: ConfigDict, keys_of: Callable[[str], dict[str, Any]]) -> ConfigDict:
  """`config` with names replaced by what they mean; itself where there are none.

  Names are `size` and `weights` of a model, which fix its shape, and 'evaluated' in `leakage.benchmarks`. Where
  `selection.targets` is empty, it gets the names of all tasks, joined by '+'.

  Args:
    config: the whole config, of the right types.
    keys_of: folder of weights → keys of `model` and their values.

  Raises:
    UserError: such a key is also set, to another value; or as `keys_of`.
  """
  flat = flatten(config)
  if EVALUATED in flat['leakage.benchmarks']:
    config = ConfigDict(config).copy_and_resolve_references()
    config.leakage.benchmarks = guarded(flat['leakage.benchmarks'], flat['evaluation.tasks'])
  if not flat['selection.targets']:
    config = ConfigDict(config).copy_and_resolve_references()
    breadth = (BREADTH,) if flat['targets.breadth'] else ()
    config.selection.targets = ('+'.join((*map(task_name, flat['targets.tasks']), *breadth)),)
  if not any(flat[f'{model}.{key}'] for model in MODELS for key in ('size', 'weights')):
    return config
  default = schema.Model().model_dump()
  config = ConfigDict(config).copy_and_resolve_references()
  for model, section in zip(MODELS, (config.model, config.proxies.model), strict=True):
    name = 'weights' if section.weights else 'size'
    if not section[name]:
      continue
    free: dict[str, Any] = {}
    if name == 'weights':
      shape = keys_of(section.weights)
    else:
      shape = dict(zip(('layers', 'width', 'heads'), SIZES[section.size], strict=True))
      free = {'kv_heads': shape['heads'], 'mlp_width': 4 * shape['width']}
    # Values that nobody set for this model: the default, and for proxies also the value of the model they follow.
    unset = {key: (default[key], *([flat[f'model.{key}']] if model != 'model' else [])) for key in default}
    for key, value in shape.items():
      if section[key] not in (value, *unset[key]):
        rule = f'is {value} in {model}.{name} = {section[name]!r}'
        raise _error(f'{model}.{key}', section[key], rule, f"leave one out: --config.{model}.{name}=''")
    section.update(shape | {key: value for key, value in free.items() if section[key] in unset[key]})
  return config


def check_devices(config: ConfigDict, device_count: int, batches: Collection[str] = BATCHES) -> None:
  """Checks mesh and batch sizes against a machine of `device_count` devices, all processes together.

  Args:
    config: a valid one.
    device_count: of the machine.
    batches: keys of the batches that its devices share.

  Raises:
    UserError: the mesh does not take all devices, or a batch does not divide over them.
  """
  replicas, data, model = config.mesh.replicas, config.mesh.data, config.mesh.model
  if device_count % model:
    rule = f'must divide the number of devices, {device_count}'
    raise _error('mesh.model', model, rule, 'set --config.mesh.model=1 or another divisor')
  share = device_count // model
  if replicas and share % replicas:
    rule = f'must divide the {share} devices that share a batch'
    raise _error(
      'mesh.replicas', replicas, rule, 'set --config.mesh.replicas=0 for one a TPU slice, or another divisor'
    )
  if data != -1 and data * (replicas or 1) != share:
    rule = (
      f'times mesh.replicas = {replicas or 1} and mesh.model = {model} must be the number of devices, {device_count}'
    )
    raise _error('mesh.data', data, rule, 'set --config.mesh.data=-1 to take them all')
  flat = flatten(config)
  for key in BATCHES:
    if key in batches and flat[key] % share:
      near = max(share, round(flat[key] / share) * share)
      rule = f'must be a multiple of the {share} devices that share a batch'
      raise _error(key, flat[key], rule, f'set --config.{key}={near}, or a larger --config.mesh.model')
  for train in TRAINS:
    parts, batch = flat[f'{train}.microbatches'] or 1, flat[f'{train}.batch_size']
    if f'{train}.batch_size' in batches and batch % (parts * share):
      rule = f'must cut {train}.batch_size = {batch} into multiples of the {share} devices that share a batch'
      raise _error(f'{train}.microbatches', parts, rule, f'set --config.{train}.microbatches=1')


def check_callables(config: ConfigDict) -> None:
  """Imports every function that the config names, so that a wrong name is reported before the first stage.

  Raises:
    UserError: as `load_callable`.
  """
  flat = flatten(config)
  for key in (*(f'{model}.factory' for model in MODELS), 'features.output_fn'):
    load_callable(flat[key], key)
  parts = [part.method for part in map(MixturePart.parse, flat['mixture.parts']) if part is not None]
  sources = [source_parts(line)[0] for line in flat['pool.sources']]
  sources = [source for source in sources if source.partition(':')[0] not in SOURCE_KINDS]
  for key, names in {
    'pool.sources': sources,
    'selection.methods': flat['selection.methods'],
    'mixture.parts': parts,
  }.items():
    for name in names:
      if ':' in name:
        load_callable(name, key)


def load_callable(name: str, key: str = '') -> Callable[..., Any]:
  """The function that 'package.module:function' names; `key` is the config key that holds it, for the message.

  Raises:
    UserError: not of that form, no such module or function, the module fails while imported, or not callable.
  """
  shown = f'{key} = {name!r}' if key else repr(name)
  if not CALLABLE.fullmatch(name):
    raise UserError(f"{shown} must be 'package.module:function'; give a module and a function in it")
  module_name, _, function_name = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # a boundary: the user's module may fail in any way
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(
      f'{shown}: cannot import module {module_name} ({reason}); correct it, or start where Python finds it'
    ) from error
  function = getattr(module, function_name, None)
  if not callable(function):
    problem = 'has no such function' if function is None else f'{function_name} is of type {type(function).__name__}'
    near = difflib.get_close_matches(function_name, [n for n in dir(module) if callable(getattr(module, n))], n=1)
    way_out = f'is it {near[0]}?' if near else 'name a function of that module'
    raise UserError(f'{shown}: {module.__file__}: {problem}; {way_out}')
  return function


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _leaves(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *sections, name = key.split('.')
    section = tree
    for part in sections:
      section = section.setdefault(part, {})
    section[name] = value
  return tree


def _check_keys(flat: Mapping[str, Any]) -> None:
  for key in flat.keys() - FIELDS.keys():
    if any(known.startswith(key + '.') for known in FIELDS):
      raise _error(key, flat[key], 'must be a section of keys', 'leave it as configs/base.py makes it')
  for key in sorted(FIELDS.keys() - flat.keys()):
    raise UserError(f'config has no key {key}; start from configs.base.get_config() and change that')
  for key in sorted(flat.keys() - FIELDS.keys()):
    if not any(key.startswith(m + '.') and flat[f'{m}.factory'] != OUR_FACTORY for m in MODELS):
      near = difflib.get_close_matches(key, FIELDS, n=1)
      raise _error(key, flat[key], 'is unknown', f'is it {near[0]}?' if near else 'docs/keys.md lists all keys')


def _check_no_secret(key: str, value: Any) -> None:
  """Every value is written into manifests, logs and the report."""
  for text in value if isinstance(value, (tuple, list)) else (value,):
    if not isinstance(text, str):
      continue
    problem = 'a password (…://user:password@…)' if _PASSWORD.search(text[:_MOST]) else ''  # longer ones are refused
    if match := _TOKEN.search(text[:_MOST]):
      problem = f'a secret in an address (…?{match.group(1)}=…)'
    if problem:
      raise UserError(
        f'config key {key} holds {problem}, which would be written into manifests and the report; leave it out and set '
        "the environment variable of that service's client"
      )


def _is_text(key: str) -> bool:
  return FIELDS[key].annotation is str or get_origin(FIELDS[key].annotation) is Literal


def _explain(key: str, value: Any, error: dict[str, Any]) -> tuple[str, str]:
  """(rule, what to do or '') of an error of pydantic."""
  kind, limits = error['type'], error.get('ctx', {})
  default, annotation = FIELDS[key].default, FIELDS[key].annotation
  if isinstance(default, tuple) and (kind in _TYPES or not isinstance(value, (tuple, list))):
    kind, of = 'tuple_type', 'numbers' if float in get_args(annotation) else 'texts'
    return f'must be a tuple of {of}, and is {type(value).__name__}', ''
  if kind in _TYPES:
    got = str(value) if isinstance(value, float) and kind == 'finite_number' else type(value).__name__
    return f'must be {_TYPES[kind]}, and is {got}', ''
  if kind == 'literal_error':
    inner = annotation if get_origin(annotation) is Literal else get_args(annotation)[0]
    choices = [str(choice) for choice in get_args(inner)]
    near = difflib.get_close_matches(str(error['input']), filter(None, choices), n=1)
    some = 'one or more' if isinstance(default, tuple) else 'one'
    return f'must be {some} of {", ".join(choices)}', f'is it {near[0]}?' if near else ''
  if kind == 'rule':
    return limits['rule'], ''
  words = {'ge': 'at least', 'gt': 'greater than', 'le': 'at most', 'lt': 'less than'}
  (limit, number), *_ = limits.items()
  unit = ' '.join(['', *(m for m in FIELDS[key].metadata if isinstance(m, str))]) if limit == 'le' else ''
  return f'must be {words[limit]} {f"{number:g}" if number < 1e4 or number >= 1e30 else f"{int(number):,}"}{unit}', ''


def _error(key: str, value: Any, rule: str, way_out: str = '') -> UserError:
  if not way_out:
    default = FIELDS[key].default
    way_out = f'for example --config.{key}=' + (f'"{default!r}"' if isinstance(default, tuple) else str(default))
  return UserError(f'config key {key} = {brief(value)} {rule}; {way_out}')
