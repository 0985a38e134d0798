"""What code of the user's own does, told by what is loaded: a file may have been edited since, a notebook has none."""

import functools
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import CellType, CodeType, FunctionType, MethodType

from torch import nn

# What functions hide in, and as what.
WRAPPERS: dict[type, tuple[str, ...]] = {
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget",),
    functools.cached_property: ("func",),
    functools.partial: ("func", "args", "keywords"),
    MethodType: ("__func__", "__self__"),
    functools._lru_cache_wrapper: ("__wrapped__",),
}


def package(thing: object) -> str:
    """The top-level package that a class or function is of."""
    return str(getattr(thing, "__module__", "")).partition(".")[0]


def loaded_code(thing: object, packages: Collection[str], seen: set[int] | None = None) -> Iterator[str]:
    """What decides what a thing does, the same in all processes: its plain values, and of classes and functions of
    `packages` their code and all of these, and plain values, that the code names. Of anything else, nothing.
    """
    seen, parts = set() if seen is None else seen, list[object]()
    if isinstance(thing, bool | int | float | complex | str | bytes | None):
        yield repr(thing)
    elif isinstance(thing, tuple | list):
        yield str(len(thing))
        parts = list(thing)
    elif isinstance(thing, set | frozenset):
        yield from sorted(" ".join(loaded_code(one, packages, set(seen))) for one in thing)
    elif isinstance(thing, dict):
        for key, value in thing.items():
            # What is None may be filled when it is first used.
            if value is not None and (told := list(loaded_code(value, packages, seen))):
                yield from [*loaded_code(key, packages, seen), *told]
    elif isinstance(thing, CellType):
        with suppress(ValueError):  # an empty one
            parts = [thing.cell_contents]
    elif isinstance(thing, CodeType):
        parts = [thing.co_code, thing.co_names, thing.co_consts]
    elif hidden := WRAPPERS.get(type(thing)):
        parts = [getattr(thing, name) for name in hidden]
    elif package(thing) in packages and id(thing) not in seen:
        seen.add(id(thing))
        if isinstance(thing, FunctionType):
            named = sorted(_names(thing.__code__) & thing.__globals__.keys())
            parts = [thing.__code__, thing.__defaults__, thing.__kwdefaults__, thing.__closure__]
            parts.append({name: thing.__globals__[name] for name in named})
        elif isinstance(thing, type):
            methods = {k: v for k, v in vars(thing).items() if callable(v) or not k.startswith("__")}
            parts = [thing.__qualname__, thing.__bases__, methods]
        else:  # attributes of layers are of the architecture
            parts = [type(thing), {} if isinstance(thing, nn.Module) else getattr(thing, "__dict__", {})]
    for part in parts:
        yield from loaded_code(part, packages, seen)


def _names(code: CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(value) for value in code.co_consts if isinstance(value, CodeType)))
