"""All that models are asked: the run's own targets and benchmarks, and one model's answers to them."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsdm_jax.core.stage import Context
from dsdm_jax.data.pool.vocabulary import Encoder, open_encoder
from dsdm_jax.data.targets.benchmarks import BENCHMARKS
from dsdm_jax.data.targets.targets import Examples, Targets
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import questions
from dsdm_jax.evaluation.questions import OWN, Request, Sequences
from dsdm_jax.evaluation.results import BENCHMARK
from dsdm_jax.evaluation.scoring import Scorer, score_request
from dsdm_jax.training.step import TrainState

SPLITS = ('target', 'holdout')


@dataclasses.dataclass(frozen=True)
class Exam:
  """All that models are asked.

  Attributes:
    examples: the run's own targets, by task and split.
    requests: benchmarks.
    encoder: of the pool's vocabulary.
    length: L.
    generate: tokens that a generated answer may have.
  """

  examples: Mapping[tuple[str, str], Examples]
  requests: tuple[Request, ...]
  encoder: Encoder
  length: int
  generate: int

  def sit(self, scorer: Scorer, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """(`<metric>__<task>__<split>` → values [items], benchmark → generated texts) of one model."""
    arrays, texts = {}, {}
    for (task, split), e in self.examples.items():
      logprob_I, accuracy_I = scorer.score(state, e.tokens_TL, e.weights_TL)
      arrays[f'logprob__{task}__{split}'], arrays[f'accuracy__{task}__{split}'] = logprob_I, accuracy_I
    stop_V = stops(self.encoder) if any(request.prompts_I for request in self.requests) else np.zeros(0, bool)
    for request in self.requests:
      name = request.benchmark.name
      values, made = score_request(scorer, state, request, self.length, self.generate, stop_V, self.encoder.decode)
      arrays |= {f'{metric}__{name}__{BENCHMARK}': value_I for metric, value_I in values.items()}
      if made:
        texts[name] = made
    return arrays, texts

  def tasks(self) -> list[dict[str, Any]]:
    """What `results.json` says of each task."""
    own = [
      {
        'task': t, 'split': s, 'rule': 'exact_argmax', 'shots': BENCHMARKS[t].shots if t in BENCHMARKS else 0,
        'n_items': len(e), 'categories': [],
      } for (t, s), e in self.examples.items()
    ]  # fmt: skip
    return own + [questions.describe(request) for request in self.requests]

  def documents(self) -> dict[tuple[str, str], list[str]]:
    own = {key: [record['document'] for record in e.records] for key, e in self.examples.items()}
    return own | {(r.benchmark.name, BENCHMARK): list(r.document_I) for r in self.requests}

  def categories(self) -> dict[tuple[str, str], list[str]]:
    return {(r.benchmark.name, BENCHMARK): list(r.category_I) for r in self.requests if any(r.category_I)}


def stops(encoder: Encoder) -> np.ndarray:
  """bool [V]: tokens that end a generated answer: the end mark, padding, and what holds a newline.

  Others without text of their own do not: a lone space of SentencePiece has none until a piece follows.
  """
  stop_V = np.array(['\n' in encoder.decode([token]) for token in range(encoder.size)])
  stop_V[[encoder.eos, encoder.pad]] = True
  return stop_V


def exam(context: Context) -> Exam:
  """What the config asks for, from the artifacts of the pool and the targets."""
  config, pool = context.config, context.inputs['pool']
  length = json.loads((pool.path / 'card.json').read_text())['length']
  encoder = open_encoder(pool.path)
  examples = {}
  if OWN in config.evaluation.tasks:
    targets = Targets(context.inputs['targets'])
    examples = {(t, s): targets.examples(t, s) for t in targets.tasks for s in SPLITS}
  sequences = Sequences(encoder.encode, length, encoder.eos, config.evaluation.begin_with_end_mark)
  asked = tuple(questions.read(config.evaluation, config.targets.folder, sequences, config.targets.seed))
  for request in asked:
    if request.benchmark.name in {task for task, _ in examples}:
      raise UserError(
        f'evaluation.tasks and targets.tasks both have a task {request.benchmark.name!r}; rename one of the files'
      )
  return Exam(examples, asked, encoder, length, config.evaluation.generate_tokens)


def gather(folder: Path, names: list[str]) -> dict[str, np.ndarray]:
  """Per-run arrays [items] of `<name>.npz` stacked into [runs, items]."""
  loaded = []
  for name in names:
    with np.load(folder / f'{name}.npz', allow_pickle=False) as arrays:
      loaded.append(dict(arrays))
  return {key: np.stack([arrays[key] for arrays in loaded]) for key in loaded[0]}
