"""Reads a pickle of plain values and numpy arrays without running code.

CIFAR comes as pickles, and unpickling calls what a file names. This reader supports only the opcodes
of plain data and builds arrays from their bytes itself. The few globals of an array are compared as
names and never imported. Anything else raises.
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
    """Why the bytes aren't a plain pickle."""


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
        where: its name for errors.

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
    """A stack machine for the opcodes of plain data, which :mod:`pickletools` parses."""

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
                    raise _RefusedError(f"its opcode {opcode.name} isn't supported")
                handler(self, argument)
        except ValueError as error:
            raise _RefusedError(f"it ends too early or is no pickle: {error}") from error
        return self.pop()

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _RefusedError("its stack is empty")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise _RefusedError("a mark is missing")

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _RefusedError(f"a {kind.__name__} is missing")
        return self.stack[-1]

    # Containers.

    def set_items(self, items: list[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise _RefusedError("a key has no value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No other keys: the hash of a nested tuple can take forever.
            if type(key) not in (bytes, str):
                raise _RefusedError("a key isn't a string")
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
            raise _RefusedError("its stack is empty")
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise _RefusedError("a memo entry is missing")
        self.push(self.memo[key])

    # Arrays.

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            raise _RefusedError(f"it names {name[:160]}")
        self.push(_GLOBALS[name])

    def find_on_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if type(module) is not str or type(name) is not str:
            raise _RefusedError("a name isn't a string")
        self.find(f"{module} {name}")

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple:
            raise _RefusedError("a call has no arguments")
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
                raise _RefusedError("it calls what doesn't make an array")

    def encode(self, text: str) -> bytes:
        # Limited, since one text may be encoded many times until memory runs out.
        self.encoded += len(text)
        if self.encoded > len(self.data):
            raise _RefusedError("it encodes more bytes than it has")
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise _RefusedError("its text isn't Latin-1") from None

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
                raise _RefusedError("it fills what isn't an array")


def _array(raw: bytes, dtype: _Dtype, shape: tuple[Any, ...], *, fortran: bool) -> np.ndarray:
    """The array of these bytes, whose number must match shape and dtype."""
    code = dtype.code.lstrip("<>|=")
    if code not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8"):
        raise _RefusedError(f"it has an array of {dtype.code[:20]!r}, not of numbers")
    if dtype.order not in ("<", ">", "|", "="):
        raise _RefusedError("an array has no known byte order")
    if len(shape) > 8 or any(type(size) is not int or size < 0 for size in shape):
        raise _RefusedError("an array's shape isn't valid")
    if math.prod(shape) * int(code[1:]) != len(raw):
        raise _RefusedError("an array's bytes don't match its shape")
    order = ">" if dtype.order == ">" else "<"
    flat = np.frombuffer(raw, order + code) if raw else np.empty(0, order + code)
    return flat.reshape(shape, order="F" if fortran else "C")


# By pickletools' names of opcodes.
_HANDLERS: dict[str, Callable[[_Reader, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda r, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), lambda r, v: r.push(v)),
    **dict.fromkeys(("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"), lambda r, v: r.push(v)),
    **dict.fromkeys(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), lambda r, v: r.push(v)),
    # Python 2's strings become bytes, as for CIFAR's data; pickletools decodes them as Latin-1.
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
