"""Item by item, language modelling and multiple choice score as in lm-evaluation-harness 0.4.13 on a random GPT-2.

With a vocabulary of characters, and with --all real ones: byte-level BPE, Llama's and T5's.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.pool.vocabulary import ByteEncoder, Encoder
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.data.targets.shapes import LANGUAGE_MODELLING, MULTIPLE_CHOICE
from dsdm_jax.evaluation import scoring, suite
from dsdm_jax.evaluation.scoring import Scorer
from dsdm_jax.training.step import Trainer
from tests.conftest import FAULTS
from tests.helpers import vocabularies

ALPHABET = ''.join(map(chr, range(32, 127))) + '\n'
LENGTH = 128  # nothing is cut: the harness keeps a token more, the last one being no input
WORDS = 'the cat and a dog saw no bird over there, where small fish swim by (slowly) until dawn; who knows why?'.split()


class Characters(ByteEncoder):
  """A character is a token."""

  size = len(ALPHABET) + 1

  def encode(self, text: str) -> list[int]:
    return [ALPHABET.index(character) + 1 for character in text]


def _trained(vocab_size: int):
  c = base.get_config()
  c.model.layers, c.model.width, c.model.heads, c.model.kv_heads, c.model.mlp_width = 2, 24, 3, 3, 64
  c.model.init_std = 0.4  # so that answers differ
  trainer = Trainer(c.model, c.pretraining.train, vocab_size, LENGTH, make_mesh(c.mesh, jax.devices()[:1]))
  state = trainer.init(jax.random.key(0))
  noise = iter(jax.random.split(jax.random.key(1), 100))
  # Biases and scales begin at zero and one, where a slip in their place would not show.
  params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(noise), x.shape) if x.ndim == 1 else x, state.params)
  return trainer, state._replace(params=params), c.model


@pytest.fixture(scope='module')
def trained():
  return _trained(Characters.size)


def _under_their_names(params: nnx.State, config) -> dict[str, np.ndarray]:
  """Weights as transformers names them; theirs has queries, keys and values one after the other, ours head by head."""
  p = nnx.to_pure_dict(params)
  head = config.width // config.heads

  def split(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x).reshape(*x.shape[:-1], config.heads, 3, head)
    return np.moveaxis(x, -2, -3).reshape(*x.shape[:-3], -1)

  def pair(name: str, module: dict, change=np.asarray) -> dict[str, np.ndarray]:
    weight = module['kernel'] if 'kernel' in module else module['scale']
    return {f'{name}.weight': change(weight), f'{name}.bias': change(module['bias'])}

  found = {'transformer.wte.weight': np.asarray(p['embedding']['embedding'])}
  found['transformer.wpe.weight'] = np.asarray(p['positions']['embedding'])
  for index, block in p['blocks'].items():
    name = f'transformer.h.{index}'
    found |= pair(f'{name}.ln_1', block['attention_norm']) | pair(f'{name}.ln_2', block['mlp_norm'])
    found |= pair(f'{name}.attn.c_attn', block['attention']['qkv'], split)
    found |= pair(f'{name}.attn.c_proj', block['attention']['out'])
    found |= pair(f'{name}.mlp.c_fc', block['mlp']['up']) | pair(f'{name}.mlp.c_proj', block['mlp']['down'])
  return found | pair('transformer.ln_f', p['norm'])


def _text(g: np.random.Generator, low: int, high: int) -> str:
  return ' '.join(g.choice(WORDS, g.integers(low, high)))


def _continued(trainer, state, contexts: list[str]) -> list[str]:
  """What the model itself would say: right at every token."""
  ids_I = [np.asarray(Characters().encode(context), np.int32) for context in contexts]
  made = Scorer(trainer, 8, 0).generate(state, ids_I, 6, LENGTH, np.zeros(Characters.size, bool))
  return [''.join((' ' + ALPHABET)[int(i)] for i in out_N).strip() for out_N in made]


def _files(folder: Path, trained) -> dict[str, tuple[benchmarks.Benchmark, list]]:
  """Local files, as benchmarks: words after a space, code, choices, and what the model would say itself."""
  g = np.random.default_rng(0)
  lines = {
    'words': [{'context': _text(g, 3, 14), 'continuation': _text(g, 1, 3)} for _ in range(30)],
    'code': [{'context': f'{word}:\n', 'continuation': f'    {_text(g, 1, 3)}'} for word in WORDS],
    'own': [],
    'choose': [
      {'query': _text(g, 3, 14), 'gold': int(g.integers(3)), 'choices': [_text(g, 1, 5) for _ in range(3)]}
      for _ in range(60)
    ],
  }
  contexts = [_text(g, 6, 7)[:24].strip() for _ in range(12)]
  for index, (context, continuation) in enumerate(zip(contexts, _continued(*trained[:2], contexts), strict=True)):
    lines['own'].append({'context': context, 'continuation': continuation + '~' * (index % 2)})
  found = {}
  for name, records in lines.items():
    file = folder / f'{name}.jsonl'
    file.write_text(''.join(json.dumps(record) + '\n' for record in records))
    benchmark = benchmarks.of_file(str(file))
    if name in ('own', 'code'):
      benchmark = dataclasses.replace(benchmark, delimiter='')
    found[name] = benchmark, benchmarks.read_items(benchmark)
  return found


def _their_task(benchmark: benchmarks.Benchmark) -> dict:
  choice = benchmark.shape == MULTIPLE_CHOICE
  metrics = ['acc', 'acc_norm'] if choice else ['acc']
  return {
    'task': benchmark.name,
    'dataset_path': 'json',
    'test_split': 'test',
    'num_fewshot': 0,
    'dataset_kwargs': {'data_files': {'test': benchmark.source}},
    'target_delimiter': benchmark.delimiter,
    'output_type': 'multiple_choice' if choice else 'loglikelihood',
    'doc_to_text': '{{query}}' if choice else '{{context}}',
    # For language modelling the harness leaves the white space before the answer to the task.
    'doc_to_target': 'gold' if choice else '{{"' + benchmark.delimiter + '" + continuation}}',
    **({'doc_to_choice': 'choices'} if choice else {}),
    'metric_list': [{'metric': m, 'aggregation': 'mean', 'higher_is_better': True} for m in metrics],
  }


def _write(folder: Path, encoder: Encoder, params: nnx.State, config, files: dict) -> dict[str, suite.Request]:
  """Writes what the harness needs to score `files`, and returns our requests of them."""
  weights = _under_their_names(params, config)
  np.savez(
    folder / 'in.npz',
    n_embd=config.width,
    n_layer=config.layers,
    n_head=config.heads,
    n_inner=config.mlp_width,
    n_positions=LENGTH,
    vocab_size=len(weights['transformer.wte.weight']),
    **weights,
  )
  (folder / 'tasks.json').write_text(json.dumps([_their_task(benchmark) for benchmark, _ in files.values()]))
  texts = set()
  for benchmark, items in files.values():
    for index in range(len(items)):
      prompt = benchmarks.prompt(benchmark, items, index)
      for context, answer in zip(prompt.contexts, prompt.answers, strict=True):
        texts |= {context + answer, context.rstrip()}
  (folder / 'ids.json').write_text(json.dumps({text: encoder.encode(text) for text in texts}))
  sequences = suite.Sequences(encoder, LENGTH, begin_with_end_mark=False)
  return {name: suite.build(benchmark, items, sequences, 4, 0) for name, (benchmark, items) in files.items()}


@pytest.mark.peers
def test_scores_equal_the_harness_item_by_item(peers, trained, tmp_path):
  everything = _files(tmp_path, trained)
  some = {name: everything[name] for name in ('code', 'choose')}
  kinds = ('byte_level', 'llama', 't5') if FAULTS else ()
  encoders = {kind: vocabularies.encoder(kind) for kind in kinds}
  # One model for all of them, which compiles once.
  large = _trained(max(encoder.size for encoder in encoders.values())) if encoders else trained
  scorers = {'characters': Scorer(trained[0], 8, 0), **dict.fromkeys(encoders, Scorer(large[0], 8, 0))}
  ours = {}
  for kind, encoder in {'characters': Characters(), **encoders}.items():
    (_, state, config), files = (trained, everything) if kind == 'characters' else (large, some)
    (tmp_path / kind).mkdir()
    ours[kind] = state, _write(tmp_path / kind, encoder, state.params, config, files)
  environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'PYTHONWARNINGS')}
  done = subprocess.run(
    [peers, Path(__file__).with_name('harness_scores.py'), *ours],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
    timeout=900,
    env=environment | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home'), 'TOKENIZERS_PARALLELISM': 'false'},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  worst, right = 0.0, {}
  for kind, (state, requests) in ours.items():
    theirs, scorer = json.loads((tmp_path / kind / 'out.json').read_text()), scorers[kind]
    for name, request in requests.items():
      answers = scorer.answers(state, request.ids_P, request.count_P, LENGTH)
      wanted = [answer for item in theirs[name] for answer in item['answers']]
      # Sums of at most 30 log-probabilities near −5 in float32 on both sides: seen 3e-5.
      np.testing.assert_allclose(answers.total_P, [total for total, _ in wanted], atol=2e-4, err_msg=f'{kind} {name}')
      worst = max(worst, float(np.abs(answers.total_P - [total for total, _ in wanted]).max()))
      if request.benchmark.shape == LANGUAGE_MODELLING:
        found = {'acc': scoring.exact_argmax(answers)['accuracy']}
      else:
        found = scoring.lowest_cross_entropy(answers, request.item_P, request.gold_I, request.characters_P)
      for metric in ('acc', 'acc_norm'):
        if metric in found:
          assert found[metric].tolist() == [item[metric] for item in theirs[name]], (kind, name, metric)
          right[kind, name, metric] = float(found[metric].mean())
  print(f'largest difference of a summed log-probability {worst:.1e} nats; right {right}')
  assert right['characters', 'own', 'acc'] == 0.5
  assert all(0 < right[kind, 'choose', 'acc'] < 1 for kind in ours)
  norm = {kind: right[kind, 'choose', 'acc_norm'] for kind in ours}
  assert right['characters', 'choose', 'acc'] != norm['characters'], 'the rules must not agree on all that is tested'
