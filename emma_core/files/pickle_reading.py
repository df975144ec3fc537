"""What a pickle describes, without running it.

A pickle is a program: it names functions and has them called. Here its instructions are followed one by one, nothing that it
names is imported, and the few names that PyTorch writes beside tensors are known; every other name is refused. So a file can
neither run code nor reach a function that fills the memory.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_INSTRUCTIONS = 1_000_000  # a checkpoint of Stable Diffusion takes 60,000
_MOST_DIMENSIONS = 8
_PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_WITH_VALUE = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
               "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
               "BINBYTES8", "BYTEARRAY8"}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
# PyTorch's word for a kind of numbers -> that of safetensors files
KINDS = {"double": "F64", "float64": "F64", "float": "F32", "float32": "F32", "half": "F16", "float16": "F16",
         "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "char": "I8", "int8": "I8", "byte": "U8",
         "uint8": "U8", "short": "I16", "int16": "I16", "int": "I32", "int32": "I32", "long": "I64", "int64": "I64",
         "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complexfloat": "C64", "complex64": "C64",
         "complexdouble": "C128", "complex128": "C128"}
BYTES_OF_KIND = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2,
                 "I32": 4, "U32": 4, "I64": 8, "U64": 8, "BOOL": 1, "C64": 8, "C128": 16}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage", "torch.storage._UntypedStorage")
_TENSOR, _TYPED_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), "torch._utils._rebuild_tensor_v3"
_PARAMETER = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_DICTIONARY, _SET, _SIZE = "collections.OrderedDict", ("builtins.set", "__builtin__.set"), "torch.Size"
_SILENT = ("torch.device", "torch.serialization._get_layout", "collections.Counter", "collections.defaultdict",
           "builtins.dict", "__builtin__.dict", "builtins.list", "builtins.int", "builtins.float", "builtins.str")
_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
# whose classes stand in published checkpoints beside the weights
_TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "argparse.Namespace")
_REBUILD = "torch._utils._rebuild_"


class PickleFault(ValueError):
    """Why a pickle is not read, in words that begin with a verb."""


@dataclass(frozen=True)
class Name:
    """Something that the pickle refers to by its name."""

    dotted: str


class Leftover:
    """What a trainer left beside the weights; nobody needs it."""


@dataclass(frozen=True)
class Storage:
    """Numbers of one kind that lie in the file under a key; ``kind`` is "" where only bytes are declared."""

    key: str
    kind: str
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a storage; ``offset`` and ``strides`` count numbers."""

    storage: Storage
    kind: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle(stream: BinaryIO | bytes, most: int = MOST_INSTRUCTIONS) -> Any:
    """The value that a pickle describes; the stream stands behind it then.

    Lists, dicts, tuples, texts and numbers are themselves, tensors are `StoredTensor`, what trainers leave is `Leftover`.

    Args:
        stream: a pickle, or a stream that stands before one.
        most: instructions.
    Raises:
        PickleFault: no pickle, or one that names anything but tensors; tensors that are no plain rows of numbers.
        OSError: the stream cannot be read.
    """
    machine = _Machine()
    try:
        for count, (instruction, value, _) in enumerate(pickletools.genops(stream)):
            if count > most:
                raise PickleFault(f"holds more than {most:,} entries, which no weights need")
            machine.follow(instruction.name, value)
    except PickleFault:
        raise
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError, MemoryError) as found:
        raise PickleFault(f"is damaged ({type(found).__name__} among its instructions)") from None
    return machine.stack[-1]


