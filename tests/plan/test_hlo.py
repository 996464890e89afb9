"""Communication and HBM traffic of a program's text, against counts by hand."""

import lzma
import re
from pathlib import Path

import pytest

from dsdm_jax.plan import hlo

STATE = '(s32[]{:T(128)}, f32[12,64,128]{2,1,0:T(8,128)}, f32[12,8,128]{2,1,0:T(8,128)})'

# Twelve times around a loop: a slice of 2 × 256 × 128 weights is gathered from four chips, multiplied on the chip,
# and the result, in on-chip memory S(1), is written into one row of an accumulator.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_slice (param_0: f32[12,64,128], param_1: s32[]) -> f32[64,128] {
  %param_0 = f32[12,64,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice.1 = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero, %zero)
  ROOT %bitcast.1 = f32[64,128]{1,0:T(8,128)} bitcast(%slice.1)
}

%fused_update (param_0.1: f32[12,8,128], param_1.1: f32[8,128], param_2.1: s32[]) -> f32[12,8,128] {
  %param_0.1 = f32[12,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = f32[8,128]{1,0:T(8,128)S(1)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  %row = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%param_1.1)
  ROOT %update.1 = f32[12,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%param_0.1, %row, %param_2.1)
}

%condition (arg.1: (s32[], f32[12,64,128], f32[12,8,128])) -> pred[] {
  %arg.1 = STATE parameter(0)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %bound = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%counter.1, %bound), direction=LT
}

%body (arg.2: (s32[], f32[12,64,128], f32[12,8,128])) -> (s32[], f32[12,64,128], f32[12,8,128]) {
  %arg.2 = STATE parameter(0)
  %counter.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %weights = f32[12,64,128]{2,1,0:T(8,128)} get-tuple-element(%arg.2), index=1
  %sums = f32[12,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg.2), index=2
  %mine = f32[64,128]{1,0:T(8,128)} fusion(%weights, %counter.2), kind=kLoop, calls=%fused_slice
  %whole = f32[256,128]{1,0:T(8,128)} all-gather(%mine), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %product = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%whole), custom_call_target="tpu_custom_call"
  %sums.2 = f32[12,8,128]{2,1,0:T(8,128)} fusion(%sums, %product, %counter.2), kind=kLoop, calls=%fused_update
  ROOT %out = STATE tuple(%counter.2, %weights, %sums.2)
}

