"""What can be known before a run: `--stage=check`, and the start of every run. Nothing is written.

Errors raise `UserError`. The rest is an estimate: rows from the sizes of files and a sample's tokens per byte, time
from the FLOP of the plan and the speed of a small training step at the widths of the proxies and of the final models,
which is measured for a second.
"""

import dataclasses
import importlib.util
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from dsdm_jax.config.methods import METHODS
from dsdm_jax.config.validate import check_callables, flatten
from dsdm_jax.config.values import Prefilter, brief, task_name
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import clock
from dsdm_jax.core.storage import Location
from dsdm_jax.data import files
from dsdm_jax.data.pool import readers, sources, vocabulary
from dsdm_jax.data.pool.passes import worker_count
from dsdm_jax.data.targets import tasks
from dsdm_jax.errors import UserError
from dsdm_jax.training import proxies
from dsdm_jax.training.step import microbatches

_SAMPLE = 2**16  # bytes of text whose tokens are counted
_PACKED = {'.gz': 3.0, '.zst': 3.5, '.bz2': 4.0, '.xz': 4.0, '.parquet': 2.5}  # bytes of text per byte of file
_DOUBTFUL = 1.5  # factor within which an estimated number of rows may be wrong
_MEASURED_SECONDS = 0.5
_WIDTHS = 'width', 'mlp_width'
_COMPILING = 10.0  # times as long as the measured step, for the programs of a stage
_EFFICIENCY = 0.75  # speed of real steps, with attention and updates, relative to the measured one
_IMPORTS, _SAVED = 2.0, 3.0  # seconds to import TensorFlow, and to save a model: over a hundred flushes to the disk
_COMPARED_BYTES = 1.5e7  # of text a second, with the words of all targets
_OF_TEXT = {'fasttext': 2.7e-6, 'lsa': 2.7e-6, 'hybrid': 2.7e-6}  # seconds a token of the pool to choose by text alone
_OF_OTHER_TEXT = 1e-6
_COUNTED_TOKENS, _RESTORED = 2e6, 0.1  # n-grams a second, and seconds to restore a model
_CUT_SHARE = 0.1  # of prompts, above which a warning is printed
_STATE_BYTES = 12  # of a parameter in a checkpoint: weight and two moments
_VERDICT_SEEDS = 3

Numbers = dict[str, float]


def run(config: ConfigDict, workdir: Location, wanted: Sequence[str], alone: bool) -> dict[str, Any]:
  """Checks a valid, resolved config against this machine and the files it names.

  Args:
    config: the whole config.
    workdir: may not exist.
    wanted: stages that are to run; a stage that is finished needs no time.
    alone: whether this is `--stage=check`, which gives a table.

  Returns:
    'lines' to print, 'warnings', and 'seconds' of each stage.

  Raises:
    UserError: the run would fail.
  """
  check_packages(config)
  check_callables(config)
  pool = _Pool(config, None if 'pool' in wanted else artifacts.open_stage(workdir, 'pool'))
  _check_budget(config, pool, wanted)
  warnings = _few_seeds(config) if 'pretraining' in wanted else []
  asked = _questions(config, pool) if {'targets', 'target_features', 'evaluation'} & {*wanted} else _Questions([], 0, 0)
  warnings += asked.warnings if 'targets' in wanted else []
  if not wanted or pool.rows is None:
    line = 'check: the size of the pool is not known yet' if wanted else 'check: all stages are finished'
    return {'lines': [line] if alone else [], 'warnings': warnings, 'seconds': {}}
  planned = config.copy_and_resolve_references()
  with planned.unlocked():
    planned.plan.rows, planned.pool.vocab_size = pool.rows, pool.vocab_size
  seconds, memory, disk, pays = _costs(planned, pool, asked, wanted)
  warnings += _too_large(config, workdir, memory, disk)
  parts = [f'{"" if pool.exact else "about "}{pool.rows:,} rows']
  parts += [f'about {clock(sum(seconds.values()))}'] if any(seconds.values()) else []
  parts += [f'{_bytes(sum(disk.values()))} of disk'] if disk else []
  lines = [f'check: {", ".join(parts)}', *pays]
  if alone:
    table = [('stage', 'time', 'memory', 'disk')]
    for stage in (stage for stage in wanted if seconds[stage]):
      held, stored = (_bytes(of[stage]) if of.get(stage) else '' for of in (memory, disk))
      table.append((stage, clock(seconds[stage]), held, stored))
    lines += [f'  {a:<16}{b:>9}{c:>12}{d:>12}'.rstrip() for a, b, c, d in table]
  return {'lines': lines, 'warnings': warnings, 'seconds': seconds}


