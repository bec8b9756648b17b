"""A patch: changes of one module of a running OneTrainer, which can be taken back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

NAME = "WAN_2_2"
TITLE = "Wan 2.2"

Former: TypeAlias = Callable[..., Any]
"""The function of OneTrainer that a patch replaces."""

_ABSENT = object()


class Patch:
    """Changes of one module. Most patches replace one function, `target`, by `replacement`, which
    gets the former function before the function's own arguments; others override `apply`.

    OneTrainer's modules are imported only when a patch is used.
    """

    module: ClassVar[str]
    target: ClassVar[str] = ""
    """``Class.function`` in the module."""
    uses: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Everything else that the patch changes or reads, by module."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @classmethod
    def names(cls) -> dict[str, tuple[str, ...]]:
        """All that must be there, by module."""
        target = (cls.target,) if cls.target else ()
        return {**cls.uses, cls.module: (*target, *cls.uses.get(cls.module, ()))}

    def missing(self) -> list[str]:
        """The names that this OneTrainer does not have."""
        return [name for module, names in self.names().items() for name in _missing(module, names)]

    def apply(self) -> None:
        owner, _, name = self.target.partition(".")
        self._wrap(getattr(self._module, owner), name, self.replacement)

    def replacement(self, former: Former, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def roll_back(self) -> None:
        """Restore everything as it was before `apply`, in reverse order."""
        while self._undo:
            self._undo.pop()()

    @property
    def _module(self) -> Any:
        return importlib.import_module(self.module)

    def _wrap(self, owner: Any, name: str, method: Callable[..., Any]) -> None:
        """Replace a function of a class or module by `method`, which gets the former function
        before the function's own arguments."""
        # Shows, unlike `getattr`, whether it is a static method, which the wrapper must stay.
        raw = inspect.getattr_static(owner, name)
        former = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return method(former, *args, **kwargs)

        wrapper.__wrapped__ = former  # pyright: ignore[reportFunctionMemberAccess]
        self._set(owner, name, staticmethod(wrapper) if isinstance(raw, staticmethod) else wrapper)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        # EnumMeta refuses new attributes of its classes; type's own method does not.
        is_class = isinstance(owner, type)
        put = type.__setattr__ if is_class else setattr
        former = vars(owner).get(name, _ABSENT)
        put(owner, name, value)
        if former is _ABSENT:
            drop = type.__delattr__ if is_class else delattr
            self._undo.append(lambda: drop(owner, name))
        else:
            self._undo.append(lambda: put(owner, name, former))

    def _set_item(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        table[key] = value
        self._undo.append(lambda: table.pop(key, None))


def is_wan(model_type: Any) -> bool:
    """Whether a member of OneTrainer's `ModelType` is the one that the add-on adds."""
    return model_type is not None and model_type.name == NAME


def model_types() -> Mapping[str, Any]:
    """The members of `ModelType`."""
    return importlib.import_module("modules.util.enum.ModelType").ModelType.__members__


def wan_member() -> Any:
    """`ModelType.WAN_2_2`; None before it is added."""
    return model_types().get(NAME)


def _missing(module: str, names: Iterable[str]) -> list[str]:
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        return [f"{module} ({error})"]
    return [name for name in names if not _has(imported, name)]


def _has(owner: Any, dotted: str) -> bool:
    for name in dotted.split("."):
        owner = getattr(owner, name, _ABSENT)
    return owner is not _ABSENT
