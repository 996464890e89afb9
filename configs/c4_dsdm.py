"""The paper's experiment: DsDm on C4, with 1.3B final models.

216,948,746 candidates of 1,024 tokens, four 125M proxies, J = 16,384. Plan it first, on any machine with libtpu
(requirements-tpu.txt), then run it:

    python -m dsdm_jax.main --config=configs/c4_dsdm.py --stage=plan
    python -m dsdm_jax.main --config=configs/c4_dsdm.py --workdir=/shared/run

Hardware: a slice of 256 to 1,024 TPU chips; batches are the paper's. It has not been run as a whole. docs/scale.md has
the plan: 1.6 to 4.9 hours on 1,024 chips of v5p (modelled, not measured).

The config does not download its inputs. It needs:

    C4 without the blocklist, as TFDS prepares it under the name c4/en.noblocklist
    data/pythia/tokenizer.json, of any Pythia model on Hugging Face
    data/llm_foundry/, LLM-Foundry's JSONL files of targets and benchmarks (docs/benchmarks.md)
    data/tfds/, SQuAD as TFDS prepares it

Differences from the paper, and choices where the paper is silent:

- Features are two-sided, which makes this scale affordable. The paper's own are `features.projection=dense`.
- No arm takes a row of a document that contains text of a target or a benchmark.
- SQuAD has the paper's 23,107 items if data/tfds has it; otherwise LLM-Foundry's file is split into halves.
"""

from dsdm_jax.configs import paper


def get_config():
  config = paper.two_sided(paper.get_config(), batch_size=4_096, shard_rows=65_536)
  config.pool.sources = ('tfds:c4/en.noblocklist',)
  config.pool.drop_duplicates = False  # C4 has none, and the paper dropped none
  config.pool.vocabulary = 'data/pythia/tokenizer.json'
  config.pool.vocab_size = 50_277  # of that tokenizer
  config.targets.tasks = ('lambada', 'squad', 'jeopardy', 'bigbench_cs_algorithms')
  config.targets.folder = 'tfds:data/tfds | data/llm_foundry'
  config.targets.max_examples = 24_000  # all of them
  # The paper trains its large models for this mix, the mean of raw scores.
  config.selection.targets = ('jeopardy+squad+lambada',)
  config.selection.methods = ('dsdm', 'classifier', 'dsir', 'semdedup_one_epoch', 'random_one_epoch')
  config.pretraining.seeds = 1  # as the paper: one run for each arm, too few for verdicts
  config.ladder.rungs = ('1', '2')  # Random, and Random with 1.8 billion parameters at twice the compute
  config.ladder.step, config.ladder.seeds = 1.0, 1
  config.evaluation.tasks = (
    'targets', 'copa', 'openbook_qa', 'piqa', 'cbt', 'hellaswag', 'winogrande', 'boolq', 'coqa', 'news_qa',
    'bb_copy_logic', 'bb_dyck_languages', 'bb_operators', 'arc_easy', 'bb_qa_wikidata', 'trivia_qa',
  )  # fmt: skip
  config.evaluation.batch_size = 1_024
  config.model.remat = False  # activations of a row and a gathered model fit into 95 GB
  config.mesh.replicas = 32  # 32 devices split the weights of each: all widths divide, and parts fill registers
  config.plan.topology = 'v5p:8x8x16'
  config.plan.price_per_chip_hour = 4.2  # v5p on demand
  return config
