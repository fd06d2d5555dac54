"""Reading plain data, JSON and YAML, from files that may be broken or made to do harm.

What is wrong with a text is a ValueError of one line, for the caller to say what was expected.
Neither the standard library's JSON nor PyYAML's safe loader is enough by itself: deep nesting ends
in a RecursionError, and a few lines of YAML aliases stand for 10^9 values.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 256 << 20
MAX_YAML_DEPTH = 16
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters, the escape of terminals among them
    "\u2028-\u202e\u2066-\u2069"  # line separators, directions of writing
    "\ud800-\udfff]"  # undecodable bytes of file names
)


def printable(text: str) -> str:
    r"""Return ``text`` with what a terminal, a picture or a file cannot show as escapes, ``\x1b``.

    For names from files, whoever wrote them: control characters, changes of the direction of
    writing, and file names that are not UTF-8. Anything else stays.
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def read_text(path: str | Path, most: int = MAX_BYTES) -> str:
    """Read a UTF-8 text file of at most ``most`` bytes, without a byte order mark.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger, or no UTF-8.
    """
    try:
        return read_bytes(path, most).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("bytes that are not UTF-8 text") from None


def read_bytes(path: str | Path, most: int = MAX_BYTES) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises:
        OSError: It cannot be read.
        ValueError: It is larger.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is malformed, nested too deeply, or has numbers of too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"malformed JSON: {_short(error)}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML that holds nothing but plain data: no tags, no anchors, no aliases.

    Raises:
        ValueError: It is something else, malformed or nested too deeply.
    """
    import yaml  # late: most callers have found JSON, or a plainer form, before they come here

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
        return loader(text).get_single_data()  # a safe loader either way
    except RecursionError:
        raise ValueError("YAML nested too deeply") from None
    except (yaml.YAMLError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"malformed YAML: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
