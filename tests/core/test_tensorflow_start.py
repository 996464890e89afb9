"""TensorFlow sees no accelerator, on a machine that has some."""

import ast
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# TensorFlow is given a GPU and a TPU before it lists devices. That it sees them first shows that hiding them is
# not the machine's doing.
SCRIPT = """
import tensorflow as tf
from tensorflow.python.eager import context

there = context.context()
there._initialize_physical_devices()
there._physical_devices += [context.PhysicalDevice(f'/physical_device:{kind}:0', kind) for kind in ('GPU', 'TPU')]
there._visible_device_list = list(there._physical_devices)
print(sorted(device.device_type for device in tf.config.get_visible_devices()))

from dsdm_jax.core import tensorflow_start
tensorflow_start.start()
print(sorted(device.device_type for device in tf.config.get_visible_devices()))
"""
# TensorFlow, and what imports it.
HEAVY = {'tensorflow', 'seqio', 'tensorflow_datasets', 'clu'}


def test_what_it_finds_is_hidden_from_it():
  done = subprocess.run([sys.executable, '-c', SCRIPT], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2_000:]
  assert done.stdout.splitlines() == ["['CPU', 'GPU', 'TPU']", "['CPU']"]


def _started(path: Path) -> bool:
  """Whether a module that imports TensorFlow or what stands on it also starts it first."""
  tree = ast.parse(path.read_text())
  names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
  names |= {n.module or '' for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
  if not {name.partition('.')[0] for name in names} & HEAVY:
    return True
  return any(isinstance(n, ast.Call) and ast.unparse(n.func) == 'tensorflow_start.start' for n in ast.walk(tree))


def test_every_module_that_imports_it_starts_it():
  # pool.py writes a dataset without TensorFlow: test_writing_a_pool_needs_no_tensorflow.
  exempt = ('core/tensorflow_start.py', 'data/pool/pool.py')
  root = ROOT / 'dsdm_jax'
  modules = [path for path in root.rglob('*.py') if str(path.relative_to(root)) not in exempt]
  assert [str(path) for path in modules if not _started(path)] == []
