"""The figures: repeatable, free of dates, and with the data's numbers in them."""

import re

import numpy as np

from dsdm_jax.report import figures
from dsdm_jax.report.report_data import Curve


def test_standalone_picture_is_repeatable_and_undated(shown):
  def draw():
    return figures.forest_standalone(shown.results['comparisons'], 0.95, 'random')

  svg = draw()
  assert svg == draw()
  assert '<metadata' not in svg
  assert not re.search(r'20\d\d-\d\d-\d\d', svg)
  assert 'var(--' not in svg


def test_page_figures_follow_the_colour_scheme(shown):
  for drawing in figures.forest(shown.results['comparisons']).values():
    svg = drawing.svg('x')
    assert svg.startswith('<svg')
    assert 'var(--blue)' in svg or 'var(--muted)' in svg
    assert not re.search(r'(fill|stroke): #(?!000|fff)', svg)
    assert '<style' not in svg


def test_text_from_outside_is_escaped_in_labels():
  svg = figures.composition(('<script>a</script>',), {'<script>alert(1)</script> & $x_1$': np.array([1.0])}).svg('x')
  assert '<script' not in svg
  assert svg.count('&lt;script&gt;') == 2 + svg.count('<!-- &lt;script&gt;')  # a bar, and the legend
  assert ' &amp; $x_1$</text>' in svg  # text, not mathematics


def test_long_curves_are_thinned_without_losing_their_mean():
  step_P = np.arange(1, 1001)
  curve = Curve('dsdm', 'mix', step_P, np.stack([np.sin(step_P), np.cos(step_P)]))
  thin_P, thin_SP = figures._thinned(curve, most=100)
  assert thin_P.shape == (100,)
  np.testing.assert_allclose(thin_SP.mean(axis=1), curve.loss_SP.mean(axis=1), atol=1e-12)


def test_standardised():
  z_N = figures.standardised(np.array([1, 2, 3], np.float32))
  np.testing.assert_allclose(z_N, [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-12)
  assert figures.standardised(np.ones(3)).tolist() == [0, 0, 0]


def test_empty_curve_and_equal_scores_draw():
  assert '<svg' in figures.losses([Curve('dsdm', 'mix', np.zeros(0, int), np.zeros((2, 0)))]).svg('x')
  assert '<svg' in figures.histogram(np.zeros(5), None, None).svg('x')


def test_difference_without_an_interval_is_a_dot(shown):
  bare = [{**c, 'low': None, 'high': None} for c in shown.results['comparisons'][:1]]
  assert '[' not in figures.forest(bare)[bare[0]['task']].svg('x')
