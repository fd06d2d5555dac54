"""``python -m compofa``: what can be done with trained networks, beside the three scripts."""

import sys

from compofa.cli.tools import main

if __name__ == "__main__":
    sys.exit(main())
