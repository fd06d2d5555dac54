"""``python -m nas``: what is known of devices, and the tools that make it known."""

import sys

from nas.cli.tools import main

if __name__ == "__main__":
    sys.exit(main())
