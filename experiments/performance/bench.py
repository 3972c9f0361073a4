"""Runs every benchmark here in turn, each in a process of its own, so that neither memory nor threads leak.

python experiments/performance/bench.py [names]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = ("loss", "lk_against_kl", "scaling", "peer", "peer_loss", "decoding")
FOLDER = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=BENCHMARKS, help=f"some of {', '.join(BENCHMARKS)}")
    seconds, failed = {}, []
    for name in parser.parse_args().names:
        start = time.monotonic()
        if subprocess.run([sys.executable, FOLDER / f"{name}.py"], check=False).returncode != 0:
            failed.append(name)
        seconds[name] = time.monotonic() - start
    print("\n" + "\n".join(f"{name}: {value:.0f} s" for name, value in seconds.items()))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
