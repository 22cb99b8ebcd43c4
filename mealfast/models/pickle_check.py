"""What a pickle in a file of `torch.save` calls and claims, followed step by step without building anything."""

from __future__ import annotations

import math
import pickletools
from collections.abc import Collection
from typing import Any, BinaryIO

# What a state dict with optimiser and averages of the largest of timm's models needs a tenth of at most.
LARGEST_PICKLE = 8 << 20  # bytes
MOST_STEPS = 1_000_000  # opcodes
MOST_CALLS = 100_000
MOST_ELEMENTS = 1_000_000  # of containers, counted as often as they can be reached
_MOST_DIMENSIONS = 64
_ROOM = 1 << 24  # values of expanded tensors and elements of arguments, beside what the file holds

CODE = "it holds more than tensors and plain values, and loading it could run code; save its state dict alone"
DAMAGED = "it is cut off or damaged"
FOREIGN = "it is no file of torch.save"
CLAIMS = "it claims more than it holds"
LARGE = "it holds more small objects than a file of weights does; save its state dict alone"

_REBUILD = {f"torch._utils {name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3")}
_OTHER_TENSORS = {
    "torch._utils _rebuild_qtensor": "quantised",
    "torch._utils _rebuild_sparse_tensor": "sparse",
    "torch._utils _rebuild_sparse_csr_tensor": "sparse",
    "torch._utils _rebuild_nested_tensor": "nested",
    "torch._utils _rebuild_meta_tensor_no_storage": "meta",
}
_HARMLESS = {
    "_codecs encode", "argparse Namespace", "builtins complex", "builtins set", "collections Counter",
    "collections OrderedDict", "torch Size", "torch device", "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_parameter_with_state", "torch.nn.parameter Parameter", "torch.serialization _get_layout",
    "__builtin__ set", "__builtin__ complex",
}  # fmt: skip
_BYTEARRAYS = {"builtins bytearray", "__builtin__ bytearray"}
_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1,
    "QUInt2x4": 1,
}  # fmt: skip
_OF_DTYPE = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "uint64": 8, "uint32": 4, "complex64": 8}


class UnreadableError(ValueError):
    """Why a file is not read, for the user."""


class _Global(str):
    """ "module name" of something that a pickle imports."""


class _Storage(int):
    """How many bytes a storage claims, with what one of its elements takes."""

    item: int


class PickleCheck:
    """Follows pickles without building anything: what they call, how often, and how much their tensors claim."""

    def __init__(self, storages: dict[str, int] | None, allowed: Collection[str] = ()) -> None:
        """`storages`: bytes of each that the file holds; None where that is not known yet. `allowed`: what may be
        called besides, each as "module name"; its sizes are taken for numbers of elements."""
        self.claimed: dict[str, int] = {}
        self._storages, self._allowed = storages, allowed
        self._steps = self._calls = self._extra = 0

    def follow(self, stream: BinaryIO) -> Any:
        """To the end of one pickle. Returns its value, as far as that is a number, a string, or a list or tuple.
        Raises UnreadableError, and anything at all where these are no pickles."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        mark = object()

        def to_mark() -> list[Any]:
            items: list[Any] = []
            while (item := stack.pop()) is not mark:
                items.append(item)
            return items[::-1]

        argument: Any
        for opcode, argument, _ in pickletools.genops(stream):
            self._steps += 1
            if self._steps > MOST_STEPS:
                raise UnreadableError(LARGE)
            match opcode.name:
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(mark)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_Global(argument))
                case "STACK_GLOBAL" | "FRAME":
                    raise UnreadableError("it has another pickle protocol than torch.save's; save it anew without one")
                case "EMPTY_LIST":
                    stack.append([])
                case "APPEND":
                    item = stack.pop()
                    stack[-1].append(item)
                case "APPENDS":
                    items = to_mark()
                    stack[-1].extend(items)
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(to_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "SETITEM":
                    stack.pop()
                    _check_keys([stack.pop()])
                case "SETITEMS":
                    _check_keys(to_mark()[::2])
                case "ADDITEMS":
                    _check_keys(to_mark())
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, arguments))
                case _:
                    for what in reversed(opcode.stack_before):
                        if what is pickletools.stackslice:
                            to_mark()
                        elif what is not pickletools.markobject:
                            stack.pop()
                    literal = None if opcode.stack_before else argument
                    stack += [literal] * len(opcode.stack_after)
        raise UnreadableError(DAMAGED)

    def _call(self, function: object, arguments: object) -> Any:
        self._calls += 1
        if self._calls > MOST_CALLS:
            raise UnreadableError(LARGE)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise UnreadableError(CODE)
        if function == "torch._tensor _rebuild_from_type_v2":
            return self._call(arguments[0], arguments[2])
        if function in _REBUILD:
            return self._tensor(*arguments[:4], *arguments[6:7] if function.endswith("_v3") else ())
        if function in _OTHER_TENSORS:
            raise UnreadableError(f"it holds {_OTHER_TENSORS[function]} tensors; save plain ones")
        if function in _BYTEARRAYS:
            if not all(isinstance(one, str) for one in arguments):  # a number is a length
                raise UnreadableError(CLAIMS)
        elif function in self._allowed:
            for one in arguments:
                sizes = one if isinstance(one, (tuple, list)) else (one,)
                self._take(math.prod(abs(size) for size in sizes if isinstance(size, int)))
        elif function not in _HARMLESS:
            raise UnreadableError(CODE)
        for one in arguments:
            if isinstance(one, (str, list, tuple)):
                self._take(len(one))
            if isinstance(one, (list, tuple)):  # of a set's elements, or of a dictionary's pairs
                _check_keys([item[0] if isinstance(item, (list, tuple)) and item else item for item in one])
                _check_keys([item for item in one if isinstance(item, tuple)])
        return arguments[0] if arguments and function in ("torch Size", "_codecs encode") else None

    def _storage(self, key: Any) -> _Storage:
        kind, storage_type, name, place, count = key[:5]
        texts = (kind, name, place, *(key[5][:1] if key[5:] and key[5] else ()))
        if kind != "storage" or not all(isinstance(one, str) for one in (*texts, storage_type)):
            raise UnreadableError(FOREIGN)
        if not isinstance(count, int) or count < 0:
            raise UnreadableError(DAMAGED)
        of = storage_type.rpartition(" ")[2].removesuffix("Storage")
        item = 1 if of == "Untyped" else _BYTES[of]
        storage = _Storage(count * item)
        storage.item = item
        if self._storages is not None and storage > self._storages.get(name, -1):
            raise UnreadableError(CLAIMS if name in self._storages else DAMAGED)
        self.claimed[name] = max(int(storage), self.claimed.get(name, 0))
        return storage

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: str = "") -> None:
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
            raise UnreadableError(DAMAGED)
        if min((offset, *size, *stride)) < 0:
            raise UnreadableError(DAMAGED)
        item = _OF_DTYPE.get(dtype.rpartition(" ")[2], 1) if dtype else storage.item
        values, held = math.prod(size), storage // item
        if values and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= held:
            raise UnreadableError(CLAIMS)
        self._take(max(values - held, 0))  # one value, expanded, may be read as many

    def _take(self, elements: int) -> None:
        self._extra += elements
        if self._extra > _ROOM:
            raise UnreadableError(CLAIMS)


def _check_keys(keys: list[object]) -> None:
    """Refuses tuples of tuples as keys: the hash of one goes through each as often as it can be reached."""
    if any(isinstance(key, tuple) and any(isinstance(item, (tuple, list)) for item in key) for key in keys):
        raise UnreadableError(LARGE)