ENTRY %main (start: (s32[], f32[12,64,128], f32[12,8,128])) -> f32[12,8,128] {
  %start = STATE parameter(0)
  %loop = STATE while(%start), condition=%condition, body=%body
  %sums.3 = f32[12,8,128]{2,1,0:T(8,128)} get-tuple-element(%loop), index=2
  ROOT %reduced = f32[12,8,128]{2,1,0:T(8,128)} all-reduce(%sums.3), replica_groups=mesh['data'=4,'model'=2] {'data'}
}
""".replace('STATE', STATE)


def test_loop_bodies_count_as_often_as_they_run():
  found = hlo.analyse(PROGRAM)
  weights, row, sums = 64 * 128 * 4, 8 * 128 * 4, 12 * 8 * 128 * 4
  assert found.collectives == (
    hlo.Collective('all-gather', 4, False, 12, 12 * 3 * weights),
    hlo.Collective('all-reduce', 4, False, 1, 2 * sums * 3 / 4),
  )
  assert found.kernels == 12
  assert found.unknown_trips == 0
  # Each time: a slice read and written, gathered (read and written whole), read by the kernel, one row written.
  each = 2 * weights + (weights + 4 * weights) + 4 * weights + row
  assert found.hbm_bytes == 12 * each + 2 * sums + 12 * 2 * 4  # and the loop's counter, twice


def test_collective_that_is_split_over_a_loop_counts_once():
  part = 'channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}'
  chained = f'{part}, frontend_attributes={{chain_id="0"}}'
  begins = (
    f'  %mine.2 = f32[64,128]{{1,0}} broadcast(%start)\n  %begun = f32[256,128]{{1,0}} all-gather(%mine.2), {chained}\n'
  )
  text = PROGRAM.replace(part, chained).replace('  %loop = ', f'{begins}  %loop = ')
  assert text.count('chain_id') == 2
  (gather,) = (c for c in hlo.analyse(text).collectives if c.operation == 'all-gather')
  assert (gather.count, gather.bytes) == (1, 3 * 64 * 128 * 4)


def test_collective_without_groups_has_all_devices():
  text = PROGRAM.replace('replica_groups={{0,1,2,3}}', 'replica_groups={}')
  text = text.replace('is_scheduled=true', 'is_scheduled=true, replica_count=2, num_partitions=4')
  gather = hlo.analyse(text).collectives[0]
  assert (gather.operation, gather.members, gather.bytes) == ('all-gather', 8, 12 * 7 * 64 * 128 * 4)


def test_loop_bound_that_is_not_constant_is_counted():
  found = hlo.analyse(PROGRAM.replace('constant(12)', 'parameter(1)'))
  assert found.unknown_trips == 1
  assert found.collectives[0].count == 1


@pytest.mark.parametrize(
  ('type_', 'values', 'padded'),
  [
    ('f32[8,128]{1,0:T(8,128)}', 4_096, 4_096),
    ('bf16[3,5]{1,0:T(8,128)(2,1)}', 30, 8 * 128 * 2),
    ('bf16[3,5]{0,1:T(8,128)(2,1)}', 30, 8 * 128 * 2),
    ('f32[2,8,64]{2,1,0:T(8,128)}', 4_096, 8_192),
    ('f32[8,128]{1,0:T(8,128)S(1)}', 4_096, 0),
    ('pred[4]{0}', 4, 4),
    ('s4[16]{0}', 8, 8),
    ('f8e4m3fn[16]{0}', 16, 16),
    ('f32[]', 4, 4),
  ],
)
def test_bytes_of_types(type_, values, padded):
  assert list(hlo.arrays(type_)) == [(values, padded)]


@pytest.mark.parametrize(
  ('text', 'members'),
  [
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
    ("replica_groups=mesh['a'=4,'b'=2] {'b'}", [0, 1]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", list(range(8))),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'a','c'}", [0, 4]),
    ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true', [0, 4]),
    ('replica_groups={{0,2},{1,3}}', [0, 2]),
    ('replica_groups={}, dimensions={0}', list(range(8))),
    ('source_target_pairs={{0,1},{1,0}}', []),
  ],
)
def test_members_of_a_group(text, members):
  assert hlo.group(text, 8) == members


@pytest.mark.parametrize(('target', 'slices'), [('{1,2}x{0:7}', 2), ('{1:4}x{0:7}', 4)])
def test_what_crosses_slices_goes_over_the_network(target, slices):
  """A sum of the result over slices, as libtpu writes it."""
  transfer = (
    f'_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{target}",_xla_megascale_transfer_type="ALL_REDUCE"'
  )
  send = (
    '  %ready = token[] after-all()\n  %sent = (f32[12,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%sums.3, %ready), '
  )
  send += f'channel_id=5, is_host_transfer=true, frontend_attributes={{{transfer}}}\n'
  program = hlo.analyse(PROGRAM.replace('  ROOT %reduced', f'{send}  ROOT %reduced'))
  sums = 12 * 8 * 128 * 4
  assert hlo.Collective('all-reduce', slices, True, 1, 2 * sums * (slices - 1) / slices) in program.collectives
  assert program.network_bytes == 2 * sums * (slices - 1) / slices
  assert program.link_bytes == hlo.analyse(PROGRAM).link_bytes


@pytest.fixture(scope='module')
def compiled():
  """The features step of a model of three layers on v5e:2x4, by libtpu, without names of operations and bodies of
  kernels."""
  return lzma.decompress((Path(__file__).parent / 'features_v5e.hlo.xz').read_bytes()).decode()


def test_no_instruction_of_a_computation_with_kernels_is_lost(compiled):
  assert sum(line.startswith('}}') for line in compiled.splitlines()) == 9  # within attributes of a kernel
  found = hlo.parse(compiled)
  begins = re.findall(r'^ +(?:ROOT )?%([\w.\-]+) = ', compiled, re.MULTILINE)
  assert sorted(name for key, each in found.items() if key for name in each) == sorted(begins)
  assert all(sum(i.root for i in computation.values()) == 1 for computation in found.values())
  called = re.findall(r'(?:calls|body|condition|to_apply)=%([\w.\-]+)', compiled)
  assert set(called) <= set(found)


def test_traffic_of_a_program_with_kernels(compiled):
  program = hlo.analyse(compiled)
  assert (program.kernels, program.unknown_trips) == (3 * 2, 0)  # attention forward and backward in each layer
  assert program.hbm_bytes == 1_084_594_696
  body = next(c for c in hlo.parse(compiled).values() if any('splash_mha_fwd' in name for name in c))
  walk = hlo._Walk(hlo.parse(compiled), 8)
  stored = body['bitcast_dynamic-update-slice_fusion.22']  # queries, keys and values of a layer, among those of all
  layers, row = 3, 8 * 2 * 512 * 128 * 2  # bytes of one of the three
  assert [padded for _, padded in hlo.arrays(stored.type)] == 3 * [layers * row]
  assert walk._bytes(body, stored) == 3 * row + 3 * row + 4  # read and written; and the number of the layer
