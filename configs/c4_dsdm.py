"""The paper's experiment: C4, 216,948,746 candidates of 1,024 tokens, four 125M proxies, J = 16,384, 1.3B finals.

See what it takes, on any machine with libtpu (requirements-tpu.txt), before it starts:

    python -m dsdm_jax.main --config=configs/c4_dsdm.py --stage=plan

It needs three things that it does not fetch:

    C4 without the blocklist, as TFDS prepares it under the name c4/en.noblocklist
    data/pythia/tokenizer.json, of any Pythia model on Hugging Face
    data/llm_foundry/, LLM-Foundry's JSONL files of targets and benchmarks (docs/benchmarks.md), and in data/tfds/ SQuAD
      as TFDS prepares it

It has not been run as a whole. Batches are the paper's and suit slices of 256 to 1,024 chips; docs/scale.md has the
plans. Features are two-sided, which is what makes the scale affordable; the paper's own are
`features.projection=dense`. Where the paper is silent, or cannot be followed:

- documents that hold text of a target or a benchmark are dropped, so that there are some rows fewer than the paper's;
- SQuAD has the paper's 23,107 items where data/tfds holds it; LLM-Foundry's file would be split into halves;
- SemDeDup keeps what is no near duplicate (the paper: a fifth of the pool).
"""

from dsdm_jax.configs import paper


def get_config():
  config = paper.two_sided(paper.get_config(), batch_size=4_096, shard_rows=65_536)
  config.pool.sources = ('tfds:c4/en.noblocklist',)
  config.pool.leakage_benchmarks = ('evaluated',)
  config.pool.drop_duplicates = False  # C4 has none, and the paper dropped none
  config.pool.vocabulary = 'data/pythia/tokenizer.json'
  config.pool.vocab_size = 50_277  # of that tokenizer
  config.targets.tasks = ('lambada', 'squad', 'jeopardy', 'bigbench_cs_algorithms')
  config.targets.folder = 'tfds:data/tfds | data/llm_foundry'
  config.targets.max_examples = 24_000  # all there are
  # The mix that the paper's large models are trained for: the mean of raw scores.
  config.selection.targets = ('jeopardy+squad+lambada',)
  config.selection.methods = ('dsdm', 'classifier', 'dsir', 'semdedup_one_epoch', 'random_one_epoch')
  config.pretraining.seeds = 1  # as the paper: one run for each arm
  config.ladder.rungs = ('1', '2')  # Random, and Random with 1.8 billion parameters at twice the compute
  config.ladder.seeds = 1
  config.evaluation.tasks = (
    'targets', 'copa', 'openbook_qa', 'piqa', 'cbt', 'hellaswag', 'winogrande', 'boolq', 'coqa', 'news_qa',
    'bb_copy_logic', 'bb_dyck_languages', 'bb_operators', 'arc_easy', 'bb_qa_wikidata', 'trivia_qa',
  )  # fmt: skip
  config.evaluation.batch_size = 1_024
  config.plan.topology = 'v5p:8x8x16'
  config.plan.price_per_chip_hour = 4.2  # v5p on demand
  return config
