"""Runs another package for `bench.peers`, in a process of its own with a Python that has the package.

`python peer_process.py NAME CONFIG` runs one batch for each line of input and prints its seconds as JSON. NAME is
traker, bergson, gpt2_eager or gpt2_sdpa. It imports nothing of this project.
"""

import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Config = dict[str, Any]


def gpt2(config: Config, **options: Any) -> Any:
  """GPT-2 of transformers with random weights and without dropout."""
  from transformers import GPT2Config, GPT2LMHeadModel

  shape = {'vocab_size': config['vocab'], 'n_positions': config['length'], 'n_embd': config['width']}
  shape |= {'n_layer': config['layers'], 'n_head': config['heads']}
  dropout = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), 0.0)
  return GPT2LMHeadModel(GPT2Config(**shape, **dropout, **options))


def train_gpt2(config: Config) -> None:
  """One training step: loss, gradient, clip by the global norm, fused AdamW with weight decay on matrices only."""
  model = gpt2(config, use_cache=False, bos_token_id=0, eos_token_id=0, attn_implementation=config['attention'])
  model.train()
  parameters = list(model.parameters())
  groups = [
    {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': config['weight_decay']},
    {'params': [p for p in parameters if p.ndim == 1], 'weight_decay': 0.0},
  ]
  betas = config['adam_b1'], config['adam_b2']
  optimizer = torch.optim.AdamW(groups, lr=config['learning_rate'], betas=betas, eps=config['adam_eps'], fused=True)
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


def bergson(config: Config) -> None:
  """Features of a batch, set up like bergson's own workers: weights are frozen, the embedding is the leaf."""
  from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
  from datasets import Dataset

  model = gpt2(config)
  model.requires_grad_(False)
  model.get_input_embeddings().requires_grad_(True)
  tokens = torch.randint(0, config['vocab'], (config['batch'], config['length']))
  data = Dataset.from_dict({'input_ids': tokens.tolist()})
  side = math.isqrt(config['j'] // (4 * config['layers']))  # a block of GPT-2 has four linear layers
  with tempfile.TemporaryDirectory() as folder:
    settings = IndexConfig(run_path=f'{folder}/index', projection_dim=side, loss_fn='log_odds')
    settings.partial_run_path.mkdir()  # for the losses
    processor = GradientProcessor(projection_dim=side)
    collector = InMemoryCollector(model=model.base_model, processor=processor, cfg=settings, data=data)
    batches = [list(range(config['batch']))]
    computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=settings)
    for _ in sys.stdin:
      collector.setup()
      began = time.perf_counter()
      computer.run_with_collector_hooks()
      seconds = time.perf_counter() - began
      width = sum(gradient.shape[1] for gradient in collector.gradients.values())
      print(json.dumps({'seconds': seconds, 'j': width}), flush=True)


class Block(nn.Module):
  """A pre-norm block whose attention is written out: under vmap, PyTorch's own attention falls back to a loop."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    q, k, v = self.qkv(self.norms[0](x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    y = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
    x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
    return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
  """The architecture of the small model of `bench.features`: learned positions, tied embeddings."""

  def __init__(self, layers: int, width: int, heads: int, vocab: int, length: int):
    super().__init__()
    self.embedding = nn.Parameter(0.02 * torch.randn(vocab, width))
    self.positions = nn.Parameter(0.02 * torch.randn(length, width))
    self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
    self.norm = nn.LayerNorm(width)

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    x = self.embedding[tokens] + self.positions[: tokens.shape[1]]
    for block in self.blocks:
      x = block(x)
    return self.norm(x) @ self.embedding.T


def traker(config: Config) -> None:
  """Features of a batch with the projector that traker has on CPU."""
  from trak import TRAKer
  from trak.modelout_functions import AbstractModelOutput
  from trak.projectors import BasicProjector, ProjectionType

  class MeanMargin(AbstractModelOutput):
    def __init__(self) -> None:
      pass

    @staticmethod
    def get_output(model: nn.Module, weights: Any, buffers: Any, tokens: torch.Tensor) -> torch.Tensor:
      logits = torch.func.functional_call(model, (weights, buffers), tokens[None])[0, :-1]
      right = torch.arange(logits.shape[-1])[None] == tokens[1:, None]
      others = torch.logsumexp(logits.masked_fill(right, -torch.inf), dim=-1)
      return (torch.where(right, logits, 0.0).sum(-1) - others).mean()

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: Any) -> torch.Tensor:
      return torch.ones(len(batch[0]), 1)

  model = Decoder(*(config[key] for key in ('layers', 'width', 'heads', 'vocab', 'length')))
  parameters = sum(p.numel() for p in model.parameters())
  batch, j = config['batch'], config['j']
  options = {'seed': 0, 'proj_type': ProjectionType.rademacher, 'device': 'cpu', 'dtype': torch.float32}
  projector = BasicProjector(grad_dim=parameters, proj_dim=j, block_size=min(j, 200), **options)
  with tempfile.TemporaryDirectory() as folder:
    options = {'device': 'cpu', 'save_dir': folder, 'use_half_precision': False, 'logging_level': 50}
    size = batch * config['repeats']
    scorer = TRAKer(model=model, task=MeanMargin(), train_set_size=size, projector=projector, **options)
    scorer.load_checkpoint(model.state_dict(), model_id=0)
    for _ in sys.stdin:
      tokens = torch.randint(0, config['vocab'], (batch, config['length']))
      began = time.perf_counter()
      scorer.featurize(batch=(tokens,), num_samples=batch)
      print(json.dumps({'seconds': time.perf_counter() - began}), flush=True)


if __name__ == '__main__':
  peers: dict[str, Callable[[Config], None]] = {'traker': traker, 'bergson': bergson}
  peers |= {'gpt2_eager': train_gpt2, 'gpt2_sdpa': train_gpt2}
  given = json.loads(sys.argv[2])
  logging.disable(logging.INFO)
  torch.set_num_threads(given['threads'])
  torch.manual_seed(0)
  peers[sys.argv[1]](given)