def check_packages(config: ConfigDict) -> None:
  """Raises UserError if a key names something whose package is missing."""
  needed = {
    'log.to': [name for name in config.log.to if name != 'tensorboard'],
    'host.beam': ['apache_beam'] if config.host.beam else [],
  }
  for key, names in needed.items():
    for name in names:
      if importlib.util.find_spec(name) is None:
        raise UserError(
          f'config key {key} = {brief(flatten(config)[key])} needs a package that is not installed: '
          f'pip install {name.replace("_", "-")}, or set the key back'
        )


class _Pool:
  """The pool, or what is known of it before it exists.

  Attributes:
    rows: N; None if it cannot be known.
    exact: whether the pool exists.
    bytes: of text; 0 if unknown.
    vocab_size: V.
    tokens: text → how many tokens it has, about.
  """

  def __init__(self, config: ConfigDict, artifact: Artifact | None):
    wanted = config.pool.length, config.pool.vocabulary
    # Whether it has the settings of this run is for the runner to say; other lengths make it another pool for sure.
    self.exact = artifact is not None and artifact.settings['pool.length'] == wanted[0]
    self.tokens: Callable[[str], float]
    self.rows: int | None = None
    if artifact is not None and self.exact:
      artifact.verify()
      card, encoder = storage.read_json(artifact.path / 'card.json', dict), vocabulary.open_encoder(artifact.path)
      self.rows, self.bytes, self.vocab_size = int(card['rows']), int(card['bytes']), int(card['vocab_size'])
      self.tokens = lambda text: len(encoder.encode(text))
      return
    self.vocab_size = config.pool.vocab_size
    self.bytes, sample = _text(config)
    if wanted[1] == 'train':
      ratio = _trained_bytes_per_token(self.vocab_size)
      self.tokens = lambda text: len(text.encode()) / ratio
      per_byte = 1 / ratio
    else:
      with tempfile.TemporaryDirectory() as folder:
        vocabulary.save(wanted[1], Path(folder), config.pool.end_piece)
        encoder = vocabulary.open_encoder(folder)
      self.vocab_size, self.tokens = encoder.size, lambda text: len(encoder.encode(text))
      per_byte = self.tokens(sample) / len(sample.encode()) if sample else 0.0
    # Rows that are not packed are documents, whose number is not known.
    if self.bytes and per_byte and config.pool.packed:
      self.rows = max(1, int(self.bytes * per_byte / config.pool.length))


def _trained_bytes_per_token(vocab_size: int) -> float:
  """Bytes per token of a unigram vocabulary trained on the pool: 1.2, 1.9 and 3.3 at 320, 1,024 and 8,192 pieces."""
  return min(4.5, max(1.05, 1.93 + 0.45 * math.log2(vocab_size / 1_024)))


def _text(config: ConfigDict) -> tuple[int, str]:
  """Bytes of text in the pool, 0 if unknown, and a sample of it, empty where no source is read.

  Raises:
    UserError: a pattern matches nothing, or the first document cannot be read, where pool.on_error is fail.
  """
  total, samples, known = 0.0, [], True
  for entry in sources.entries(config.pool):
    if entry.generated or entry.kind in ('tfds', 'tokens'):
      known = known and entry.kind == 'installed_packages' and bool(config.pool.max_bytes)
      total += config.pool.max_bytes
      continue
    units = sources.units(entry)
    if not units and config.pool.on_error == 'fail':
      raise UserError(f'pool.sources: {entry.target} matches no file; correct the path, or take it out')
    paths = [path for unit in units for path in unit.paths]
    sizes = [_size(path) for path in paths]
    known = known and None not in sizes
    total += sum(
      (size or 0) * next((factor for end, factor in _PACKED.items() if path.endswith(end)), 1.0)
      for path, size in zip(paths, sizes, strict=True)
    )
    for unit in units[:1]:
      samples.append(_sample(unit, config.pool.on_error))
  if not known:
    return config.pool.max_bytes, ''.join(samples)
  return int(min(total, config.pool.max_bytes or total)), ''.join(samples)


def _size(path: str) -> int | None:
  if files.is_remote(path):
    return None
  return os.path.getsize(path) if os.path.exists(path) else 0  # the pool says which file is missing, or counts it


