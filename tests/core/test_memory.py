"""What is freed is kept where that pays, and what other packages would leak is not asked of them."""

import gc
import importlib.util
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils

from dsdm_jax.core import memory
from dsdm_jax.core.checkpoints import Checkpoints
from dsdm_jax.errors import UserError
from tests.conftest import ROOT


def test_saving_and_restoring_lists_no_metrics_of_tensorstore(tmp_path, monkeypatch):
  asked = []
  monkeypatch.setattr(tensorstore, 'experimental_collect_matching_metrics', lambda *a: asked.append(a) or [])
  state = {'w': jnp.arange(4.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {'step': 1})
  with Checkpoints(tmp_path) as checkpoints:
    restored, record = checkpoints.restore(state)
  np.testing.assert_array_equal(restored['w'], state['w'])
  assert record == {'step': 1}
  assert asked == []


def test_saving_and_restoring_leaves_nothing_of_its_arrays_behind(tmp_path):
  """TensorStore leaks each description that Orbax asks for: eight blocks of memory an array, saved or restored."""
  state = {f'layer_{i}': jnp.full(8, i) for i in range(64)}

  def cycle(number: int) -> None:
    with Checkpoints(tmp_path / str(number)) as checkpoints:
      checkpoints.save(1, state, {})
    with Checkpoints(tmp_path / str(number)) as checkpoints:
      np.testing.assert_array_equal(checkpoints.restore(state)[0]['layer_9'], state['layer_9'])

  blocks = []
  for number in range(6):
    cycle(number)
    gc.collect()
    blocks.append(sys.getallocatedblocks())
  assert (blocks[-1] - blocks[1]) / 4 < 2 * len(state), blocks


@pytest.mark.parametrize('json', [{'driver': 'file', 'path': '/tmp/a b/ü/'}, {'driver': 'memory', 'path': 'x/'}])
def test_a_store_is_described_as_tensorstore_describes_it(json):
  memory.avoid_storage_leaks()
  assert tensorstore_utils.ts.KvStore.Spec(json).to_json() == tensorstore.KvStore.Spec(json).to_json()


def test_restoring_opens_no_array_to_learn_its_shape(tmp_path, monkeypatch):
  """TensorStore leaks 5 kB each time that Orbax describes one; in checkpoints of before shapes stand nowhere else."""
  state = {'layer': {'w': jnp.ones((2, 3)), 'b': jnp.ones(3)}, 'step': jnp.int32(1)}
  other = {**state, 'layer': {'w': jnp.ones((2, 4)), 'b': jnp.ones(3)}}
  said = r'\(layer.w is \(2, 4\) in the model and \(2, 3\) in the checkpoint\); it is torn or belongs to another model'
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    checkpoints.close()
    with pytest.raises(UserError, match=said):
      checkpoints.restore(other)
    with pytest.raises(UserError, match=r'step is not there in the model and \(\) in the checkpoint'):
      checkpoints.restore({'layer': state['layer']})
    described: list[str] = []
    describe = ocp.StandardCheckpointHandler.metadata
    monkeypatch.setattr(
      ocp.StandardCheckpointHandler, 'metadata', lambda self, path: described.append(path.name) or describe(self, path)
    )
    np.testing.assert_array_equal(checkpoints.restore(state)[0]['layer']['w'], state['layer']['w'])
    assert described == []
    for noted in ('shapes', 'checksums.json'):
      (tmp_path / '1' / noted).rename(tmp_path / noted)
    np.testing.assert_array_equal(checkpoints.restore(state)[0]['layer']['w'], state['layer']['w'])
    with pytest.raises(UserError, match=said):
      checkpoints.restore(other)
    assert described == ['state', 'state']


_STEPS = """
import importlib.machinery, sys
from dsdm_jax.core import memory

if sys.argv[1] == 'huge':
  sys.modules['__main__'].__spec__ = importlib.machinery.ModuleSpec('dsdm_jax.main', None)
  memory.use_huge_pages()
import resource
import jax, jax.numpy as jnp

x = jnp.ones((6_000, 8))  # whose products take 144 MB
step = jax.jit(lambda x: jnp.cos(x @ x.T).sum()).lower(x).compile()
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
  step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, sys.argv[1:])
"""


def _page_faults(how: str) -> int:
  """Of two steps of a program with temporary buffers that no thread's own arena can hold."""
  environment = os.environ | {'JAX_CPU_ENABLE_ASYNC_DISPATCH': 'true', 'JAX_NUM_CPU_DEVICES': '1'}
  environment.pop('GLIBC_TUNABLES', None)
  arguments = [how, 'two words', '']
  done = subprocess.run(
    [sys.executable, '-c', _STEPS, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
  )
  faults, _, said = done.stdout.partition(' ')
  assert said.strip() == str(arguments), 'the second start has the arguments of the first'
  return int(faults)


def _kernel_has_huge_pages() -> bool:
  setting = Path('/sys/kernel/mm/transparent_hugepage/enabled')
  return setting.is_file() and '[madvise]' in setting.read_text()


@pytest.mark.skipif(
  platform.libc_ver() < ('glibc', '2.35') or not _kernel_has_huge_pages(),
  reason='glibc before 2.35, or a kernel that gives huge pages to none or all',
)
def test_steps_with_large_temporary_buffers_clear_few_pages():
  pages = 2 * 6_000 * 6_000 * 4 // resource.getpagesize()
  assert _page_faults('plain') > pages / 2, 'the program shows what it should'
  assert _page_faults('huge') < pages / 20


@pytest.mark.skipif(sys.platform != 'linux', reason='a setting of glibc')
@pytest.mark.parametrize('module', ['dsdm_jax.main', 'dsdm_jax.bench'])
def test_a_program_starts_again_with_huge_pages_and_what_else_was_set(module, tmp_path):
  found = _started(module, tmp_path, GLIBC_TUNABLES='glibc.malloc.tcache_count=3')
  assert found == 'glibc.malloc.tcache_count=3:glibc.malloc.hugetlb=1'
  said = 'glibc.malloc.hugetlb=0'
  assert _started(module, tmp_path, GLIBC_TUNABLES=said) == said


def _started(module: str, folder: Path, **environment: str) -> str:
  """GLIBC_TUNABLES as the program has it when it goes to work."""
  (folder / 'sitecustomize.py').write_text(
    'import os, sys\n'
    'def told(frame, event, argument):\n'
    '  if event == "call" and frame.f_code.co_name == "main" and "dsdm_jax" in frame.f_code.co_filename:\n'
    '    print(os.environ["GLIBC_TUNABLES"], flush=True)\n'
    '    os._exit(0)\n'
    'sys.setprofile(told)\n'
  )
  environment = os.environ | environment | {'PYTHONPATH': str(folder)}
  done = subprocess.run(
    [sys.executable, '-m', module], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


def test_another_program_that_runs_a_module_of_this_one_goes_on():
  code = 'import runpy; runpy.run_module("dsdm_jax.main", run_name="__main__")'
  environment = os.environ | {'GLIBC_TUNABLES': ''}
  done = subprocess.run(
    [sys.executable, '-c', f'print("once", flush=True); {code}'], env=environment, cwd=ROOT, capture_output=True,
    text=True, check=False,
  )  # fmt: skip
  assert (done.returncode, done.stdout) == (2, 'once\n')
  assert '--config is missing' in done.stderr


def test_a_host_with_an_accelerator_is_left_as_it_is(monkeypatch, tmp_path):
  (tmp_path / 'nvidia0').touch()
  started = []
  monkeypatch.setattr(memory.os, 'execv', lambda *given: started.append(given))
  monkeypatch.setattr(memory, '_ACCELERATORS', (str(tmp_path / 'nvidia[0-9]*'),))
  monkeypatch.setenv('GLIBC_TUNABLES', '')
  monkeypatch.setattr(sys.modules['__main__'], '__spec__', importlib.util.find_spec('dsdm_jax.main'))
  monkeypatch.delenv('JAX_PLATFORMS')
  memory.use_huge_pages()
  assert started == []
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')  # the accelerator is not for this run
  memory.use_huge_pages()
  assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
