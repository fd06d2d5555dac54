"""``python -m compofa``: all commands."""

import sys

from compofa.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
