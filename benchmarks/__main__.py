"""``python -m benchmarks``: measure and print the speed of training steps and searches."""

from __future__ import annotations

import argparse
import platform

import torch

from benchmarks import search, training


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--resolution", type=int, default=128, help="image side in pixels")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--rounds", type=int, default=5, help="timings per step, alternating")
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.machine()} {platform.system()}"
    )
    rows = training.run(args.resolution, args.batch, args.rounds)
    width = max(len(str(row["step"])) for row in rows)
    print(f"{'':{width}}  {'images/s':>9}  {'GMACs/s':>8}  {'time ratio':>10}")
    for row in rows:
        print(
            f"{row['step']:{width}}  {row['images/s']:>9.1f}  {row['GMACs/s']:>8.1f}  "
            f"{row['time ratio']:>10.2f}"
        )
    print()
    search.speed(args.rounds)


if __name__ == "__main__":
    main()
