"""The selection methods, in one table: where each one lives, what it depends on, and what it is charged for."""

import dataclasses
from collections.abc import Mapping

# What a method can need → the stages whose cost it bears for that, besides its own part of the stage `selection`. Of
# stages that handle proxies one after the other, a need of the first proxy bears one part.
FIRST = '[0]'
NEEDS: Mapping[str, tuple[str, ...]] = {
  'text': (),  # text or tokens of the pool and of the targets
  'file': (),  # scores in a file of the user's
  'training': (),  # a training of its own, with the proxies' model and settings
  'first_proxy': (f'proxies{FIRST}',),  # the weights of proxy 0
  'embeddings': (f'proxies{FIRST}',),  # embeddings by proxy 0
  'moments': ('proxies',),  # weights and Adam's moments of all proxies
  'log_likelihoods': ('proxies',),  # log-likelihoods of the pool's rows by all proxies
  'features': ('proxies', 'features', 'target_features'),  # features of all proxies, or products with them
  'feature_rows': ('proxies', 'features', 'target_features'),  # features of all proxies, row by row
  'first_features': (f'proxies{FIRST}', f'features{FIRST}'),  # features of proxy 0
  'scores': ('prefilter', 'proxies', 'features', 'target_features', 'datamodel'),  # scores of the datamodel
}
# Stages whose cost a method can bear; a run without a prefilter has no such stage.
STAGES = ('prefilter', 'proxies', 'features', 'target_features', 'datamodel', 'selection')


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to select rows.

  Attributes:
    path: 'package.module:function'.
    targeted: the selection depends on the target.
    seeded: the selection is random, so each seed has its own rows.
    needs: keys of `NEEDS`; a method without needs costs nothing.
    label: name in the report.
  """

  path: str
  targeted: bool
  seeded: bool
  needs: tuple[str, ...]
  label: str

  def shares(self, proxies: int) -> dict[str, float]:
    """Stage whose cost the method bears, in the order of `STAGES` → its share: 1 / proxies of what proxy 0 needs."""
    borne = {stage for need in self.needs for stage in NEEDS[need]} | ({'selection'} if self.needs else set())
    return {s: 1.0 if s in borne else 1.0 / proxies for s in STAGES if s in borne or s + FIRST in borne}


def _method(place: str, label: str, *needs: str, targeted: bool = True, seeded: bool = False) -> Method:
  return Method(f'dsdm_jax.selection.{place}', targeted, seeded, needs, label)


METHODS: Mapping[str, Method] = {
  'dsdm': _method('dsdm:dsdm', 'DsDm', 'scores'),
  'random': _method('controls:random', 'random, same epochs', targeted=False, seeded=True),
  'random_one_epoch': _method('controls:random_one_epoch', 'random, one epoch', targeted=False, seeded=True),
  'bottom': _method('dsdm:bottom', 'bottom-ranked', 'scores'),
  'dsdm_gumbel': _method('dsdm_sampled:dsdm_gumbel', 'DsDm, Gumbel', 'scores', seeded=True),
  'dsdm_boltzmann': _method('dsdm_sampled:dsdm_boltzmann', 'DsDm, Boltzmann', 'scores', seeded=True),
  'dsdm_greedy': _method('dsdm_diverse:dsdm_greedy', 'DsDm, greedy', 'scores', 'first_features'),
  'dsdm_clusters': _method('dsdm_diverse:dsdm_clusters', 'DsDm, clusters', 'scores', 'first_features'),
  'dsdm_distilled': _method('distilled:dsdm_distilled', 'DsDm, distilled', 'scores', 'text'),
  'hybrid': _method('hybrid:hybrid', 'DsDm + LSA', 'scores', 'text'),
  'hybrid_embedding': _method('hybrid:hybrid_embedding', 'DsDm + embedding', 'scores', 'embeddings'),
  'classifier': _method('classifier:classifier', 'classifier', 'text'),
  'classifier_pareto': _method('classifier:classifier_pareto', 'classifier pareto', 'text', seeded=True),
  'fasttext': _method('fasttext:fasttext', 'fastText', 'text'),
  'dsir': _method('dsir:dsir', 'DSIR', 'text', seeded=True),
  'semdedup': _method('semdedup:semdedup', 'SemDeDup', 'embeddings', targeted=False, seeded=True),
  'semdedup_one_epoch': _method(
    'semdedup:semdedup_one_epoch', 'SemDeDup, one epoch', 'embeddings', targeted=False, seeded=True
  ),
  'minhash': _method('minhash:minhash', 'MinHash', 'text', targeted=False, seeded=True),
  'bm25': _method('bm25:bm25', 'BM25', 'text'),
  'bm25_max': _method('bm25:bm25_max', 'BM25, maximum', 'text'),
  'tfidf': _method('tfidf:tfidf', 'TF-IDF nearest', 'text'),
  'lsa': _method('lsa:lsa', 'LSA nearest', 'text'),
  'embedding': _method('embedding:embedding', 'embedding', 'embeddings'),
  'perplexity_low': _method('perplexity:perplexity_low', 'perplexity low', 'log_likelihoods', targeted=False),
  'perplexity_high': _method('perplexity:perplexity_high', 'perplexity high', 'log_likelihoods', targeted=False),
  'perplexity_middle': _method('perplexity:perplexity_middle', 'perplexity middle', 'log_likelihoods', targeted=False),
  'color_filter': _method('color_filter:color_filter', 'CoLoR-Filter', 'first_proxy', 'text'),
  'gradient': _method('gradient:gradient', 'gradient', 'features'),
  'gradient_cosine': _method('gradient:gradient_cosine', 'gradient cosine', 'feature_rows'),
  'less': _method('less:less', 'LESS', 'moments'),
  'oracle': _method('oracle:oracle', 'oracle', 'training'),
  'imported': _method('dsdm:imported', 'imported', 'file', targeted=False),
  'dsdm_shifted': _method('controls:dsdm_shifted', 'dsdm shifted', 'scores'),
  'dsdm_permuted': _method('controls:dsdm_permuted', 'dsdm permuted', 'scores'),
  'random_again': _method('controls:random_again', 'random again', targeted=False, seeded=True),
}


def method_name(method: str) -> str:
  """The name of an arm: of 'package.module:function' the function."""
  return method.rpartition(':')[2]


def label(name: str) -> str:
  """The name of an arm in the report, also of a mixture, a custom method or another checkpoint."""
  return METHODS[name].label if name in METHODS else name.replace('_', ' ')


def charged_shares(name: str, proxies: int) -> dict[str, float]:
  """Stage → share of its cost that an arm bears: all of each for a mixture or a custom method."""
  return METHODS[name].shares(proxies) if name in METHODS else dict.fromkeys(STAGES, 1.0)
