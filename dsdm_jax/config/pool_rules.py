"""Rules of the `pool`, `host` and `targets` parts of a config, and the names that they take."""

import re
from collections.abc import Iterable, Mapping

from dsdm_jax.config.rule import NAME, Rule, at_least, one_of, some_of, within

SOURCE_KINDS = ('text', 'jsonl', 'parquet', 'hf', 'tfds', 'seqio', 'tokens')
KINDS = ('source', 'docs', 'licences', 'metadata', 'data')
TASKS = ('docs', 'api_qa', 'cs_algorithms')
# Those of dsdm_jax/data/targets/benchmarks.py, by a test.
BENCHMARKS = (
  'lambada', 'squad', 'jeopardy', 'bigbench_cs_algorithms', 'copa', 'openbook_qa', 'piqa', 'cbt', 'hellaswag',
  'winogrande', 'boolq', 'coqa', 'news_qa', 'bb_copy_logic', 'bb_dyck_languages', 'bb_operators', 'arc_easy',
  'bb_qa_wikidata', 'trivia_qa', 'winograd', 'arc_challenge', 'squad_xquad',
)  # fmt: skip

EVALUATED = 'evaluated'  # in pool.leakage_benchmarks

JSONL = Rule(lambda v: v.endswith('.jsonl'), 'paths that end in .jsonl')
_LINE = Rule(lambda v: '\n' not in v, 'must be one line')


def _is_source(line: str) -> bool:
  head = line.partition(' | ')[0].strip()
  kind, _, target = head.partition(':')
  if kind in SOURCE_KINDS:
    return bool(target)
  return head == 'installed_packages' or NAME.holds(head)


def guarded(named: Iterable[str], evaluated: Iterable[str]) -> tuple[str, ...]:
  """`pool.leakage_benchmarks` with those of `evaluation.tasks` in the place of 'evaluated', in an order of their own.

  What `evaluation.tasks` holds besides is refused where it is asked.
  """
  of = {name for name in evaluated if name in BENCHMARKS or JSONL.holds(name)}
  named = set(named)
  return tuple(sorted((named - {EVALUATED}) | (of if EVALUATED in named else set())))


def weights_differ(lines: Iterable[str]) -> bool:
  """Whether lines of `pool.sources` ask for unequal shares; what is no number is refused where lines are read."""
  given = (re.search(r' \| *weight *= *(\d*\.?\d+(?:e[+-]?\d+)?)', line) for line in lines)
  return len({float(found.group(1)) if found else 1.0 for found in given}) > 1


POOL_RULES: Mapping[str, Rule] = {
  'pool.sources': Rule(
    lambda v: bool(v) and len(v) == len(set(v)) and all(map(_is_source, v)),
    f"must be one or more of 'installed_packages', 'KIND:GLOB' with a kind of {', '.join(SOURCE_KINDS)}, or "
    "'package.module:function' with a module that Python finds from here, each once",
  ),
  'pool.kinds': some_of(*KINDS),
  'pool.max_bytes': at_least(0),
  'pool.max_document_bytes': at_least(0),
  'pool.on_error': one_of('fail', 'skip'),
  'pool.length': at_least(8),
  'pool.vocabulary': Rule(
    lambda v: v in ('train', 'bytes') or v.endswith(('.model', '.json')),
    "must be 'train', 'bytes', or the path of a SentencePiece .model or a tokenizer.json",
  ),
  'pool.vocab_size': at_least(300),  # 256 byte pieces, the control pieces and some to learn
  'pool.end_piece': _LINE,
  'pool.leakage_ngram': at_least(2),
  'pool.leakage_benchmarks': Rule(
    lambda v: all(b in (EVALUATED, *BENCHMARKS) or JSONL.holds(b) for b in v),
    f"must be '{EVALUATED}', names of {', '.join(BENCHMARKS)}, or paths that end in .jsonl",
  ),
  'pool.plant_targets': at_least(0),
  'host.workers': at_least(0),
  'host.beam': Rule(lambda v: not v or v.startswith('--'), "must be options such as '--runner=DirectRunner', or empty"),
  'targets.tasks': some_of(*TASKS, *BENCHMARKS, also=JSONL),
  'targets.folder': Rule(
    lambda v: '\n' not in v and v == v.strip() and (not v or all(part.strip() for part in v.split(' | '))),
    "must be one line that does not begin or end with white space; several places are joined by ' | '",
  ),
  'targets.max_examples': at_least(1),
  'targets.holdout_share': within(0, 1, '()'),
  'targets.seed': at_least(0),
}
