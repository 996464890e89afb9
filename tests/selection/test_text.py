"""Selectors that read text: n-grams and rankings by hand, and the published DSIR next to ours."""

import collections
import dataclasses
import itertools
import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.errors import UserError
from dsdm_jax.selection import bm25, candidates, distilled, dsir, lsa, minhash, ngrams, tfidf
from dsdm_jax.selection.classifier import shares
from tests.conftest import ROOT
from tests.helpers.selection import ArrayCandidates, Rows, selected, target

KNOWN = 987410084  # a constant, to notice a process or machine that hashes differently
TEXTS = ['The cat sat on the mat.', 'the cat', '', 'cat', "don't stop", 'ÄÖ äö! äö', 'x\ty\nz']


def words(text: str) -> list[str]:
  """Runs of letters and digits, and runs of other marks, by hand."""
  found, kind = [], None
  for c in text.lower():
    now = 'space' if c.isspace() else 'word' if c.isalnum() or c == '_' else 'mark'
    if now != 'space':
      if now == kind:
        found[-1] += c
      else:
        found.append(c)
    kind = now
  return found


def grams_by_hand(units: list) -> collections.Counter:
  return collections.Counter([(u,) for u in units]) + collections.Counter(itertools.pairwise(units))


@given(st.lists(st.one_of(st.text('ab c.d\n', max_size=20), st.text(max_size=8)), min_size=1, max_size=5))
def test_words_and_pairs_are_counted(texts):
  grams = ngrams.of_texts(texts, 1 << 30)
  dense = [grams_by_hand(words(t)) for t in texts]
  assert grams.size_B.tolist() == [sum(c.values()) for c in dense]
  # With so many buckets none is shared: the counts of buckets are those of the n-grams.
  for row, counts in enumerate(dense):
    here = slice(*grams.first_B[row : row + 2])
    buckets = np.concatenate([grams.uni_M[here], grams.bi_M[here]])
    found = collections.Counter(buckets[buckets < grams.buckets].tolist())
    assert sorted(found.values()) == sorted(counts.values())


def test_sums_counts_and_matrix_agree():
  grams = ngrams.of_texts(TEXTS, 1_000)
  weight = np.random.default_rng(0).normal(size=1_000)
  dense = grams.matrix().toarray()
  assert dense.sum(axis=1).tolist() == grams.size_B.tolist()
  np.testing.assert_array_equal(dense.sum(axis=0), grams.counts())
  np.testing.assert_allclose(grams.sums(weight), dense @ weight, atol=1e-5)  # weights in float32
  same = ngrams.of_sequences([np.array([5, 6, 7]), np.array([7, 6, 5])], 1_000)
  rows = ngrams.of_rows(np.array([[5, 6, 7], [7, 6, 5]]), 1_000)
  np.testing.assert_array_equal(same.bi_M, rows.bi_M)
  assert rows.bi_M[0] != rows.bi_M[4], 'the order of a pair matters'
  np.testing.assert_allclose(rows.sums(weight), rows.matrix() @ weight, atol=1e-5)
  assert ngrams.of_texts(TEXTS, 1_000).units().toarray()[0].max() == 2, '"the" occurs twice'


def test_a_words_hash_is_its_own():
  """It does not depend on the place, the text or the neighbours of the word."""
  here = ngrams.of_texts(['one two'], 1 << 31)
  there = ngrams.of_texts(['x ' * 1_000, '  ONE\ttwo three'], 1 << 31)
  assert there.uni_M[1_000:1_002].tolist() == here.uni_M.tolist()
  assert there.bi_M[1_000] == here.bi_M[0]
  assert len(set(there.uni_M.tolist())) == 4
  everything = ngrams.of_texts([' '.join(f'w{i} {i}x' for i in range(20_000))], 1 << 31)
  # 40,000 words in 2³¹ buckets: 0.37 pairs share one by chance.
  assert len(np.unique(everything.uni_M)) >= 40_000 - 4
  assert ngrams.of_texts(['one'], 1 << 31).uni_M.tolist() == here.uni_M[:1].tolist() == [KNOWN]


def pool_of(texts: list[str], **options) -> ArrayCandidates:
  tokens_NL = np.zeros((len(texts), 8), np.int32)
  tokens_NL[:, 0] = np.arange(len(texts))
  return ArrayCandidates(np.zeros(len(texts)), Rows(tokens_NL, texts=texts), **options)


