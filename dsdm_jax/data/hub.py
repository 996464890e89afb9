"""Models and datasets of the Hugging Face hub by their ids: downloaded once, then read as local files.

`model.weights='EleutherAI/pythia-70m'`, `pool.vocabulary='EleutherAI/pythia-70m/tokenizer.json'` and
`pool.sources=('hf_hub:OWNER/NAME | split=train',)` become paths of the hub's cache, which contain the commit.
`@REVISION` after the name takes a branch, tag or commit. A path that exists here is never looked up.
"""

import functools
import os
import re
from typing import Literal

from ml_collections import ConfigDict

from dsdm_jax.config.relations import MODELS, OUR_FACTORY
from dsdm_jax.config.values import source_parts
from dsdm_jax.data import files
from dsdm_jax.errors import UserError

_ID = re.compile(r'(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?')
_MODEL = ('*.json', '*.safetensors', '*.jinja')  # of a model and its tokenizer
_TOKENIZER = ('tokenizer*', 'config.json', 'generation_config.json', '*.jinja', '*.model')
_DATA = {'.parquet': 'parquet', **dict.fromkeys(('.jsonl', '.jsonl.gz', '.jsonl.zst', '.json.gz'), 'jsonl')}
_PLACES = (
  'data/{}-*',
  '{}-*',
  '{}',
  'data/{}',
  '{}/*',
  '*/{}-*',
  '*/{}',
  '*/{}/*',
)  # of a split's files, without ending
KIND = 'hf_hub:'  # of a line of pool.sources


def localized(config: ConfigDict, data: bool = True) -> ConfigDict:
  """`config` with local paths in place of hub ids.

  Args:
    config: a whole config.
    data: whether vocabulary and sources are needed too; a plan needs models alone.

  Raises:
    UserError: an id is not in the cache and cannot be downloaded, or a dataset has no files to read.
  """
  changed = ConfigDict(config).copy_and_resolve_references()
  for at, section in zip(MODELS, (changed.model, changed.proxies.model), strict=True):
    if section.factory == OUR_FACTORY and (match := _is_id(section.weights)) and not match['file']:
      section.weights = _folder(f'{at}.weights', match['repo'], match['revision'] or 'main', 'model', _MODEL)
  if not data:
    return changed
  pool = changed.pool
  if (match := _is_id(pool.vocabulary)) and match['file']:
    folder = _folder('pool.vocabulary', match['repo'], match['revision'] or 'main', 'model', _TOKENIZER)
    pool.vocabulary = f'{folder}/{match["file"]}'
  pool.sources = tuple(_source(line) if line.startswith(KIND) else line for line in pool.sources)
  return changed


def _is_id(text: str) -> re.Match[str] | None:
  return None if os.path.exists(text) else _ID.fullmatch(text)


@functools.cache  # so that a run reads one commit
def _folder(where: str, repo: str, revision: str, kind: Literal['model', 'dataset'], patterns: tuple[str, ...]) -> str:
  """The folder of one commit in the cache, with the files that `patterns` match."""
  import huggingface_hub

  try:
    return huggingface_hub.snapshot_download(
      repo, repo_type=kind, revision=revision, allow_patterns=list(patterns), tqdm_class=None
    )
  except Exception as error:  # a boundary: of the network, the hub and its cache
    flag = ' --repo-type dataset' if kind == 'dataset' else ''
    raise UserError(
      f'{where} = {repo!r} is no path here, and the Hugging Face hub does not give it ({files.one_line(error)}); '
      f'correct it, or fetch it where there is a network: hf download {repo}{flag} --revision {revision}'
    ) from error


def _source(line: str) -> str:
  """A line of `pool.sources` that reads the files of a dataset: parquet: or jsonl: with the same options."""
  head, *rest = source_parts(line)
  match, options = _ID.fullmatch(head.removeprefix(KIND)), dict(_option(part) for part in rest)
  if match is None or match['file']:
    raise UserError(f'pool.sources has {line!r}; needs hf_hub:OWNER/NAME, and maybe @REVISION, | split= and | files=')
  repo, revision = match['repo'], match['revision'] or 'main'
  split, pattern = options.pop('split', 'train'), options.pop('files', '')
  patterns = (pattern,) if pattern else tuple(place.format(split) + end for place in _PLACES for end in _DATA)
  folder = _folder('pool.sources', repo, revision, 'dataset', patterns)
  targets = (f'{files.local.escape(folder)}/{pattern}' for pattern in patterns)
  found = ((target, [*filter(files.is_file, files.glob(target))]) for target in targets)
  target, names = next((entry for entry in found if entry[1]), ('', []))
  folders = sorted({os.path.relpath(os.path.dirname(name), folder) for name in names})
  if not pattern and len(folders) > 1:  # configurations, such as languages
    raise UserError(
      f'pool.sources has {line!r}: the dataset has files of the split {split} in {len(folders)} folders '
      f'({", ".join(folders)[:200]}); name those of one with | files={folders[0]}/{target.rpartition("/")[2]}'
    )
  kind = next((kind for end, kind in _DATA.items() if target.endswith(end)), None)
  if kind is None:
    raise UserError(
      f'pool.sources has {line!r}: the dataset has no Parquet or JSONL files of the split {split} where they usually '
      f'are; name them with | files=PATTERN, such as | files=en/{split}-*.parquet'
    )
  options.setdefault('name', repo.partition('/')[2])
  return ' | '.join([f'{kind}:{target}', *(f'{key}={value}' for key, value in options.items())])


def _option(part: str) -> tuple[str, str]:
  key, _, value = part.partition('=')
  return key.strip(), value.strip()
