"""Once-for-all networks with compound search spaces."""

__version__ = "0.1.0"
