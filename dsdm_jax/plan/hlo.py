"""Reads the text of a compiled TPU program: its communication and its HBM traffic.

XLA's cost analysis counts the body of a loop once and does not know what stays in on-chip memory (memory space 1 in the
text). Here each instruction counts as often as its loops run, with trip counts from the loop conditions.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'bf16': 16, 'token': 0, 'opaque': 0}
_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([^\s(]+) \(.*\{\s*$')
_BEGIN = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = ')  # of an instruction
_END = re.compile(r'^\}(?:, execution_thread="[^"]*")?\s*$')  # of a computation
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.\-]+)')
# Axes by name, of a mesh of all devices in their order or in that of a transposed grid.
_MESH_GROUP = re.compile(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? ?\{([^}]*)\}')
_AXIS = re.compile(
  r"'(\w+)'(?::\((\d+)\)(\d+))?"
)  # 'a', or a part of it: 'a':(2)4, where 2 is the size of what is before
# Groups × members of a grid of devices that may be transposed.
_GRID_GROUP = re.compile(r'replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_LIST_GROUP = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_ALL = 'replica_groups={}'  # one group of all devices
# Slices {1,2} or {1:4}, the chips of each, and what they do.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,:]+)\}x[^"]*",_xla_megascale_transfer_type="(\w+)"')
_DEVICES = re.compile(r'\b(?:num_partitions|replica_count)=(\d+)')
_CHAIN = re.compile(r'chain_id="(\d+)"')
COLLECTIVES = tuple(
  'all-gather all-reduce reduce-scatter all-to-all collective-permute ragged-all-to-all collective-broadcast'.split()
)
# Without traffic of their own: aliases of other instructions, or the second half of a pair that was counted.
_FREE = set(
  'parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id while call '
  'conditional add-dependency'.split()
)
_FREE_CALLS = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound', 'Sharding', 'SPMD')


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  literal: str  # text between the parentheses, for constants and parameters
  attributes: str
  root: bool


Computation = dict[str, Instruction]
_Kind = tuple[str, int, bool]  # operation, members and `between_slices` of a collective


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective: what a chip receives in total over `count` runs of it in one run of the program.

  Attributes:
    operation: in HLO.
    members: of a group; of slices if it is between slices.
    between_slices: whether it goes over the data-center network, and not over the links of a slice.
    count: in one run of the program.
    bytes: received.
  """

  operation: str
  members: int
  between_slices: bool
  count: int
  bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
  """Costs of one run of a compiled program on one chip.

  Attributes:
    collectives: by operation and group size.
    hbm_bytes: read from and written to HBM.
    kernels: runs of Pallas kernels.
    unknown_trips: loops with unknown trip count, which are counted once.
  """

  collectives: tuple[Collective, ...]
  hbm_bytes: float
  kernels: int
  unknown_trips: int

  @property
  def link_bytes(self) -> float:
    return sum(c.bytes for c in self.collectives if not c.between_slices)

  @property
  def network_bytes(self) -> float:
    return sum(c.bytes for c in self.collectives if c.between_slices)


def analyse(text: str) -> Program:
  """Analyses a program from its entry; an empty text is a program without instructions.

  The text of a program for several slices is that of one slice: what crosses is a transfer to the host, with the kind
  of collective and the slices in its attributes.
  """
  if not text:
    return Program((), 0.0, 0, 0)
  devices = math.prod(int(count) for count in _DEVICES.findall(text.partition('\n')[0]))
  return _Walk(parse(text), devices).program()