def invented(seed: int, count: int, shift: float, length: int = 40) -> list[str]:
  """Texts over 60 words; `shift` moves weight from the first words to the last."""
  rng = np.random.default_rng(seed)
  place = np.linspace(-1, 1, 60)
  found = []
  for _ in range(count):
    p = np.exp(rng.normal(shift, 0.7) * place)
    found.append(' '.join(f'w{i}' for i in rng.choice(60, length, p=p / p.sum())))
  return found


POOL, TARGET = invented(0, 300, 0.0), invented(1, 40, 2.0)
LIKENESS_N = np.array([np.mean([int(w[1:]) for w in t.split()]) for t in POOL])


@pytest.mark.parametrize('kind', ['words', 'tokens'])
@pytest.mark.parametrize(
  'method', ['dsir', 'classifier', 'classifier_pareto', 'bm25', 'bm25_max', 'tfidf', 'lsa', 'fasttext']
)
def test_rows_like_the_target_are_selected(method, kind):
  """Measured by a property of the synthetic text that no method knows: the positions of its words in the vocabulary."""
  if kind == 'words':
    pool, wanted = pool_of(POOL, ngram_buckets=4_096), target(texts=TARGET)
  else:
    ids = [[int(w[1:]) + 1 for w in t.split()] for t in POOL]
    pool = ArrayCandidates(np.zeros(300), Rows(np.array(ids, np.int32)), ngrams='tokens', ngram_buckets=4_096)
    wanted = target(sequences=[[int(w[1:]) + 1 for w in t.split()] for t in TARGET])
  found = selected(method, pool, 60, target=wanted).rows
  assert len(set(found.tolist())) == 60
  best = np.sort(LIKENESS_N)[-60:].mean()
  gained = (LIKENESS_N[found].mean() - LIKENESS_N.mean()) / (best - LIKENESS_N.mean())
  assert gained > (0.75 if method != 'classifier_pareto' else 0.3)  # random rows gain 0, with an sd of 0.1


def test_fasttext_is_charged_for_its_training():
  """Two operations for the mean and two for its update, of each distinct n-gram, mark of the end and dimension."""
  pool, spent = pool_of(POOL), []
  pool.add_flop = spent.append
  selected('fasttext', pool, 60, target=target(texts=TARGET))

  def distinct(texts):
    return sum(1 + len(grams_by_hand(words(text))) for text in texts)

  texts = distinct(POOL) + distinct(TARGET) * 7 + distinct(TARGET[:20])  # 40 target texts are repeated to 300
  assert spent == [4 * 100 * 5 * texts]


class Counted(Rows):
  """Counts the rows that are read."""

  reads = 0

  def tokens(self, rows):
    self.reads += len(rows)
    return super().tokens(rows)


@pytest.mark.parametrize('method', ['dsir', 'bm25', 'tfidf', 'lsa', 'classifier', 'minhash'])
def test_every_target_is_charged_for_the_passes_that_it_shares(method):
  """As much as if it were the only one, whatever earlier targets have read."""

  def charged(names: str) -> list[float]:
    rows = Counted(np.arange(len(POOL))[:, None], texts=POOL)
    pool = ArrayCandidates(rows=rows, ngram_buckets=512)
    pool.costs = candidates.CostAccounting(lambda: float(rows.reads))
    wanted = [dataclasses.replace(target(texts=TARGET), name=name) for name in names]
    return [pool.costs.charged(lambda one=one: selected(method, pool, 60, target=one))[1]['flop'] for one in wanted]

  (alone,) = charged('b')
  assert charged('ab') == [alone, alone] and alone > 0


class InBlocks(Rows):
  """Rows that may only be read in blocks."""

  def tokens(self, rows):
    assert len(rows) <= 64
    return super().tokens(rows)


@pytest.mark.parametrize('kind', ['words', 'tokens'])
def test_rows_to_fit_are_read_in_blocks_and_are_the_same(monkeypatch, kind):
  tokens_NL = np.random.default_rng(0).integers(0, 40, (300, 16)).astype(np.int32)
  rows = np.random.default_rng(1).permutation(300)[:200]
  at_once = shares(ngrams.PoolGrams(Rows(tokens_NL), kind, 512).rows(rows))
  monkeypatch.setattr(ngrams, 'BLOCK', 64)
  monkeypatch.setattr(ngrams, '_BLOCK_TOKENS', 16 * 20)  # 20 rows are hashed together
  grams = ngrams.PoolGrams(InBlocks(tokens_NL), kind, 512)
  blocks = [shares(block) for block in grams.each(rows)]
  assert len(blocks) == 13  # four reads: 20 + 20 + 20 + 4 three times, and 8
  np.testing.assert_array_equal(scipy.sparse.vstack(blocks).toarray(), at_once.toarray())
  # The two methods that are fitted to a sample of the pool.
  pool = ArrayCandidates(np.zeros(300), InBlocks(tokens_NL), ngrams=kind, ngram_buckets=512)
  wanted = target(texts=['w1 w2 w3', 'w2 w1'], sequences=[[1, 2, 3], [2, 1]])
  assert selected('classifier', pool, 5, target=wanted).size == 5
  assert distilled.fit(grams, np.arange(300, dtype=np.float32), 300).fitted == 240