class _Machine:
    """The stack of a pickle, with what stood on it before each mark, and what is remembered by number."""

    def __init__(self):
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def follow(self, name: str, value: Any) -> None:
        """One instruction."""
        if name in _WITH_VALUE:
            self.stack.append(value)
        elif name in _PLAIN:
            self.stack.append(_PLAIN[name])
        elif name in _PUT or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else value] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[value])
        elif name == "GLOBAL":
            self.stack.append(_name(value.replace(" ", ".", 1)))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME"):
            raise PickleFault(f"uses the instruction {name}, which PyTorch does not write")

    def to_mark(self) -> list[Any]:
        """What stands above the last mark, taken off with it."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def take(self, count: int) -> tuple[Any, ...]:
        """The uppermost items, taken off."""
        items = tuple(self.stack[len(self.stack) - count:])
        if len(items) < count:
            raise IndexError
        del self.stack[len(self.stack) - count:]
        return items

    def extend(self, items: Sequence[Any]) -> None:
        group = self.stack[-1]
        if isinstance(group, set):
            group.update(map(_key, items))
        elif isinstance(group, list):
            group.extend(items)
        elif not isinstance(group, Leftover):
            raise TypeError

    def enter(self, items: Sequence[Any]) -> None:
        """Keys and values in turn into the dict on top."""
        group = self.stack[-1]
        if isinstance(group, dict):
            group.update(_pairs(items))
        elif not isinstance(group, Leftover):
            raise TypeError

    def call(self) -> None:
        function, arguments = self.take(2)
        self.stack.append(_called(function, arguments))

    def build(self) -> None:
        """Attributes of an object: tensors and dicts have none that are needed."""
        self.take(1)
        if not self.stack:
            raise IndexError


def _name(dotted: str) -> Name:
    if dotted.startswith(_REBUILD) and dotted not in (*_TENSOR, _TYPED_TENSOR, *_PARAMETER):
        kind = dotted.removeprefix(_REBUILD).partition("_tensor")[0].partition("_")[0]
        raise PickleFault(f"holds a tensor that is no plain row of numbers ({kind or 'other'})")
    known = (*_TENSOR, _TYPED_TENSOR, *_PARAMETER, _SUBCLASS, _DICTIONARY, *_SET, _SIZE, *_SILENT, *_CLASSES, *_UNTYPED)
    if dotted in known or dotted.startswith(_TRAINERS) or _storage_kind(dotted) or _number_kind(dotted):
        return Name(dotted)
    raise PickleFault(f"names {dotted[:100]}, which is no part of weights and could run code")


def _storage_kind(dotted: str) -> str:
    """The kind of numbers of "torch.HalfStorage", or ""."""
    if not (dotted.startswith("torch.") and dotted.endswith("Storage")):
        return ""
    return KINDS.get(dotted.removeprefix("torch.").removesuffix("Storage").removeprefix("cuda.").lower(), "")


def _number_kind(dotted: str) -> str:
    """The kind of "torch.float16", or ""."""
    return KINDS.get(dotted.removeprefix("torch."), "") if dotted.startswith("torch.") else ""


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(arguments, tuple):
        raise TypeError
    if isinstance(function, Leftover):
        return Leftover()
    dotted = function.dotted
    if dotted in _TENSOR or dotted == _TYPED_TENSOR:
        storage, offset, shape, strides, *rest = arguments
        kind = _number_kind(rest[2].dotted) if dotted == _TYPED_TENSOR else storage.kind
        return _tensor(storage, kind, offset, shape, strides)
    if dotted in _PARAMETER:
        return _tensor_in(arguments[0])
    if dotted == _SUBCLASS:
        rebuild, kind, inner, _ = arguments
        if kind.dotted not in _CLASSES:
            raise TypeError
        return _tensor_in(_called(rebuild, inner))
    if dotted == _DICTIONARY:
        return dict(_pairs([part for pair in arguments[0] for part in _pair(pair)])) if arguments else {}
    if dotted in _SET:
        return set(map(_key, arguments[0])) if arguments else set()
    if dotted == _SIZE:
        return tuple(arguments[0])
    return Leftover()


def _tensor_in(found: Any) -> StoredTensor:
    if not isinstance(found, StoredTensor):
        raise TypeError
    return found


def _tensor(storage: Any, kind: str, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """A checked tensor: every number of it lies in its storage, and none is counted more than once."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not kind or any(type(number) is not int or number < 0 for number in numbers):
        raise TypeError
    if len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise PickleFault(f"holds a tensor of {len(shape)} dimensions and {len(strides)} strides")
    count = 1
    for side in shape:
        count *= side
    held = storage.count * BYTES_OF_KIND[storage.kind or "U8"] // BYTES_OF_KIND[kind]
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if count and (last >= held or count > held):
        raise PickleFault(f"holds a tensor of shape {tuple(shape)[:8]}, more than the {held:,} numbers that are there for it")
    return StoredTensor(storage, kind, offset, tuple(shape), tuple(strides))


def _storage(identity: Any) -> Storage:
    """Of ("storage", its class, key, device, count), as PyTorch writes it; an old file adds None for a view."""
    word, kind, key, _, count, *views = identity
    if word != "storage" or not isinstance(key, str) or type(count) is not int or count < 0 or any(views):
        raise TypeError
    numbers = "" if kind.dotted in _UNTYPED else _storage_kind(kind.dotted)
    if not numbers and kind.dotted not in _UNTYPED:
        raise TypeError
    return Storage(key, numbers, count)


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise TypeError
    return [(_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True)]


def _pair(found: Any) -> Sequence[Any]:
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise TypeError
    return found


def _key(found: Any) -> Any:
    """What may be a key: it is hashed without looking far inside."""
    parts = found if isinstance(found, tuple) else (found,)
    if not all(isinstance(part, str | int | float | bytes | Name | Leftover | None) for part in parts):
        raise TypeError
    return found


def _two_names(machine: _Machine) -> None:
    module, name = machine.take(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    machine.stack.append(_name(f"{module}.{name}"))


def _identity(machine: _Machine) -> None:
    machine.stack.append(_storage(*machine.take(1)))


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        made = make(machine)  # which may put another stack in place
        machine.stack.append(made)

    return step


_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "MARK": _Machine.mark, "STOP": lambda machine: machine.stack[-1], "POP": lambda machine: machine.take(1),
    "POP_MARK": _Machine.to_mark, "DUP": _push(lambda machine: machine.stack[-1]),
    "EMPTY_DICT": _push(lambda machine: {}), "EMPTY_LIST": _push(lambda machine: []),
    "EMPTY_TUPLE": _push(lambda machine: ()), "EMPTY_SET": _push(lambda machine: set()),
    "TUPLE": _push(lambda machine: tuple(machine.to_mark())), "TUPLE1": _push(lambda machine: machine.take(1)),
    "TUPLE2": _push(lambda machine: machine.take(2)), "TUPLE3": _push(lambda machine: machine.take(3)),
    "LIST": _push(lambda machine: machine.to_mark()), "DICT": _push(lambda machine: dict(_pairs(machine.to_mark()))),
    "FROZENSET": _push(lambda machine: frozenset(map(_key, machine.to_mark()))),
    "APPEND": lambda machine: machine.extend(machine.take(1)), "APPENDS": lambda machine: machine.extend(machine.to_mark()),
    "ADDITEMS": lambda machine: machine.extend(machine.to_mark()),
    "SETITEM": lambda machine: machine.enter(machine.take(2)), "SETITEMS": lambda machine: machine.enter(machine.to_mark()),
    "STACK_GLOBAL": _two_names, "BINPERSID": _identity, "BUILD": _Machine.build, "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
}