def _sample(unit: sources.Unit, on_error: str) -> str:
  texts: list[str] = []
  for record in readers.read(unit, _SAMPLE):
    if isinstance(record, readers.Problem):
      if on_error == 'fail':
        raise UserError(f'{record}; correct it, or set --config.pool.on_error=skip')
      continue
    texts.append(record.text)
    if sum(map(len, texts)) > _SAMPLE:
      break
  return ''.join(texts)[:_SAMPLE]


def _check_budget(config: ConfigDict, pool: _Pool, wanted: Sequence[str]) -> None:
  if pool.rows is None or (config.pool.vocabulary == 'train' and pool.bytes < config.pool.vocab_size):
    return  # the second is an error of its own, which the pool explains
  rows = pool.rows if pool.exact else int(_DOUBTFUL * pool.rows)
  has = f'has {pool.rows:,}' if pool.exact else f'will have about {pool.rows:,}'
  if 'proxies' in wanted:
    proxies.steps_of(config.proxies, rows)
  options = config.selection
  for method in options.methods if 'selection' in wanted else ():
    needed = options.examples * (options.epochs if method.endswith('one_epoch') else 1)
    if needed > rows:
      key = 'selection.examples'
      raise UserError(
        f'config key {key} = {options.examples} gives {method} {needed:,} rows to choose, and the pool {has}; set '
        f'--config.{key}={max(1, pool.rows * options.examples // needed // 2)} or less, or add text to the pool'
      )


def _few_seeds(config: ConfigDict) -> list[str]:
  if config.pretraining.seeds >= _VERDICT_SEEDS or len(config.selection.methods) < 2:
    return []
  return [
    f'pretraining.seeds = {config.pretraining.seeds} gives no verdicts, which take {_VERDICT_SEEDS}: set '
    '--config.pretraining.seeds=4'
  ]


@dataclasses.dataclass(frozen=True)
class _Questions:
  """What is known of the targets' prompts.

  Attributes:
    warnings: one for each target whose prompts are cut at this length.
    examples: of all target splits.
    tokens: of what one model reads in the evaluation of both splits, with padding.
  """

  warnings: list[str]
  examples: int
  tokens: int


