"""Pickles of plain values and uint8 arrays, read without executing anything.

The opcodes are disassembled by the standard library and interpreted here: constants and containers are built, and of
calls only those by which numpy spells an array and Python 3 spells bytes are understood, by their names. Nothing is
imported, nothing is called, and no length is believed: `pickle.Unpickler`, even with a `find_class` that refuses,
allocates what a file declares (a memo slot numbered 2³¹ costs it 32 GB).
"""

import io
import pickletools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from pipeline.prepare.listing import SourceError

MAX_OPCODES = 4_000_000
_ARRAY = ("_reconstruct", "ndarray", "dtype")
_NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_PYTHON_2_BYTES = ("BINSTRING", "SHORT_BINSTRING")
_PUTS = ("BINPUT", "LONG_BINPUT")
_GETS = ("BINGET", "LONG_BINGET")


_T = TypeVar("_T")


class _Name(NamedTuple):
    """A global that the file asks for, by its name: the thing itself is never looked up."""

    module: str
    name: str


class _Dtype(NamedTuple):
    """The element type of an array, as its file spells it."""

    code: str


class _Pending:
    """An array whose contents come with a later opcode."""

    def __init__(self) -> None:
        self.slots: list[int] = []  # of the memo, to be given the array when it is there


class _RefusedError(Exception):
    """What a file asks for and does not get."""


def loads(data: bytes, where: str) -> object:
    """What a pickle holds: None, bool, int, float, str, bytes, list, tuple, dict with text keys, read-only uint8 array.

    Python 2's strings are bytes. Raises SourceError, which begins with `where`, for everything else, and for a file
    that is damaged.
    """
    try:
        return _Machine(data).run()
    except _RefusedError as refusal:
        raise SourceError(
            f"{where}: asks for {refusal}, which data has no need of; nothing was executed; get the file anew from its "
            "official address"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise SourceError(f"{where}: not a whole pickle ({reason}); copy the file again") from error


class _Machine:
    """The stack, the marks on it and the memo of one pickle."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._text_left = len(data)  # characters that may still be turned into bytes: no more than the file has
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def run(self) -> object:
        """The value that the file holds."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(self._data))):
            if opcode.name == "STOP":
                break
            if count == MAX_OPCODES:
                raise _RefusedError(f"more than {MAX_OPCODES} opcodes")
            self._step(opcode.name, argument)
        (value,) = self._stack
        return value

    def _step(self, opcode: str, argument: object) -> None:
        stack = self._stack
        if opcode in _NUMBERS or opcode in _TEXTS:
            stack.append(argument)
        elif opcode in _PYTHON_2_BYTES:
            stack.append(str(argument).encode("latin-1"))
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _EMPTY:
            stack.append(_EMPTY[opcode]())
        elif opcode == "MARK":
            self._marks.append(len(stack))
        elif opcode in _PUTS:
            self._put(int(str(argument)))
        elif opcode == "MEMOIZE":
            self._put(len(self._memo))
        elif opcode in _GETS:
            stack.append(self._memo[int(str(argument))])
        elif opcode not in ("PROTO", "FRAME"):
            self._combine(opcode, argument)

    def _combine(self, opcode: str, argument: object) -> None:
        """The opcodes that make one value of several."""
        stack = self._stack
        if opcode in _TUPLES or opcode == "TUPLE":
            stack.append(tuple(self._pop(_TUPLES[opcode]) if opcode in _TUPLES else self._pop_to_mark()))
        elif opcode in ("APPEND", "APPENDS"):
            values = self._pop(1) if opcode == "APPEND" else self._pop_to_mark()
            _expect(stack[-1], list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self._pop(2) if opcode == "SETITEM" else self._pop_to_mark()
            # A tuple that holds itself many times over would take for ever to hash.
            keys = [_expect(key, str, bytes) for key in values[::2]]
            _expect(stack[-1], dict).update(zip(keys, values[1::2], strict=True))
        elif opcode == "GLOBAL":
            stack.append(_known(*str(argument).split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            module, name = self._pop(2)
            stack.append(_known(_expect(module, str), _expect(name, str)))
        elif opcode == "REDUCE":
            function, arguments = self._pop(2)
            stack.append(self._call(function, _expect(arguments, tuple)))
        elif opcode == "BUILD":
            self._build(*self._pop(1))
        else:
            raise _RefusedError(f"opcode {opcode}")

    def _pop(self, count: int) -> list[object]:
        floor = len(self._stack) - count
        if floor < (self._marks[-1] if self._marks else 0):
            raise ValueError("an opcode wants more values than there are")
        values = self._stack[floor:]
        del self._stack[floor:]
        return values

    def _pop_to_mark(self) -> list[object]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def _put(self, slot: int) -> None:
        value = self._stack[-1]
        self._memo[slot] = value
        if isinstance(value, _Pending):
            value.slots.append(slot)

    def _build(self, state: object) -> None:
        """Give what lies on top its state: an array its shape and bytes; a dtype keeps its code, which says it all."""
        top = self._stack[-1]
        if isinstance(top, _Pending):
            array = _array(_expect(state, tuple))
            self._stack[-1] = array
            self._memo.update(dict.fromkeys(top.slots, array))
        elif not isinstance(top, _Dtype):
            raise _RefusedError(f"state for a {type(top).__name__}")

    def _call(self, function: object, arguments: tuple[object, ...]) -> object:
        """What the three known functions would return."""
        name = function.name if isinstance(function, _Name) else ""
        if name == "encode":
            text, encoding = (_expect(argument, str) for argument in arguments)
            self._text_left -= len(text)
            if encoding not in ("latin1", "latin-1") or self._text_left < 0:
                raise _RefusedError("bytes from text that is not latin1, or is used again and again")
            return text.encode("latin-1")
        if name == "dtype":
            code = arguments[0]
            return _Dtype(code.decode("latin-1") if isinstance(code, bytes) else _expect(code, str))
        if name == "_reconstruct" and isinstance(arguments[0], _Name) and arguments[0].name == "ndarray":
            return _Pending()
        raise _RefusedError(f"a call of a {name or type(function).__name__}")


def _known(module: str, name: str = "") -> _Name:
    if (module, name) == ("_codecs", "encode") or (module in _NUMPY and name in _ARRAY):
        return _Name(module, name)
    raise _RefusedError(f"{module[:60]}.{name[:60]}")


def _array(state: tuple[object, ...]) -> np.ndarray:
    """(version, shape, dtype, Fortran order, bytes) → the array, a view of the bytes."""
    _, shape, dtype, fortran, contents = state
    if not isinstance(dtype, _Dtype) or dtype.code != "u1":
        raise _RefusedError(
            f"an array of {dtype.code[:20] if isinstance(dtype, _Dtype) else 'objects'}, not of bytes (u1)"
        )
    lengths = [_expect(length, int) for length in _expect(shape, tuple)]
    raw = _expect(contents, bytes)
    if min(lengths, default=0) < 0:  # numpy would fill in a −1
        raise ValueError(f"an array of shape {lengths[:4]}")
    return np.frombuffer(raw, np.uint8).reshape(lengths, order="F" if fortran is True else "C")


def _expect(value: object, *kinds: type[_T]) -> _T:
    if not isinstance(value, kinds):
        raise TypeError(f"a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value
