"""Scores of an exported folder by lm-evaluation-harness alone: `python harness_exported.py FOLDER TASKS OUT`.

Needs requirements-peers.txt and nothing of this project.
"""

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main(folder, tasks, out):
  manager = TaskManager(include_path=tasks, include_defaults=False)
  found = simple_evaluate(
    'hf',
    model_args=f'pretrained={folder},dtype=float32,max_length=31',  # a window less than ours has, see harness_jax.py
    tasks=[f'own_{path.stem}' for path in sorted(Path(tasks).glob('*.yaml'))],
    task_manager=manager,
    device='cpu',
    batch_size=16,
    log_samples=True,
    bootstrap_iters=0,
  )
  samples = {task: sorted(of_task, key=lambda sample: sample['doc_id']) for task, of_task in found['samples'].items()}
  metrics = ('acc', 'acc_norm')
  results = {
    task: [{'resps': s['resps'], 'asked': s['arguments'], **{m: s[m] for m in metrics if m in s}} for s in of_task]
    for task, of_task in samples.items()
  }
  Path(out).write_text(json.dumps(results))


if __name__ == '__main__':
  main(*sys.argv[1:])
