"""Reading JSON, YAML and text from untrusted files, which may be damaged or malicious.

Errors in a text are one-line ValueErrors, to which callers add what they expected. The standard
library's JSON parser and PyYAML's safe loader do not suffice: deep nesting causes a RecursionError,
and a few lines of YAML aliases expand to 10^9 values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
"""Default limit of the size of a file."""
MAX_YAML_DEPTH = 16
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, including terminal escapes
    "\u2028-\u202e\u2066-\u2069"  # line separators, bidirectional controls
    "\ud800-\udfff]"  # undecodable bytes of file names
)


def printable(text: str) -> str:
    r"""Return ``text`` with unprintable characters as escapes such as ``\x1b``.

    For names from untrusted files. Control characters, bidirectional controls and undecodable bytes
    of file names are escaped; all else is unchanged.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def read_text(path: str | Path, limit: int = MAX_BYTES) -> str:
    """Return the content of a UTF-8 file, without a byte order mark.

    Args:
        path: The file.
        limit: Maximal size in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is larger than ``limit`` or not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        path: The file.
        limit: Maximal size in bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is larger than ``limit``.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is malformed or nested too deeply, or an integer has too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"malformed JSON: {_short(error)}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain data.

    Raises:
        ValueError: The text is malformed, nested deeper than 16 levels, or has a tag, an anchor or
            an alias.
    """
    import yaml  # late: most files are JSON and do not need it

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(text, Loader=loader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ValueError("a YAML anchor or alias")
            if getattr(event, "tag", None):
                raise ValueError("a YAML tag")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_YAML_DEPTH:
                raise ValueError("YAML nested too deeply")
        return loader(text).get_single_data()  # both loaders are safe ones
    except RecursionError:
        raise ValueError("YAML nested too deeply") from None
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"malformed YAML: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