def parse(text: str) -> dict[str, Computation]:
  """Name of each computation → its instructions by name; the key of the entry is also ''.

  The attributes of a kernel may contain line breaks, and such a line may begin with a brace.
  """
  computations: dict[str, Computation] = {}
  current: Computation | None = None
  lines: list[str] = []  # of one instruction

  def finish() -> None:
    if lines and current is not None:
      instruction = _instruction('\n'.join(lines))
      current[instruction.name] = instruction
    lines.clear()

  for line in text.splitlines():
    if current is None:
      head = _COMPUTATION.match(line)
      if head:
        current = computations.setdefault(head[1], {})
        if line.startswith('ENTRY'):
          computations[''] = current
    elif _END.match(line):
      finish()
      current = None
    elif _BEGIN.match(line):
      finish()
      lines.append(line)
    elif lines:
      lines.append(line)
  if current is not None:
    raise ValueError('the text of a program ends within a computation')
  return computations


def _instruction(line: str) -> Instruction:
  left, _, right = line.partition(' = ')
  end = _balanced(right) if right.startswith('(') else right.index(' ')
  type_, rest = right[:end], right[end:].lstrip()
  opcode, _, tail = rest.partition('(')
  close = _balanced('(' + tail) - 1
  inside, root = tail[: close - 1], left.lstrip().startswith('ROOT')
  operands = tuple(_NAME.findall(inside))
  return Instruction(left.split('%')[-1].strip(), type_, opcode.strip(), operands, inside, tail[close:], root)


def _balanced(text: str) -> int:
  """Position after the parenthesis that closes the first one."""
  depth = 0
  for position, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if depth == 0:
      return position + 1
  return len(text)


def arrays(type_: str) -> Iterator[tuple[float, float]]:
  """(bytes of the values, bytes in HBM with tile padding) of each array of a type."""
  for kind, dims, layout in _ARRAY.findall(type_):
    bits = _BITS[kind] if kind in _BITS else int(re.sub(r'\D', '', kind.partition('e')[0]) or 32)
    shape = [int(n) for n in dims.split(',') if n]
    values = math.prod(shape) * bits / 8
    yield values, 0.0 if re.search(r'S\([1-9]', layout) else _padded(shape, layout) * bits / 8


