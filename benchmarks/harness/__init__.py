"""Shared code of the benchmarks: processes that are timed in turns, and the work they run.

Importing this package lets a script import ``tests``, whose tools for counting memory it shares: a
script started by its path finds only its own folder and what is installed.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
