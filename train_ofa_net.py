"""Train a supernet: ``python train_ofa_net.py --task compound --phase 1``; see ``--help``."""

import sys

from compofa.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
