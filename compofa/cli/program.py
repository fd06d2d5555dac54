"""How the user called this process, so that help, errors and advice name commands to paste.

Texts of the library name the scripts of a clone and ``python -m``. An installation has neither:
there, the same commands are ``compofa train`` and ``compofa-train``.
"""

from __future__ import annotations

import re
import sys
from pathlib import PurePath

SCRIPTS = {"train": "train_ofa_net.py", "eval": "eval_sampled_config.py", "search": "run_NAS.py"}
"""The scripts of a clone, by the names of their commands."""

_STANDALONE = {f"compofa-{command}" for command in SCRIPTS}
_SCRIPT = re.compile(
    r"(?:python )?(?<![\w/.-])(" + "|".join(map(re.escape, SCRIPTS.values())) + ")"
)
_UNDER_TORCHRUN = re.compile(r"(torchrun(?: --?\S+(?: \d+)?)*) train_ofa_net\.py")
_MODULE = re.compile(r"python -m (?:compofa|nas)\b")


def as_called(text: str) -> str:
    """Return ``text`` with commands spelled as this process was called.

    Under ``compofa``, ``train_ofa_net.py`` becomes ``compofa train``; under ``compofa-train`` it
    becomes ``compofa-train``; under ``python -m compofa``, ``python -m compofa train``. Called as a
    script, or from Python, ``text`` stays as it is.
    """
    base = _called()
    if not base:
        return text
    names = {script: command for command, script in SCRIPTS.items()}
    joint = "-" if base in _STANDALONE else " "
    root = "compofa" if base in _STANDALONE else base
    text = _UNDER_TORCHRUN.sub(r"\1 -m compofa train", text)
    text = _SCRIPT.sub(lambda found: f"{root}{joint}{names[found[1]]}", text)
    return _MODULE.sub(root, text)


def _called() -> str:
    """Return ``compofa``, ``compofa-train``, …, ``python -m compofa``, or "" for a script."""
    started = PurePath(sys.argv[0] if sys.argv else "")
    stem = started.name.removesuffix(".exe")
    if stem == "compofa" or stem in _STANDALONE:
        return stem
    return "python -m compofa" if started.parts[-2:] == ("compofa", "__main__.py") else ""
