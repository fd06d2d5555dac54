"""Ways in which files are damaged: bytes as broken disks leave them, values as hands do."""

import random


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def lose(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 600)]


def blank(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    length = len(data[at : at + rng.randrange(1, 600)])
    data[at : at + length] = bytes(length)


def repeat(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.randrange(1, 600)]


BYTES = (flip, flip, flip, cut, lose, blank, repeat)
VALUES = (
    b"NaN", b"Infinity", b"-Infinity", b"nan", b"inf", b"1e400", b"-1", b"0", b"-0.5", b"1e308",
    b"99999999999999999999999", b"3.5", b"null", b"true", b'"x"', b"[]", b"{}", b"", b"\x1b[31m",
    b"[[[[[[]]]]]]", b"\xff\xfe", b"\x00", b"\xc3\xa9", b"!!python/object:os.system", b"&a *a",
)  # fmt: skip


def replace_value(data: bytearray, rng: random.Random) -> None:
    """Put something else in the place of a number or a word of a text."""
    starts = [
        at for at in range(1, len(data))
        if data[at : at + 1].isalnum() and not data[at - 1 : at].isalnum()
    ]  # fmt: skip
    if not starts:
        return
    at = end = rng.choice(starts)
    while end < len(data) and (data[end : end + 1].isalnum() or data[end : end + 1] in b".-+"):
        end += 1
    if data[at - 1 : at] == b'"' and rng.random() < 0.5:  # a text's quotes with it
        at, end = at - 1, min(len(data), end + 1)
    data[at:end] = rng.choice(VALUES)


def drop_line(data: bytearray, rng: random.Random) -> None:
    lines = data.split(b"\n")
    lines.pop(rng.randrange(len(lines)))
    data[:] = b"\n".join(lines)


def double_line(data: bytearray, rng: random.Random) -> None:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines.insert(rng.randrange(len(lines)), lines[at])
    data[:] = b"\n".join(lines)


TEXT = (replace_value, replace_value, replace_value, replace_value, drop_line, double_line)


def damaged(whole: bytes, seed: str, text: bool) -> bytes:
    """Return a damaged file, the same for the same seed."""
    rng = random.Random(seed)
    data = bytearray(whole)
    while bytes(data) == whole:
        rng.choice(TEXT if text and rng.random() < 0.7 else BYTES)(data, rng)
    return bytes(data)
