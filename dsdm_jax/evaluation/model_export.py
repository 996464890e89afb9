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
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from dsdm_jax.core import artifacts, storage
from dsdm_jax.core.storage import Location
from dsdm_jax.data.order.selection import Selection
from dsdm_jax.data.pool import tokenizer_files
from dsdm_jax.data.pool.pool import Pool
from dsdm_jax.errors import visible
from dsdm_jax.lm import hugging_face, partition
from dsdm_jax.selection.export import new_folder
from dsdm_jax.training import trained
from dsdm_jax.training.trained import Trained

_COMPARED_TEXTS = 256  # rows of the pool


class TrainedModel(Trained):
  """One model of a finished run, as `Trained`, that is written for transformers.

  Raises:
    UserError: as `Trained`, a file of the run is damaged, or the model is a custom one.
  """

  def __init__(
    self,
    workdir: Location,
    arm: str = '',
    seed: int = 0,
    proxy: int | None = None,
    checkpoint: Location | None = None,
  ):
    opened = artifacts.read(workdir, *trained.stages(arm, proxy))
    super().__init__(opened, Pool(opened['pool']), arm, seed, proxy, checkpoint)
    self.refuse_foreign((), ', which has no counterpart in transformers')
    self.selection = Selection.load(opened['selection'].path, self.entry['selection']) if arm else None
    self.theirs = hugging_face.their_config(self.config, self.pool.vocab_size, self.pool.length)

  def parameters(self) -> dict[str, jax.Array]:
    """Path → parameter, of the last checkpoint."""
    return _named(self.restored({'params': self._shapes()})['params'])

  def _shapes(self) -> nnx.State:
    return nnx.state(self.abstract(), nnx.Param)

  def write(self, out: Path, dtype: str) -> str:
    """Writes the files into the folder `out` and returns a message about them."""
    ids = tokenizer_files.write(self.pool.path, out, self.pool.length)
    shapes = self._shapes()
    of_path = {'/'.join(map(str, path)): (path, x) for path, x in nnx.to_flat_state(shapes)}
    with self.checkpoint() as restore:

      def read(paths: Collection[str]) -> dict[str, jax.Array]:
        some = nnx.from_flat_state([of_path[path] for path in paths])
        return _named(restore({'params': some})['params'])

      hugging_face.write(out, self.config, self.theirs | ids, _named(shapes), dtype, read)
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
    card, settings = self.pool.card, self.artifact.config
    training = {
      k: v for k, v in settings.items() if k.startswith((f'{self.section}.', 'pretraining.', 'proxies.train.'))
    }
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
    stage = artifacts.open_stage(self.artifact.path.parent.parent, 'evaluation') if self.entry else None
    if stage is None:
      return []
    results = storage.read_json(stage.path / 'results.json', dict)

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


def _named(params: nnx.State) -> dict[str, Any]:
  return {partition.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


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
  parser.add_argument('--workdir', type=storage.locate, required=True, help='a run')
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument('--arm', default='', help='<method>[--<target>]')
  which.add_argument('--proxy', type=int, help='number of a proxy')
  checkpoint = "folder of Orbax checkpoints in the shape of the run's models"
  which.add_argument('--checkpoint', type=storage.locate, help=checkpoint)
  parser.add_argument('--seed', type=int, default=0, help='of the arm')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--out', type=storage.locate, required=True, help='folder or address; missing or empty')
  flags = parser.parse_args(argv)
  model = TrainedModel(flags.workdir, flags.arm, flags.seed, flags.proxy, flags.checkpoint)
  with new_folder(flags.out) as folder:
    message = model.write(folder, flags.dtype)
  sys.stdout.write(visible(f'{message}, in {flags.out}') + '\n')
  return 0
