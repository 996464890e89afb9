"""A TFDS dataset whose builder makes its own records: what preparing one takes can be tried without a network."""

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds


class Lines(tfds.core.GeneratorBasedBuilder):
  """Twenty short texts."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))

  def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
    del dl_manager
    return {'train': self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
    for i in range(20):
      yield i, {'text': f'line {i} is one of twenty lines'}
