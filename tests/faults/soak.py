"""Runs the smallest pipeline again and again in one process: `python -m tests.faults.soak FOLDER TIMES`.

Prints {"gib", "handles", "threads"} after each run, as one line of JSON.
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
  for _ in range(times):
    pipeline.run(get_config(), folder / 'run')
    shutil.rmtree(folder / 'run')
    gc.collect()
    threads = len(os.listdir('/proc/self/task'))
    sys.stderr.write(
      json.dumps({'gib': resident_bytes() / 2**30, 'handles': open_handles(), 'threads': threads}) + '\n'
    )


if __name__ == '__main__':
  main()
