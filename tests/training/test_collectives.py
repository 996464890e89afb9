"""What the compiled train step sends between devices: weights and gradients, and few sums of activations."""

import re

import jax
import jax.numpy as jnp

from configs import base
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.training.step import Trainer

# Sizes that differ from each other, so that a shape says what it is.
BATCH, LENGTH, LAYERS, WIDTH, MLP, VOCAB = 16, 28, 2, 32, 160, 192
COLLECTIVE = re.compile(
  r'= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('
)
SHAPE = re.compile(r'\w+\[([\d,]*)\]')


def collectives(grid: tuple[int, int], deep: bool, microbatches: int = 1) -> list[tuple[str, tuple[int, ...]]]:
  """(operation, shape of one result) of each collective of the compiled step."""
  config = base.get_config()
  config.mesh.data, config.mesh.model = grid
  config.model.update(
    {
      'layers': LAYERS,
      'width': WIDTH,
      'heads': 8,
      'kv_heads': 8,
      'mlp_width': MLP,
      'scan_layers': deep,
      'remat': deep,
    }
  )
  config.pretraining.train.update({'batch_size': BATCH, 'microbatches': microbatches})
  trainer = Trainer(config.model, config.pretraining.train, VOCAB, LENGTH, make_mesh(config.mesh))
  tokens_BL = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
  step = trainer.step.lower(
    trainer.abstract, tokens_BL, jax.ShapeDtypeStruct((BATCH,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
  )
  text = step.compile().as_text()
  assert 'input_output_alias' in text, 'the state is donated'
  return [
    (operation, tuple(int(n) for n in shape.split(',') if n))
    for results, operation in COLLECTIVE.findall(text)
    for shape in SHAPE.findall(results)
  ]


def test_data_parallel_sends_weights_and_gradients_alone():
  found = collectives((8, 1), deep=True, microbatches=2)
  assert {operation for operation, _ in found} <= {'all-gather', 'all-reduce', 'reduce-scatter'}
  assert [shape for _, shape in found if LENGTH in shape and shape != (LENGTH, WIDTH)] == []  # positions are weights
  gathered = [shape for operation, shape in found if operation == 'all-gather']
  # One layer's weights at a time.
  assert not [shape for shape in gathered if len(shape) == 3 and shape[0] == LAYERS]
  assert [shape for shape in gathered if len(shape) == 3]


def test_tensor_parallel_sums_activations_twice_a_layer_and_pass():
  found = collectives((2, 4), deep=False)
  rows = BATCH // 2
  activations = [(o, shape) for o, shape in found if LENGTH in shape and shape != (LENGTH, WIDTH)]
  assert {operation for operation, _ in activations} == {'all-reduce'}
  assert {shape for _, shape in activations} <= {(rows, LENGTH, WIDTH), (rows, LENGTH)}
  # Attention and MLP, forward and backward; the embedding's rows and the head's input besides (Megatron's count).
  assert sum(shape == (rows, LENGTH, WIDTH) for _, shape in activations) == 4 * LAYERS + 2
