"""Reads a pickle of plain values and numpy arrays, and calls nothing that the file names.

CIFAR comes as pickles, and unpickling runs what a file tells it to. This reader knows only the
opcodes that plain data needs, keeps their results in Python lists and dictionaries, and builds
arrays from their bytes itself; the few globals that stand for an array are names to it, never
looked up. Anything else is refused.
"""

from __future__ import annotations

import math
import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from fastokd.errors import UserError

MAX_BYTES = 1 << 30


class _Global(Enum):
    """What a pickled array may name."""

    ARRAY = "an empty array, to be filled"
    NDARRAY = "the class of arrays"
    DTYPE = "a dtype"
    FROM_BUFFER = "an array from its bytes"
    SCALAR = "a number with its dtype"
    ENCODE = "bytes spelled as text"
    BYTES = "no bytes"


# By module and name. Python 2 and 3, numpy 1 and 2, protocols 2 to 5 spell arrays and bytes in
# these ways.
_GLOBALS = {
    **{f"numpy.{core}.multiarray _reconstruct": _Global.ARRAY for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray scalar": _Global.SCALAR for core in ("core", "_core")},
    **{f"numpy.{core}.numeric _frombuffer": _Global.FROM_BUFFER for core in ("core", "_core")},
    "numpy ndarray": _Global.NDARRAY,
    "numpy dtype": _Global.DTYPE,
    "_codecs encode": _Global.ENCODE,
    "__builtin__ bytes": _Global.BYTES,
}


class _RefusedError(Exception):
    """Why the bytes are no plain pickle."""


@dataclass
class _Dtype:
    """Kind and size, such as ``u1``, and the byte order, which BUILD sets."""

    code: str
    order: str = "="


@dataclass
class _Array:
    """An array that its state fills later."""

    value: np.ndarray | None = None


_MARK = object()


def read_plain_pickle(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary that ``data`` pickles: names to ints, strings, bytes, lists and arrays.

    Args:
        data: the pickle.
        where: what to call it in an error.

    Raises:
        UserError: it is truncated, holds anything but plain values and numeric arrays, or isn't a
            dictionary.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{where} has {len(data)} bytes: at most {MAX_BYTES} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about escapes in damaged text
            result = _Reader(data).run()
    except _RefusedError as error:
        raise UserError(
            f"{where} can't be read ({error}): it is damaged or not what it should be, fetch it "
            "again (--download)"
        ) from None
    if not isinstance(result, dict):
        raise UserError(f"{where} holds no dictionary: fetch it again (--download)")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else key: (
            value.value if isinstance(value, _Array) else value
        )
        for key, value in result.items()
    }


class _Reader:
    """A stack machine for the opcodes of plain data, as :mod:`pickletools` splits a pickle."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.encoded = 0

    def run(self) -> Any:
        try:
            for opcode, argument, _ in pickletools.genops(self.data):
                if opcode.name == "STOP":
                    break
                handler = _HANDLERS.get(opcode.name)
                if handler is None:
                    raise _RefusedError(f"its opcode {opcode.name} is not for plain data")
                handler(self, argument)
        except ValueError as error:
            raise _RefusedError(f"it ends too early or is no pickle: {error}") from error
        return self.pop()

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _RefusedError("it takes a value where there is none")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise _RefusedError("it ends a group that never began")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _RefusedError(f"it fills a {kind.__name__} that isn't there")
        return self.stack[-1]

    # Containers.

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise _RefusedError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else is hashed: a nested tuple's hash can be made to take forever.
            if type(key) not in (bytes, str):
                raise _RefusedError("a key is no string")
            target[key] = value

    def extend(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def pop_last(self, count: int) -> list[Any]:
        return [self.pop() for _ in range(count)][::-1]

    def remember(self, key: int | None) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise _RefusedError("it remembers a value where there is none")
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise _RefusedError("it recalls what it never had")
        self.push(self.memo[key])

    # Arrays.

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            raise _RefusedError(f"it asks for {name[:160]}")
        self.push(_GLOBALS[name])

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(module) is not str or type(name) is not str:
            raise _RefusedError("it names something by what is no name")
        self.find(f"{module} {name}")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise _RefusedError("it calls something without arguments")
        match function, arguments:
            case _Global.ARRAY, (_Global.NDARRAY, tuple(), _):
                self.push(_Array())
            case _Global.DTYPE, (str() | bytes() as code, *_):
                self.push(_Dtype(code if isinstance(code, str) else code.decode("latin-1")))
            case _Global.FROM_BUFFER, (
                bytes() as raw,
                _Dtype() as dtype,
                tuple() as shape,
                "C" | "F" as order,
                *axes,
            ) if axes in ([], [None]):
                self.push(_Array(_array(raw, dtype, shape, fortran=order == "F")))
            case _Global.SCALAR, (_Dtype() as dtype, bytes() as raw):
                self.push(_array(raw, dtype, (), fortran=False).item())
            case _Global.BYTES, ():
                self.push(b"")
            case _Global.ENCODE, (str() as text, "latin1"):
                self.push(self.encode(text))
            case _:
                raise _RefusedError("it calls something that makes no array")

    def encode(self, text: str) -> bytes:
        # The same text may be encoded again and again: bounded, or memory would run out.
        self.encoded += len(text)
        if self.encoded > len(self.data):
            raise _RefusedError("it spells out more bytes than it has")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise _RefusedError("its text is no bytes") from None

    def build(self) -> None:
        state = self.pop()
        match self.stack[-1] if self.stack else None, state:
            case _Dtype() as dtype, (int(), str() | bytes() as order, None, None, None, *_):
                dtype.order = order if isinstance(order, str) else order.decode("latin-1")
            case _Array(None) as array, (
                int(),
                tuple() as shape,
                _Dtype() as dtype,
                bool() | int() as fortran,
                bytes() as raw,
            ):
                array.value = _array(raw, dtype, shape, fortran=bool(fortran))
            case _:
                raise _RefusedError("it fills something that is no array")


def _array(raw: bytes, dtype: _Dtype, shape: tuple[Any, ...], *, fortran: bool) -> np.ndarray:
    """The array of these bytes; its size must be exactly what shape and dtype say."""
    code = dtype.code.lstrip("<>|=")
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"):
        raise _RefusedError(f"it has an array of {dtype.code[:20]!r}, not of numbers")
    if dtype.order not in ("<", ">", "|", "="):
        raise _RefusedError("an array has no known byte order")
    if len(shape) > 8 or any(type(size) is not int or size < 0 for size in shape):
        raise _RefusedError("an array's shape is no shape")
    if math.prod(shape) * int(code[1:]) != len(raw):
        raise _RefusedError("an array has not as many bytes as its shape says")
    order = ">" if dtype.order == ">" else "<"
    flat = np.frombuffer(raw, order + code) if raw else np.empty(0, order + code)
    return flat.reshape(shape, order="F" if fortran else "C")


# By the names that pickletools gives opcodes.
_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda r, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda r, v: r.push(v)),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), lambda r, v: r.push(v)),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), lambda r, v: r.push(v)),
    # Python 2's strings are bytes here, as CIFAR's data are; pickletools reads them as Latin-1.
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), lambda r, v: r.push(v.encode("latin-1"))),
    "BYTEARRAY8": lambda r, value: r.push(bytes(value)),
    "MARK": lambda r, _: r.push(_MARK),
    "NONE": lambda r, _: r.push(None),
    "NEWTRUE": lambda r, _: r.push(True),
    "NEWFALSE": lambda r, _: r.push(False),
    "EMPTY_LIST": lambda r, _: r.push([]),
    "EMPTY_DICT": lambda r, _: r.push({}),
    "EMPTY_TUPLE": lambda r, _: r.push(()),
    "APPEND": lambda r, _: r.extend([r.pop()]),
    "APPENDS": lambda r, _: r.extend(r.pop_mark()),
    "LIST": lambda r, _: r.push(r.pop_mark()),
    "SETITEM": lambda r, _: r.set_items(r.pop_last(2)),
    "SETITEMS": lambda r, _: r.set_items(r.pop_mark()),
    "DICT": lambda r, _: r.make_dict(),
    "TUPLE": lambda r, _: r.push(tuple(r.pop_mark())),
    "TUPLE1": lambda r, _: r.push(tuple(r.pop_last(1))),
    "TUPLE2": lambda r, _: r.push(tuple(r.pop_last(2))),
    "TUPLE3": lambda r, _: r.push(tuple(r.pop_last(3))),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), lambda r, key: r.remember(key)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda r, key: r.recall(key)),
    "GLOBAL": lambda r, name: r.find(name),
    "STACK_GLOBAL": lambda r, _: r.find_on_stack(),
    "REDUCE": lambda r, _: r.reduce(),
    "BUILD": lambda r, _: r.build(),
}
