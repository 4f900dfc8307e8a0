"""Files that are there whole or not at all: written beside, flushed to the disk, renamed. And when the disk is full."""

import errno
import glob
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaw.errors import UserError

PARTIAL, STALE_SECONDS = ".deltaw-partial-", 86_400


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; what was written takes the place of `path` only if the block ends without an error."""
    with _leading_to(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        scratch = Path(name)
        try:
            yield scratch
            scratch.chmod(0o644)
            _flush(scratch)
            scratch.replace(path)
            _flush(path.parent)
        finally:
            scratch.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a folder to fill; it becomes `path`, which is empty or not there, if the block ends without an error."""
    home = path if path.exists() else path.parent  # what is there may be a mounted disk, and is not replaced
    for litter in home.glob(f".{glob.escape(path.name)}{PARTIAL}*"):
        with suppress(FileNotFoundError):
            if time.time() - litter.stat().st_mtime > STALE_SECONDS:  # of a process that was killed
                shutil.rmtree(litter, ignore_errors=True)
    prefix = f".{path.name}{PARTIAL}"
    with _leading_to(path), tempfile.TemporaryDirectory("", prefix, home, ignore_cleanup_errors=True) as name:
        scratch = Path(name)
        yield scratch
        scratch.chmod(0o755)
        for file in scratch.rglob("*"):
            _flush(file)
        for whole in list(scratch.iterdir()) if home == path else [scratch]:
            whole.replace(path / whole.name if home == path else path)
        _flush(home)


@contextmanager
def _leading_to(path: Path) -> Iterator[None]:
    """Make the folders above a path; those that were made go again if nothing is written.

    Errors name the path that was asked for, and not the one written beside it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as e:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        if not isinstance(e, OSError) and (number := _refused(e)):
            raise OSError(number, os.strerror(number), str(path)) from e
        said = Path(os.fsdecode(getattr(e, "filename", None) or "")).parts
        if isinstance(e, OSError) and any(part.startswith(f".{path.name}") for part in said):
            e.filename = str(path)
        raise


def refuse(path: Path, flag: str = "--out") -> None:
    """Stop where something is there already, be it a link to nothing.

    Raises:
        UserError: it is; then `flag` gives another.
    """
    if os.path.lexists(path):
        raise UserError("It is there already.", where=str(path), remedy=f"Take another {flag}.")


def sweep(folder: Path) -> None:
    """Remove what a process that was killed in the middle of a write left beside."""
    for litter in folder.glob(".*.safetensors-*"):
        litter.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def disk_is_full(error: Exception) -> bool:
    """Whether this is why a file could not be written: no room, or none for a file of this size."""
    return (getattr(error, "errno", None) or _refused(error)) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _refused(error: BaseException) -> int:
    """What the system said to safetensors, which has an error of its own and tells it only in words; 0: nothing."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    return int(said[1]) if said else 0


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder as a file, and keeps renames in its journal
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