def test_dsir_by_hand():
  weights = dsir.log_ratio(np.array([3, 1, 0]), np.array([1, 2, 1]))
  np.testing.assert_allclose(weights, np.log([0.75 + 1e-8, 0.25 + 1e-8, 1e-8]) - np.log([0.25, 0.5, 0.25]), rtol=1e-6)
  # The weight of a task alone changes nothing.
  shares = dsir.log_ratio(np.array([0.3, 0.1, 0]), np.array([1, 2, 1]))
  np.testing.assert_allclose(shares, weights, rtol=1e-6)


def test_bm25_by_hand():
  texts, query = ['red fox red', 'blue fox', 'green green green green'], 'red fox'
  pool = pool_of(texts)
  found = selected('bm25', pool, 3, target=target(texts=[query]))
  lengths = [3, 2, 4]
  score = []
  for text, length in zip(texts, lengths, strict=True):
    total = 0.0
    for term in query.split():
      tf, holds = text.split().count(term), sum(term in t.split() for t in texts)
      idf = math.log(1 + (3 - holds + 0.5) / (holds + 0.5))
      total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / 3))
    score.append(total)
  assert found.rows.tolist() == [0, 1, 2]
  np.testing.assert_allclose(found.scores, sorted(score, reverse=True), rtol=1e-6)
  assert bm25._K1 == 1.2


def test_a_distilled_scorer_learns_scores_and_reports_its_correlation():
  rng = np.random.default_rng(0)
  texts = invented(2, 1_500, 0.0)
  likeness_N = np.array([np.mean([int(w[1:]) for w in t.split()]) for t in texts])
  learnt = distilled.fit(ngrams.PoolGrams(rows_of(texts), 'words', 4_096), likeness_N.astype(np.float32), 1_000)
  noise = distilled.fit(
    ngrams.PoolGrams(rows_of(texts), 'words', 4_096), rng.normal(size=1_500).astype(np.float32), 1_000
  )
  assert learnt.correlation > 0.9
  assert abs(noise.correlation) < 4 / np.sqrt(noise.held_out)  # four sd of a rank correlation of nothing
  assert (learnt.fitted, learnt.held_out) == (800, 100)
  score_N = learnt.score(ngrams.PoolGrams(rows_of(texts), 'words', 4_096))
  outside = np.setdiff1d(np.arange(1_500), _sample(1_500, 1_000))
  assert scipy.stats.spearmanr(score_N[outside], likeness_N[outside]).statistic > 0.9
  assert abs(score_N.mean() - likeness_N.mean()) < 0.1 * likeness_N.std(), 'in the scale of the scores'
  with pytest.raises(UserError, match='at least 50'):
    distilled.fit(ngrams.PoolGrams(rows_of(texts[:40]), 'words', 64), likeness_N[:40], 40)


def rows_of(texts: list[str]) -> Rows:
  return pool_of(texts).pool


def _sample(rows: int, count: int) -> np.ndarray:
  from dsdm_jax.core import prng

  return prng.numpy_stream(0, 'selection', 'distilled').permutation(rows)[:count]


@pytest.fixture
def reference() -> Path:
  """A Python that has data-selection: DSDM_JAX_PEERS, or the environment that launch/test.sh makes."""
  if 'DSDM_JAX_PEERS' in os.environ:
    return Path(os.environ['DSDM_JAX_PEERS'])
  python = ROOT / '.venv-peers' / 'bin' / 'python'
  found = python.is_file() and subprocess.run(
    [python, '-c', 'import importlib.util as u; assert u.find_spec("data_selection") and u.find_spec("fasttext")'],
    capture_output=True,
    check=False,
  )
  if not found or found.returncode:
    pytest.skip('no environment with requirements-peers.txt; launch/test.sh makes .venv-peers')
  return python


