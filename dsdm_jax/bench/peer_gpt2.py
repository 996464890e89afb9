"""Trains GPT-2 of transformers, in a process of its own; started by `bench.peers` with a Python that has it.

`python peer_gpt2.py CONFIG.json`: for each line of input takes one step and prints what it took. Imports nothing of
this project. A step does what one of the other side does: loss, gradient, clip by the global norm, AdamW with weight
decay on matrices alone, in PyTorch's fused form. No dropout.
"""

import json
import logging
import sys
import time
from typing import Any

import torch
from peer_model import gpt2


def main(config: dict[str, Any]) -> None:
  logging.disable(logging.INFO)
  model = gpt2(config, use_cache=False, bos_token_id=0, eos_token_id=0, attn_implementation=config['attention'])
  model.train()
  parameters = list(model.parameters())
  optimizer = torch.optim.AdamW(
    [
      {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': config['weight_decay']},
      {'params': [p for p in parameters if p.ndim == 1], 'weight_decay': 0.0},
    ],
    lr=config['learning_rate'], betas=(config['adam_b1'], config['adam_b2']), eps=config['adam_eps'], fused=True,
  )  # fmt: skip
  tokens = torch.randint(0, config['vocab'], (config['batch'], config['length']))
  for _ in sys.stdin:
    began, used = time.perf_counter(), time.process_time()
    optimizer.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, config['gradient_clip'])
    optimizer.step()
    loss.item()
    spent = {'seconds': time.perf_counter() - began, 'cpu_s': time.process_time() - used}
    print(json.dumps(spent | {'parameters': sum(p.numel() for p in parameters)}), flush=True)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
