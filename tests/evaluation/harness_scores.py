"""Scores by lm-evaluation-harness, in a process of its own: `python harness_scores.py FOLDER…`.

Each folder has weights of a small GPT-2 under transformers' names (in.npz), the ids of every text that the harness may
ask for (ids.json) and tasks (tasks.json). Writes for each task and item the log-probability and greediness of every
answer, acc and acc_norm (out.json). Needs requirements-peers.txt and nothing of this project.
"""

import json
import os
import sys
import tempfile

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizer


class Table(PreTrainedTokenizer):
  """A tokenizer that knows some texts as a whole, so that the harness splits the ids of a real vocabulary."""

  def __init__(self, ids, size):
    self.ids, self.size = ids, size
    super().__init__(eos_token='0')

  vocab_size = property(lambda self: self.size)

  def get_vocab(self):
    return {str(i): i for i in range(self.size)}

  def _convert_token_to_id(self, token):
    return int(token)

  def encode(self, text, **options):
    return self.ids[text]

  def decode(self, ids, **options):
    return '<end>'


def model(arrays):
  shape = {key: int(arrays[key]) for key in ('n_embd', 'n_layer', 'n_head', 'n_inner', 'n_positions', 'vocab_size')}
  found = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
  weights = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith('transformer.')}
  missing, unexpected = found.load_state_dict(weights, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}, (missing, unexpected)  # tied to the embedding
  return found.eval()


def read(folder, name):
  with open(os.path.join(folder, name)) as file:
    return json.load(file)


def main(folder):
  with np.load(os.path.join(folder, 'in.npz')) as arrays:
    language_model = HFLM(
      pretrained=model(arrays),
      tokenizer=Table(read(folder, 'ids.json'), int(arrays['vocab_size'])),
      batch_size=7,
      device='cpu',
      max_length=int(arrays['n_positions']),
    )
  tasks = read(folder, 'tasks.json')
  with tempfile.TemporaryDirectory() as cache:
    for task in tasks:
      task['dataset_kwargs']['cache_dir'] = cache
    found = simple_evaluate(language_model, tasks=tasks, log_samples=True, bootstrap_iters=0)
  scores = {}
  for task, samples in found['samples'].items():
    scores[task] = [
      {
        'answers': [[float(answer[0][0]), answer[0][1] in (True, 'True')] for answer in sample['resps']],
        'acc': sample['acc'],
        'acc_norm': sample.get('acc_norm'),
      }
      for sample in sorted(samples, key=lambda sample: sample['doc_id'])
    ]
  with open(os.path.join(folder, 'out.json'), 'w') as file:
    json.dump(scores, file)


if __name__ == '__main__':
  for folder in sys.argv[1:]:
    main(folder)
