"""The files that a run begins with, and how they are found again when it is resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compofa.errors import ConfigError
from compofa.io.checkpoint import file_hash
from compofa.io.open import OpenedNetwork, open_network
from compofa.training.config import TrainConfig


@dataclass(frozen=True)
class Origin:
    """A file that a run came from, to be found and known again when it is resumed.

    Attributes:
        path: Where it was: within the run's folder, where it lies there, else absolute.
        digest: Its hash, see :func:`compofa.io.checkpoint.file_hash`; empty of earlier versions.
    """

    path: str
    digest: str = ""

    @classmethod
    def of(cls, source: str | Path, output: Path, opened: OpenedNetwork | None = None) -> Origin:
        """Return the origin that ``source`` leads to: a file, or the weights of a named network.

        Args:
            source: What :func:`compofa.io.open.open_network` takes.
            output: The run's folder.
            opened: The network, if it has been opened.
        """
        file = Path(source)
        if not file.is_file():
            opened = opened or open_network(source)
            file = opened.path
        digest = opened.digest if opened and file == opened.path else file_hash(file)
        absolute, folder = Path(os.path.abspath(file)), Path(os.path.abspath(output))
        inside = absolute.is_relative_to(folder)
        return cls(str(absolute.relative_to(folder) if inside else absolute), digest)

    def found(self, given: str | None, option: str, output: Path) -> str:
        """Return where the file is now.

        Args:
            given: Where it is said to be, if anywhere.
            option: Which says so.
            output: The run's folder.

        Raises:
            ConfigError: It is not there, or another file is.
        """
        path = given or str(output / self.path if self.digest else Path(self.path))
        if self.digest:
            now = Origin.of(path, output) if given or Path(path).is_file() else None
            if now is None or now.digest != self.digest:
                what = f"one of hash {now.digest}" if now else "nothing there"
                raise ConfigError(
                    f"{option}: expected the file of hash {self.digest} that the run began with, "
                    f"then {self.path}, got {what} at {path}: say with {option} where it is"
                )
        return path


def origins_in(training: Mapping[str, Any]) -> dict[str, Origin]:
    """Return the files that a run began with, ``teacher`` and ``start``, from its saved state."""
    if "origins" not in training:  # of an earlier version
        return {"teacher": Origin(str(training["teacher"]))} if training["teacher"] else {}
    pairs = training["origins"].items()
    return {name: Origin(str(path), str(digest)) for name, (path, digest) in pairs}


def resumed_teacher(
    config: TrainConfig, then: Mapping[str, Any], origins: Mapping[str, Origin], output: Path
) -> str:
    """Return where the teacher of a resumed run is now; empty where it has none.

    Args:
        config: Settings now: their paths may be others than then, and lead to the same files.
        then: Settings of the run.
        origins: Files of the run.
        output: Its folder.

    Raises:
        ConfigError: A file is not there, or another one is.
    """
    for name, known in (("init_path", ("start",)), ("teacher_path", ("teacher", "start"))):
        given, before = getattr(config, name), then.get(name)
        if given in (None, before):
            continue
        origin = next((origins[each] for each in known if each in origins), None)
        if origin is None:
            raise ConfigError(f"cannot resume with another {name}: {before!r} then, {given!r} now")
        origin.found(given, f"--{name.replace('_', '-')}", output)
    if "teacher" not in origins:
        return ""
    given = config.teacher_path
    if given and given == then.get("teacher_path") and not Path(given).is_file():
        given = None  # the same words from another folder
    return origins["teacher"].found(given, "--teacher-path", output)
