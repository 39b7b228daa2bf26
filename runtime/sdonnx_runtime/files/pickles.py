"""Read a pickle as data: nothing that it names is imported, called or changed.

The opcodes are those of CPython's ``pickletools``, which parses their arguments.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

_MAX_OPERATIONS = 1_000_000
"""Opcodes of a pickle, and elements that its calls copy; a checkpoint of a thousand tensors has 30,000."""

_MAX_KEY = 1000
"""Characters of a dictionary's key."""


class PickleError(Exception):
    """A pickle is damaged or hostile."""


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str
    """Its module and name, with a dot."""


@dataclass(eq=False, slots=True)
class Instance:
    """What a pickle makes by calling a `Global` that isn't in the table of calls."""

    name: str
    """The global's."""
    arguments: Any = ()
    items: dict[Any, Any] | None = None
    """What it stores by key, if it is a dictionary of a class of its own."""
    state: Any = None
    """What its ``__setstate__`` gets."""


Calls: TypeAlias = Mapping[str, Callable[..., Any]]
"""Functions that stand for globals, by their names; they get what a hostile file gives them."""


def read_pickle(stream: Any, calls: Calls, persistent_load: Callable[[Any], Any]) -> Any:
    """Read one pickle: dictionaries, lists (also for sets), tuples, strings, numbers, `Global` and `Instance`.

    ``stream`` has ``read`` and ``readline``, and remains behind the pickle. Keys of dictionaries are hashed by
    identity unless they are short strings or numbers: equal tuples are different keys.

    Raises:
        PickleError: it is damaged or hostile.
    """
    machine = _Machine(calls, persistent_load)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.spend(1)
            machine.run(opcode.name, argument)
        return machine.take()
    except PickleError:
        raise
    except Exception as error:  # a hostile pickle makes the parser and the calls raise anything
        raise PickleError(f"{type(error).__name__}: {error}"[:200]) from None


