"""Pickles read without executing anything: what comes out, and what hostile ones are denied."""

import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.prepare import array_pickle
from pipeline.prepare.listing import SourceError
from tests.prepare import trees

# cPickle.dumps({"data": ..., "labels": [1, 0], "n": 300}, 2) of Python 2.7.18 with numpy 1.16.6
_BY_PYTHON_2 = (
    b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x01K\x00eU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01"
    b"\x87Rq\t(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06\x00\x01\x02\x03\x04\x05tbU\x01n"
    b"M,\x01u."
)
_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(min_size=1),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.binary(min_size=1), inner),
    max_leaves=20,
)


def _refusal(data: bytes) -> str:
    with pytest.raises(SourceError) as caught:
        array_pickle.loads(data, "evil")
    text = str(caught.value)
    assert text.startswith("evil: ")
    assert "\n" not in text
    return text


def _complaint(data: bytes) -> str:
    """What is said of a pickle that may be whole; empty where nothing is."""
    try:
        array_pickle.loads(data, "x")
    except SourceError as error:
        return str(error)
    return ""


@given(_PLAIN, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_come_back(value: object, protocol: int) -> None:
    assert array_pickle.loads(pickle.dumps(value, protocol), "x") == value


def test_what_python_2_wrote() -> None:
    for data in (_BY_PYTHON_2, trees.python2_pickle({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3)})):
        value = array_pickle.loads(data, "x")
        assert isinstance(value, dict)
        assert np.array_equal(value[b"data"], [[0, 1, 2], [3, 4, 5]])
        assert value[b"data"].dtype == np.uint8
    assert array_pickle.loads(_BY_PYTHON_2, "x")[b"labels"] == [1, 0]  # type: ignore[index]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.", b"numpy._core."])
def test_arrays_of_both_numpys_and_both_orders(protocol: int, module: bytes) -> None:
    array = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    for one in (array, np.asfortranarray(array)):
        data = pickle.dumps([one, one], protocol)
        assert b"numpy._core." in data
        if module == b"numpy.core.":  # as numpy 1 names it, the length before the name shortened
            data = data.replace(b"\x8c\x16numpy._core.", b"\x8c\x15numpy.core.").replace(b"cnumpy._", b"cnumpy.")
        first, second = array_pickle.loads(data, "x")  # type: ignore[misc]
        assert np.array_equal(first, array)
        assert np.array_equal(second, array)


# -------------------------------------------------------------------------------------------------- hostile


class _Calls:
    def __init__(self, function: object, *arguments: object) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self._reduced


class _Instance:
    def __setstate__(self, state: object) -> None:
        raise AssertionError("executed")


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_calls_and_instances_are_named_and_not_executed(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "executed"
    instance = _Instance()
    instance.value = 1  # type: ignore[attr-defined]
    for value, asked in [
        (_Calls(os.system, f"touch {mark}"), "posix.system"),
        (_Calls(eval, f"open({str(mark)!r}, 'w')"), "eval"),
        ([1, {"a": _Calls(np.load, str(mark))}], "load"),
        (instance, "_Instance" if protocol > 1 else "_reconstructor"),
    ]:
        text = _refusal(pickle.dumps(value, protocol))
        assert asked in text or "opcode" in text
        assert "nothing was executed" in text
    assert not mark.exists()


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (b"(S'true'\nios\nsystem\n.", "opcode"),  # INST
        (b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.", "os.system"),  # OBJ
        (b"\x80\x02cnumpy\nload\n)R.", "numpy.load"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0afrombuffer\x93.", "numpy.frombuffer"),
        (b"\x80\x02cnumpy.core.multiarray\nscalar\n)R.", "numpy.core.multiarray.scalar"),
        (b"\x80\x02c_codecs\ndecode\n)R.", "_codecs.decode"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "not latin1"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "a call of a ndarray"),
        (b"\x80\x02K\x01)R.", "a call of a int"),
        (b"\x80\x02cnumpy\ndtype\n}b.", "state for a _Name"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02U\x01aQ.", "opcode BINPERSID"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "opcode NEWOBJ"),
        (pickle.dumps(np.zeros(2), 2), "an array of f8"),
        (pickle.dumps(np.array([None], dtype=object), 2), "an array of O8"),
    ],
)
def test_what_is_asked_for_is_named(data: bytes, asked: str) -> None:
    assert asked in _refusal(data)


def _array(shape: bytes, contents: bytes) -> bytes:
    """An array pickle with a shape of its own choice."""
    return _BY_PYTHON_2.replace(b"K\x02K\x03\x86", shape).replace(b"U\x06\0\1\2\3\4\5", contents)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # BINBYTES8
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",  # BINUNICODE8
        b"\x80\x02T" + struct.pack("<i", 2**31 - 1) + b"x.",  # BINSTRING
        b"\x80\x02T" + struct.pack("<i", -5) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",  # BYTEARRAY8
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # LONG4
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N",  # FRAME
        _array(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b"U\x06\0\1\2\3\4\5"),
        _array(b"J\xff\xff\xff\xffK\x03\x86", b"U\x06\0\1\2\3\4\5"),
        _array(b"K\0\x8a\x0a" + b"\xff" * 9 + b"\x7f\x86", b"U\0"),
        # a text of 1 MB turned into bytes 10,000 times
        b"\x80\x02c_codecs\nencode\nq\0X"
        + struct.pack("<I", 10**6)
        + b"a" * 10**6
        + b"X\6\0\0\0latin1\x86q\1R("
        + b"h\0h\1R" * 10**4
        + b"l.",
    ],
)
def test_what_is_declared_is_not_allocated(data: bytes) -> None:
    tracemalloc.start()
    try:
        _refusal(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * 10**6
    finally:
        tracemalloc.stop()


def test_a_memo_slot_costs_nothing() -> None:
    tracemalloc.start()
    try:
        assert array_pickle.loads(b"\x80\x02K\x05r" + struct.pack("<I", 2**32 - 1) + b".", "x") == 5
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_a_tuple_that_holds_itself_often_is_no_key() -> None:
    twice = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    bomb = b"\x80\x02()q\x00" + twice + b"}h\x3cNst."
    assert "a tuple where a str belongs" in _refusal(bomb)


def test_too_many_opcodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_pickle, "MAX_OPCODES", 100)
    assert "more than 100 opcodes" in _refusal(b"\x80\x02(" + b"N" * 200 + b"t.")


@given(st.binary(max_size=60))
@example(b"")
@example(b".")
@example(b"\x80\x02e.")
@example(b"\x80\x02(.")
@example(b"\x80\x02h\x05.")
def test_noise_is_one_line_or_a_plain_value(data: bytes) -> None:
    for stream in (data, b"\x80\x02" + data + b"."):
        assert "\n" not in _complaint(stream)


@given(st.integers(0, len(_BY_PYTHON_2) - 1), st.integers(0, 255), st.booleans())
def test_a_damaged_file_is_one_line_or_a_value(at: int, byte: int, cut: bool) -> None:
    data = _BY_PYTHON_2[:at] + (b"" if cut else bytes([byte]) + _BY_PYTHON_2[at + 1 :])
    assert "\n" not in _complaint(data)


def test_nothing_is_imported() -> None:
    """The library's own Unpickler would have looked the name up, and so would have run the module."""
    sink = io.BytesIO()
    sink.write(b"\x80\x02cantigravity\nfly\n)R.")
    assert "antigravity.fly" in _refusal(sink.getvalue())
