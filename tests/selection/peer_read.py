"""Run in an environment of peers: opens an export with the reader of the package it is for, and prints what it gives.

Some packages import clouds or many taggers at their top. Of these only the reader is loaded: the modules around it are
empty.
"""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any


def reader(package: str, *around: str) -> Any:
  """The module `package` with `around`, its parents, left empty."""
  folder = site(around[0])
  for name in around:
    module = types.ModuleType(name)
    module.__path__ = [str(Path(folder, *name.split('.')[1:]))]
    sys.modules[name] = module
  return importlib.import_module(package)


def site(package: str) -> str:
  [folder] = importlib.util.find_spec(package).submodule_search_locations
  return folder


def grain(folder: str) -> list[Any]:
  import grain

  source = grain.sources.ArrayRecordDataSource(sorted(map(str, Path(folder).glob('*.array_record'))))
  return [record.hex() for record in grain.MapDataset.source(source)]


def megatron(folder: str) -> list[Any]:
  [index] = Path(folder).glob('*.idx')
  from megatron.core.datasets.indexed_dataset import IndexedDataset

  return [x.tolist() for x in IndexedDataset(str(index.with_suffix('')))]


def mds(folder: str) -> list[Any]:
  around = ('streaming', 'streaming.base', 'streaming.base.format', 'streaming.base.format.mds')
  shards = reader('streaming.base.format.mds.reader', *around).MDSReader
  result = []
  for entry in json.loads(Path(folder, 'index.json').read_text())['shards']:
    shard = shards.from_json(folder, '', entry)
    result += [
      {k: v.tolist() if hasattr(v, 'tolist') else v for k, v in shard[i].items()} for i in range(shard.samples)
    ]
  return result


def dolma(folder: str) -> list[Any]:
  """Mixes `folder`/documents with the attributes `dsdm`: what has a score for docs above zero."""
  [library] = Path(site('dolma')).glob('dolma.*.so')
  spec = importlib.util.spec_from_file_location('dolma', library)
  rust = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(rust)
  stream = {
    'name': 'mixed',
    'documents': [f'{folder}/documents/*.gz'],
    'attributes': ['dsdm'],
    'output': {'path': f'{folder}/out', 'max_size_in_bytes': 2**30},
    'filter': {'include': ['$.attributes[?(@.dsdm__score_a[0][2] > 0)]'], 'exclude': []},
  }
  work = {name: f'{folder}/mixer/{name}' for name in ('input', 'output')}
  rust.mixer_entrypoint(json.dumps({'streams': [stream], 'work_dir': work, 'processes': 1}))
  import gzip

  parts = sorted(Path(folder, 'out').rglob('*.gz'))
  lines = b''.join(gzip.decompress(part.read_bytes()) for part in parts).decode().split('\n')
  return [json.loads(line)['id'] for line in lines if line]


def datasets(folder: str) -> list[Any]:
  import datasets

  found = datasets.load_dataset(folder, split='train', cache_dir=f'{folder}/../cache')
  return [{name: record[name] for name in ('row', 'tokens', 'loss_mask') if name in record} for record in found]


if __name__ == '__main__':
  print(json.dumps(globals()[sys.argv[1]](sys.argv[2])))
