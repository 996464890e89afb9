"""Featurizes batches with bergson, in a process of its own; started by `bench.peers` with a Python that has it.

`python peer_bergson.py CONFIG.json`: for each line of input featurizes a batch and prints its seconds. Imports nothing
of this project. The model is GPT-2 of transformers, set up as bergson's own workers do: weights frozen, the embedding
the leaf that the backward pass runs to.
"""

import json
import logging
import math
import sys
import tempfile
import time
from typing import Any

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
from datasets import Dataset
from peer_model import gpt2


def main(config: dict[str, Any]) -> None:
  logging.disable(logging.INFO)
  model = gpt2(config)
  model.requires_grad_(False)
  model.get_input_embeddings().requires_grad_(True)
  tokens = torch.randint(0, config['vocab'], (config['batch'], config['length']))
  data = Dataset.from_dict({'input_ids': tokens.tolist()})
  side = math.isqrt(config['j'] // (4 * config['layers']))  # four linear layers in each of GPT-2's blocks
  with tempfile.TemporaryDirectory() as folder:
    settings = IndexConfig(run_path=f'{folder}/index', projection_dim=side, loss_fn='log_odds')
    settings.partial_run_path.mkdir()  # where it leaves the losses
    collector = InMemoryCollector(
      model=model.base_model, processor=GradientProcessor(projection_dim=side), cfg=settings, data=data
    )
    computer = CollectorComputer(model, data, collector=collector, batches=[list(range(config['batch']))], cfg=settings)
    for _ in sys.stdin:
      collector.setup()
      began = time.perf_counter()
      computer.run_with_collector_hooks()
      seconds = time.perf_counter() - began
      width = sum(gradient.shape[1] for gradient in collector.gradients.values())
      print(json.dumps({'seconds': seconds, 'j': width}), flush=True)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
