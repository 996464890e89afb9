"""Rules of the `selection` and `mixture` parts of a config, and the names of the methods."""

from collections.abc import Mapping
from pathlib import PurePath

from dsdm_jax.config import mixture_parts
from dsdm_jax.config.methods import METHODS, method_name
from dsdm_jax.config.rule import NAME, Rule, above, at_least, one_of, within


def is_method(method: str) -> bool:
  return method in METHODS or NAME.holds(method)


def is_part(text: str) -> bool:
  part = mixture_parts.parse(text)
  return part is not None and is_method(part.method)


def part_key(text: str) -> tuple[str, str]:
  part = mixture_parts.parse(text)
  return ('', '') if part is None else (part.method, part.target)


SELECTION_RULES: Mapping[str, Rule] = {
  'selection.methods': Rule(
    lambda v: 0 < len(v) == len({method_name(m) for m in v}) and all(is_method(m) for m in v),
    f"must be one or more of {', '.join(METHODS)}, or 'package.module:function', with names that differ",
  ),
  'selection.repeat_cap': at_least(1),
  'selection.document_cap': at_least(0),
  'selection.source_cap': within(0, 1, '(]'),
  'selection.temperature': above(0),
  'selection.diversity': at_least(0),
  'selection.clusters': at_least(0),
  'selection.duplicate_similarity': within(0, 1, '(]'),
  'selection.ngrams': one_of('words', 'tokens'),
  'selection.ngram_buckets': within(2, 2**31),
  'selection.classifier_rows': at_least(1),
  'selection.conditional_steps': at_least(1),
  'selection.conditional_learning_rate': above(0),
  'selection.distill_rows': at_least(50),
  'selection.imported': Rule(
    lambda v: not v or PurePath(v).suffix in ('.npy', '.parquet', '.pt'), 'must end in .npy, .parquet or .pt'
  ),
  'mixture.parts': Rule(
    lambda v: all(is_part(text) for text in v) and len({part_key(text) for text in v}) == len(v),
    "must be parts like 'dsdm@docs rate=2 epochs=4 cap=8' or 'random rows=500', each method and target once, with "
    'numbers above 0 and at most 1,000,000 (rows: 1,000,000,000,000)',
  ),
  'mixture.when_empty': one_of('drop', 'repeat', 'refuse'),
}
