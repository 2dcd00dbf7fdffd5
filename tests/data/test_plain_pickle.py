"""Pickles of plain data are read; whatever else a pickle can say does nothing and is refused."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastokd.data.sets.plain_pickle import read_plain_pickle
from fastokd.errors import UserError
from tests.data.make import python2_pickle

ARRAYS = [
    np.arange(6, dtype=np.uint8).reshape(2, 3),
    np.asfortranarray(np.arange(24, dtype=">i4").reshape(2, 3, 4)),
    np.array([True, False]),
    np.linspace(0, 1, 5),
    np.empty((0, 3072), np.uint8),
    np.array(7),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays(array: np.ndarray, protocol: int) -> None:
    for data in (pickle.dumps({"a": array}, protocol=protocol), python2_pickle({"a": array})):
        ours = read_plain_pickle(data, "file")["a"]
        assert ours.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(ours, array)
        assert ours.shape == array.shape


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values(protocol: int) -> None:
    shared = [1, 2]
    value = {
        "numbers": [0, -1, 255, 256, 65536, -(2**31), 2**70, 0.5, True, False, None],
        "text": "é" * 300,
        "bytes": b"\x00\xff" * 300,
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": {"a": {}, "b": []},
        "shared": [shared, shared],
        "numpy": [np.int64(3), np.uint8(200)],
    }
    assert read_plain_pickle(pickle.dumps(value, protocol=protocol), "file") == value


class Runs:
    """Writes a file when unpickled, by any of the ways that pickle has."""

    def __init__(self, reduced: tuple[Any, ...]) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that would create ``mark``, or end the process."""
    command = f"touch {mark}"
    system = b"cos\nsystem\n"
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    deep = b"".join((b"\x80\x04}", b")", b"\x85" * 100_000, b"K\x01s."))
    wide = b"".join((b"\x80\x04})", b"q\x00h\x00\x86" * 100, b"K\x01s."))
    return {
        "reduce": pickle.dumps({b"data": Runs((os.system, (command,)))}),
        "eval": pickle.dumps({b"data": Runs((eval, (f"open({str(mark)!r}, 'w')",)))}),
        "open": pickle.dumps({b"data": Runs((open, (str(mark), "w")))}),
        "protocol 0": pickle.dumps({b"data": Runs((os.system, (command,)))}, protocol=0),
        "inst": b"(" + b"S'" + command.encode() + b"'\nios\nsystem\n.",
        "obj": b"(" + system + text + b"o.",
        "newobj": b"\x80\x02" + system + text + b"\x85\x81.",
        "ext": b"\x80\x02\x82\x01.",
        "persid": b"\x80\x02" + text + b"Q.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__class__\x93.",
        "build": pickle.dumps({b"data": Runs((OrderedDict, (), {"a": 1}))}),
        "numpy load": b"\x80\x02cnumpy\nload\n" + text + b"\x85R.",
        "deep key": deep,
        "wide key": wide,
        "deep name": b"\x80\x04)" + b"\x85" * 100_000 + b"\x8c\x01a\x93.",
        "deep value": b"\x80\x04}\x8c\x01a)" + b"\x85" * 100_000 + b"s",
        "huge memo": b"\x80\x02}r\xff\xff\xff\xff",
        "huge bytes": b"\x80\x04\x8e" + b"\xff" * 8,
        "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 50) + b".",
        "negative string": b"\x80\x02T\xff\xff\xff\xff.",
    }


@pytest.mark.parametrize("kind", hostile(Path("/x")))
def test_hostile_pickles_do_nothing(kind: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UserError, match="file can't be read"):
        read_plain_pickle(hostile(mark)[kind], "file")
    assert not mark.exists()


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """Python's own unpickler does run them: the test above tests something."""
    for kind in ("reduce", "protocol 0", "inst", "obj", "stack global"):
        mark = tmp_path / kind.replace(" ", "_")
        pickle.loads(hostile(mark)[kind])
        assert mark.exists(), kind


