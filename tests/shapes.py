"""Make the naming rule executable: while tests run, `x_TI` has two dimensions, and equal letters are equal sizes."""

import functools
import importlib
import inspect
import pkgutil
import re

from torch import Tensor

import deltaw

SUFFIX = re.compile(r"_([A-Z1]+)$")


def checked(fn):
    names = [p for p in inspect.signature(fn).parameters if SUFFIX.search(p)]

    @functools.wraps(fn)
    def call(*args, **kwargs):
        sizes = {"1": 1}
        for name, value in inspect.signature(fn).bind(*args, **kwargs).arguments.items():
            if name in names and isinstance(value, Tensor):
                letters = SUFFIX.search(name)[1]
                assert value.ndim == len(letters), f"{fn.__qualname__}: {name} has shape {tuple(value.shape)}"
                for letter, n in zip(letters, value.shape, strict=True):
                    if sizes.setdefault(letter, n) != n:
                        raise AssertionError(f"{fn.__qualname__}: {letter} is {sizes[letter]} and {n} in {name}")
        return fn(*args, **kwargs)

    return call if names else fn


def install():
    for info in pkgutil.walk_packages(deltaw.__path__, "deltaw."):
        if info.name == "deltaw.web.replicas":  # it has no tensors, and Ray takes seconds
            continue
        module = importlib.import_module(info.name)
        for owner in [module, *(c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == info.name)]:
            for name, fn in list(vars(owner).items()):
                if inspect.isfunction(fn) and fn.__module__ == info.name:
                    setattr(owner, name, checked(fn))
