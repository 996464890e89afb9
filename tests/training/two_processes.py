"""Trains on two processes; test_processes.py calls `main` with ADDRESS PROCESS FOLDER SIGNAL AFTER in each.

Process 1 sends itself that signal after so many steps.
"""

import os
import signal
import sys
from pathlib import Path

import jax

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.core import processes
from dsdm_jax.core.mesh import share
from dsdm_jax.errors import Stopped
from tests.training import test_loop
from tests.training.test_step import BATCH, make_trainer


def main(argv: list[str]) -> int:
  address, process, folder = argv[1], int(argv[2]), Path(argv[3])
  signal_sent, after = signal.Signals[argv[4]], int(argv[5])
  config = base.get_config()
  wanted = {'coordinator': address, 'processes': 2, 'process': process, 'heartbeat_seconds': 10}
  config.distributed.update(wanted)
  try:
    with processes.running(config, checks.flatten(config)):

      def batches(start: int):
        for step, batch in enumerate(test_loop.stream()(start), start):
          if step == after and process == 1:
            os.kill(os.getpid(), signal_sent)
          yield {name: x[mine] for name, x in batch.items()}

      trainer = make_trainer(2, **test_loop.KEYS)
      mine = share(trainer.batch_sharding, BATCH)
      assert mine.tolist() == [process * BATCH // 2 + i for i in range(BATCH // 2)], 'half of each batch'
      params = jax.tree.leaves(trainer.init(test_loop.key()).params)
      assert not all(x.is_fully_addressable for x in params), 'some weights are split over processes'
      test_loop.train(folder, trainer, batches, first=processes.is_first())
  except Stopped as stopped:
    print(stopped, file=sys.stderr)
    return stopped.exit_code
  return 0