class _Machine:
    """The stack machine of pickles."""

    def __init__(self, calls: Calls, persistent_load: Callable[[Any], Any]) -> None:
        self._calls = calls
        self._persistent_load = persistent_load
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = _MAX_OPERATIONS

    def spend(self, operations: int) -> None:
        """Count operations.

        Raises:
            PickleError: they are too many.
        """
        self._left -= operations
        if self._left < 0:
            raise PickleError("it takes more than a million operations")

    def run(self, name: str, argument: Any) -> None:
        """Run an opcode."""
        if name in _VALUES:
            self._stack.append(_short(argument))
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        else:
            _METHODS[name](self, argument)

    def take(self) -> Any:
        """Take the topmost value."""
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise PickleError("its stack is empty")
        return self._stack.pop()

    def pop_mark(self) -> list[Any]:
        """Take the values above the last mark."""
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def do_nothing(self, _: Any) -> None:
        pass

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self.take()

    def discard(self, _: Any) -> None:
        self.pop_mark()

    def duplicate(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def put(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def make_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self.pop_mark()))

    def make_tuple1(self, _: Any) -> None:
        self._stack.append((self.take(),))

    def make_tuple2(self, _: Any) -> None:
        second, first = self.take(), self.take()
        self._stack.append((first, second))

    def make_tuple3(self, _: Any) -> None:
        third, second, first = self.take(), self.take(), self.take()
        self._stack.append((first, second, third))

    def make_list(self, _: Any) -> None:
        self._stack.append(self.pop_mark())

    def make_dict(self, _: Any) -> None:
        values = self.pop_mark()
        self._stack.append({})
        self.store(values)

    def append(self, _: Any) -> None:
        value = self.take()
        self.extend([value])

    def appends(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            cast("list[Any]", target).extend(values)
        elif not isinstance(target, Instance):
            raise PickleError(f"it appends to a {type(target).__name__}")

    def set_item(self, _: Any) -> None:
        value, key = self.take(), self.take()
        self.store([key, value])

    def set_items(self, _: Any) -> None:
        self.store(self.pop_mark())

    def store(self, values: list[Any]) -> None:
        """Store keys and values, which alternate, in the topmost dictionary."""
        target = self._stack[-1]
        if isinstance(target, Instance):
            target.items = {} if target.items is None else target.items
            target = target.items
        items = cast("dict[Any, Any]", target)
        if not isinstance(target, dict) or len(values) % 2:
            raise PickleError("it stores items where there is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            items[hashable(key)] = value

    def push_global(self, name: Any) -> None:
        self._stack.append(Global(str(name).replace(" ", ".", 1)))

    def push_named_global(self, _: Any) -> None:
        name, module = self.take(), self.take()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("a global has no name")
        self._stack.append(Global(f"{module}.{name}"))

    def push_extension(self, code: Any) -> None:
        self._stack.append(Global(f"extension {code}"))

    def call_function(self, _: Any) -> None:
        arguments, function = self.take(), self.take()
        self.call(function, arguments)

    def call_with_keywords(self, _: Any) -> None:
        _, arguments, function = self.take(), self.take(), self.take()
        self.call(function, arguments)

    def call_inst(self, name: Any) -> None:
        arguments = tuple(self.pop_mark())
        self.call(Global(str(name).replace(" ", ".", 1)), arguments)

    def call_obj(self, _: Any) -> None:
        function, *arguments = self.pop_mark()
        self.call(function, tuple(arguments))

    def call(self, function: Any, arguments: Any) -> None:
        if isinstance(function, Instance):
            result = Instance(function.name)
        elif not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise PickleError(f"it calls a {type(function).__name__}")
        elif function.name in self._calls:
            values = cast("tuple[Any, ...]", arguments)
            self.spend(sum(len(cast("Any", each)) for each in values if isinstance(each, (str, bytes, list, tuple))))
            result = self._calls[function.name](*values)
        else:
            result = Instance(function.name, arguments)
        self._stack.append(result)

    def build(self, _: Any) -> None:
        state = self.take()
        if isinstance(self._stack[-1], Instance):
            self._stack[-1].state = state

    def persistent(self, text: Any) -> None:
        self._stack.append(self._persistent_load(text))

    def persistent_from_stack(self, _: Any) -> None:
        self._stack.append(self._persistent_load(self.take()))


def _short(value: Any) -> Any:
    """Return a number or string; integers of more than 64 bytes, whose arithmetic would be slow, as an `Instance`."""
    return Instance("builtins.int") if isinstance(value, int) and value.bit_length() > 512 else value


def hashable(key: Any) -> Any:
    """Return a key that is hashed in no time: tuples can be nested a million times."""
    if isinstance(key, (str, bytes)):
        if len(key) > _MAX_KEY:
            raise PickleError(f"a key has {len(key)} characters")
        return key
    if key is None or isinstance(key, (int, float, Global, Instance)):
        return key
    return Instance(type(key).__name__)


_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
})  # fmt: skip
"""Opcodes that push their argument."""

_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "NEXT_BUFFER": lambda: None,
}  # fmt: skip
"""Opcodes that push a value of their own."""

_METHODS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.do_nothing, "FRAME": _Machine.do_nothing, "STOP": _Machine.do_nothing,
    "READONLY_BUFFER": _Machine.do_nothing,
    "MARK": _Machine.mark, "POP": _Machine.pop, "POP_MARK": _Machine.discard, "DUP": _Machine.duplicate,
    "PUT": _Machine.put, "BINPUT": _Machine.put, "LONG_BINPUT": _Machine.put, "MEMOIZE": _Machine.put,
    "GET": _Machine.get, "BINGET": _Machine.get, "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.make_tuple, "TUPLE1": _Machine.make_tuple1, "TUPLE2": _Machine.make_tuple2,
    "TUPLE3": _Machine.make_tuple3, "LIST": _Machine.make_list, "FROZENSET": _Machine.make_list,
    "APPEND": _Machine.append, "APPENDS": _Machine.appends, "ADDITEMS": _Machine.appends,
    "DICT": _Machine.make_dict, "SETITEM": _Machine.set_item, "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.push_global, "STACK_GLOBAL": _Machine.push_named_global,
    "EXT1": _Machine.push_extension, "EXT2": _Machine.push_extension, "EXT4": _Machine.push_extension,
    "INST": _Machine.call_inst, "OBJ": _Machine.call_obj, "REDUCE": _Machine.call_function,
    "NEWOBJ": _Machine.call_function, "NEWOBJ_EX": _Machine.call_with_keywords, "BUILD": _Machine.build,
    "PERSID": _Machine.persistent, "BINPERSID": _Machine.persistent_from_stack,
}  # fmt: skip
"""Methods of the other opcodes."""
