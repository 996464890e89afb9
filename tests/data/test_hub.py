"""Ids of the Hugging Face hub become paths of its cache: offline from its layout, and from a hub on loopback."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from configs import base
from dsdm_jax.config.validate import validate
from dsdm_jax.data import hub, inputs
from dsdm_jax.errors import UserError
from tests.data.pool.test_sources import build

OLD, NEW = '1' * 40, '2' * 40  # commits


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
  """An empty cache and no network."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  hub._folder.cache_clear()
  yield tmp_path / 'hub'
  hub._folder.cache_clear()


def cached(cache: Path, kind: str, repo: str, commit: str, **files: str) -> Path:
  """Puts files into the cache as the hub's client does; the commit becomes main."""
  folder = cache / f'{kind}s--{repo.replace("/", "--")}'
  (folder / 'refs').mkdir(parents=True, exist_ok=True)
  (folder / 'refs' / 'main').write_text(commit)
  for name, text in files.items():
    path = folder / 'snapshots' / commit / name.replace('__', '/')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return folder / 'snapshots' / commit


def test_ids_become_paths_that_name_the_commit(cache):
  old = cached(cache, 'model', 'lab/pythia-tiny', OLD, **{'config.json': '{}', 'model.safetensors': 'old'})
  new = cached(cache, 'model', 'lab/pythia-tiny', NEW, **{'config.json': '{}', 'tokenizer.json': '{}'})
  c = base.get_config()
  c.model.weights, c.proxies.model.weights = f'lab/pythia-tiny@{OLD}', 'lab/pythia-tiny'
  c.pool.vocabulary = 'lab/pythia-tiny/tokenizer.json'
  validate(c)
  found = hub.localized(c)
  assert (found.model.weights, found.proxies.model.weights) == (str(old), str(new))
  assert found.pool.vocabulary == str(new / 'tokenizer.json')
  settings = {'model.weights': found.model.weights, 'model.factory': found.model.factory}
  result, given = inputs.by_content({'model.weights': found.model.weights}, settings, None)
  assert result['model.weights'].startswith('content ') and OLD in given['model.weights']
  plain = base.get_config()
  assert hub.localized(plain).to_dict() == plain.to_dict()


def test_a_dataset_is_read_as_its_files_of_a_split(cache, tmp_path):
  lines = ''.join(json.dumps({'text': f'Text number {i} of the hub.'}) + '\n' for i in range(9))
  files = {'data__train-00000-of-00001.jsonl': lines, 'data__test-00000-of-00001.jsonl': 'never read'}
  folder = cached(cache, 'dataset', 'lab/prose', NEW, **files)
  c = base.get_config()
  c.pool.sources = (
    'hf_hub:lab/prose | weight=2',
    f'hf_hub:lab/prose@{NEW} | split=test | name=t | files=data/test-*.jsonl',
  )
  validate(c)
  first, second = hub.localized(c).pool.sources
  assert first == f'jsonl:{folder}/data/train-*.jsonl | weight=2 | name=prose'
  assert second == f'jsonl:{folder}/data/test-*.jsonl | name=t'
  pool = build(tmp_path, first.replace(' | weight=2', ''), length=16)
  assert {d['id'].split('/')[1] for d in pool.documents} == {f'train-00000-of-00001.jsonl:{i}' for i in range(1, 10)}


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('model.weights', 'lab/absent', "model.weights = 'lab/absent' is no path here, .*hf download lab/absent --rev"),
    ('pool.vocabulary', 'lab/absent/tokenizer.json', "pool.vocabulary = 'lab/absent' is no path here"),
    ('pool.sources', ('hf_hub:lab/absent',), 'hf download lab/absent --repo-type dataset --revision main'),
    ('pool.sources', ('hf_hub:lab',), 'needs hf_hub:OWNER/NAME'),
    ('pool.sources', ('hf_hub:lab/many',), r'train in 2 folders .en, fr.; .* one with . files=en/train-\*\.jsonl$'),
    ('pool.sources', ('hf_hub:lab/empty',), 'no Parquet or JSONL files of the split train .*name them with'),
  ],
)
def test_what_is_not_cached_is_one_line(cache, key, value, words):
  cached(cache, 'dataset', 'lab/empty', NEW, **{'README.md': ''})
  cached(
    cache, 'dataset', 'lab/many', NEW, **{'en__train-0.jsonl': '', 'fr__train-0.jsonl': '', 'fr__train-1.jsonl': ''}
  )
  c = base.get_config()
  c.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=words) as caught:
    hub.localized(c)
  assert '\n' not in str(caught.value)


@contextlib.contextmanager
def served(files: dict[str, bytes], kind: str = 'models') -> Iterator[str]:
  """A hub with one model or dataset, lab/served, at the commit `NEW`."""
  repo = '/lab/served' if kind == 'models' else f'/{kind}/lab/served'

  class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
      path, _, _ = self.path.partition('?')
      if path.startswith(f'/api/{kind}/lab/served/tree/'):
        tree = [{'type': 'file', 'path': name, 'size': len(data), 'oid': '0' * 40} for name, data in files.items()]
        self.answer(json.dumps(tree).encode())
      elif path.startswith(f'/api/{kind}/lab/served'):
        siblings = [{'rfilename': name} for name in files]
        self.answer(json.dumps({'id': 'lab/served', 'sha': NEW, 'siblings': siblings}).encode())
      elif path.startswith(start := f'{repo}/resolve/{NEW}/') and (name := path.removeprefix(start)) in files:
        self.answer(files[name])
      else:
        self.send_error(404)

    do_HEAD = do_GET

    def answer(self, data: bytes) -> None:
      self.send_response(200)
      for key, value in (
        ('Content-Length', str(len(data))),
        ('ETag', f'"{hash(data) & 0xFFFF}"'),
        ('X-Repo-Commit', NEW),
      ):
        self.send_header(key, value)
      self.end_headers()
      if self.command == 'GET':
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


def at(monkeypatch, address: str) -> None:
  """Sends the client to the hub at an address."""
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  monkeypatch.setattr(constants, 'ENDPOINT', address)
  monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', address + '/{repo_id}/resolve/{revision}/{filename}')
  monkeypatch.setattr(hf_api.api, 'endpoint', address)


def test_a_dataset_is_downloaded_as_far_as_it_is_read(cache, monkeypatch):
  files = {'data/train-0.jsonl': b'{"text": "of the hub"}', 'data/test-0.jsonl': b'unused', 'README.md': b'unused'}
  c = base.get_config()
  c.pool.sources = ('hf_hub:lab/served | split=train',)
  with served(files, 'datasets') as address:
    at(monkeypatch, address)
    [line] = hub.localized(c).pool.sources
  folder = cache / 'datasets--lab--served' / 'snapshots' / NEW
  assert line == f'jsonl:{folder}/data/train-*.jsonl | name=served'
  read = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  assert read == {'data/train-0.jsonl': files['data/train-0.jsonl']}


def test_a_model_is_downloaded_once(cache, monkeypatch):
  files = {'config.json': b'{"model_type": "gpt2"}', 'model.safetensors': b'weights', 'pytorch_model.bin': b'unused'}
  c = base.get_config()
  c.model.weights = 'lab/served'
  with served(files) as address:
    at(monkeypatch, address)
    folder = Path(hub.localized(c).model.weights)
  assert folder.name == NEW and sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
  assert (folder / 'model.safetensors').read_bytes() == b'weights'
  hub._folder.cache_clear()
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  assert hub.localized(c).model.weights == str(folder)
