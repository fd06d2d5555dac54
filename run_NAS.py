"""Search the best subnets for a device: ``python run_NAS.py``; see ``--help``."""

import sys

from nas.cli.search import main

if __name__ == "__main__":
    sys.exit(main())
