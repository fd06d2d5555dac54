"""Distributed ranks (torchrun, Horovod, or a single process), and CPU threads."""
