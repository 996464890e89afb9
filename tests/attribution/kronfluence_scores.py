"""EK-FAC scores by kronfluence, in a process of its own: `python kronfluence_scores.py IN.npz OUT.npz`.

Reads weights of a small model and tokens, and writes kronfluence's scores [N, T] with its heuristic damping, a tenth of
the mean eigenvalue of each matrix. Needs requirements-peers.txt and nothing of this project.
"""

import sys
import tempfile

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import nn


class Model(nn.Module):
  """Tokens [B, L] → logits [B, L, V]: a constant embedding, one hidden layer, logits; each token sees itself alone."""

  def __init__(self, given):
    super().__init__()
    self.register_buffer('embedding', torch.as_tensor(given['embedding']))
    self.inner = nn.Linear(*given['inner'].shape, bias=False)
    self.outer = nn.Linear(*given['outer'].shape, bias=False)
    for name in ('inner', 'outer'):
      getattr(self, name).weight.data = torch.as_tensor(given[name].T.copy())

  def forward(self, tokens):
    return self.outer(torch.tanh(self.inner(self.embedding[tokens])))


class MeanMargin(Task):
  def compute_measurement(self, batch, model):
    (tokens,) = batch
    logits = model(tokens)[:, :-1]
    right = torch.arange(logits.shape[-1])[None, None] == tokens[:, 1:, None]
    others = torch.logsumexp(logits.masked_fill(right, -torch.inf), dim=-1)
    return (torch.where(right, logits, 0.0).sum(-1) - others).mean(-1).sum()

  def compute_train_loss(self, batch, model, sample=False):
    return self.compute_measurement(batch, model)

  def get_attention_mask(self, batch):
    (tokens,) = batch
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0  # predicts nothing: without a gradient it is in none of our covariances
    return mask


def main(source, destination):
  given = np.load(source)
  rows, targets = (
    torch.utils.data.TensorDataset(torch.as_tensor(given[key].astype(np.int64))) for key in ('tokens_NL', 'tokens_TL')
  )
  task = MeanMargin()
  with tempfile.TemporaryDirectory() as folder:
    analyzer = Analyzer('parity', prepare_model(Model(given), task), task, cpu=True, output_dir=folder)
    arguments = FactorArguments(strategy='ekfac', use_empirical_fisher=True)
    analyzer.fit_all_factors('factors', rows, per_device_batch_size=20, factor_args=arguments)
    analyzer.compute_pairwise_scores(
      'scores', 'factors', targets, rows, per_device_query_batch_size=len(targets), per_device_train_batch_size=20,
      score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    np.savez(destination, score_NT=analyzer.load_pairwise_scores('scores')['all_modules'].numpy().T)


if __name__ == '__main__':
  main(*sys.argv[1:])
