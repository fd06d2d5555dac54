"""Explicit randomness: every random number comes from a seed derived from named parts.

No function here uses the global generators of ``random``, NumPy or torch.
"""

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Hash ``parts`` into one seed, identical on every platform and in every process.

    Args:
        *parts: Purpose of the seed, such as ``(seed, "subnets", step)``.

    Returns:
        An integer in [0, 2**63).
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded with :func:`derive_seed` of ``parts``."""
    return np.random.default_rng(derive_seed(*parts))
