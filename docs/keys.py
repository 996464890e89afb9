"""Writes docs/keys.md, the table of all config keys: `PYTHONPATH=. python docs/keys.py` in the repository."""

from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from dsdm_jax.config.schema import Config, Model, Section, Training


def markdown() -> str:
  """The page."""
  lines = [
    '# Config keys',
    '',
    'Generated from `dsdm_jax/config/schema.py` by `PYTHONPATH=. python docs/keys.py`. Set a key in a config file, or',
    'on the command line with `--config.SECTION.KEY=VALUE`. Integers may be written as `1_000_000` or `1e6`. Texts',
    'have at most 10,000 characters and tuples at most 10,000 parts.',
  ]
  sections: dict[type[Section], list[str]] = {Config: ['']}
  for name, field in Config.model_fields.items():
    if isinstance(field.default, Section):
      sections[type(field.default)] = [name]
  sections[Model].append('proxies.model')
  sections[Training] = ['proxies.train', 'pretraining.train']
  for section, places in sections.items():
    lines += ['', '## ' + (', '.join(f'`{place}`' for place in places) if places != [''] else 'Top level'), '']
    lines += [' '.join(section.__doc__.split()), ''] if section.__doc__ and section is not Config else []
    lines += ['| key | type | default | unit, bounds | |', '|---|---|---|---|---|']
    for name, field in section.model_fields.items():
      if not isinstance(field.default, Section):
        cells = (f'`{name}`', _type(field), f'`{field.default!r}`', _bounds(field), field.description or '')
        lines.append('| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |')
  return '\n'.join(lines) + '\n'


def _type(field: FieldInfo) -> str:
  if get_origin(field.annotation) is Literal:
    return ', '.join(f'`{choice!r}`' for choice in get_args(field.annotation))
  if isinstance(field.default, tuple):
    return 'numbers' if field.annotation == tuple[float, ...] else 'texts'
  return {bool: 'bool', int: 'int', float: 'float', str: 'text'}[type(field.default)]


def _bounds(field: FieldInfo) -> str:
  limits = {'ge': '≥', 'gt': '>', 'le': '≤', 'lt': '<'}
  words = [m for m in field.metadata if isinstance(m, str)]
  for name, sign in limits.items():
    values = [getattr(m, name) for m in field.metadata if hasattr(m, name)]
    if values and not (name == 'ge' and any(hasattr(m, 'gt') for m in field.metadata)):
      tightest = max(values) if name in ('ge', 'gt') else min(values)
      words.append(f'{sign} {tightest:,}' if isinstance(tightest, int) else f'{sign} {tightest:g}')
  words += [(m.func.__doc__ or '').removeprefix('must be ') for m in field.metadata if isinstance(m, AfterValidator)]
  return '; '.join(words)


if __name__ == '__main__':
  Path(__file__).with_suffix('.md').write_text(markdown())
