"""The examples run, and the public API imports only what is used."""

import subprocess
import sys

import pytest

import dsdm_jax
from examples import own_model


def test_own_model_finds_the_rows_that_the_targets_were_copied_from():
  assert sorted(own_model.main().rows) == list(range(8))


def test_import_brings_in_neither_jax_nor_numpy():
  code = "import sys, dsdm_jax; print({'jax', 'numpy', 'pandas', 'tensorflow', 'matplotlib'} & set(sys.modules))"
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set()'


def test_public_names():
  for name in dsdm_jax.__all__:
    assert getattr(dsdm_jax, name) is not None
  with pytest.raises(AttributeError, match="'dsdm_jax' has no attribute 'no_such_name'"):
    _ = dsdm_jax.no_such_name
