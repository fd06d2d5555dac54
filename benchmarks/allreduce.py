"""``torchrun --nproc-per-node 2 -m benchmarks.allreduce``: time the averaging of gradients.

Start it with ``torchrun`` or ``horovodrun``. It averages the gradients of the ImageNet supernet as
a training step does: flatten, all-reduce, and copy the means back.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from compofa.distributed.launch import process_group
from compofa.networks.zoo import ofa_net
from compofa.training.optim import make_optimizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.allreduce", description=__doc__)
    parser.add_argument("--net", default="compofa-elastic", help="network id")
    parser.add_argument(
        "--rounds", type=int, default=10, help="number of timings; the median is printed"
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    with process_group(cuda=cuda) as backend:
        net = ofa_net(args.net).to(backend.device("cuda" if cuda else "cpu"))
        make_optimizer(net, 0.0, 0.0)  # allocates all gradients
        size = sum(parameter.numel() for parameter in net.parameters())
        for half in (False, True):
            times = []
            for _ in range(args.rounds):
                backend.gather(None)  # a barrier
                started = time.perf_counter()
                backend.average_gradients(net.parameters(), 1.0, half)
                if cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            if backend.is_main:
                sent = size * (2 if half else 4)
                print(
                    f"{backend.name}, {backend.size} ranks: {sent:,} bytes in "
                    f"{1000 * statistics.median(times):.1f} ms (fastest {1000 * min(times):.1f} ms)"
                )


if __name__ == "__main__":
    main()
