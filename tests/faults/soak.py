"""Runs the smallest pipeline again and again in one process: `python -m tests.faults.soak FOLDER TIMES`.

Prints {"gib", "handles", "threads", "objects"} after each run, as one line of JSON: resident memory, open handles, and
the number of objects that Python's garbage collector tracks.
"""

import gc
import json
import os
import shutil
import sys
from pathlib import Path

from dsdm_jax import pipeline
from dsdm_jax.bench.load import open_handles, resident_bytes


def main() -> None:
  from tests.pipeline.tiny import get_config

  folder, times = Path(sys.argv[1]), int(sys.argv[2])
  for number in range(times):
    # A new folder for each run: with a shared one, caches by path would hide what grows.
    pipeline.run(get_config(), folder / f'run_{number}')
    shutil.rmtree(folder / f'run_{number}')
    gc.collect()
    seen = {'gib': resident_bytes() / 2**30, 'handles': open_handles()}
    seen |= {'threads': len(os.listdir('/proc/self/task')), 'objects': len(gc.get_objects())}
    sys.stderr.write(json.dumps(seen) + '\n')


if __name__ == '__main__':
  main()
