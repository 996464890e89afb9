"""One flipped bit in a finished run, before every reader: an error line, or what was read before."""

import contextlib
import dataclasses
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dsdm_jax
from dsdm_jax import cli, pipeline
from dsdm_jax.attribution import score_files
from dsdm_jax.attribution.store import Features
from dsdm_jax.config.validate import flatten
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError
from dsdm_jax.report import report_data
from dsdm_jax.selection import documents, export
from dsdm_jax.study import arm_file, study
from dsdm_jax.training import loop, step
from dsdm_jax.validation import table
from tests.pipeline import tiny

MOST_CHARACTERS = 2_000


def add_validation(workdir: Path) -> None:
  """A made-up finished validation."""
  inputs = {name: artifact.digest for name, artifact in artifacts.read(workdir, 'pool', 'targets').items()}
  identity = artifacts.Identity('validation', 1, {}, inputs)
  out = artifacts.begin(workdir, identity)
  record = {
    'setting': 'plain',
    'predictor': 'reference',
    'family': 'halves',
    'subsets': 9,
    'lds': 0.33,
    'low': 0.1,
    'high': 0.5,
    'ceiling': None,
  }
  storage.write_json(out / 'lds.json', {'by_example': [record], 'by_task': [record]})
  storage.write_json(out / 'monotone.json', {'docs': [{'loss': [1.0, 2.0, 3.5], 'ordered': True}]})
  artifacts.commit(workdir, identity, {}, artifacts.Cost(out))


def _load(workdir: Path, scratch: Path) -> Any:
  run = dsdm_jax.load(workdir)
  rows = [0, run.pool.num_rows - 1]
  return (
    run.pool.show(rows).to_csv(),
    {target: run.scores[target].tobytes() for target in run.scores},
    run.scores.interval('docs').to_csv(),
    run.selections.table.to_csv(),
    {name: run.selections[name].rows.tobytes() for name in run.selections},
    run.results.raw,
    run.results.losses.to_csv(),
    run.config,
    run.cost.to_csv(),
  )


def _export(workdir: Path, scratch: Path) -> Any:
  export.write(workdir, 'dsdm--mix', 'jsonl', scratch / 'export')
  return (scratch / 'export/dsdm--mix--0.jsonl').read_bytes()


def _documents(workdir: Path, scratch: Path) -> Any:
  documents.write(workdir, 'parquet', scratch / 'documents')
  return [path.read_bytes() for path in sorted((scratch / 'documents').iterdir())]


def _report(workdir: Path, scratch: Path) -> Any:
  inputs = artifacts.read(workdir, *report_data.STAGES, 'validation')
  shown = dict(vars(report_data.load(inputs, {}, Pool(inputs['pool']).text)))
  del shown['text'], shown['environment']
  shown['documents'] = list(shown['documents'])
  return json.dumps(shown, default=lambda x: vars(x) if dataclasses.is_dataclass(x) else x.tolist())


def _scores(workdir: Path, scratch: Path) -> Any:
  return {name: score_N.tobytes() for name, score_N in score_files.load(workdir, 'mix').items()}


def _arm(workdir: Path, scratch: Path) -> Any:
  arm_file.write(workdir, 'a', flatten(tiny.get_config()), scratch / 'a.json')
  return (scratch / 'a.json').read_bytes()


def _arm_file(workdir: Path, scratch: Path) -> Any:
  return repr(arm_file.read(workdir / 'arm.json'))


def _pool(workdir: Path, scratch: Path) -> Any:
  pool = Pool(workdir / 'pool')
  return pool.tokens(range(pool.num_rows)).tobytes(), list(pool.documents), pool.sources, pool.planted


def _features(workdir: Path, scratch: Path) -> Any:
  features = Features(artifacts.read(workdir, 'features')['features'])
  return [(first, phi_BJ.tobytes()) for c in range(features.checkpoints) for first, _, phi_BJ in features.pool(c)]


def _run(workdir: Path, scratch: Path) -> Any:
  with contextlib.redirect_stdout(io.StringIO()):
    pipeline.run(tiny.get_config(), workdir)
  return (workdir / 'results.json').read_bytes()


