"""Evaluate subnets of a trained supernet: ``python eval_sampled_config.py``; see ``--help``."""

import sys

from compofa.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
