"""Trains on two processes; started by test_processes.py as `two_processes.py ADDRESS PROCESS FOLDER SIGNAL AFTER`.

Process 1 sends itself that signal after so many steps.
"""

import os
import signal
import sys
from pathlib import Path

import tests.conftest  # isort: skip  # noqa: F401  sets the environment before JAX is imported
import jax

from configs import base
from dsdm_jax.config import validate as checks
from dsdm_jax.core import processes
from dsdm_jax.core.mesh import share
from dsdm_jax.errors import Stopped
from tests.training import test_loop
from tests.training.test_step import BATCH, make_trainer


def main() -> None:
  address, process, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
  signal_sent, after = signal.Signals[sys.argv[4]], int(sys.argv[5])
  config = base.get_config()
  wanted = {'coordinator': address, 'processes': 2, 'process': process, 'heartbeat_seconds': 10}
  config.distributed.update(wanted)
  jax.config.update('jax_num_cpu_devices', 1)
  code = 0
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
    code = stopped.exit_code
  processes.leave(code)


if __name__ == '__main__':
  main()
