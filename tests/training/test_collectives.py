"""What the compiled train step sends between devices: weights and gradients, and few sums of activations."""

import re

import jax
import jax.numpy as jnp

from configs import base
from dsdm_jax.core.mesh import make_mesh
from dsdm_jax.plan import hlo
from dsdm_jax.training.step import Trainer

# Sizes that differ from each other, so that a shape says what it is.
BATCH, LENGTH, LAYERS, WIDTH, MLP, VOCAB = 16, 28, 2, 32, 160, 192
COLLECTIVE = re.compile(
  r'= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\('
)
SHAPE = re.compile(r'\w+\[([\d,]*)\]')


def collectives(
  grid: tuple[int, int, int], deep: bool, microbatches: int = 1
) -> list[tuple[str, tuple[int, ...], list[int]]]:
  """(operation, shape of one result, devices of the first group) of each collective of the compiled step."""
  config = base.get_config()
  config.mesh.replicas, config.mesh.data, config.mesh.model = grid
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
    (operation, tuple(int(n) for n in shape.split(',') if n), hlo.group(line, 8))
    for line in text.splitlines()
    for results, operation in COLLECTIVE.findall(line)
    for shape in SHAPE.findall(results)
  ]


def test_data_parallel_sends_weights_and_gradients_alone():
  found = collectives((1, 8, 1), deep=True)
  assert {operation for operation, *_ in found} == {'all-gather', 'all-reduce', 'reduce-scatter'}
  assert [shape for _, shape, _ in found if LENGTH in shape and shape != (LENGTH, WIDTH)] == []  # positions are weights
  gathered = [shape for operation, shape, _ in found if operation == 'all-gather']
  # One layer's weights at a time.
  assert not [shape for shape in gathered if len(shape) == 3 and shape[0] == LAYERS]
  assert {(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, MLP), (MLP, WIDTH)} <= set(gathered)
  # Whole gradients are summed of vectors alone, and of positions, which are not split.
  summed = [shape for operation, shape, _ in found if operation == 'all-reduce']
  assert {shape for shape in summed if len(shape) > 1} <= {
    (LENGTH, WIDTH),
    (LAYERS, WIDTH),
    (LAYERS, 3 * WIDTH),
    (LAYERS, MLP),
  }


def test_replicas_exchange_parts_of_gradients_alone():
  """In two parts of a batch, whose gradients are added before they are sent."""
  found = collectives((2, 4, 1), deep=True, microbatches=2)
  replicas = [set(range(4)), set(range(4, 8))]
  inside = [x for x in found if any(set(x[2]) <= replica for replica in replicas)]
  across = [x for x in found if x not in inside]
  assert [operation for operation, *_ in across if operation != 'all-reduce'] == []  # no weight is gathered across
  assert [shape for operation, shape, _ in inside if operation == 'all-gather']
  # A device sends a quarter of each matrix's gradient to the other replica, and small vectors whole; once a step.
  matrices = {
    (LAYERS, WIDTH, 3 * WIDTH): 1,
    (LAYERS, WIDTH, WIDTH): 2,
    (LAYERS, WIDTH, MLP): 1,
    (LAYERS, MLP, WIDTH): 2,
  }
  parts = [tuple(n // 4 if i == axis else n for i, n in enumerate(shape)) for shape, axis in matrices.items()]
  sent = [shape for _, shape, group in across if len(group) == 2]
  assert set(parts) <= set(sent)
  whole = [shape for _, shape, _ in across if shape[-2:] in {shape[1:] for shape in matrices}]
  assert whole == []


def test_microbatches_gather_weights_once():
  def gathers(microbatches: int) -> int:
    return sum(
      operation == 'all-gather' for operation, *_ in collectives((1, 8, 1), deep=False, microbatches=microbatches)
    )

  assert gathers(2) <= gathers(1)


def test_tensor_parallel_sums_activations_twice_a_layer_and_pass():
  found = collectives((1, 2, 4), deep=False)
  rows = BATCH // 2
  activations = [(o, shape) for o, shape, _ in found if LENGTH in shape and shape != (LENGTH, WIDTH)]
  assert {operation for operation, _ in activations} == {'all-reduce'}
  assert {shape for _, shape in activations} <= {(rows, LENGTH, WIDTH), (rows, LENGTH)}
  # Attention and MLP, forward and backward; the embedding's rows and the head's input besides (Megatron's count).
  assert sum(shape == (rows, LENGTH, WIDTH) for _, shape in activations) == 4 * LAYERS + 2
