"""Runs the smallest pipeline again and again in one process: `python -m tests.faults.soak FOLDER TIMES`.

Prints {"gib", "kept_gib", "handles", "threads", "objects"} after each run, as one line of JSON: memory in use, what
glibc kept besides (`core.memory`), and how many objects Python's garbage collector knows.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

from dsdm_jax import pipeline
from dsdm_jax.bench.load import open_handles, resident_bytes
from dsdm_jax.core import memory


def main() -> None:
  from tests.pipeline.tiny import get_config

  folder, times = Path(sys.argv[1]), int(sys.argv[2])
  for number in range(times):
    # A folder of its own: what is kept by path would be found again in one that serves all.
    pipeline.run(get_config(), folder / f'run_{number}')
    shutil.rmtree(folder / f'run_{number}')
    gc.collect()
    resident = resident_bytes()
    memory.give_back_freed_memory()
    used = resident_bytes()
    seen = {'gib': used / 2**30, 'kept_gib': (resident - used) / 2**30, 'handles': open_handles()}
    seen |= {'threads': len(os.listdir('/proc/self/task')), 'objects': len(gc.get_objects())}
    sys.stderr.write(json.dumps(seen) + '\n')


if __name__ == '__main__':
  main()
