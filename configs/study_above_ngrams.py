"""The study of docs/results.md: models above n-gram counts on the whole pool of mixed text.

Make the questions, try a setting of the models on random rows, and run all arms. The last command resumes where it
stopped; arms of other machines join its table with `--also='docs/results/above_ngrams/*.json'`:

    python -m dsdm_jax.study items --folder data/benchmarks --out data/study
    python -m dsdm_jax.main --config=configs/study_above_ngrams.py:trial --workdir=runs/trial \
      --config.pretraining.train.learning_rate=1e-3
    python -m dsdm_jax.study run --config=configs/study_above_ngrams.py --workdir=runs/above_ngrams

Inputs: text at `data/pool/*.jsonl.gz` (fields `id`, `source`, `text`), questions at `data/study/*.jsonl`, and
benchmarks at `data/benchmarks/*.jsonl`, in LLM-Foundry's shapes.

Hardware and time: two CPU cores, 14 minutes a model, or 21 minutes for two that train at once on a core each.

Result: on SQuAD and TriviaQA DsDm has a log-probability 0.37 [0.30, 0.45] nats per token higher than random data, and
0.13 [0.07, 0.18] higher than LSA; it loses on most of what was not targeted. Without the prefilter it is at +0.17
[-0.22, 0.57], fastText alone at +0.04 [-0.08, 0.15], DSIR at +0.03 [-0.04, 0.10], and with breadth as a target DsDm is
at +0.21 [0.13, 0.30]. Random rows that are seen once are at +0.25 [0.03, 0.47], and win on what was not targeted. The
other arms are not trained yet (docs/results.md).
"""

from dsdm_jax.configs import recipe

# Models of random rows are above n-gram counts on these, and below them on the other two.
TARGETS = ('squad_cloze', 'trivia_qa_cloze')
UNTARGETED = ('lambada_cloze', 'jeopardy_cloze')
# The best that were tried for random rows; docs/results.md has the losses.
_TRAINING = {
  'optimizer': 'contrib.muon',
  'optimizer_arguments': 'consistent_rms=0.2',
  'batch_size': 8,
  'learning_rate': 8e-3,
}
_THREE = {'pretraining.seeds': 3}
_DSDM = {'selection.methods': ('dsdm',), **_THREE}
# Scores of the whole pool by a proxy that is trained five times as long.
_WHOLE = {'selection.prefilter': '', 'proxies.epochs': 0.5}
# No method that needs scores, so the stages that make them do little.
_UNSCORED = {'selection.prefilter': 'random 1', 'proxies.subset_share': 0.01}
# A model of random rows on an eighth of the tokens.
_TRIAL = {'selection.methods': ('random',), 'selection.epochs': 1, 'pretraining.seeds': 1, **_UNSCORED}
# Proxies like the models.
_LARGE = {
  'proxies.count': 2,
  'proxies.model.layers': 2,
  'proxies.model.width': 128,
  'proxies.model.mlp_width': 512,
  'proxies.model.init_std': 0.05,
  **{f'proxies.train.{key}': value for key, value in _TRAINING.items()},
}

# Named before any of these arms was trained: the first arm against random rows, and against the best baseline without
# a model of docs/earlier_study.md.
PRIMARY = (('dsdm', 'random'), ('dsdm', 'lsa/lsa'))
# The most important arms come first, so that an interrupted study has them.
ARMS: dict[str, dict] = {
  'base': {'selection.methods': ('dsdm', 'random'), **_THREE},
  'lsa': {'selection.methods': ('lsa',), **_THREE, **_UNSCORED},
  'whole': {**_DSDM, **_WHOLE},
  'fasttext': {'selection.methods': ('fasttext',), **_THREE, **_UNSCORED},
  'breadth': {**_DSDM, 'selection.targets': ('+'.join((*TARGETS, 'breadth')),)},
  'one_epoch': {'selection.methods': ('random_one_epoch',), **_THREE, **_UNSCORED},
  'dsir': {'selection.methods': ('dsir',), **_THREE, **_UNSCORED},
  'baselines_of_proxies': {'selection.methods': ('embedding', 'color_filter'), **_THREE, **_WHOLE},
  'gradient': {
    'selection.methods': ('gradient',),
    **_THREE,
    **_WHOLE,
    'features.projection': 'two_sided',
    'features.mode': 'store',
  },
  'hybrid': {'selection.methods': ('hybrid', 'bottom'), **_THREE, **_WHOLE},
  'prefilter_lsa': {**_DSDM, 'selection.prefilter': 'lsa 4'},
  'prefilter_random': {**_DSDM, 'selection.prefilter': 'random 4'},
  'large': {**_DSDM, **_WHOLE, **_LARGE},
  'paper': {
    **_DSDM,
    **_WHOLE,
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
  config.proxies.epochs = 0.1
  config.proxies.train.batch_size = 8
  config.pretraining.train.update(_TRAINING)
  config.selection.examples, config.selection.epochs = 4_880, 8
  config.selection.targets = ('+'.join(TARGETS),)
  config.evaluation.tasks = (
    *('targets', 'piqa', 'winograd', 'data/benchmarks/blimp_sample.jsonl'),
    *(f'data/study/{name}.jsonl' for name in UNTARGETED),
  )
  config.evaluation.max_items = 1_000
  config.plan.topology, config.plan.rows = 'v5e:1x1', 185_114
  config.update_from_flattened_dict(known[arm])
  return config
