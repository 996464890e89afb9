"""From a lab's model, corpus and evaluation to documents with scores, and to a model that lm-evaluation-harness opens.

    pip install 'lm_eval[hf]'
    python examples/whole_way.py WORKDIR --model HuggingFaceTB/SmolLM2-135M \
      --corpus 'corpus/*.parquet' --documents 'documents/*.jsonl.gz' --task arc_easy

MODEL is a folder of Hugging Face or a hub id, with its tokenizer.json. The corpus has the columns `text` and `meta`,
with an `id` and a `source` inside; the documents are dolma's. Without these flags, a random model, small files and a
local task stand in: a minute on a laptop, without a network.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from dsdm_jax import cli, pipeline
from dsdm_jax.config import schema


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Returns the harness's results for the exported model."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('workdir', type=Path)
  parser.add_argument('--model')
  parser.add_argument('--corpus')
  parser.add_argument('--documents')
  parser.add_argument('--task')
  flags = parser.parse_args(argv)
  workdir, tasks = flags.workdir, ''
  c = schema.config_dict()
  if flags.model is None:
    flags.model, flags.corpus, flags.documents, flags.task, tasks = stand_ins(
      workdir.with_name(f'{workdir.name}-inputs')
    )
    c.pool.length, c.targets.max_examples, c.features.dimension, c.selection.examples = 64, 16, 128, 32
    c.pretraining.train.batch_size, c.features.shard_rows, c.pretraining.seeds = 16, 512, 1

  # The corpus: documents keep their own ids, and the model's own vocabulary makes the rows.
  c.pool.sources = (f'parquet:{flags.corpus} | id=meta.id | source=meta.source', f'jsonl:{flags.documents}')
  c.pool.vocabulary, c.pool.max_bytes = f'{flags.model}/tokenizer.json', 0
  # The target: what the harness asks, from the task's training split. Its validation split is evaluated.
  c.targets.tasks, c.targets.folder = (f'lm_eval:{flags.task}',), tasks
  c.evaluation.tasks = ('targets', f'lm_eval:{flags.task}:validation')
  # The proxy is the model as it is. The final models continue from it, on DsDm's choice or on random rows.
  c.model.weights = c.proxies.model.weights = flags.model
  c.pretraining.train.learning_rate = 3e-4  # for fine-tuning; the default is for models from scratch
  c.proxies.count, c.proxies.epochs, c.selection.methods = 1, 0.0, ('dsdm', 'random')
  pipeline.run(c, workdir)

  # One record a document, under its own id: as Parquet, and beside dolma's files as attributes that its mixer reads.
  for form in ('parquet', 'dolma'):
    export('documents', '--workdir', str(workdir), '--format', form, '--out', f'{workdir}-{form}')
  # The model that was trained on the choice, opened by transformers and asked by the harness.
  exported = f'{workdir}-model'
  export('model', '--workdir', str(workdir), '--arm', 'dsdm', '--seed', '0', '--out', exported)
  import torch
  from lm_eval import simple_evaluate
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=tasks or None, include_defaults=not tasks)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  options = {'pretrained': exported, 'dtype': 'float32', 'device': device}
  found = simple_evaluate('hf', model_args=options, tasks=[flags.task], task_manager=manager, bootstrap_iters=0)
  return found['results']


def export(*arguments: str) -> None:
  if code := cli.main(['export', *arguments]):
    raise SystemExit(code)


def stand_ins(folder: Path) -> tuple[str, str, str, str, str]:
  """Writes a random Llama with a tokenizer, texts and a task: (model, corpus, documents, task, folder of tasks)."""
  import jax
  import pyarrow as pa
  import pyarrow.parquet as pq
  import tokenizers
  from flax import nnx

  from dsdm_jax.lm import decoder, hugging_face, partition

  folder.mkdir(parents=True, exist_ok=True)
  words = 'adding tuple index value list string count returns empty first last copy sorted keys each item'.split()
  texts = [' '.join(words[(i * j + i) % len(words)] for j in range(60)) + f' {i}.' for i in range(300)]
  metas = [{'id': f'doc-{i}', 'source': ('web', 'books')[i % 2]} for i in range(len(texts))]
  records = [{'text': text, 'meta': meta} for text, meta in zip(texts[:200], metas, strict=False)]
  pq.write_table(pa.Table.from_pylist(records), folder / 'corpus.parquet')
  with gzip.open(folder / 'documents.jsonl.gz', 'wt') as file:
    file.writelines(
      json.dumps({'text': text, **meta}) + '\n' for text, meta in zip(texts[200:], metas[200:], strict=True)
    )

  (folder / 'model').mkdir(exist_ok=True)
  tokenizer = tokenizers.ByteLevelBPETokenizer()
  tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=['<|endoftext|>'], show_progress=False)
  tokenizer.save(str(folder / 'model' / 'tokenizer.json'))
  config = schema.config_dict(schema.Model)
  config.update({'layers': 2, 'width': 48, 'heads': 3, 'kv_heads': 1, 'mlp_width': 96, 'positions': 'rope'})
  config.update({'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'init_std': 0.1})
  size = tokenizer.get_vocab_size()
  params = nnx.state(decoder.build(config, size, 64, nnx.Rngs(0)), nnx.Param)
  named = {partition.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
  hugging_face.write(folder / 'model', config, hugging_face.their_config(config, size, 64), named)

  lines = [
    json.dumps(
      {'question': f'{words[i % 16]} then', 'choices': [words[(i * k + 1) % 16] for k in (3, 5)], 'gold': i % 2}
    )
    for i in range(80)
  ]
  splits = {'train': lines[:40], 'validation': lines[40:60], 'test': lines[60:]}
  for split, of_split in splits.items():
    (folder / f'{split}.jsonl').write_text('\n'.join(of_split) + '\n')
  task = {
    'task': 'next_word',
    'dataset_path': 'json',
    'output_type': 'multiple_choice',
    'doc_to_text': '{{question}}',
    'doc_to_choice': 'choices',
    'doc_to_target': 'gold',
    'training_split': 'train',
    'validation_split': 'validation',
    'test_split': 'test',
    'dataset_kwargs': {'data_files': {split: f'{folder}/{split}.jsonl' for split in splits}},
    'metric_list': [{'metric': 'acc', 'aggregation': 'mean', 'higher_is_better': True}],
  }
  (folder / 'task.yaml').write_text(json.dumps(task))  # JSON is YAML
  return f'{folder}/model', f'{folder}/corpus.parquet', f'{folder}/documents.jsonl.gz', 'next_word', str(folder)


if __name__ == '__main__':
  print(json.dumps(main(), indent=2, default=str))
