"""The study of docs/earlier_study.md: DsDm against baselines and variants on mixed real text.

Run all arms, or one arm alone; the first command resumes where it stopped:

    python -m dsdm_jax.study run --config=configs/study_mixed_text.py --workdir=runs/mixed
    python -m dsdm_jax.main --config=configs/study_mixed_text.py:cheap --workdir=runs/cheap

Inputs: text at `data/pool/*.jsonl.gz` (fields `id`, `source`, `text`) and questions at `data/benchmarks/*.jsonl`, in
LLM-Foundry's shapes. Four tasks are targets and three are not.

Hardware and time: two CPU cores, 1 h 57 min for the arm `base`; docs/results/tables.md has the time of every arm.

Result: on the mix of three targets, DsDm has a log-probability 0.24 [0.20, 0.28] nats per token higher than random
data. Baselines are not at their best settings there, and the compute multipliers depend on the ladder: see "Read with
care" in docs/earlier_study.md.

Every arm trains on the same number of tokens. Targeted arms see a subset four times, as in the paper; random data is
taken four times and once.
"""

from dsdm_jax.configs import base

PAPER_MIX = 'lambada+squad_xquad+jeopardy'
_DSDM = {'selection.methods': ('dsdm',), 'pretraining.seeds': 3, 'ladder.rungs': ()}
_ONE_PROXY = {**_DSDM, 'pretraining.seeds': 5, 'proxies.count': 1}
_NARROW = {'proxies.model.width': 32, 'proxies.model.mlp_width': 128}
_NARROWER = {'proxies.model.width': 16, 'proxies.model.mlp_width': 64}
_CHEAPEST = {**_NARROWER, 'proxies.model.layers': 1, 'proxies.epochs': 0.5}
_SINGLE = {**_DSDM, 'selection.targets': ('lambada', 'squad_xquad', 'jeopardy', 'bigbench_cs_algorithms')}
_OF_TEXT = ('bottom', 'classifier', 'fasttext', 'dsir', 'bm25', 'bm25_max', 'tfidf', 'lsa', 'minhash')
_OF_PROXIES = ('semdedup', 'embedding', 'gradient', 'gradient_cosine', 'hybrid', 'hybrid_embedding')
_OF_LIKELIHOOD = ('perplexity_low', 'perplexity_middle', 'perplexity_high', 'color_filter')

# The most important arms come first, so that an interrupted study has them.
ARMS: dict[str, dict] = {
  'base': {
    'selection.methods': ('dsdm', 'random', 'random_one_epoch'),
    'pretraining.seeds': 5,
    'ladder.rungs': ('1', '2', '4'),
  },
  'baselines_of_text': {**_DSDM, 'selection.methods': _OF_TEXT},
  'baselines_of_proxies': {**_DSDM, 'selection.methods': _OF_PROXIES},
  'baselines_of_likelihood': {**_DSDM, 'selection.methods': _OF_LIKELIHOOD},
  'single': _SINGLE,
  'single_baselines': {**_SINGLE, 'selection.methods': ('classifier', 'dsir', 'bm25')},
  'cheap': {**_ONE_PROXY, **_NARROW},
  'cheaper': {**_ONE_PROXY, **_NARROWER},
  'cheapest': {**_ONE_PROXY, **_CHEAPEST},
  # The same proxy for the methods that need one.
  'cheapest_baselines': {**_ONE_PROXY, **_CHEAPEST, 'selection.methods': (*_OF_PROXIES, 'less', *_OF_LIKELIHOOD)},
  # The paper's projection and Gram matrix, but not its J, number of proxies or mean of raw scores.
  'paper': {**_DSDM, 'features.projection': 'dense', 'features.dimension': 512, 'datamodel.gram': 'full'},
  'gram_full': {**_DSDM, 'datamodel.gram': 'full'},
  'diverse': {**_DSDM, 'selection.methods': ('dsdm_greedy', 'dsdm_gumbel')},
  'proxies_1': {**_DSDM, 'proxies.count': 1},
  'proxies_4': {**_DSDM, 'proxies.count': 4},
  'proxy_half_epoch': {**_DSDM, 'proxies.epochs': 0.5},
  'J_512': {**_DSDM, 'features.dimension': 512},
  'damping_0.01': {**_DSDM, 'datamodel.damping': 0.01},
  'damping_1': {**_DSDM, 'datamodel.damping': 1.0},
  'epochs_2': {**_DSDM, 'selection.examples': 3_072, 'selection.epochs': 2},
  'epochs_8': {**_DSDM, 'selection.examples': 768, 'selection.epochs': 8},
  # Retrained proxies. `dsdm/again` takes one seed of each of these arms: the seed of the arm's number.
  'again_1': {**_DSDM, 'proxies.seed': 1},
  'again_2': {**_DSDM, 'proxies.seed': 2},
}


def get_config(arm='base'):
  """The config of one arm: `configs/study_mixed_text.py:cheap`."""
  if arm not in ARMS:
    raise ValueError(f'{arm!r} is not an arm of the study; its arms are {", ".join(ARMS)}')
  config = base.get_config()
  config.pool.sources = ('jsonl:data/pool/*.jsonl.gz',)
  config.pool.max_bytes = 9_000_000
  config.pool.max_document_bytes = 8_192
  config.pool.vocab_size = 2_048
  config.targets.tasks = ('lambada', 'squad_xquad', 'jeopardy', 'bigbench_cs_algorithms')
  config.targets.folder = 'data/benchmarks'
  config.targets.max_examples = 512
  config.model.width, config.model.mlp_width = 96, 384
  config.model.positions = 'rope'
  config.model.init_std = 0.1
  for training in (config.proxies.train, config.pretraining.train):
    training.batch_size = 32
    training.learning_rate = 1e-2
  config.proxies.epochs = 1.0
  config.features.projection = 'two_sided'  # some arms need stored features
  config.selection.examples = 1_536
  config.selection.targets = (PAPER_MIX,)
  config.evaluation.tasks = ('targets', 'piqa', 'winograd', 'trivia_qa')
  config.evaluation.max_items = 400
  config.update_from_flattened_dict(ARMS[arm])
  return config
