"""Ablations of the long quickstart: one arm for each choice in the method, and arms with retrained proxies.

Run all arms, or one arm alone:

    python -m dsdm_jax.study run --config=configs/study.py --workdir=runs/study
    python -m dsdm_jax.main --config=configs/study.py:J_512 --workdir=runs/J_512

Hardware: two CPU cores. The command resumes arm by arm and prints the time that each arm took.

Result: `study.csv` and `study.json` in the workdir, which compare all arms on the same items.

An arm is configs/quickstart_full.py with two-sided features and a few keys changed. `base` trains the baselines; every
other arm trains DsDm alone and is compared with them. The arms `again_…` are `base` with other proxies. Together they
measure the variation that an interval for a single selection does not include.
"""

from dsdm_jax.configs import quickstart_full

_DSDM = {'selection.methods': ('dsdm',)}

# Arm → key → value. Pool, targets, evaluation and the size of the final models are the same for all.
ARMS: dict[str, dict] = {
  'base': {'selection.methods': ('dsdm', 'random', 'random_one_epoch', 'bottom')},
  # Proxies: how many, how large, how long.
  'proxies_1': {**_DSDM, 'proxies.count': 1},
  'proxies_4': {**_DSDM, 'proxies.count': 4},
  'proxy_narrow': {**_DSDM, 'proxies.model.width': 32, 'proxies.model.mlp_width': 128},
  'proxy_half_epoch': {**_DSDM, 'proxies.epochs': 0.5},
  'proxy_4_epochs': {**_DSDM, 'proxies.epochs': 4.0},
  # Features.
  'J_512': {**_DSDM, 'features.dimension': 512},
  'J_4096': {**_DSDM, 'features.dimension': 4_096},
  'dense': {**_DSDM, 'features.projection': 'dense', 'features.dimension': 512, 'features.microbatch': 16},
  # Datamodel.
  'damping_0.01': {**_DSDM, 'datamodel.damping': 0.01},
  'damping_1': {**_DSDM, 'datamodel.damping': 1.0},
  'gram_full': {**_DSDM, 'datamodel.gram': 'full'},
  'gram_joint': {**_DSDM, 'datamodel.gram': 'joint'},
  'unit_norm': {**_DSDM, 'datamodel.unit_norm': True},
  'q': {**_DSDM, 'datamodel.q': True},
  # Mix of targets.
  'mix_mean': {**_DSDM, 'datamodel.mix': 'mean'},
  'mix_rank': {**_DSDM, 'datamodel.mix': 'rank'},
  # Top-k against diverse selection.
  'dsdm_greedy': {'selection.methods': ('dsdm_greedy',)},
  'dsdm_clusters': {'selection.methods': ('dsdm_clusters',)},
  # The same budget as more rows in fewer epochs, and fewer rows in more epochs.
  'epochs_2': {**_DSDM, 'selection.examples': 1_536, 'selection.epochs': 2},
  'epochs_8': {**_DSDM, 'selection.examples': 384, 'selection.epochs': 8},
  # Other proxies: one more selection each.
  **{f'again_{seed}': {**_DSDM, 'proxies.seed': seed} for seed in (1, 2, 3)},
}


def get_config(arm='base'):
  """The config of one arm: `configs/study.py:damping_1`."""
  if arm not in ARMS:
    raise ValueError(f'{arm!r} is not an arm of the study; its arms are {", ".join(ARMS)}')
  config = quickstart_full.get_config()
  config.features.projection = 'two_sided'  # most arms change how features are made
  for key, value in ARMS[arm].items():
    *sections, last = key.split('.')
    section = config
    for name in sections:
      section = section[name]
    section[last] = value
  return config