def _questions(config: ConfigDict, pool: _Pool) -> _Questions:
  """Reads all targets; the stages that follow in this process do not read the built-in ones again."""
  length, targets, warnings = config.pool.length, config.targets, []
  examples = read = 0
  for task in targets.tasks:
    one = targets.copy_and_resolve_references()
    with one.unlocked():
      one.tasks = (task,)
    [raw] = tasks.read_tasks(one)
    if raw.language_modelling or not raw.items:
      examples, read = examples + targets.max_examples, read + 2 * targets.max_examples * length
      continue
    picked = raw.items[:: max(1, len(raw.items) // 200)]
    tokens = np.array([pool.tokens(item.context + item.answer) for item in picked])
    share = float(np.mean(tokens >= length))
    if share > _CUT_SHARE:
      fits = 2 ** math.ceil(math.log2(np.quantile(tokens, 0.95) + 1))
      warnings.append(
        f'{share:.0%} of the prompts of {task_name(task)} are longer than pool.length = {length} and lose their '
        f'beginning: set --config.pool.length={fits}'
      )
    count = min(targets.max_examples, max(1, len(raw.items) // 2))
    quarters = np.minimum(4, np.ceil(4 * tokens / length))  # sequences are padded to quarters of the length
    pairs = np.mean([len(item.choices or item.context_options or '?') for item in picked])
    examples, read = examples + count, read + int(2 * count * pairs * quarters.mean() * length / 4)
  return _Questions(warnings, examples, read)


def _costs(
  config: ConfigDict, pool: _Pool, asked: _Questions, wanted: Sequence[str]
) -> tuple[Numbers, Numbers, Numbers, list[str]]:
  """Seconds, bytes of memory and bytes of disk of each stage, and whether choosing pays."""
  import jax

  from dsdm_jax.core.mesh import make_mesh
  from dsdm_jax.plan import programs

  mesh, rows, length = make_mesh(config.mesh), pool.rows or 0, config.pool.length
  works = {work.stage: work for work in programs.works(config, mesh)}
  flop = {name: work.least_flop * work.runs for name, work in works.items()}
  final = programs.Model.of(config.model, config.pool.vocab_size, length)
  proxy = programs.Model.of(config.proxies.model, config.pool.vocab_size, length)
  models = programs.final_runs(config)
  flop['evaluation'] = models * asked.tokens * final.forward_flop
  flop['target_features'] = 3 * proxies.checkpoints(config) * asked.examples * length * proxy.forward_flop
  tokens_at_once = [
    train.batch_size
    // microbatches(train, train.batch_size, length, config.pool.vocab_size, round(model.parameters), mesh)
    * length
    for train, model in ((config.proxies.train, proxy), (config.pretraining.train, final))
  ]
  # Products of a narrow proxy are slower than those of the final models, often several times.
  compiling, of_proxy = _measure(config, config.proxies.model, tokens_at_once[0])
  of_final = of_proxy
  if [config.model[key] for key in _WIDTHS] != [config.proxies.model[key] for key in _WIDTHS]:
    of_final = _measure(config, config.model, tokens_at_once[1])[1]

  def of(*names: str) -> float:
    speed = of_final if {'pretraining', 'ladder', 'evaluation'} & {*names} else of_proxy
    devices = jax.device_count() * _EFFICIENCY
    return sum(value / speed / devices for name, value in flop.items() if name.split()[0] in names)

  prefilter, targets = Prefilter.parse(config.selection.prefilter), max(1, len(config.selection.targets))
  ekfac = config.features.projection == 'ekfac'
  per_model = _RESTORED + min(config.selection.examples * length, config.evaluation.ngram_tokens) / _COUNTED_TOKENS
  text = (pool.bytes or 4 * rows * length) / 1.5e6 / worker_count(config.host.workers)
  seconds = {
    'pool': 3 + text,
    'leakage': 1 + (pool.bytes or 4 * rows * length) / _COMPARED_BYTES / worker_count(config.host.workers),
    'targets': 1.0,
    'prefilter': 1 + seconds_by_text([prefilter.method], rows * length, targets) if prefilter else 0.0,
    'proxies': compiling + _IMPORTS + config.proxies.count * _SAVED + of('proxies'),
    'features': compiling + of('features'),
    'target_features': 0.0 if ekfac else compiling / 2 + of('target_features'),
    'datamodel': (1.2 if ekfac else 0.5) * compiling + of('gram', 'target_means', 'scores'),
    'selection': 1
    + len(config.selection.methods) * rows / 1e6
    + seconds_by_text(config.selection.methods, rows * length, targets),
    'pretraining': compiling + models * _SAVED + of('pretraining'),
    'ladder': len(config.ladder.rungs) * compiling + of('ladder'),
    'evaluation': len(config.targets.tasks) * compiling / 2 + of('evaluation') + models * per_model,
    'report': 4.0,
  }
  j = 0 if ekfac else programs.dimension(config, mesh)
  kept = proxies.checkpoints(config) + config.proxies.train.keep_checkpoints * config.proxies.count
  disk = {
    'pool': 6.0 * rows * length,
    'proxies': float(kept * _STATE_BYTES * proxy.parameters),
    'features': programs.stored_bytes(config, j) if j else 4.0 * proxies.checkpoints(config) * proxy.parameters,
    'datamodel': 4.0 * programs.scored_rows(config) * len(config.targets.tasks),
    'selection': 16.0 * models * config.selection.examples,
    'pretraining': float(models * config.pretraining.train.keep_checkpoints * _STATE_BYTES * final.parameters),
  }
  memory = {
    'proxies': _training_bytes(config, config.proxies.model, proxy.parameters, tokens_at_once[0]),
    'features': 4.0 * proxy.parameters * max(1, config.features.microbatch or config.features.batch_size),
    'datamodel': 8.0 * j * j,
    'pretraining': _training_bytes(config, config.model, final.parameters, tokens_at_once[1]),
  }
  chosen, one = sum(flop.get(name, 0.0) for name in programs.SELECTION), flop['pretraining'] / max(models, 1)
  memory, disk = ({s: of[s] for s in of if s in wanted} for of in (memory, disk))
  return {s: seconds.get(s, 0.0) for s in wanted}, memory, disk, _pays(config, chosen / one, rows)


def seconds_by_text(methods: Sequence[str], tokens: int, targets: int) -> float:
  """What methods take to choose by text alone from a pool of so many tokens, about; those that read none take 0.

  A targeted method reads the pool once for each of the `targets`.
  """
  reading = [method for method in methods if method in METHODS and 'text' in METHODS[method].needs]
  times = [targets if METHODS[method].targeted else 1 for method in reading]
  return tokens * sum(_OF_TEXT.get(m, _OF_OTHER_TEXT) * n for m, n in zip(reading, times, strict=True))


def _training_bytes(config: ConfigDict, model: ConfigDict, parameters: int, tokens: int) -> float:
  """Memory of a training step, about: weights, gradients, moments, and activations that the backward pass reads."""
  block = (
    14 * model.width + 3 * model.mlp_width + (0 if model.attention == 'fused' else model.heads * config.pool.length)
  )
  layers = 1 if model.remat else model.layers
  return 16.0 * parameters + 4.0 * tokens * (layers * block + 3 * config.pool.vocab_size)


def _measure(config: ConfigDict, model: ConfigDict, tokens: int) -> tuple[float, float]:
  """Seconds that a stage compiles, about, and FLOP/s of one device, for one MLP and the output layer of `tokens`."""
  import jax
  import jax.numpy as jnp

  (width, hidden), vocab = (model[key] for key in _WIDTHS), config.pool.vocab_size
  count = min(4_096, tokens)
  began = time.monotonic()
  weights = tuple(jnp.full(shape, 0.01) for shape in ((width, hidden), (hidden, width), (width, vocab)))

  def loss(weights: tuple[jax.Array, ...], x_BD: jax.Array) -> jax.Array:
    up, down, head = weights
    return jnp.mean(jax.nn.logsumexp(jax.nn.gelu(x_BD @ up) @ down @ head, axis=-1))

  step, x_BD = jax.jit(jax.grad(loss)), jnp.ones((count, width))
  jax.block_until_ready(step(weights, x_BD))
  compiling, steps, began = _COMPILING * (time.monotonic() - began), 0, time.monotonic()
  while (seconds := time.monotonic() - began) < _MEASURED_SECONDS:
    jax.block_until_ready(step(weights, x_BD))
    steps += 1
  return compiling, 6.0 * count * (2 * width * hidden + width * vocab) * steps / seconds


def _pays(config: ConfigDict, ratio: float, rows: int) -> list[str]:
  """Lines about whether choosing pays, from its cost in final models and the pool's rows."""
  if not any('scores' in METHODS[m].needs for m in config.selection.methods if m in METHODS):
    return []
  cost, saved = f'  choosing costs {ratio:.2g} × one final model', config.plan.multiplier - 1
  at = f'(at plan.multiplier = {config.plan.multiplier:g})'
  if ratio <= saved or saved <= 0:
    return [f'{cost}{" and pays" if saved > 0 else ""} {at}']
  budget = math.ceil(config.selection.examples * ratio / saved / 100) * 100
  models = math.ceil(ratio / saved)
  lines = [f'{cost}; it pays for {models:,} models that share it', f'  {at}']
  given, cheaper = config.proxies, 'epochs=0' if config.proxies.model.weights else 'model.width=16'
  if budget <= rows // 2:
    lines[0] += ','
    lines[1] = f'  or for one with --config.selection.examples={budget} {at}'
  elif given.epochs and (given.count > 1 or given.model.weights or given.model.width > 16):
    lines[0] += ','
    lines[1:] = [f'  or with cheaper proxies {at}, such as', f'  --config.proxies.count=1 --config.proxies.{cheaper}']
  return lines


def _too_large(
  config: ConfigDict, workdir: Location, memory: Mapping[str, float], disk: Mapping[str, float]
) -> Iterator[str]:
  import jax

  free, needed, folder = math.inf, sum(disk.values()), workdir
  if isinstance(workdir, Path):  # an object store has no end
    folder = next(parent for parent in (workdir, *workdir.parents) if parent.exists())
    free = shutil.disk_usage(folder).free
  if needed > free:
    largest = max(disk, key=lambda name: disk[name])
    stored = largest == 'features' and config.features.projection != 'ekfac'
    yield (
      f'the run needs about {_bytes(needed)} of disk, most for {largest}, and {folder} has {_bytes(free)} free: use '
      f'another --workdir{", or a smaller --config.features.dimension" if stored else ""}'
    )
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') or _available()
  for name, size in memory.items():
    if limit and size > limit:
      smaller = '--config.features.dimension' if name == 'datamodel' else 'batch or microbatch of that stage'
      yield f'{name} needs about {_bytes(size)} of memory and there are {_bytes(limit)}: set a smaller {smaller}'


def _available() -> int:
  """Bytes of memory of this machine that are available; 0 if unknown."""
  try:
    lines = Path('/proc/meminfo').read_text().splitlines()
    return next(1_024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable'))
  except (OSError, StopIteration, ValueError):
    return 0


def _bytes(number: float) -> str:
  if number >= 1e9:
    return f'{number / 1e9:,.1f} GB'
  return f'{number / 1e6:,.0f} MB'
