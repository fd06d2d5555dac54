"""Reading files of ``torch.save`` safely: nothing in a file is imported or called.

A pickle is a program for a stack machine. This interpreter builds dense tensors and plain data. Any
other object becomes :class:`Skipped`, the name of its type without its content, so checkpoints of
other programs can be read even if they contain NumPy scalars, loggers or settings beside the
weights. Counting instructions bounds time and memory.

Both formats of torch are supported: zip archives, and the legacy format of five pickles followed by
the storages, which Once-for-All's published files have.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

_STEPS = 5_000_000  # limit per file; a checkpoint with optimiser state takes about 50,000
_TENSOR_STEPS = 64  # cost of a tensor, which takes more memory than other values
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_ARCHIVE = b"PK\x03\x04"

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_STORAGES = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
    "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
    "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    "QInt8": torch.int8, "QUInt8": torch.uint8, "QInt32": torch.int32,  # as their integer codes
    "QUInt4x2": torch.uint8, "QUInt2x4": torch.uint8,
}  # fmt: skip
_STORAGE_TYPES = {
    **{f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    **{f"torch.cuda.{name}Storage": dtype for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
}
_LITERALS = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
_MAKERS = ("copyreg._reconstructor", "copy_reg._reconstructor", "copyreg.__newobj__")


class Skipped:
    """Placeholder of an object that is neither a dense tensor nor plain data.

    Attributes:
        name: Qualified name of its type, or of the function that would create it.
    """

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Storage:
    """A storage: the bytes that tensors are views of, and their dtype."""

    __slots__ = ("content", "dtype")

    def __init__(self, content: Tensor, dtype: torch.dtype) -> None:
        self.content, self.dtype = content, dtype


def unpickle(file: BinaryIO) -> Any:
    """Return the content of a file of ``torch.save``, with tensors on the CPU.

    Parameters are returned as tensors, ordered dicts as ``dict``, ``torch.Size`` as a tuple, and
    objects of other types as :class:`Skipped`.

    Args:
        file: A file on disk, open at its start.

    Raises:
        OSError: The file cannot be read. ValueError, TypeError, LookupError, RuntimeError,
        MemoryError, zipfile.BadZipFile: The file is
            damaged, has another format, or would expand to far more bytes than its size.
    """
    size = os.fstat(file.fileno()).st_size
    archived = file.read(len(_ARCHIVE)) == _ARCHIVE  # as torch.load distinguishes them
    file.seek(0)
    if not archived:
        return _read_legacy(file, size)
    with zipfile.ZipFile(file) as archive:
        return _read_archive(archive, size)


def skipped_names(data: Any) -> set[str]:
    """Return the names of all :class:`Skipped` objects in ``data``."""
    names, seen, todo = set(), set(), [data]
    while todo:
        value = todo.pop()
        if isinstance(value, Skipped):
            names.add(value.name)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(value)
            todo.extend(value.values() if isinstance(value, dict) else ())
    return names


def _read_archive(archive: zipfile.ZipFile, size: int) -> Any:
    records = {record.filename: record for record in archive.infolist()}
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise ValueError("a compressed archive")  # torch.save never compresses
    if (claimed := sum(record.file_size for record in archive.infolist())) > size:
        raise ValueError(f"a file of {size} bytes that declares {claimed} bytes of content")
    if not any(record.CRC for record in records.values()):  # torch can be set to omit them
        for record in records.values():
            del record.CRC  # so that zipfile does not compare it
    pickles = [name for name in records if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("an archive without exactly one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and archive.read(order) != b"little":
        raise ValueError("big-endian byte order")
    storages: dict[Any, Tensor] = {}

    def read_storage(key: Any, count: int, width: int) -> Tensor:
        if key not in storages:
            content = bytearray(archive.read(records[f"{root}data/{key}"]))
            storages[key] = (
                torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
            )
        return storages[key]

    return _Interpreter(read_storage).run(io.BytesIO(archive.read(records[pickles[0]])))


def _read_legacy(file: BinaryIO, size: int) -> Any:
    storages: dict[Any, tuple[Tensor, int]] = {}
    total = 0

    def read_storage(key: Any, count: int, width: int) -> Tensor:
        nonlocal total
        if key not in storages:
            total += count * width
            if total > size:
                raise ValueError("storages larger than the file")
            storages[key] = torch.empty(count * width, dtype=torch.uint8), count
        return storages[key][0]

    interpreter = _Interpreter(read_storage)
    if interpreter.run(file) != _MAGIC or interpreter.run(file) != _PROTOCOL:
        raise ValueError("not a file of torch.save")
    system = interpreter.run(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("big-endian byte order")
    data, keys = interpreter.run(file), interpreter.run(file)
    if not isinstance(keys, list) or sorted(keys) != sorted(storages):
        raise ValueError("storages that do not match the tensors")
    for key in keys:
        content, count = storages[key]
        if file.read(8) != struct.pack("<q", count):
            raise ValueError("a storage of another size than declared")
        if len(content) and file.readinto(content.numpy()) != len(content):
            raise ValueError("a truncated storage")
    if file.read(1):
        raise ValueError("data after the last storage")
    return data


class _Interpreter:
    """Interpreter of pickles.

    Args:
        read_storage: Called with the key of a storage, its number of elements and the bytes per
            element; returns its content, uint8 [bytes].
    """

    def __init__(self, read_storage: Callable[[Any, int, int], Tensor]) -> None:
        self._read_storage = read_storage
        self._steps_left = _STEPS
        self._known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._mapping,
            "collections.defaultdict": lambda factory=None: {},
            "_codecs.encode": self._encode,
            "torch.Size": lambda sizes=(): sizes,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor_v3,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda make, kind, args, _: self._call(
                make, args
            ),
        }

    def run(self, file: BinaryIO) -> Any:
        """Execute one pickle and return its result."""
        stack: list[Any] = []
        outer: list[list[Any]] = []
        memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._spend(1)
            match opcode.name:
                case name if name in _LITERALS:
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_SET":
                    stack.append(Skipped("builtins.set"))
                case "LIST" | "TUPLE" | "DICT" | "FROZENSET" | "OBJ" | "INST":
                    items, stack = stack, outer.pop()
                    stack.append(_build(opcode.name, items, argument))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(_last(stack, count))]
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "SETITEM":
                    pair = _last(stack, 2)
                    del stack[-2:]
                    _extend(stack[-1], pair, pairs=True)
                case "APPENDS" | "SETITEMS" | "ADDITEMS":
                    items, stack = stack, outer.pop()
                    _extend(stack[-1], items, pairs=opcode.name == "SETITEMS")
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    stack = outer.pop()
                case "DUP":
                    stack.append(stack[-1])
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(Skipped(argument.replace(" ", ".")))
                case "STACK_GLOBAL":
                    module, name = _last(stack, 2)
                    self._spend(len(module) + len(name))
                    stack[-2:] = [Skipped(f"{module}.{name}")]
                case "REDUCE" | "NEWOBJ":
                    make, args = _last(stack, 2)
                    stack[-2:] = [self._call(make, args)]
                case "NEWOBJ_EX":
                    make = _last(stack, 3)[0]
                    stack[-3:] = [Skipped(_name(make))]
                case "BUILD":
                    stack.pop()  # state of an object, which is ignored
                    _last(stack, 1)
                case "BINPERSID":
                    stack.append(self._persistent(stack.pop()))
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(f"an unsupported pickle opcode, {opcode.name}")
        raise ValueError("a truncated pickle")

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise ValueError("too many objects")

    def _call(self, make: Any, args: Any) -> Any:
        """Return the result of ``make(*args)`` if ``make`` is known, else a placeholder."""
        name = _name(make)
        if type(args) is not tuple:
            raise TypeError("a call whose arguments are not a tuple")
        if name in _MAKERS and args and isinstance(args[0], Skipped):
            return args[0]
        known = self._known.get(name)
        return Skipped(name) if known is None else known(*args)

    def _persistent(self, saved: Any) -> Any:
        """Return the storage (or, in old files, the class) of a persistent id."""
        kind, *rest = saved
        if kind == "module":
            return rest[0]
        if kind != "storage":
            raise ValueError("an unknown persistent id")
        storage_type, key, _, count, *view = rest
        if any(part is not None for part in view):
            raise ValueError("a view of another storage")
        dtype = _STORAGE_TYPES.get(_name(storage_type))
        if type(count) is not int or count < 0 or type(key) not in (str, int):
            raise TypeError("a storage of unknown size")
        if dtype is None:
            return Skipped(_name(storage_type))
        self._spend(_TENSOR_STEPS)
        content = self._read_storage(key, count, dtype.itemsize)
        if len(content) != count * dtype.itemsize:
            raise ValueError(f"expected {count * dtype.itemsize} bytes, got {len(content)}")
        return _Storage(content, dtype)

    def _mapping(self, pairs: Iterable[Any] = ()) -> dict[Any, Any]:
        pairs = list(pairs)
        self._spend(len(pairs))
        return dict(pairs)

    def _encode(self, text: str, encoding: str) -> bytes:
        """Return bytes, which protocol 2 writes as Latin-1 text."""
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes encoded other than as Latin-1")
        self._spend(len(text))
        return text.encode("latin-1")

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any = None,
        hooks: Any = None, metadata: Any = None, dtype: Any = None,
    ) -> Any:  # fmt: skip
        """Return a view of a storage, or a placeholder if its type is unknown."""
        kind = None
        if isinstance(storage, _Storage) and not metadata:
            kind = storage.dtype if dtype is None else _DTYPES.get(_name(dtype))
        if kind is None:
            return Skipped("torch.Tensor")
        self._spend(_TENSOR_STEPS)
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise TypeError("a tensor of invalid shape")
        content = storage.content.view(kind)
        steps = (s * (n - 1) for n, s in zip(size, stride, strict=True))
        if math.prod(size) and offset + sum(steps) >= len(content):
            raise ValueError("a tensor larger than its storage")
        return content.as_strided(size, stride, offset)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any,
        metadata: Any = None,
    ) -> Any:  # fmt: skip
        """Return the same; here the dtype comes before the metadata."""
        return self._tensor(storage, offset, size, stride, grad, hooks, metadata, dtype)


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("a pickle that pops from an empty stack")
    return stack[-count:]


def _name(value: Any) -> str:
    if not isinstance(value, Skipped):
        raise TypeError(f"expected a class or function, got {type(value).__name__}")
    return value.name


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _build(kind: str, items: list[Any], argument: Any) -> Any:
    """Return the object built from the items since the last mark."""
    if kind == "LIST":
        return items
    if kind == "TUPLE":
        return tuple(items)
    if kind == "DICT":
        return dict(_pairs(items))
    if kind == "FROZENSET":
        return Skipped("builtins.frozenset")
    return Skipped(argument.replace(" ", ".") if kind == "INST" else _name(items[0]))


def _extend(target: Any, items: list[Any], pairs: bool = False) -> None:
    """Extend a list or a dict; a placeholder ignores the items."""
    if isinstance(target, Skipped):
        return
    if type(target) is not (dict if pairs else list):
        raise TypeError(f"items added to {type(target).__name__}")
    if pairs:
        target.update(_pairs(items))
    else:
        target.extend(items)
