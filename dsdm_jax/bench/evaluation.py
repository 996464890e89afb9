"""Speed of evaluation: `python -m dsdm_jax.bench evaluation --folder FOLDER --tasks lambada`.

Evaluates an untrained model of the quickstart's size on the benchmarks whose JSONL files are in FOLDER (for names see
docs/benchmarks.md); the time does not depend on the weights. Prints a line of JSON for each: items, seconds to
tokenize, seconds to score with and without the first compilation, processor seconds, FLOP.
"""

import argparse
import json
import time

from dsdm_jax.configs import quickstart
from dsdm_jax.core import prng, processes
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.pool import vocabulary
from dsdm_jax.data.targets import benchmarks
from dsdm_jax.errors import UserError
from dsdm_jax.evaluation import suite
from dsdm_jax.evaluation.scoring import Scorer, score_request
from dsdm_jax.evaluation.suite import stop_tokens
from dsdm_jax.training.step import trainer


def add_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--folder', required=True, help="of the benchmarks' JSONL files")
  parser.add_argument('--tasks', default='lambada', help='comma-separated names (default: lambada)')
  parser.add_argument('--items', type=int, default=0, help='maximum number of items of each; 0 for all')


def run(flags: argparse.Namespace) -> None:
  """Measures and prints; see the module."""
  config = quickstart.get_config()
  config.evaluation.max_items, config.targets.folder = flags.items, flags.folder
  tasks = tuple(flags.tasks.split(','))
  unknown = [task for task in tasks if task not in benchmarks.BENCHMARKS]
  if unknown:
    raise UserError(f'--tasks={flags.tasks}: {unknown[0]} is not a benchmark in docs/benchmarks.md')
  processes.keep_freed_memory()  # as every run of the pipeline does
  texts = [
    f'{i.context} {i.continuation}' for i in benchmarks.read_items(benchmarks.BENCHMARKS[tasks[0]], flags.folder)
  ]
  encoder = vocabulary.SentencePieceEncoder(vocabulary.train(texts, config.pool.vocab_size))
  compiled = trainer(config.model, config.pretraining.train, encoder.size, config.pool.length, make_mesh(config.mesh))
  state = compiled.init(prng.stream(0, 'bench', 'evaluation'))
  stop_V = stop_tokens(encoder)
  for task in tasks:
    config.evaluation.tasks = (task,)
    began = time.perf_counter()
    sequences = suite.Sequences(encoder, config.pool.length)
    (request,) = suite.read(config.evaluation, config.targets, sequences)
    line = {'task': task, 'items': len(request.item_ids_I), 'tokenize_s': time.perf_counter() - began}
    scorer = Scorer(compiled, config.evaluation.batch_size, encoder.eos)
    for name in ('first', 'again'):
      before, began, busy = scorer.flop, time.perf_counter(), time.process_time()
      score_request(
        scorer, state, request, config.pool.length, config.evaluation.generate_tokens, stop_V, encoder.decode
      )
      line |= {f'score_{name}_s': time.perf_counter() - began, f'cpu_{name}_s': time.process_time() - busy}
    line['flop'] = scorer.flop - before
    print(json.dumps({k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in line.items()}), flush=True)
