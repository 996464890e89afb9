"""The next study of docs/results.md: models above n-gram counts on the whole pool of mixed text.

Make the questions, try a setting of the models on random rows, and run all arms. The last command resumes where it
stopped; arms of other machines join its table with `--also='docs/results/above_ngrams/*.json'`:

    python -m dsdm_jax.study items --folder data/benchmarks --out data/study
    python -m dsdm_jax.main --config=configs/study_above_ngrams.py:trial --workdir=runs/trial \
      --config.pretraining.train.learning_rate=1e-3
    python -m dsdm_jax.study run --config=configs/study_above_ngrams.py --workdir=runs/above_ngrams

Inputs: text at `data/pool/*.jsonl.gz` (fields `id`, `source`, `text`), questions at `data/study/*.jsonl`, and
benchmarks at `data/benchmarks/*.jsonl`, in LLM-Foundry's shapes.

Hardware and time: two CPU cores, 14 minutes a model while the machine did other work.

Result: docs/results.md has the plan, and one model of two arms, which are above n-grams on one of three targets.
"""

from dsdm_jax.configs import recipe

TARGETS = ('lambada_cloze', 'squad_cloze', 'jeopardy_cloze')
# The best that were tried for random rows; docs/results.md has the losses.
_TRAINING = {
  'optimizer': 'contrib.muon',
  'optimizer_arguments': 'consistent_rms=0.2',
  'batch_size': 8,
  'learning_rate': 8e-3,
}
# A model of random rows on an eighth of the tokens. It needs no scores, so the stages before it do little.
_TRIAL = {
  'selection.methods': ('random',),
  'selection.prefilter': 'random 1',
  'selection.epochs': 1,
  'proxies.subset_share': 0.01,
  'pretraining.seeds': 1,
}
_THREE = {'pretraining.seeds': 3}
_DSDM = {'selection.methods': ('dsdm',), **_THREE}
# Proxies like the models.
_LARGE = {
  'proxies.count': 2,
  'proxies.model.layers': 2,
  'proxies.model.width': 128,
  'proxies.model.mlp_width': 512,
  'proxies.model.init_std': 0.05,
  **{f'proxies.train.{key}': value for key, value in _TRAINING.items()},
}

# The most important arms come first, so that an interrupted study has them.
ARMS: dict[str, dict] = {
  'base': {'selection.methods': ('dsdm', 'random'), **_THREE},
  'lsa': {'selection.methods': ('lsa',), **_THREE},
  'one_epoch': {'selection.methods': ('random_one_epoch',), **_THREE},
  'baselines_of_text': {'selection.methods': ('fasttext', 'dsir'), **_THREE},
  'baselines_of_proxies': {'selection.methods': ('embedding', 'color_filter', 'gradient'), **_THREE},
  'hybrid': {'selection.methods': ('hybrid', 'bottom'), **_THREE},
  'prefiltered': {**_DSDM, 'selection.prefilter': 'fasttext 4'},
  'cheap': {**_DSDM, 'selection.prefilter': 'fasttext 4', 'proxies.epochs': 0.1},
  'large': {**_DSDM, **_LARGE},
  'paper': {
    **_DSDM,
    **_LARGE,
    'proxies.count': 4,
    'features.projection': 'two_sided',
    'features.dimension': 16_384,
    'datamodel.gram': 'full',
    'datamodel.mix': 'mean',
  },
}


def get_config(arm='base'):
  """The config of one arm, or of the trial: `configs/study_above_ngrams.py:large`."""
  known = ARMS | {'trial': _TRIAL}
  if arm not in known:
    raise ValueError(f'{arm!r} is not an arm of the study; its arms are {", ".join(known)}')
  config = recipe.get_config()
  config.pool.sources = ('jsonl:data/pool/*.jsonl.gz',)
  config.pool.max_bytes = 0
  config.pool.length = 256
  config.pool.vocab_size = 4_096
  config.targets.tasks = tuple(f'data/study/{name}.jsonl' for name in TARGETS)
  config.targets.folder = 'data/benchmarks'
  config.targets.max_examples = 512
  config.targets.breadth = 1.0
  config.model.width, config.model.mlp_width, config.model.init_std = 128, 512, 0.05
  config.proxies.model.init_std = 0.1
  config.proxies.epochs = 0.5
  config.proxies.train.batch_size = 8
  config.pretraining.train.update(_TRAINING)
  config.selection.examples, config.selection.epochs = 4_880, 8
  config.selection.targets = ('+'.join(TARGETS),)
  config.evaluation.tasks = ('targets', 'piqa', 'winograd', 'trivia_qa', 'data/benchmarks/blimp_sample.jsonl')
  config.evaluation.max_items = 1_000
  config.plan.topology, config.plan.rows = 'v5e:1x1', 185_114
  config.update_from_flattened_dict(known[arm])
  return config
