"""The batch job of the demonstration: a reconciliation that somebody started in the wrong place, with the wrong priority.

    python -m demo.batch --cpu N [--nice N]

It names itself `batch-recon`, prints `running` once it is on its CPU, and computes until it is told to stop (SIGTERM).
"""

import argparse
import ctypes
import hashlib
import os
import sys

__all__ = ["main"]

_PR_SET_NAME = 15


def main(argv: list[str] | None = None) -> int:
    """Reconcile for ever."""
    parser = argparse.ArgumentParser(prog="batch-recon", description="computes until it is told to stop")
    parser.add_argument("--cpu", type=int, required=True)
    parser.add_argument("--nice", type=int, default=-20)
    options = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"batch-recon", 0, 0, 0)
    os.sched_setaffinity(0, {options.cpu})
    os.setpriority(os.PRIO_PROCESS, 0, options.nice)
    print("running", flush=True)
    digest = hashlib.sha256()
    while True:
        digest.update(b"statement line" * 512)


if __name__ == "__main__":
    sys.exit(main())
