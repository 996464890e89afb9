"""DsDm against random data on the text of the installed packages, on a laptop.

bash launch/run.sh
"""

from configs import base


def get_config():
  return base.get_config()