def _padded(shape: list[int], layout: str) -> int:
  order, _, tiles = layout.partition(':')
  tile = re.match(r'T\(([\d,]+)\)', tiles)
  if not tile or not shape:
    return math.prod(shape)
  minor_first = [int(n) for n in order.split(',') if n]
  sides = [int(n) for n in tile[1].split(',')][::-1]
  sizes = [shape[n] for n in minor_first] if len(minor_first) == len(shape) else shape[::-1]
  return math.prod(-(-size // side) * side for size, side in zip(sizes, sides, strict=False)) * math.prod(
    sizes[len(sides) :]
  )


def _hbm(type_: str) -> float:
  return sum(padded for _, padded in arrays(type_))


def _values(type_: str) -> float:
  return sum(values for values, _ in arrays(type_))


def _attribute(instruction: Instruction, key: str) -> str:
  match = re.search(rf'{key}=%?([\w.\-]+)', instruction.attributes)
  return match[1] if match else ''


def group(attributes: str, devices: int) -> list[int]:
  """The first group of a collective in a program on `devices` devices; empty if the text does not contain it."""
  if _ALL in attributes:
    return list(range(devices))
  if match := _MESH_GROUP.search(attributes):
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    found, names = [0], list(sizes)
    for name, before, size in _AXIS.findall(match[4]):
      count = int(size or sizes[name])
      behind = math.prod(sizes[other] for other in names[names.index(name) + 1 :])
      step = behind * sizes[name] // (int(before or 1) * count)
      found = [first + step * position for first in found for position in range(count)]
    order = _grid(match[2], match[3]) if match[2] else range(math.prod(sizes.values()))
    return sorted(int(order[place]) for place in found)
  if match := _GRID_GROUP.search(attributes):
    return _grid(match[3], match[4])[: int(match[2])].tolist()
  if match := _LIST_GROUP.search(attributes):
    return [int(device) for device in match[1].split(',')]
  return []


def _grid(shape: str, order: str | None) -> np.ndarray:
  """Devices of '16,64' in the order of the transposition '1,0'."""
  sizes = [int(n) for n in shape.split(',')]
  axes = [int(n) for n in order.split(',')] if order else None
  return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


class _Walk:
  """Sums over the computations that the entry reaches."""

  def __init__(self, computations: dict[str, Computation], devices: int):
    self._computations, self._devices = computations, devices
    self._collectives_by_kind: dict[_Kind, list[float]] = {}
    # XLA may split a collective into parts that overlap with computation, also over the iterations of a loop. The text
    # of each part contains the whole: it counts as often as the part that runs least, the first or the last.
    self._chains: dict[tuple[str, str], tuple[_Kind, float, int]] = {}
    self._hbm_bytes, self._kernels, self._unknown = 0.0, 0, 0

  def program(self) -> Program:
    self._computation('', 1)
    for kind, received, times in self._chains.values():
      self._add(kind, received, times)
    collectives = tuple(
      Collective(*kind, int(count), received) for kind, (count, received) in sorted(self._collectives_by_kind.items())
    )
    return Program(collectives, self._hbm_bytes, self._kernels, self._unknown)

  def _computation(self, name: str, times: int) -> None:
    computation = self._computations[name]
    for instruction in computation.values():
      opcode = instruction.opcode
      if opcode == 'while':
        trips = self._trips(_attribute(instruction, 'condition'))
        self._computation(_attribute(instruction, 'body'), times * trips)
      elif opcode == 'call':
        self._computation(_attribute(instruction, 'to_apply'), times)
      elif opcode == 'conditional':
        branches = re.search(r'branch_computations=\{([^}]*)\}', instruction.attributes)
        names = _NAME.findall(branches[1]) if branches else [_attribute(instruction, 'true_computation')]
        self._computation(max(names, key=lambda n: len(self._computations[n])), times)
      else:
        self._collectives(computation, instruction, times)
        self._hbm_bytes += times * self._bytes(computation, instruction)
        self._kernels += times * ('custom_call_target="tpu_custom_call"' in instruction.attributes)

  def _trips(self, condition: str) -> int:
    """The constant that the loop counter, which starts at zero, is compared with."""
    constants = (i for i in self._computations[condition].values() if i.opcode == 'constant')
    literals = (re.match(r'(\d+)', i.literal) for i in constants if i.type[:3] in ('s32', 'u32'))
    bounds = [int(literal[1]) for literal in literals if literal]
    if len(bounds) != 1:
      self._unknown += 1
      return 1
    return bounds[0]

  def _collectives(self, computation: Computation, instruction: Instruction, times: int, name: str = '') -> None:
    operation = instruction.opcode.removesuffix('-start')
    if operation in COLLECTIVES:
      sent = sum(_values(computation[o].type) for o in instruction.operands if o in computation)
      members = group(instruction.attributes, self._devices)
      if 'all-reduce-scatter' in name:
        operation = 'reduce-scatter'
      kind, received = (operation, len(members), False), _received(operation, sent, len(members))
      if chain := _CHAIN.search(instruction.attributes):
        channel = re.search(r'channel_id=(\d+)', instruction.attributes)
        key = (chain[1], channel[1] if channel else instruction.name)
        known = self._chains.get(key)
        if known is None or times < known[2]:
          self._chains[key] = kind, received, times
        return
      self._add(kind, received, times)
    elif transfer := operation == 'send' and _BETWEEN_SLICES.search(instruction.attributes):
      ends = [[int(end) for end in part.split(':')] for part in transfer[1].split(',')]
      slices = sum(part[-1] - part[0] + 1 for part in ends)
      sent = _values(computation[instruction.operands[0]].type)
      operation = transfer[2].lower().replace('_', '-')
      self._add((operation, slices, True), _received(operation, sent, slices), times)
    elif called := _attribute(instruction, 'calls'):
      inner = self._computations.get(called, {})
      for inside in inner.values():
        self._collectives(inner, inside, times, called)

  def _add(self, kind: _Kind, received: float, times: int) -> None:
    entry = self._collectives_by_kind.setdefault(kind, [0, 0.0])
    entry[0] += times
    entry[1] += times * received

  def _bytes(self, computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(('-done', '-update')):
      return 0.0
    if opcode == 'custom-call' and any(f'"{free}' in instruction.attributes for free in _FREE_CALLS):
      return 0.0
    if opcode in ('copy-start', 'slice-start'):
      result = list(arrays(instruction.type))
      if opcode == 'copy-start':
        return result[0][1] + result[1][1]
      return result[1][1] + result[1][0]  # the slice, read from HBM and written to its destination
    if opcode in ('dynamic-slice', 'slice', 'gather'):
      return 2 * _hbm(instruction.type)
    if opcode == 'dynamic-update-slice':
      return 2 * self._operand(computation, instruction, 1)
    written = _hbm(instruction.type)
    if opcode == 'fusion' and (called := _attribute(instruction, 'calls')) in self._computations:
      inner = self._computations[called]
      read = sum(
        self._used(inner, number, self._operand(computation, instruction, number))
        for number in range(len(instruction.operands))
      )
      return read + self._written(inner, instruction.type)
    return written + sum(self._operand(computation, instruction, n) for n in range(len(instruction.operands)))

  def _operand(self, computation: Computation, instruction: Instruction, number: int) -> float:
    operand = computation.get(instruction.operands[number])
    return _hbm(operand.type) if operand else 0.0

  def _used(self, inner: Computation, number: int, whole: float) -> float:
    """Bytes of a parameter that a fusion reads: only the slice if it is sliced, none if it is updated."""
    if not whole:
      return 0.0
    parameter = next((i for i in inner.values() if i.opcode == 'parameter' and i.literal == str(number)), None)
    return min(whole, self._read(inner, parameter, whole)) if parameter else whole

  def _read(self, inner: Computation, source: Instruction, whole: float) -> float:
    total = 0.0
    for user in inner.values():
      if source.name not in user.operands:
        continue
      position = user.operands.index(source.name)
      if user.opcode == 'bitcast':
        total += self._read(inner, user, whole)
      elif user.opcode in ('dynamic-slice', 'slice', 'gather') and position == 0:
        total += _values(user.type)
      elif user.opcode == 'dynamic-update-slice' and position == 0:
        continue
      elif user.opcode == 'fusion' and (called := _attribute(user, 'calls')) in self._computations:
        total += self._used(self._computations[called], position, whole)
      else:
        return whole
    return total

  def _written(self, inner: Computation, type_: str) -> float:
    """Bytes that a fusion with a result of `type_` writes: of what ends in a dynamic-update-slice only the update."""
    root = next((i for i in inner.values() if i.root), None)
    results = [root] if root else []
    if root and root.opcode == 'tuple':
      results = [inner[name] for name in root.operands if name in inner]
    sizes = [padded for _, padded in arrays(type_)]
    if len(results) != len(sizes):
      return sum(sizes)
    return sum(min(size, self._produced(inner, result)) for size, result in zip(sizes, results, strict=True))

  def _produced(self, inner: Computation, result: Instruction) -> float:
    if result.opcode == 'bitcast' and result.operands[0] in inner:
      return self._produced(inner, inner[result.operands[0]])
    if result.opcode == 'dynamic-update-slice' and result.operands[1] in inner:
      return _values(inner[result.operands[1]].type)
    if result.opcode == 'fusion' and (called := _attribute(result, 'calls')) in self._computations:
      return self._written(self._computations[called], result.type)
    return math.inf


def _received(operation: str, sent: float, members: int) -> float:
  """Bytes that one member receives in a ring collective of `members`, each of which contributes `sent` bytes."""
  share = (members - 1) / members if members else 1.0
  if operation == 'all-gather':
    return sent * max(members - 1, 0)
  if operation == 'all-reduce':
    return 2 * sent * share
  if operation in ('collective-permute', 'collective-broadcast'):
    return sent
  return sent * share
