"""Exports a trained model as a folder that Hugging Face's transformers opens.

    dsdm export model --workdir RUN --arm dsdm --seed 0 --out FOLDER
    dsdm export model --workdir RUN --proxy 0 --out FOLDER
    dsdm export model --workdir RUN --checkpoint OTHER/pretraining/…/dsdm--mix--0 --out FOLDER

The folder has config.json, safetensors files of about 128 MB, the tokenizer, generation_config.json, and a model card
with data, selection and results. `model.weights=FOLDER` reads it again to the bit, if it is written in float32.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from dsdm_jax.config.relations import OUR_FACTORY
from dsdm_jax.config.schema import Model
from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import tokenizer_files
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import UserError, visible
from dsdm_jax.lm import hugging_face, partition
from dsdm_jax.selection.export import new_folder
from dsdm_jax.training.step import abstract_model

_COMPARED_TEXTS = 256  # rows of the pool


class TrainedModel:
  """One model of a finished run: an arm's, a proxy, or a checkpoint of the same shape.

  Args:
    workdir: of the run.
    arm: '<method>' or '<method>--<target>'; '' for none.
    seed: of the arm.
    proxy: number of a proxy; None for none.
    checkpoint: folder of Orbax checkpoints of the run's final models; None for none.

  Raises:
    UserError: no such model, a file of the run is damaged, or the model is a custom one.
  """

  def __init__(
    self, workdir: Path, arm: str = '', seed: int = 0, proxy: int | None = None, checkpoint: Path | None = None
  ):
    stage = 'pretraining' if proxy is None else 'proxies'
    opened = artifacts.read(workdir, 'pool', *(('selection',) if arm else ()), stage)
    self.pool, self._stage = Pool(opened['pool']), opened[stage]
    self.entry: dict[str, Any] = {}
    self.selection: Selection | None = None
    if arm:
      index = json.loads((opened['selection'].path / 'index.json').read_bytes())
      arms = {f'{e["method"]}--{e["target"]}': e['method'] for e in index}
      named = [name for name, method in arms.items() if arm in (name, method)]
      matching = [e for e in index if f'{e["method"]}--{e["target"]}' in named and e['seed'] == seed]
      if len(matching) != 1:
        seeds = sorted({e['seed'] for e in index})
        raise UserError(
          f'--arm={arm} --seed={seed}: {workdir} has the arms {", ".join(arms)} with the seeds '
          f'{", ".join(map(str, seeds))}; name one of each'
        )
      self.entry = matching[0]
      self.selection = Selection.load(opened['selection'].path, self.entry['selection'])
    self.name = self.entry['name'] if arm else checkpoint.name if checkpoint else f'proxy_{proxy}'
    section = 'model' if proxy is None else 'proxies.model'
    keys = {k.removeprefix(f'{section}.'): v for k, v in self._stage.config.items() if k.startswith(f'{section}.')}
    if keys['factory'] != OUR_FACTORY:  # a file of a workdir must not name a function that runs here
      raise UserError(
        f'{section}.factory of the run is {keys["factory"]}, a custom model, which has no counterpart in transformers'
      )
    self.config = ConfigDict(Model().model_dump() | keys)
    self.theirs = hugging_face.their_config(self.config, self.pool.vocab_size, self.pool.length)
    self.folder = checkpoint or self._stage.path / self.name
    self.step = None if checkpoint else self._stage.last_step(self.name)
    if not self.folder.is_dir():
      raise UserError(f'{self.folder} does not exist; name a model of the run or a folder of checkpoints')

  def parameters(self) -> dict[str, jax.Array]:
    """Path → parameter, of the last checkpoint."""
    model = abstract_model(self.config, self.pool.vocab_size, self.pool.length)
    with Checkpoints(self.folder) as checkpoints:
      state = checkpoints.restore_part({'params': nnx.state(model, nnx.Param)}, self.step)
    leaves = jax.tree_util.tree_leaves_with_path(state['params'])
    return {partition.path_name(path): x for path, x in leaves}

  def write(self, out: Path, dtype: str) -> str:
    """Writes the files into the folder `out` and returns a message about them."""
    ids = tokenizer_files.write(self.pool.path, out, self.pool.length)
    hugging_face.write(out, self.config, self.theirs | ids, self.parameters(), dtype)
    storage.write_json(out / 'generation_config.json', ids)
    rows = range(0, self.pool.num_rows, -(-self.pool.num_rows // _COMPARED_TEXTS))
    texts = [self.pool.text(row) for row in rows]
    same = tokenizer_files.agreement(self.pool.encoder, out, texts)
    storage.write_text(out / 'README.md', self._card(dtype, f'{same:,} of {len(texts):,}'))
    return (
      f'{self.name} as {self.theirs["model_type"]} in {dtype}; its tokenizer gives the ids of the pool on {same:,} of '
      f'{len(texts):,} of its texts'
    )

  def _card(self, dtype: str, same: str) -> str:
    card, settings = self.pool.card, self._stage.config
    section = 'model' if self._stage.path.parent.name == 'pretraining' else 'proxies.model'
    training = {k: v for k, v in settings.items() if k.startswith((f'{section}.', 'pretraining.', 'proxies.train.'))}
    lines = [
      '---', 'library_name: transformers', 'pipeline_tag: text-generation', 'tags: [dsdm, data-selection]', '---', '',
      f'# {self.name}', '',
      f'A language model of {self.theirs["model_type"]}\'s architecture, trained by dsdm_jax on rows of '
      f'{self.pool.length} tokens; longer texts are untested. Weights are in {dtype}.', '',
      '## Data', '',
      f'{card["rows"]:,} rows from {card["documents"]:,} documents ({card["bytes"]:,} bytes, {card["tokens"]:,} '
      f'tokens, a vocabulary of {card["vocab_size"]:,}).', '',
      '| source | documents | rows |', '|---|---|---|',
      *(f'| {_cell(name)} | {s["documents"]:,} | {s["rows"]:,} |' for name, s in [*card['sources'].items()][:50]), '',
      f'The tokenizer gives the same ids as that of the training on {same} texts of the pool.', '',
    ]  # fmt: skip
    if self.selection is not None:
      facts = json.dumps(self.selection.provenance, indent=2, ensure_ascii=False)
      lines += ['## Selection', '', f'{self.selection.size:,} rows, chosen by:', '', '```json', facts, '```', '']
    lines += self._results()
    lines += ['## Settings', '', '```json', json.dumps(training, indent=2, default=str), '```', '']
    return '\n'.join(lines)

  def _results(self) -> list[str]:
    """Results of the model's arm over its seeds, if the run is evaluated."""
    stage = artifacts.open_stage(self._stage.path.parent.parent, 'evaluation') if self.entry else None
    if stage is None:
      return []
    results = json.loads((stage.path / 'results.json').read_bytes())

    def own(row: Mapping[str, Any]) -> bool:
      return (row['method'], row['target_mix']) == (self.entry['method'], self.entry['target'])

    level = f'{results["confidence"]:.0%} interval'
    lines = [
      '## Results', '',
      f'Means of this arm over its seeds; this model is seed {self.entry["seed"]}.', '',
      f'| task | split | items | seeds | nats per token of the right answer | {level} | accuracy | {level} |',
      '|---|---|---|---|---|---|---|---|',
    ]  # fmt: skip
    for row in filter(own, results['summary']):
      lines.append(
        f'| {_cell(row["task"])} | {row["split"]} | {row["n_items"]:,} | {row["seeds"]} | {row["logprob"]:.4f} | '
        f'{_interval(row["low"], row["high"])} | {row["accuracy"]:.4f} | '
        f'{_interval(row["accuracy_low"], row["accuracy_high"])} |'
      )
    compared = list(filter(own, results['comparisons']))
    if compared:
      lines += ['', f'| task | split | compared with | difference in nats per token | {level} | verdict |']
      lines += ['|---|---|---|---|---|---|']
    for row in compared:
      lines.append(
        f'| {_cell(row["task"])} | {row["split"]} | {_cell(row["baseline"])} | {row["difference"]:+.4f} | '
        f'{_interval(row["low"], row["high"])} | {row["verdict"]} |'
      )
    return [*lines, '', *(note + '\n' for note in results['notes'])]


def _cell(text: Any) -> str:
  return visible(str(text)).replace('|', '\\|').replace('<', '&lt;')


def _interval(low: float | None, high: float | None) -> str:
  return '' if low is None or high is None else f'{low:.4f} to {high:.4f}'


def main(argv: Sequence[str] | None = None) -> int:
  """Returns 0.

  Raises:
    UserError: as `TrainedModel`, no family of transformers has such a model, or the folder cannot be written.
  """
  parser = argparse.ArgumentParser(
    prog='dsdm export model', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', type=Path, required=True, help='a run')
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--arm', default='', help='<method>[--<target>]')
  which.add_argument('--proxy', type=int, help='number of a proxy')
  which.add_argument('--checkpoint', type=Path, help="folder of Orbax checkpoints in the shape of the run's models")
  parser.add_argument('--seed', type=int, default=0, help='of the arm')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--out', type=Path, required=True, help='folder to write; it must be missing or empty')
  flags = parser.parse_args(argv)
  model = TrainedModel(flags.workdir, flags.arm, flags.seed, flags.proxy, flags.checkpoint)
  with new_folder(flags.out) as folder:
    message = model.write(folder, flags.dtype)
  sys.stdout.write(visible(f'{message}, in {flags.out}') + '\n')
  return 0
