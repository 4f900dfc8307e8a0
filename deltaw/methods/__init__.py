"""The techniques there are: one file each. The folder is the registry; the file's name is the technique's name."""

import importlib
import pkgutil
from typing import Any

from deltaw.adapters.adapter import Method
from deltaw.errors import UserError, nearest
from deltaw.settings import build


def names() -> list[str]:
    """The names of all methods."""
    return [m.name for m in pkgutil.iter_modules(__path__)]


def find(name: str) -> type[Method]:
    """Return the settings class of the method `name`: the one `Method` that `methods/name.py` defines.

    Raises:
        UserError: there is no such method.
    """
    file = name.replace("-", "_")
    if file not in names():
        raise UserError(f"There is no method '{name}'.", remedy=nearest(name, names()))
    module = importlib.import_module(f"{__name__}.{file}")
    (cls,) = [c for c in vars(module).values()
              if isinstance(c, type) and issubclass(c, Method) and c.__module__ == module.__name__]  # fmt: skip
    return cls


def method(name: str, where: str = "", **settings: Any) -> Method:
    """Make the method `name` with these settings.

    Raises:
        UserError: no such method, an unknown setting, or a value that does not fit.
    """
    return build(find(name), settings, where)


def name_of(method: Method) -> str:
    """The name under which a method is found."""
    return type(method).__module__.rsplit(".", 1)[-1]
