"""What the library costs, as ratios to hand-written JAX taken in one run, beside Flax's.

    make bench                          # or: python benchmarks/overhead.py
    make bench ARGS='--only tracing --rounds 5'

Contenders run in turn and only ratios are compared, so other work on the machine cancels out; run
it on a quiet machine all the same.  Prints the table and writes it, with the command that gave it,
to `benchmarks/results/overhead.json` and `.md` (not with `--only`).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import flax.linen

import shardflax.nn
from benchmarks import calling, loop, programs, tracing
from benchmarks.report import Row, machine, markdown, write

RESULTS = Path(__file__).parent / "results" / "overhead.json"
GROUPS = ("tracing", "calling", "programs", "loop")


def measure(groups: tuple[str, ...], rounds: int) -> list[Row]:
    """The rows of some groups."""
    spaces = shardflax.nn, flax.linen
    rows: list[Row] = []
    if "tracing" in groups:
        rows += tracing.rows(*spaces, rounds)
    if "calling" in groups:
        rows += calling.rows(*spaces, rounds)
    if "programs" in groups:
        rows += programs.rows(rounds)
    if "loop" in groups:
        rows += loop.rows(max(3, rounds // 2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What the library costs, beside hand-written JAX and Flax."
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the slowest rows")
    parser.add_argument("--only", choices=GROUPS, help="one group of rows; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write the result")
    args = parser.parse_args()
    before = machine()
    rows = measure((args.only,) if args.only else GROUPS, args.rounds)
    print(markdown(rows))
    if args.only is None:
        command = shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]])
        write(rows, command, before, args.out)


if __name__ == "__main__":
    main()
