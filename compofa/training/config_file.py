"""Settings of a run from a file: TOML, YAML or JSON, such as the ``config.json`` of a run."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from compofa.errors import ConfigError, did_you_mean
from compofa.io.untrusted import parse_json, parse_yaml, read_text
from compofa.training.config import TrainConfig

MAX_BYTES = 1 << 20
RUN_NAMES = ("name", "output")
"""Options of the command that are no settings of :class:`TrainConfig`, and are read as well."""
_TYPES = get_type_hints(TrainConfig)
_YAML_1_2_NUMBER = re.compile(r"[-+]?\d+[eE][-+]?\d+")
"""Such as 1e-3: a number in YAML 1.2 and JSON, but text to PyYAML, which reads YAML 1.1."""


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Return the settings in a file, with their types checked.

    Names are those of the options, with underscores or hyphens, in no section. Of the
    ``config.json`` of a phase, the settings of that phase are read. Bounds are checked by
    :meth:`TrainConfig.resolved`.

    Args:
        path: A file ending in ``.toml``, ``.yaml``, ``.yml`` or ``.json``.

    Raises:
        ConfigError: The file cannot be read, or a name or type is wrong.
    """
    path = Path(path)
    parse = _PARSERS.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"--config: expected a file ending in {', '.join(_PARSERS)}, got {path.name!r}"
        )
    try:
        data = parse(read_text(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"--config {path}: expected settings, got {what}") from None
    if isinstance(data, Mapping) and isinstance(data.get("config"), Mapping):
        data = data["config"]
    settings = checked_settings(data, f"--config {path}", RUN_NAMES)
    return {k: os.path.expanduser(v) if isinstance(v, str) else v for k, v in settings.items()}


def checked_settings(data: Any, source: str, more: Collection[str] = ()) -> dict[str, Any]:
    """Return settings read from a file as :class:`TrainConfig` takes them.

    Args:
        data: Values by name, as parsed.
        source: What they were read from, for errors.
        more: Further names to accept, of text.

    Raises:
        ConfigError: It is no mapping, or a name or type is wrong; the message lists all of them.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected settings by name, got {type(data).__name__}")
    known = [*(setting.name for setting in fields(TrainConfig)), *more]
    settings: dict[str, Any] = {}
    faults, unknown = [], []
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            unknown.append(str(key))
        elif name in settings:
            faults.append(f"{name}: given twice")
        else:
            try:
                settings[name] = _value(_TYPES.get(name, str | None), value)
            except TypeError as error:
                faults.append(f"{name}: expected {error}, got {value!r}")
    for key in unknown:
        hint = did_you_mean(key.replace("-", "_"), known).strip()
        faults.append(f"unknown setting {key!r}" + f" ({hint})" * bool(hint))
    if unknown:
        faults.append(f"known are {', '.join(known)}")
    if faults:
        raise ConfigError(f"{source}: {'; '.join(faults)}")
    return settings


def _value(hint: Any, value: Any) -> Any:
    """Return a value of the type ``hint``.

    Raises:
        TypeError: It is none; the message says what was expected.
    """
    kinds = get_args(hint)
    if value is None and type(None) in kinds:
        return None
    kind = next((arg for arg in kinds if arg is not type(None)), hint) if kinds else hint
    if kind is float and isinstance(value, str) and _YAML_1_2_NUMBER.fullmatch(value):
        value = float(value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind in (bool, int, float, str):
        names = {bool: "true or false", int: "an integer", float: "a finite number", str: "text"}
        raise TypeError(names[kind])
    numbers = value if isinstance(value, list) else [value]  # tuple[int, ...]
    if not numbers or any(type(number) is not int for number in numbers):
        raise TypeError("integers such as [128, 160]")
    return tuple(numbers)


def _parse_toml(text: str) -> Any:
    """Parse TOML: by the standard library, or on Python 3.10 by the package tomli."""
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    try:
        parser = importlib.import_module(name)
    except ModuleNotFoundError:
        raise ValueError(
            "TOML, which Python 3.10 reads with the package tomli alone (pip install tomli)"
        ) from None
    try:
        return parser.loads(text)
    except RecursionError:
        raise ValueError("TOML nested too deeply") from None
    except parser.TOMLDecodeError as error:
        raise ValueError(f"malformed TOML: {error}") from None


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": _parse_toml,
    ".yaml": parse_yaml,
    ".yml": parse_yaml,
    ".json": parse_json,
}
