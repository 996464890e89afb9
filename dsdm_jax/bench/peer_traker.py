"""Featurizes batches with traker, in a process of its own; started by `bench.peers` with a Python that has it.

`python peer_traker.py CONFIG.json`: for each line of input featurizes a batch and prints its seconds. Imports nothing
of this project.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import BasicProjector, ProjectionType


class Block(nn.Module):
  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
    self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
    self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    parts = self.qkv(self.norms[0](x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = parts  # written out: under vmap PyTorch's own attention falls back to a loop
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    y = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(later, -torch.inf).softmax(-1) @ v
    x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
    return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class Decoder(nn.Module):
  """The architecture of the other side's small model: learned positions, tied embeddings."""

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


def main(config: dict[str, Any]) -> None:
  torch.set_num_threads(config['threads'])
  torch.manual_seed(0)
  model = Decoder(*(config[key] for key in ('layers', 'width', 'heads', 'vocab', 'length')))
  parameters = sum(p.numel() for p in model.parameters())
  batch = config['batch']
  projector = BasicProjector(
    grad_dim=parameters, proj_dim=config['j'], seed=0, proj_type=ProjectionType.rademacher, device='cpu',
    block_size=min(config['j'], 200), dtype=torch.float32,
  )  # fmt: skip
  with tempfile.TemporaryDirectory() as folder:
    traker = TRAKer(
      model=model, task=MeanMargin(), train_set_size=batch * config['repeats'], device='cpu', projector=projector,
      save_dir=folder, use_half_precision=False, logging_level=50,
    )  # fmt: skip
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for _ in sys.stdin:
      tokens = torch.randint(0, config['vocab'], (batch, config['length']))
      began = time.perf_counter()
      traker.featurize(batch=(tokens,), num_samples=batch)
      print(json.dumps({'seconds': time.perf_counter() - began}), flush=True)


if __name__ == '__main__':
  main(json.loads(sys.argv[1]))
