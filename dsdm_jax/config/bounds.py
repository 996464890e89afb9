"""How large the values of a config may be: what lies above no machine could hold or run, and is a slip."""

from collections.abc import Mapping

CHARACTERS = 10_000  # of one text
PARTS = 10_000  # texts or numbers of one tuple

# Kind of number → the largest, and what is said after it.
KINDS: Mapping[str, tuple[float, str]] = {
  'seed': (2**32 - 1, ', the largest seed of 32 bits'),
  'steps': (2**31 - 1, ' steps, which are counted in 32 bits'),
  'bytes': (2**50, ' bytes, a pebibyte'),
  'page': (2**31 - 1, ' bytes of one page'),
  'rows': (10**12, ' rows'),
  'batch': (2**24, ' rows at once'),
  'listed': (10**7, ' rows of one page'),
  'items': (10**9, ''),
  'few': (10_000, ''),
  'draws': (10**7, ' draws'),
  'models': (100_000, ' models'),
  'passes': (10**6, ' passes'),
  'tokens': (2**24, ' tokens'),
  'pieces': (10**7, ' pieces'),
  'layers': (100_000, ' layers'),
  'width': (2**22, ' numbers of one token'),
  'columns': (2**24, ' columns'),
  'devices': (10**6, ' devices'),
  'processes': (10**6, ' processes'),
  'workers': (10_000, ' processes of one machine'),
  'seconds': (30 * 86_400, ' seconds, 30 days'),
  'minutes': (10**6, ' minutes, about two years'),
  'hours': (20_000, ' hours, about two years'),
  'real': (1e30, ', as numbers have 32 bits'),
  'factor': (10**6, ''),
}

_MODEL = {
  'layers': 'layers', 'width': 'width', 'heads': 'width', 'kv_heads': 'width', 'mlp_width': 'width',
  'rotary_base': 'real', 'init_std': 'real',
}  # fmt: skip
_TRAIN = {
  'batch_size': 'batch', 'microbatches': 'batch', 'learning_rate': 'real', 'z_loss': 'real', 'weight_decay': 'real',
  'adam_eps': 'real', 'adam_eps_root': 'real', 'gradient_clip': 'real', 'warmup_steps': 'steps',
  'save_every_steps': 'steps', 'save_every_minutes': 'minutes', 'keep_checkpoints': 'few', 'keep_every_steps': 'steps',
  'keep_every_hours': 'hours', 'evaluate_every_steps': 'steps', 'evaluate_rows': 'rows', 'profile_steps': 'steps',
  'log_every_steps': 'steps',
}  # fmt: skip

# The kind of every number in configs/base.py that its rule does not bound already (a test holds that).
BOUNDS: Mapping[str, str] = {
  'seed': 'seed',
  'mesh.data': 'devices',
  'mesh.model': 'devices',
  'distributed.processes': 'processes',
  'distributed.process': 'processes',
  'distributed.heartbeat_seconds': 'seconds',
  'distributed.start_seconds': 'seconds',
  'pool.max_bytes': 'bytes',
  'pool.max_document_bytes': 'bytes',
  'pool.length': 'tokens',
  'pool.vocab_size': 'pieces',
  'pool.leakage_ngram': 'few',
  'pool.plant_targets': 'items',
  'host.workers': 'workers',
  'targets.max_examples': 'items',
  'targets.seed': 'seed',
  **{f'{model}.{key}': kind for model in ('model', 'proxies.model') for key, kind in _MODEL.items()},
  **{f'{train}.{key}': kind for train in ('proxies.train', 'pretraining.train') for key, kind in _TRAIN.items()},
  'proxies.seed': 'seed',
  'proxies.count': 'models',
  'proxies.checkpoints': 'few',
  'proxies.epochs': 'passes',
  'features.dimension': 'columns',
  'features.basis_rows': 'rows',
  'features.gram_rows': 'rows',
  'features.batch_size': 'batch',
  'features.microbatch': 'batch',
  'features.shard_rows': 'batch',
  'features.jobs': 'processes',
  'features.job': 'processes',
  'datamodel.damping': 'real',
  'datamodel.groups': 'items',
  'datamodel.examples': 'items',
  'datamodel.bootstrap': 'draws',
  'validation.rows': 'rows',
  'validation.target_examples': 'items',
  'validation.epochs': 'passes',
  'validation.seeds': 'models',
  'validation.halves': 'models',
  'validation.stratified': 'models',
  'validation.proxies': 'models',
  'validation.models_at_once': 'models',
  'validation.least_eps_root': 'real',
  'validation.smooth_eps_root': 'real',
  'validation.smooth_batch_size': 'batch',
  'validation.resamples': 'draws',
  'selection.examples': 'rows',
  'selection.epochs': 'passes',
  'selection.repeat_cap': 'passes',
  'selection.document_cap': 'rows',
  'selection.temperature': 'real',
  'selection.diversity': 'real',
  'selection.clusters': 'items',
  'selection.classifier_rows': 'rows',
  'selection.conditional_steps': 'steps',
  'selection.conditional_learning_rate': 'real',
  'selection.distill_rows': 'rows',
  'pretraining.max_epochs': 'passes',
  'pretraining.models_at_once': 'models',
  'pretraining.seeds': 'models',
  'ladder.seeds': 'models',
  'evaluation.max_items': 'items',
  'evaluation.file_shots': 'few',
  'evaluation.generate_tokens': 'tokens',
  'evaluation.bootstrap': 'draws',
  'evaluation.selection_uses': 'factor',
  'evaluation.batch_size': 'batch',
  'report.examples': 'few',
  'report.explorer_rows': 'listed',
  'report.explorer_bytes': 'page',
  'plan.rows': 'rows',
  'plan.price_per_chip_hour': 'factor',
  'plan.multiplier': 'factor',
  'plan.calibration': 'factor',
}


def too_large(key: str, value: object) -> str:
  """What is wrong with the size of a value of the right type; '' for nothing."""
  if isinstance(value, str) and len(value) > CHARACTERS:
    return f'has {len(value):,} characters and must have at most {CHARACTERS:,}'
  if isinstance(value, (tuple, list)):
    if len(value) > PARTS:
      return f'has {len(value):,} parts and must have at most {PARTS:,}'
    return next(filter(None, (too_large('', part) for part in value)), '')
  if key in BOUNDS and isinstance(value, (int, float)):
    most, words = KINDS[BOUNDS[key]]
    if value > most:
      return f'must be at most {said(most)}{words}'
  return ''


def said(number: float) -> str:
  return f'{number:,}' if isinstance(number, int) else f'{number:g}'
