"""The passes over a pool: exact joining and cutting, the same bytes on any number of processes, and at size."""

import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsdm_jax.core.artifacts import Artifact
from dsdm_jax.core.progress import Bar
from dsdm_jax.data.pool import layout, passes, permutation
from dsdm_jax.data.pool.passes import Job, Plan
from dsdm_jax.data.pool.permutation import Shuffle
from dsdm_jax.data.pool.sources import Unit, parse
from dsdm_jax.errors import UserError
from tests.helpers.data import RECORDS, contents, lines, run_pool, small_config


@given(
  documents=st.lists(st.lists(st.integers(2, 200), max_size=23), min_size=1, max_size=12),
  length=st.integers(2, 17),
  units=st.integers(1, 3),
  seed=st.integers(0, 3),
)
def test_no_token_is_lost_or_doubled(documents, length, units, seed, tmp_path_factory):
  """Documents in several units, scattered to rows: the joined stream comes back from them, token by token."""
  work = tmp_path_factory.mktemp('work')
  edges = np.linspace(0, len(documents), units + 1).astype(int)
  jobs = []
  for index, (first, stop) in enumerate(itertools.pairwise(edges)):
    job = Job(Unit(parse('jsonl:x'), ()), index, work, 0, False, first=int(first))
    mine = documents[first:stop]
    job.file('tokens', 'bin').write_bytes(np.array([t for d in mine for t in d], np.uint8).tobytes())
    np.save(job.file('counts', 'npy'), np.array([len(d) for d in mine], np.int64))
    jobs.append(job)
  order = layout.join(jobs, len(documents), seed, work)
  stream = [t for place in range(len(documents)) for t in [*documents[order.shuffle.at(np.array([place]))[0]], 1]]
  assert order.begin[-1] == len(stream)
  plan = Plan(len(stream) // length, 0, length, 'uint8', 1, seed)
  if not plan.rows:
    return
  plan.flat(work, 'w+')
  for job in reversed(jobs):
    passes.scatter((job, plan))
  rows = np.array(plan.flat(work, 'r')).reshape(plan.rows, length)
  source_K = np.arange(len(documents)) % 3
  place = np.empty(plan.rows, np.int64)
  for to_B, document_B, offset_B, source_B in layout.origins(order, source_K.astype(np.int16), 3, plan):
    place[:] = to_B
    for row, (document, offset) in enumerate(zip(document_B, offset_B, strict=True)):
      assert order.begin[document] + offset == row * length
    owner = np.repeat(source_K[order.shuffle.at(np.arange(len(documents)))], np.diff(order.begin))
    for row in range(plan.rows):
      assert source_B[row] == np.bincount(owner[row * length : (row + 1) * length], minlength=3).argmax()
  assert sorted(place) == list(range(plan.rows))
  assert rows[place].ravel().tolist() == stream[: plan.rows * length]


def test_same_bytes_on_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  from dsdm_jax.data.pool import build

  monkeypatch.setattr(build, '_FEW_BYTES', 0)
  for i in range(3):
    (tmp_path / f'{i}.jsonl').write_bytes(lines(RECORDS[i::3] + RECORDS[:1]))
  values = []
  for workers in (1, 2):
    config = small_config(sources=(f'jsonl:{tmp_path}/*.jsonl',), max_bytes=15_000, max_document_bytes=0)
    config.host.workers = workers
    values.append(contents(run_pool(config, tmp_path / f'run{workers}').path))
  assert values[0].keys() == values[1].keys()
  assert [name for name in values[0] if values[0][name] != values[1][name]] == []
  assert json.loads(values[0]['card.json'])['lost']['duplicates']['documents'] == 3


def test_a_computed_permutation_serves_where_one_is_too_large_to_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  monkeypatch.setattr(permutation, 'STORED', 10)
  order = Shuffle(1_000, np.random.default_rng(0))
  assert not order.stored
  assert sorted(order.place(np.arange(1_000))) == list(range(1_000)) != order.place(np.arange(1_000)).tolist()
  (tmp_path / 'a.jsonl').write_bytes(lines(RECORDS))
  from tests.data.pool.test_sources import build, texts

  assert set(texts(build(tmp_path / 'pool', f'jsonl:{tmp_path}/a.jsonl')).items()) <= {
    (r['id'], r['text']) for r in RECORDS
  }


def test_duplicates_are_found_in_groups_of_hashes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  rng = np.random.default_rng(0)
  jobs, begin, hashes = [], [0], []
  for index in range(3):
    job = Job(Unit(parse('jsonl:x'), ()), index, tmp_path, 0, False)
    hash_M2 = rng.integers(0, 20, (40, 2)).astype(np.uint64)
    np.savez(job.file('scan', 'npz'), hash_M2=hash_M2)
    jobs.append(job)
    begin.append(begin[-1] + 40)
    hashes += map(tuple, hash_M2.tolist())
  wanted = [h in hashes[:i] for i, h in enumerate(hashes)]
  assert layout.repeated(jobs, begin).tolist() == wanted
  monkeypatch.setattr(layout, '_GROUP', 16)
  assert layout.repeated(jobs, begin).tolist() == wanted


def test_shares_of_a_budget():
  def entry(weight: float = 1.0, cap: int = 0, sized: bool = False) -> SimpleNamespace:
    return SimpleNamespace(weight=weight, max_bytes=cap, sized=sized)

  assert layout.shares([entry(), entry()], [100, 50], 0) == [100, 50]
  assert layout.shares([entry(), entry()], [100, 100], 100) == [50, 50]
  assert layout.shares([entry(3), entry(1)], [100, 100], 100) == [75, 25]
  assert layout.shares([entry(3), entry(1)], [30, 100], 100) == [30, 70]
  assert layout.shares([entry(1, 10), entry(1)], [100, 100], 100) == [10, 90]
  # A sized source may exceed the budget by a document, but not its cap or the share of others.
  assert layout.shares([entry(sized=True)], [105], 100) == [105]
  assert layout.shares([entry(cap=10, sized=True)], [100], 0) == [10]
  assert layout.shares([entry(3, sized=True), entry()], [105, 105], 100) == [75, 25]


def test_a_document_table_of_many_groups(tiny_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
  from dsdm_jax.data.pool import pool

  monkeypatch.setattr(passes, '_DOCUMENTS', 5)
  monkeypatch.setattr(pool, '_RESIDENT_DOCUMENTS', 0)
  large = pool.Pool(run_pool(small_config(), tmp_path))
  wanted = pool.Pool(tiny_artifact).documents
  assert len(large.documents._groups) > 3
  assert list(large.documents) == list(wanted)
  assert large.documents[3:6] == wanted[3:6] and large.documents[-1] == wanted[-1]


def _killed(job: int) -> int:
  if job == 2:
    os.kill(os.getpid(), signal.SIGKILL)
  return job


def _without_memory(job: int) -> int:
  raise MemoryError


@pytest.mark.parametrize(('function', 'workers'), [(_killed, 2), (_without_memory, 1)])
def test_a_killed_worker_is_one_line(function, workers: int):
  with pytest.raises(UserError, match=r'(was killed|ran out).*lower --config\.host\.workers') as caught:
    passes.run_parallel(function, list(range(4)), workers, Bar(None, None, None, 'job'))
  assert '\n' not in str(caught.value)
