"""Rounded features: bounds of their error, and how it is reported."""

import numpy as np
import pytest

from dsdm_jax.attribution.quantization import Quantizer

B, BLOCKS = 40, ((0, 16), (16, 80), (80, 96))


def _phi(seed=0):
  phi_BJ = np.random.default_rng(seed).normal(size=(B, 96)).astype(np.float32)
  phi_BJ[:, 16:80] *= 1e6  # one scale for all columns would lose the other layers
  phi_BJ[3] = 0
  phi_BJ[4, 80:] = 0
  return phi_BJ


def test_int8_is_off_by_half_a_step_of_its_row_and_layer():
  quantizer, phi_BJ = Quantizer('int8', BLOCKS), _phi()
  encoded = quantizer.encode(phi_BJ)
  codes_BJ, scale_BK, bad_B = map(np.asarray, encoded)
  assert not (bad_B + 1).any()
  assert codes_BJ.dtype == np.int8 and scale_BK.dtype == np.float32 and scale_BK.shape == (B, 3)
  error_BJ = np.abs(quantizer.decode(encoded) - phi_BJ)
  for i, j in BLOCKS:
    step_B1 = np.abs(phi_BJ[:, i:j]).max(axis=1, keepdims=True) / 127
    assert np.all(error_BJ[:, i:j] <= 0.5001 * step_B1)
  assert not error_BJ[3].any() and not error_BJ[4, 80:].any()


@pytest.mark.parametrize(
  ('dtype', 'bytes_per_row', 'error'), [('float32', 384, 0), ('bfloat16', 192, 4e-3), ('int8', 108, 0.03)]
)
def test_fidelity(dtype, bytes_per_row, error):
  fidelity = Quantizer(dtype, BLOCKS).fidelity(_phi())
  assert fidelity['bytes_per_row'] == bytes_per_row
  assert (fidelity['inner_product_error'] > error / 30) if error else fidelity['inner_product_error'] == 0
  assert fidelity['inner_product_error'] <= error
  assert fidelity['top_overlap'] >= 1 - 5 * error


def test_fidelity_can_be_bad_and_stands_a_single_row():
  coarse, phi_BJ = Quantizer('int8', ((0, 96),)), _phi()
  phi_BJ[:, 16:80] = 1e3  # the same for all rows, and large: what tells rows apart falls below one step
  assert coarse.fidelity(phi_BJ)['top_overlap'] < 0.5
  assert Quantizer('int8', BLOCKS).fidelity(phi_BJ)['top_overlap'] > 0.85
  assert coarse.fidelity(phi_BJ[:1])['top_overlap'] == 1
