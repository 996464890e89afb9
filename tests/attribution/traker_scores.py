"""Scores by traker, in a process of its own: `python traker_scores.py IN.npz OUT.npz`.

Reads weights of a small model at C checkpoints, its ±1 projections, tokens and λ, and writes traker's scores [N, T].
Needs requirements-peers.txt and nothing of this project.
"""

import sys
import tempfile

import numpy as np
import torch
from torch import nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import AbstractProjector
from trak.utils import vectorize


class Model(nn.Module):
  """Tokens [B, L] → logits [B, L, V]: embedding, one hidden layer, logits; each token sees itself alone."""

  def __init__(self, vocab, width, hidden):
    super().__init__()
    self.embedding = nn.Parameter(torch.zeros(vocab, width))
    self.inner = nn.Parameter(torch.zeros(width, hidden))
    self.outer = nn.Parameter(torch.zeros(hidden, vocab))

  def forward(self, tokens):
    return torch.tanh(self.embedding[tokens] @ self.inner) @ self.outer


class MeanMargin(AbstractModelOutput):
  def __init__(self):
    pass

  @staticmethod
  def get_output(model, weights, buffers, tokens):
    logits = torch.func.functional_call(model, (weights, buffers), tokens[None, :-1])[0]
    right = torch.arange(logits.shape[-1])[None] == tokens[1:, None]
    others = torch.logsumexp(logits.masked_fill(right, -torch.inf), dim=-1)
    return (torch.where(right, logits, 0.0).sum(-1) - others).mean()

  def get_out_to_loss_grad(self, model, weights, buffers, batch):
    (tokens,) = batch
    logits = torch.func.functional_call(model, (weights, buffers), tokens[:, :-1])
    probability = torch.softmax(logits, -1).gather(-1, tokens[:, 1:, None])[..., 0]
    return (1 - probability.mean(-1, keepdim=True)).detach()


class Given(AbstractProjector):
  """The projection that the other side uses: a matrix of its own for each checkpoint."""

  def __init__(self, projection_CJW):
    dimension, width = projection_CJW.shape[1:]
    super().__init__(grad_dim=width, proj_dim=dimension, seed=0, proj_type='rademacher', device='cpu')
    self._projection_CJW = torch.as_tensor(projection_CJW)

  def project(self, grads, model_id):
    return vectorize(grads, device='cpu') @ self._projection_CJW[model_id].T

  def free_memory(self):
    pass


def main(source, destination):
  given = np.load(source)
  rows, targets = (torch.as_tensor(given[key].astype(np.int64)) for key in ('tokens_NL', 'tokens_TL'))
  vocab, width = given['embedding_C'].shape[1:]
  model = Model(vocab, width, given['inner_C'].shape[2])
  states = [
    {key: torch.as_tensor(given[f'{key}_C'][c]) for key in ('embedding', 'inner', 'outer')}
    for c in range(len(given['embedding_C']))
  ]
  with tempfile.TemporaryDirectory() as folder:
    traker = TRAKer(
      model=model, task=MeanMargin(), train_set_size=len(rows), save_dir=folder, device='cpu',
      projector=Given(given['projection_CJW']), use_half_precision=False, lambda_reg=float(given['damping']),
      logging_level=50,
    )  # fmt: skip
    for c, state in enumerate(states):
      traker.load_checkpoint(state, model_id=c)
      traker.featurize(batch=(rows,), num_samples=len(rows))
    traker.finalize_features()
    for c, state in enumerate(states):
      traker.start_scoring_checkpoint('parity', state, c, num_targets=len(targets))
      traker.score(batch=(targets,), num_samples=len(targets))
    np.savez(destination, score_NT=np.array(traker.finalize_scores('parity')))


if __name__ == '__main__':
  main(*sys.argv[1:])
