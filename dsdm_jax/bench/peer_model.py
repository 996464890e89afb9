"""GPT-2 of transformers with random weights, for the peers beside; they run where this package is not installed."""

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(config: dict[str, Any], **options: Any) -> GPT2LMHeadModel:
  """The model of `bench.peers`' `config`, without dropout, on as many threads as it says."""
  torch.set_num_threads(config['threads'])
  torch.manual_seed(0)
  return GPT2LMHeadModel(
    GPT2Config(
      vocab_size=config['vocab'], n_positions=config['length'], n_embd=config['width'], n_layer=config['layers'],
      n_head=config['heads'], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **options,
    )
  )  # fmt: skip
