"""test_model_export.py runs this in an environment with transformers: opens each folder and saves what it gives."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
  folders, texts = [Path(name) for name in sys.argv[2:]], json.loads(Path(sys.argv[1]).read_text())
  for folder in folders:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)['input_ids'] for text in texts]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='auto')
    with torch.no_grad():
      logits_BLV = model(torch.tensor([x[:16] for x in ids])).logits.float().numpy()
      generated = model.generate(torch.tensor([ids[0][:4]]), max_new_tokens=2, do_sample=False)
    facts = {'ids': ids, 'eos': tokenizer.eos_token_id, 'stops': model.generation_config.eos_token_id}
    facts |= {'decoded': tokenizer.batch_decode(ids), 'dtype': str(model.dtype), 'generated': generated.shape[1]}
    np.save(folder.with_suffix('.npy'), logits_BLV)
    folder.with_suffix('.json').write_text(json.dumps(facts))


if __name__ == '__main__':
  main()