PUBLISHED_DSIR = """
import json, sys
import numpy as np
from data_selection import HashedNgramDSIR
from data_selection.hashed_ngram_dsir import hash_buckets
from nltk.tokenize import WordPunctTokenizer

folder = sys.argv[1]
files = [folder + '/raw.jsonl'], [folder + '/target.jsonl']
model = HashedNgramDSIR(*files, folder + '/cache', num_proc=1)
model.fit_importance_estimator(num_tokens_to_fit='all')
model.compute_importance_weights()
parts = sorted(model.log_importance_weights_dir.iterdir(), key=lambda file: int(file.stem))
np.save(folder + '/weights.npy', np.concatenate([np.load(part) for part in parts]))
bucket = {}
for file in files:
  for line in open(file[0]):
    words = WordPunctTokenizer().tokenize(json.loads(line)['text'].lower())
    bucket |= {gram: hash_buckets(gram) for gram in [*words, *map(' '.join, zip(words, words[1:]))]}
json.dump(bucket, open(folder + '/buckets.json', 'w'))
"""


def published(reference: Path, folder: Path, code: str) -> None:
  command = [reference, '-c', code, str(folder)]
  done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
  assert done.returncode == 0, done.stderr[-2_000:]


@pytest.mark.peers
def test_dsir_is_the_published_one_at_its_defaults(reference, tmp_path):
  """10,000 buckets. By the package's own hash weights are equal; our hash shares other buckets, and ranks alike."""
  rng = np.random.default_rng(5)
  pool = [f"{t}. It's {' '.join(rng.choice(TEXTS[0].split(), 3))} ({i})!" for i, t in enumerate(POOL)]
  for name, texts in (('raw', pool), ('target', TARGET)):
    (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
  published(reference, tmp_path, PUBLISHED_DSIR)
  theirs_N, bucket = np.load(tmp_path / 'weights.npy'), json.loads((tmp_path / 'buckets.json').read_text())
  ours_N = dsir._log_weights(pool_of(pool), target(texts=TARGET))
  assert len(theirs_N) == len(ours_N) == 300

  def weights(bucket) -> np.ndarray:
    def hashed(texts) -> ngrams.Grams:
      units = [words(text) for text in texts]
      pairs = [pair for text in units for pair in itertools.zip_longest(text, text[1:])]
      uni_M = np.array([bucket[unit] for unit, _ in pairs])
      bi_M = np.array([10_000 if after is None else bucket[f'{unit} {after}'] for unit, after in pairs])
      return ngrams.Grams(uni_M, bi_M, np.cumsum([0, *map(len, units)]), 10_000)

    raw, wanted = hashed(pool), hashed(TARGET)
    return raw.sums(dsir.log_ratio(wanted.counts(), raw.counts()))

  np.testing.assert_allclose(weights(bucket), theirs_N, rtol=1e-5)  # ours are sums of float32
  # Some 5,000 n-grams share buckets. How far does that move ranks? As far as with any other hash.
  other_N = weights(dict(zip(bucket, np.random.default_rng(0).integers(0, 10_000, len(bucket)), strict=True)))
  level = scipy.stats.spearmanr(other_N, theirs_N).statistic
  assert scipy.stats.spearmanr(ours_N, theirs_N).statistic == pytest.approx(level, abs=0.03)


PUBLISHED_FASTTEXT = """
import json, sys
import fasttext
import numpy as np

folder = sys.argv[1]
model = fasttext.train_supervised(folder + '/train.txt', wordNgrams=2, bucket=2_000_000, thread=1, verbose=0)
found = []
for line in open(folder + '/pool.txt'):
  labels, p = model.predict(line.strip(), k=2)
  p = dict(zip(labels, np.float64(p)))
  found.append(np.log(p['__label__1'] / p['__label__0']))
np.save(folder + '/logits.npy', found)
"""


@pytest.mark.peers
def test_fasttext_ranks_as_the_published_one(reference, tmp_path):
  """Both start from other random numbers and see the texts in another order."""
  order = np.random.default_rng(0).permutation(600)
  labelled = [f'__label__0 {t}' for t in POOL] + [f'__label__1 {TARGET[i % 40]}' for i in range(300)]
  (tmp_path / 'train.txt').write_text(''.join(labelled[i] + '\n' for i in order))
  (tmp_path / 'pool.txt').write_text(''.join(text + '\n' for text in POOL))
  published(reference, tmp_path, PUBLISHED_FASTTEXT)
  theirs_N = np.load(tmp_path / 'logits.npy')
  found = selected('fasttext', pool_of(POOL), 300, target=target(texts=TARGET))
  assert scipy.stats.spearmanr(found.scores, theirs_N[found.rows]).statistic > 0.97


@pytest.mark.parametrize('method', ['tfidf', 'lsa'])
def test_nearest_targets_are_those_of_scikit_learn(method):
  """Its vectors of exact words, its SVD of the words in two rows, its cosine."""
  from sklearn.decomposition import TruncatedSVD
  from sklearn.feature_extraction.text import TfidfVectorizer

  vectorizer = TfidfVectorizer(tokenizer=words, token_pattern=None).fit(POOL)
  x_NV, target_TV = (vectorizer.transform(texts) for texts in (POOL, TARGET))
  if method == 'lsa':
    svd = TruncatedSVD(lsa._DIMENSIONS if x_NV.shape[1] > lsa._DIMENSIONS else x_NV.shape[1], random_state=0).fit(x_NV)
    x_NV, target_TV = (sklearn_normalized(svd.transform(x)) for x in (x_NV, target_TV))
  theirs_N = np.asarray(
    (x_NV @ target_TV.T).max(axis=1).todense() if method == 'tfidf' else (x_NV @ target_TV.T).max(1)
  )
  found = selected(method, pool_of(POOL), 300, target=target(texts=TARGET))
  np.testing.assert_allclose(found.scores, theirs_N.reshape(-1)[found.rows], atol=2e-5)  # float32


def sklearn_normalized(x_ND: np.ndarray) -> np.ndarray:
  return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def test_lsa_finds_rows_of_the_same_topic_that_share_no_word():
  topics = [[f'{topic}{i}' for i in range(12)] for topic in 'ab']
  rng = np.random.default_rng(0)
  texts = [' '.join(rng.choice(topics[row % 2], 5, replace=False)) for row in range(400)]
  space = lsa.fit(ngrams.PoolGrams(rows_of(texts), 'words', 1 << 18), np.ones(1 << 18, np.float32), dimensions=2)
  ones = np.ones(1 << 18, np.float32)
  a, b, other = (
    space.unit(tfidf.vectors(ngrams.of_texts([text], 1 << 18), ones))[0] for text in ('a0 a1 a2', 'a3 a4 a5', 'b3 b4')
  )
  assert a @ b > 0.9 > 0.3 > abs(a @ other)


def test_minhash_drops_what_overlaps():
  """1 − (1 − J⁸)¹⁴ of pairs: all at J = 0.98, hardly any at 0.3; short texts as a whole."""
  rng = np.random.default_rng(0)
  base = [' '.join(f'w{i}' for i in rng.integers(0, 5_000, 100)) for _ in range(200)]
  # A new last word changes one of 96 runs, J = 95 / 97; 44 of 96 runs in common are J = 44 / 148.
  near = [text.rpartition(' ')[0] + ' new' for text in base[:50]]
  half = [
    ' '.join(text.split()[:48]) + ' ' + ' '.join(f'v{i}' for i in rng.integers(0, 5_000, 52)) for text in base[50:150]
  ]
  short = ['one two', 'two one', 'one two', '', '', '你好世界', '你好世界']
  dropped_N = minhash.duplicates(ngrams.PoolGrams(rows_of([*base, *near, *half, *short]), 'words', 1 << 31))
  assert not dropped_N[:200].any()
  assert dropped_N[200:250].all()
  assert dropped_N[250:350].sum() <= 2  # 0.0009 each
  assert dropped_N[350:].tolist() == [False, False, True, False, False, False, True]


def test_settings_are_chosen_by_other_documents_of_the_target():
  texts = [f'{i} {" ".join(f"d{i // 2}w{j}" for j in range(9))}' for i in range(40)]  # pairs share a passage
  whole = target(texts=texts)
  fitted, held = whole.nested()
  parts = [{record['answer'] for record in part.examples('docs').records} for part in (fitted, held)]
  assert parts[0] | parts[1] == set(texts) and not parts[0] & parts[1]
  assert 2 <= len(parts[1]) <= 18  # binomial: 40 of 0.25 in pairs
  assert candidates.choose(whole, (3, 1, 2), lambda x, *split: x if split else 9) == 1
  assert candidates.choose(whole, (3, 1, 2), lambda x, *_: np.nan if x == 1 else x) == 2
  assert candidates.choose(target(texts=texts[:1]), (3, 1, 2), lambda x, *_: x) == 3, 'one document cannot be split'
