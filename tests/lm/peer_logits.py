"""test_hugging_face.py runs this in an environment with transformers: saves small random models and their logits."""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

NEOX = {'vocab_size': 96, 'hidden_size': 32, 'num_hidden_layers': 1, 'num_attention_heads': 2}
NEOX |= {'intermediate_size': 64, 'max_position_embeddings': 64}
GELU_NEW = {'num_attention_heads': 4, 'use_parallel_residual': False, 'hidden_act': 'gelu_new'}
LLAMA = {'num_attention_heads': 4, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False}


def neox(**keys) -> transformers.GPTNeoXForCausalLM:
  return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX | keys))


MODELS = {
  'gpt2': lambda: transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=96, n_positions=40, n_embd=32, n_layer=2, n_head=4)
  ),
  'pythia': lambda: neox(num_hidden_layers=2, intermediate_size=128),
  'neox_in_a_row': lambda: neox(**GELU_NEW),
  'padded': lambda: neox(vocab_size=104),  # tokens are below 96
  'llama': lambda: transformers.LlamaForCausalLM(
    transformers.LlamaConfig(**NEOX | LLAMA | {'num_hidden_layers': 2, 'intermediate_size': 48})
  ),
}


def main() -> None:
  folder = Path(sys.argv[1])
  for name, build in MODELS.items():
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
      for parameter in model.parameters():  # biases and scales too, which are initialised to 0 and 1
        parameter.add_(0.1 * torch.randn_like(parameter))
      tokens_BL = torch.randint(0, 96, (3, 24))
      logits_BLV = model(tokens_BL).logits
    model.save_pretrained(folder / name, max_shard_size='40KB' if name == 'gpt2' else '1GB')
    np.savez(folder / f'{name}.npz', tokens_BL=tokens_BL.numpy().astype(np.int32), logits_BLV=logits_BLV.numpy())


if __name__ == '__main__':
  main()
