"""Causal attention on TPUs with the splash kernel of JAX's Pallas library: no [L, L] array reaches HBM.

XLA cannot partition a Pallas kernel, so it runs inside `shard_map` over the mesh that `on_mesh` sets. It supports
neither forward mode nor second derivatives.
"""

import contextlib
import functools
from collections.abc import Iterator

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsdm_jax.core.mesh import BATCH, MODEL, batch_shards
from dsdm_jax.lm import partition

LANES = 128  # of a TPU register; the length must be a multiple of it
_LARGEST_BLOCK = 512  # of queries and of keys: two blocks and the buffers of the backward pass fit into VMEM


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[None]:
  """Code that is traced inside may use kernels on `mesh`."""
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def serves(length: int) -> bool:
  """Whether the kernel supports `length` where this is traced: on a TPU mesh, and for a multiple of `LANES`."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device is not None and device.platform == 'tpu' and length % LANES == 0


def causal(q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, interpret: bool = False) -> jax.Array:
  """softmax(QKᵀ/√K) V, where each position sees itself and earlier ones; shape and dtype of `q_BLHK`.

  Args:
    q_BLHK: L is a multiple of 128. A batch of one row is not partitioned: under `vmap(..., spmd_axis_name=BATCH)` it
      is one of the mapped rows.
    k_BLHK: may have fewer heads, a divisor of those of q.
    v_BLHK: shaped like k.
    interpret: interpret the kernel on any device, slowly; for tests.
  """
  mesh = jax.sharding.get_abstract_mesh()
  batch, heads = q_BLHK.shape[0], k_BLHK.shape[2]
  if mesh.manual_axes:  # inside `shard_map`: these are one device's rows and heads
    return _local(q_BLHK, k_BLHK, v_BLHK, interpret)
  rows = BATCH if batch > 1 and batch % batch_shards(mesh) == 0 else None
  spec = PartitionSpec(rows, None, MODEL if heads % mesh.shape[MODEL] == 0 else None)
  local = functools.partial(_local, interpret=interpret)
  # The kernel does not declare which mesh axes its outputs vary over, so that is not checked.
  mapped = jax.shard_map(local, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
  return mapped(q_BLHK, k_BLHK, v_BLHK)


def _local(q_BLHK: jax.Array, k_BLHK: jax.Array, v_BLHK: jax.Array, interpret: bool) -> jax.Array:
  # Imported here because the import takes half a second, which CPU runs should not pay.
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

  _, length, heads, head_size = q_BLHK.shape
  side = next(b for b in (_LARGEST_BLOCK, 384, 256, LANES) if length % b == 0)
  sizes = splash.BlockSizes(block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, use_fused_bwd_kernel=True)
  mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
  # The backward pass of a scan reads q, k, v, the output and the logsumexp as the kernel takes and makes them.
  kernel = splash.make_splash_mha(
    mask,
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=partition.SAVED,
    interpret=interpret,
  )
  q_BHLK, k_BHLK, v_BHLK = (
    checkpoint_name(x.swapaxes(1, 2), partition.SAVED) for x in (q_BLHK * head_size**-0.5, k_BLHK, v_BLHK)
  )
  return jax.vmap(kernel)(q_BHLK, k_BHLK, v_BHLK).swapaxes(1, 2)