def _study(workdir: Path, scratch: Path) -> Any:
  with contextlib.redirect_stdout(io.StringIO()):
    linked = study.share(tiny.get_config(), scratch / 'arm', [workdir])
  return {name: artifacts.read(scratch / 'arm', name)[name].digest for name in linked}


def _checkpoint(workdir: Path, scratch: Path) -> Any:
  """As evaluation reads a model of `evaluation.checkpoints`."""
  folder = _model(workdir)
  config, pool = pipeline.runner_config(tiny.get_config()), Pool(workdir / 'pool')
  trainer = step.trainer(config.model, config.pretraining.train, pool.vocab_size, pool.length, make_mesh(config.mesh))
  state = loop.load_state(folder, trainer)
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def _model(workdir: Path) -> Path:
  return sorted(path for path in workdir.glob('pretraining/*/*') if path.is_dir())[0]


def _printed(act: Callable[[list[str]], int], arguments: list[str]) -> str:
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    code = act(arguments)
  if code:
    raise UserError((error.getvalue() or out.getvalue().splitlines()[-1]).strip())
  return out.getvalue()


def _table(workdir: Path, scratch: Path) -> Any:
  return _printed(table.main, [str(workdir / 'validation')])


def _verify(workdir: Path, scratch: Path) -> Any:
  return _printed(cli.main, ['verify', str(workdir)])


_STAGES = {stage.name: stage for stage in pipeline.STAGES}  # a run computes damaged files of repairable ones again
# Reader → the stages that it reads; '' for the file of an arm, 'model' for one model's checkpoints.
READERS: dict[Callable[[Path, Path], Any], tuple[str, ...]] = {
  _load: report_data.STAGES,
  _export: ('pool', 'datamodel', 'selection'),
  _documents: ('pool', 'datamodel', 'selection'),
  _report: (*report_data.STAGES, 'validation'),
  _scores: ('datamodel',),
  _arm: ('pool', 'targets', 'selection', 'pretraining', 'ladder', 'evaluation'),
  _arm_file: ('',),
  _pool: ('pool',),
  _features: ('features',),
  _table: ('validation',),
  _run: (*(name for name in report_data.STAGES if not _STAGES[name].repairable), 'report'),
  _study: report_data.STAGES,
  _checkpoint: ('model',),
  _verify: (*report_data.STAGES, 'validation'),
}


def prepare(workdir: Path) -> None:
  add_validation(workdir)
  _arm(workdir, workdir)
  (workdir / 'a.json').rename(workdir / 'arm.json')


def _files(workdir: Path) -> dict[str, list[Path]]:
  """Stage → its manifest and the files that this lists."""
  files = {'': [workdir / 'arm.json'], 'model': [p for p in sorted(_model(workdir).rglob('*')) if p.is_file()]}
  for stage in (*report_data.STAGES, 'validation', 'report'):
    artifact = artifacts.read(workdir, stage)[stage]
    files[stage] = [artifact.path.parent / artifacts.MANIFEST, *(artifact.path / n for n in artifact.manifest['files'])]
  return files


def flips(workdir: Path, scratch: Path, number: int, seed: int = 0) -> Iterator[tuple[str, str]]:
  """Flips bits one after the other; yields each (reader, how it ended) after checking it. Each reader comes in turn."""

  def read(reader: Callable[[Path, Path], Any]) -> Any:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    return reader(workdir, scratch)

  before = {reader: read(reader) for reader in (_run, *READERS)}  # the first run adds the validation to the report
  rng, files = random.Random(seed), _files(workdir)
  for index in range(number):
    reader, stages = list(READERS.items())[index % len(READERS)]
    file = rng.choice([file for file in files[rng.choice(stages)] if file.stat().st_size])
    whole = file.read_bytes()
    data = bytearray(whole)
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    where = f'{reader.__name__} after a flip in byte {at} of {file}'
    assert not storage.marked(file) or not storage.is_marked(file), where
    try:
      found = read(reader)
    except UserError as error:
      ended, message = 'an error line', str(error)
      assert '\n' not in message and len(message) <= MOST_CHARACTERS, f'{where}: {message[:300]}'
    else:
      ended = 'the same result'
      assert found == before[reader], where
    file.write_bytes(whole)
    yield reader.__name__, ended
