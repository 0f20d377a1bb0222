"""What every test shares: one thread for torch, here and in workers, since tiny tensors only wait for a second one.

And no waiting for the disk: tests kill processes, not machines, and what a process wrote outlives it unflushed.
"""

from __future__ import annotations

import os

for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.fsync = lambda _descriptor: None
