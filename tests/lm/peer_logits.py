"""test_hugging_face.py runs this in an environment with transformers: saves small random models and their logits.

With a second folder it saves the logits of the models in that folder, on the same tokens.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

COMMON = {'vocab_size': 96, 'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4}
COMMON |= {'intermediate_size': 48, 'max_position_embeddings': 64}
GROUPED = {'num_key_value_heads': 2, 'rms_norm_eps': 1e-3, 'tie_word_embeddings': False}
# The original length is short, so that frequencies of every kind are among the four.
LLAMA3 = {'rope_type': 'llama3', 'rope_theta': 500.0, 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
LLAMA3 |= {'original_max_position_embeddings': 32}
GEMMA = {'head_dim': 16, 'query_pre_attn_scalar': 16, 'num_key_value_heads': 2, 'sliding_window': 24}
GEMMA3_TYPES = ['sliding_attention', 'full_attention', 'sliding_attention']
GEMMA3_ROTARY = {
  'full_attention': {'rope_type': 'linear', 'factor': 8.0, 'rope_theta': 1e6},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 1e4},
}


def of(name: str, **keys):
  config = getattr(transformers, f'{name}Config' if name != 'Gemma3' else 'Gemma3TextConfig')(**COMMON | keys)
  return getattr(transformers, f'{name}ForCausalLM')(config)


def neox(**keys) -> transformers.GPTNeoXForCausalLM:
  return of('GPTNeoX', num_attention_heads=2, intermediate_size=64, **keys)


MODELS = {
  'gpt2': lambda: transformers.GPT2LMHeadModel(
    transformers.GPT2Config(vocab_size=96, n_positions=40, n_embd=32, n_layer=2, n_head=4)
  ),
  'pythia': neox,
  'neox_in_a_row': lambda: neox(use_parallel_residual=False, hidden_act='gelu_new', layer_norm_eps=1e-3),
  'padded': lambda: neox(vocab_size=104),  # tokens are below 96
  'llama': lambda: of('Llama', **GROUPED),
  'llama3': lambda: of('Llama', **GROUPED | {'tie_word_embeddings': True}, head_dim=16, rope_parameters=LLAMA3),
  'llama_biased': lambda: of('Llama', attention_bias=True, mlp_bias=True),
  'mistral': lambda: of('Mistral', **GROUPED, head_dim=16, sliding_window=24),
  'qwen2': lambda: of('Qwen2', **GROUPED, head_dim=16),
  'qwen3': lambda: of('Qwen3', **GROUPED, head_dim=16),
  'olmo2': lambda: of('Olmo2', **GROUPED, head_dim=16),
  'gemma2': lambda: of('Gemma2', **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
  'gemma3': lambda: of(
    'Gemma3', **GEMMA | {'num_hidden_layers': 3}, layer_types=GEMMA3_TYPES, rope_parameters=GEMMA3_ROTARY
  ),
}


def main() -> None:
  folder = Path(sys.argv[1])
  if len(sys.argv) == 3:
    opened(folder, Path(sys.argv[2]))
    return
  for name, build in MODELS.items():
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
      for parameter in model.parameters():  # biases and scales too, which are initialised to 0 and 1
        parameter.add_(0.1 * torch.randn_like(parameter))
      tokens_BL = torch.randint(0, 96, (3, 24))
      logits_BLV, short_BLV = model(tokens_BL).logits, model(tokens_BL[:, -9:]).logits
    model.save_pretrained(folder / name, max_shard_size='40KB' if name in ('gpt2', 'qwen3') else '1GB')
    arrays = {'logits_BLV': logits_BLV.numpy(), 'short_BLV': short_BLV.numpy()}
    np.savez(folder / f'{name}.npz', tokens_BL=tokens_BL.numpy().astype(np.int32), **arrays)


def opened(folder: Path, tokens: Path) -> None:
  for model in sorted(path.parent for path in folder.glob('*/config.json')):
    own = tokens / f'{model.name}.npz'
    with np.load(own if own.exists() else tokens / 'llama.npz') as arrays, torch.no_grad():
      tokens_BL = torch.from_numpy(arrays['tokens_BL'].astype(np.int64))
      loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
      np.save(model.with_suffix('.npy'), loaded(tokens_BL).logits.numpy())


if __name__ == '__main__':
  main()