def array_pickle(shape: Any, code: str, raw: bytes, order: str = "|") -> bytes:
    """A pickled array that says of itself what it likes."""
    state = (
        1,
        shape,
        Runs((np.dtype, (code, False, True), (3, order, None, None, None, -1, -1, 0))),
    )
    array = Runs((np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (*state, False, raw)))
    return pickle.dumps({"a": array}, protocol=4)


@pytest.mark.parametrize(
    ("shape", "code", "raw", "says"),
    [
        ((3,), "u1", b"ab", "don't match its shape"),
        ((1 << 62, 4), "u1", b"", "don't match its shape"),
        ((-1, -2), "u1", b"ab", "shape isn't valid"),
        (("2",), "u1", b"ab", "shape isn't valid"),
        ((1,) * 40, "u1", b"a", "shape isn't valid"),
        ((1,), "O8", b"12345678", "not of numbers"),
        ((1,), "V2000000000", b"a", "not of numbers"),
        ((1,), "M8", b"12345678", "not of numbers"),
        ([2], "u1", b"ab", "isn't an array"),
        ((2,), "u1", "ab", "isn't an array"),
    ],
)
def test_lying_arrays_are_refused(shape: Any, code: str, raw: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        read_plain_pickle(array_pickle(shape, code, raw), "file")


def test_an_array_never_filled_is_none() -> None:
    whole = python2_pickle({"a": np.arange(300, dtype=np.uint8)})
    cut = whole[: whole.index(b"(K\x01")] + b"s."
    assert read_plain_pickle(cut, "file")["a"] is None


def test_text_is_not_encoded_without_end() -> None:
    text = b"X" + struct.pack("<I", 1000) + b"a" * 1000 + b"q\x00"
    encode = b"c_codecs\nencode\nq\x01" + b"h\x00X\x06\x00\x00\x00latin1\x86R"
    data = b"\x80\x02}(X\x01\x00\x00\x00a" + text + b"X\x01\x00\x00\x00b(" + encode
    data += b"h\x01h\x00X\x06\x00\x00\x00latin1\x86R" * 100 + b"lu."
    with pytest.raises(UserError, match="more bytes than it has"):
        read_plain_pickle(data, "file")


SMALL = python2_pickle({b"data": np.arange(12, dtype=np.uint8).reshape(2, 6), b"labels": [3, 4]})


def test_spelling_is_that_of_cifars_files() -> None:
    """What the fuzzing starts from, and ``make.write_cifar`` writes."""
    assert SMALL.startswith(b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\n")
    assert b"U\x02u1" in SMALL
    assert SMALL.endswith(b"U\x06labelsq\x11]q\x12(K\x03K\x04eu.")


def test_every_truncation_is_refused() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(UserError, match="file can't be read"):
            read_plain_pickle(SMALL[:length], "file")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), max_size=6),
    st.binary(max_size=8),
)
def test_damage_is_read_or_refused(changes: list[tuple[int, int]], tail: bytes) -> None:
    data = bytearray(SMALL)
    for position, value in changes:
        data[position] = value
    read_or_refuse(bytes(data[:-1]) + tail + b".")


OPCODES = b"(.NJKMGUTCBX]}aelsudt)qrhjcRb\x80\x85\x86\x87\x88\x89\x8a\x8c\x8d\x8e\x93\x94\x95\x96"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [bytes([op]) for op in OPCODES]
            + [b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"cnumpy.core.multiarray\n_reconstruct\n"]
            + [b"cnumpy.core.multiarray\nscalar\n", b"U\x02u1", b"K\x03", b"\x8c\x01a", b"U\x01|"]
        ),
        max_size=40,
    )
)
def test_any_program_is_read_or_refused(opcodes: list[bytes]) -> None:
    read_or_refuse(b"".join(opcodes) + b".")


def read_or_refuse(data: bytes) -> None:
    """Anything but a dictionary or a UserError is a bug, and fails by itself."""
    with contextlib.suppress(UserError):
        assert isinstance(read_plain_pickle(data, "file"), dict)
