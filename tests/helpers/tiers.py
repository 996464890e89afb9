"""Which tests `launch/test.sh` runs: with --fast, by default (this is what CI runs), and with --all.

A test belongs to the smallest tier that no line here moves it out of. docs/testing.md says why these were moved.
"""

import pytest

# Only with --all. Each component keeps a shorter test in the default tier.
FULL = (
  'tests/attribution/test_bench.py::test_features_prints',
  'tests/attribution/test_damping.py::test_auto_does_not_lose_to_the_best_damping_on_a_bank_of_trained_subsets',
  'tests/attribution/test_bench.py::test_passes_are_compared',
  'tests/data/pool/test_beam.py::test_the_direct_runner',
  'tests/evaluation/test_bench.py',
  'tests/evaluation/test_parity_harness.py',
  'tests/faults/test_kill.py::test_kill_where_data_is_made_again',
  'tests/faults/test_kill.py::test_validation_that_is_killed',
  'tests/faults/test_precision.py',
  'tests/faults/test_soak.py',
  'tests/faults/test_two_processes.py',
  'tests/pipeline/test_checkpoints.py::test_features_are_of_each_checkpoint_and_scores_of_all',
  'tests/pipeline/test_elastic.py',
  'tests/pipeline/test_tokens.py::test_tokens_sum_up_to_the_row[',
  'tests/pipeline/test_validation.py::test_bench_holds_the_derivative_to_finite_differences',
  'tests/plan/test_compile.py::test_the_papers_scale_compiles_and_fits',
  *(f'tests/plan/test_plan.py::test_packaged_configs_are_planned[{name}' for name in ('c4', 'quickstart_', 'study')),
  'tests/selection/test_trainers.py::test_megatron_opens_its_files[large]',
  'tests/test_colab.py::test_runs_from_start_to_end',
  'tests/test_examples.py::test_whole_way_of_a_lab',
  'tests/training/test_bench.py::test_gpt2_is_timed_beside_a_training_step',
  'tests/training/test_bench.py::test_loop_measures_first_step_and_cost_of_input',
  'tests/training/test_differentiable.py::test_metagradient_agrees_with_finite_differences',
  'tests/training/test_processes.py::test_terminated_run_of_two_processes_saves_the_step_that_it_reports',
  'tests/validation/test_oracle.py::test_oracle_agrees_with_finite_differences[plain',
)
FULL_FIXTURES = {'studied'}
# Not with --fast, beside what is marked slow, browser or peers.
# These compile or train models, or start processes.
SLOW = (
  *(
    f'tests/attribution/test_{name}.py'
    for name in (
      'agreement bench bfloat16 collectives covariances coverage damping directional ekfac fused_attention gradients '
      'planted_pairs processes score_files second_moment sources'
    ).split()
  ),
  *(f'tests/core/test_{name}.py' for name in ('compile_cache', 'processes', 'tensorflow_start')),
  *(f'tests/evaluation/test_{name}.py' for name in ('bench', 'scoring')),
  'tests/faults/',
  *(f'tests/lm/test_{name}.py' for name in ('attention', 'attention_tpu', 'decoding', 'products')),
  *(f'tests/pipeline/test_{name}.py' for name in ('bad_input', 'end_to_end', 'settings')),
  'tests/plan/',
  'tests/report/test_page.py',
  *(f'tests/selection/test_{name}.py' for name in ('every_selector', 'proxy_signals', 'vocabularies')),
  'tests/test_wheel.py',
  *(
    f'tests/training/test_{name}.py'
    for name in ('bench', 'collectives', 'differentiable', 'loop', 'processes', 'step', 'vmapped')
  ),
  *(f'tests/training/test_optimizer.py::test_{name}' for name in ('training_in', 'parts_of_a_batch', 'z_loss')),
  *(f'tests/validation/test_{name}.py' for name in ('oracle', 'variants')),
)
# A test that uses one of these waits for a whole run, for another environment, or for a browser.
ENVIRONMENTS = {'beam', 'libtpu', 'peers'}
SLOW_FIXTURES = {*ENVIRONMENTS, 'browser', 'copied', 'finished', 'server'}


def mark(item: pytest.Item) -> None:
  """Adds the marker `full` or `slow` to a test that these lists name."""
  fixtures = set(getattr(item, 'fixturenames', ()))
  if fixtures & FULL_FIXTURES or item.nodeid.startswith(FULL):
    item.add_marker(pytest.mark.full)
  if (
    fixtures & SLOW_FIXTURES or item.nodeid.startswith(SLOW) or any(map(item.get_closest_marker, ('browser', 'peers')))
  ):
    item.add_marker(pytest.mark.slow)


def order(items: list[pytest.Item]) -> None:
  """Puts slow files first, so that the last are short and no worker ends long after the other.

  Files that use another environment come in between: launch/test.sh may still install it when the first tests run.
  """
  slow = {item.path for item in items if item.get_closest_marker('slow')}
  elsewhere = {item.path for item in items if ENVIRONMENTS & set(getattr(item, 'fixturenames', ()))}
  items.sort(key=lambda item: 1 if item.path in elsewhere else 0 if item.path in slow else 2)
