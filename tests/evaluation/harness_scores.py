"""Scores by lm-evaluation-harness, in a process of its own: `python harness_scores.py IN.npz TASKS.json OUT.json`.

Reads weights of a small GPT-2 under transformers' names, its alphabet (a character is a token), and tasks; writes for
each task and item the log-probability and greediness of every answer, acc and acc_norm. Needs requirements-peers.txt
and nothing of this project.
"""

import json
import sys
import tempfile

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def tokenizer(alphabet):
  vocabulary = {'<end>': 0, **{character: index for index, character in enumerate(alphabet, 1)}}
  plain = Tokenizer(models.WordLevel(vocabulary, unk_token='<end>'))
  plain.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
  return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token='<end>', unk_token='<end>')


def model(arrays):
  shape = {key: int(arrays[key]) for key in ('n_embd', 'n_layer', 'n_head', 'n_inner', 'n_positions', 'vocab_size')}
  found = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
  weights = {key: torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith('transformer.')}
  missing, unexpected = found.load_state_dict(weights, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}, (missing, unexpected)  # tied to the embedding
  return found.eval()


def main(weights_file, tasks_file, out_file):
  arrays = np.load(weights_file)
  language_model = HFLM(
    pretrained=model(arrays),
    tokenizer=tokenizer(str(arrays['alphabet'])),
    batch_size=7,
    device='cpu',
    max_length=int(arrays['n_positions']),
  )
  with open(tasks_file) as file:
    tasks = json.load(file)
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
  with open(out_file, 'w') as file:
    json.dump(scores, file)


if __name__ == '__main__':
  main(*sys.argv[1:])
