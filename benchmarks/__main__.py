"""``python -m benchmarks``: print the table of measured speeds."""

from __future__ import annotations

import argparse
import platform

import torch

from benchmarks import search, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--resolution", type=int, default=128, help="side of the images")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each step, in turn")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {platform.system()}"
    )
    rows = training.run(args.resolution, args.batch, args.rounds)
    wide = max(len(str(row["what"])) for row in rows)
    print(f"{'':{wide}}  {'images/s':>9}  {'GMACs/s':>8}  {'time ratio':>10}")
    for row in rows:
        print(
            f"{row['what']:{wide}}  {row['images/s']:>9.1f}  {row['GMACs/s']:>8.1f}  "
            f"{row['time ratio']:>10.2f}"
        )
    print()
    search.speed(args.rounds)


if __name__ == "__main__":
    main()
