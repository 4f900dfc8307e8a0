"""Encoded rows in four bytes a token: in memory while they are few, and in an unnamed file beyond.

The file is gone with the process, however that ends. What grows with the data is eight bytes a row.
"""

import errno
import hashlib
import tempfile
import weakref
from array import array
from contextlib import suppress
from pathlib import Path

import numpy as np

from deltaw.data.encode import Encoded
from deltaw.errors import WillNotFit

IN_MEMORY = 64 << 20
"""Bytes of rows that are kept in memory."""
LEARNT = 1 << 31
"""Added to the id of a token that is learnt."""


class Rows:
    """Rows that were written one after another, and are read by their number, without their places."""

    def __init__(self, folder: Path | None = None, in_memory: int = IN_MEMORY) -> None:
        """`folder`: where the file lies, if there is one."""
        where = None if folder is None else str(folder)
        self._file = tempfile.SpooledTemporaryFile(max_size=in_memory, dir=where)  # noqa: SIM115 (lives as long)
        weakref.finalize(self, _close, self._file)
        self._folder, self._ends, self._sha = folder, array("Q", [0]), hashlib.sha256()
        self.targets = 0

    def append(self, row: Encoded) -> None:
        """Write one more row; none was read yet.

        Raises:
            WillNotFit: the disk is full.
        """
        words = np.array(row.ids, np.uint32) | np.where(row.trained, np.uint32(LEARNT), np.uint32(0))
        try:
            self._file.write(words.tobytes())
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            written = f"{4 * self.tokens / 1e9:.1f} GB"
            raise WillNotFit(f"The disk is full: {written} of encoded rows were written.", where=str(self._folder),
                             remedy="Free some, or take --runs on another disk.") from None  # fmt: skip
        self._ends.append(self.tokens + len(words))
        self._sha.update(words.tobytes() + b"/")
        self.targets += row.targets

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return self._ends[-1]

    @property
    def mean_tokens(self) -> float:
        """Of a row."""
        return self.tokens / len(self)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all ids and marks."""
        return self._sha.hexdigest()

    def longest(self) -> int:
        """The number of the row with the most tokens."""
        return int(np.diff(np.frombuffer(self._ends, np.uint64)).argmax())

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> Encoded:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, stop = self._ends[i], self._ends[i + 1]
        self._file.seek(4 * start)
        words = np.frombuffer(self._file.read(4 * (stop - start)), np.uint32)
        return Encoded(tuple((words & (LEARNT - 1)).tolist()), tuple((words >= LEARNT).tolist()))


def _close(file: tempfile.SpooledTemporaryFile[bytes]) -> None:
    with suppress(OSError):  # what did not go onto a full disk is tried once more, and is of no use
        file.close()
