"""A custom model and output function run end to end by config alone; stages read only keys that they declare."""

import json
import sys
import warnings

import numpy as np
import pytest
from ml_collections import ConfigDict

from dsdm_jax import main, pipeline
from dsdm_jax.attribution.store import FeatureStore
from dsdm_jax.config import validate
from dsdm_jax.core.runner import Runner
from tests.helpers import scores as saved_scores
from tests.helpers.workdirs import files_of
from tests.pipeline import runs
from tests.pipeline.tiny import get_config

FLAGS = (
  '--config.model.factory=tests.helpers.custom_models:build',
  '--config.model.kv_heads=1',
  '--config.features.output_fn=tests.helpers.custom_models:last_token_logit',
  '--config.features.layers=mix/w[qkvo]|unembed',
  '--config.pretraining.train.save_every_steps=0',
  '--config.proxies.train.save_every_steps=0',
  "--config.selection.methods=('dsdm','random')",
  '--config.pretraining.seeds=1',
)
# Placement and progress: no result depends on these keys.
FREE = ('mesh.', 'features.job', 'host.', 'log.')


@pytest.fixture(scope='module')
def custom(finished, tmp_path_factory):
  """(workdir of the run, stage → config keys that its code read)."""
  workdir = tmp_path_factory.mktemp('custom') / 'run'
  read: dict[str, set[str]] = {}
  with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    _record_reads(patch, read)
    warnings.filterwarnings('ignore', 'the load_module', DeprecationWarning)  # ml_collections loads config files by it
    argv = ['dsdm_jax', runs.TINY, f'--workdir={workdir}', *FLAGS]
    patch.setattr(sys, 'argv', argv)  # ml_collections looks there for the overrides
    code = main.main(argv)
  assert code == 0
  return workdir, read


def _record_reads(patch: pytest.MonkeyPatch, read: dict[str, set[str]]) -> None:
  sections: dict[int, str] = {}
  now: list[str] = []
  original, run_stage = ConfigDict.__getitem__, Runner.run_stage

  def walk(config: ConfigDict, prefix: str) -> None:
    sections[id(config)] = prefix
    for key in config:
      value = original(config, key)
      if isinstance(value, ConfigDict):
        walk(value, f'{prefix}{key}.')

  def getitem(self, key):
    value = original(self, key)
    if now and id(self) in sections and not isinstance(value, ConfigDict):
      read.setdefault(now[-1], set()).add(sections[id(self)] + key)
    return value

  def recorded(runner, stage):
    walk(runner.config, '')
    now.append(stage.name)
    try:
      return run_stage(runner, stage)
    finally:
      now.pop()

  patch.setattr(ConfigDict, '__getitem__', getitem)
  patch.setattr(Runner, 'run_stage', recorded)


def test_it_runs_from_end_to_end(custom):
  workdir, _ = custom
  assert runs.stages_run(workdir) == list(pipeline.NAMES)
  results = json.loads((workdir / 'results.json').read_text())
  assert results['config']['model.factory'] == results['config']['proxies.model.factory']
  assert results['config']['model.factory'] == 'tests.helpers.custom_models:build'
  assert len(results['arms']) == 2 * 1 * 3 * 2


def test_its_layers_are_probed_and_only_those(custom):
  workdir, _ = custom
  semantics = json.loads((workdir / 'features/manifest.json').read_text())['semantics']
  assert [layer['path'] for layer in semantics['layers']] == [
    'stack/0/mix/wk/kernel',
    'stack/0/mix/wo/kernel',
    'stack/0/mix/wq/kernel',
    'stack/0/mix/wv/kernel',
    'unembed/kernel',
  ]
  store = FeatureStore(
    files_of(workdir, 'features') / 'features_0.zarr', semantics['rows'], semantics['dimension'], 256, 'bfloat16'
  )
  phi_NJ = store.read(0).astype(np.float32)
  for layer in semantics['layers']:
    part = phi_NJ[:, layer['start'] : layer['start'] + layer['a'] * layer['b']]
    assert np.abs(part).max() > 0, layer['path']


def test_scores_are_its_own(custom, finished):
  a, b = (saved_scores.load(files_of(workdir, 'datamodel')) for workdir in (custom[0], finished))
  assert abs(np.corrcoef(a['score_docs_N'], b['score_docs_N'])[0, 1]) < 0.9


def test_no_stage_reads_a_key_that_it_did_not_declare(custom):
  """A key that is read and not declared would let a changed setting pass for a finished stage."""
  _, read = custom
  assert set(read) == set(pipeline.NAMES)  # every stage was recorded
  settings = validate.flatten(get_config())
  for stage in (s for s in pipeline.STAGES if s.name in pipeline.NAMES):
    # What a stage upstream depends on is held by that artifact's digest, which is part of this stage's identity.
    known = [s for s in pipeline.STAGES if s.name in pipeline.needed(stage.name)]
    declared = {key for s in known for key in (*validate.select(settings, s.keys), *(key for key, _ in s.where_set))}
    undeclared = {key for key in read[stage.name] - declared if not key.startswith(FREE)}
    assert undeclared == set(), stage.name
