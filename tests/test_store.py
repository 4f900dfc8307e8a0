"""Encoded rows come back as they were written, from memory and from the disk, and a full disk is said."""

import errno
import gc
import hashlib

import pytest
from hypothesis import given, settings, strategies as st
from small import stored

from deltaw.data.encode import Encoded
from deltaw.data.store import Rows
from deltaw.errors import WillNotFit

ids = st.integers(0, 2**31 - 1)
row = st.lists(st.tuples(ids, st.booleans()), min_size=1, max_size=9).map(
    lambda pairs: Encoded(*zip(*pairs, strict=True))
)


@settings(deadline=None)
@given(rows=st.lists(row, min_size=1, max_size=9), in_memory=st.sampled_from([1, 30, 10**6]))
def test_rows_come_back_as_they_were_written(rows, in_memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    kept = Rows(folder, in_memory)
    for each in rows:
        kept.append(each)
    assert [kept[i] for i in reversed(range(len(rows)))] == rows[::-1]
    assert list(kept) == rows
    assert (len(kept), kept.tokens) == (len(rows), sum(len(r.ids) for r in rows))
    assert kept.targets == sum(r.targets for r in rows)
    assert len(kept[kept.longest()].ids) == max(len(r.ids) for r in rows)
    assert list(folder.iterdir()) == []  # the file has no name
    with pytest.raises(IndexError):
        kept[len(rows)]


def test_the_file_takes_four_bytes_a_token():
    kept = stored([Encoded((1, 2, 3), (False, True, True))] * 50)
    assert kept._file.seek(0, 2) == 4 * kept.tokens == 600


def fingerprint(*rows):
    return stored(Encoded(ids, marks) for ids, marks in rows).fingerprint


def test_the_fingerprint_tells_ids_marks_and_where_rows_end():
    plain = fingerprint(((1, 2), (False, True)), ((3,), (True,)))
    assert plain == fingerprint(((1, 2), (False, True)), ((3,), (True,)))
    others = [
        fingerprint(((1, 2), (False, True)), ((4,), (True,))),
        fingerprint(((1, 2), (True, True)), ((3,), (True,))),
        fingerprint(((1,), (False,)), ((2, 3), (True, True))),
    ]
    assert len({plain, *others}) == 4
    assert len(plain) == hashlib.sha256().digest_size * 2


def test_a_full_disk_is_said_with_what_was_written(tmp_path, monkeypatch):
    kept = Rows(tmp_path)
    kept.append(Encoded((1,), (True,)))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kept._file, "write", full)
    with pytest.raises(WillNotFit, match="The disk is full") as e:
        kept.append(Encoded((1,), (True,)))
    assert e.value.where == str(tmp_path)
    monkeypatch.setattr(kept._file, "write", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        kept.append(Encoded((1,), (True,)))


def test_what_cannot_go_onto_a_full_disk_at_the_end_is_no_traceback(tmp_path):
    kept = Rows(tmp_path)

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    really, kept._file.close = kept._file.close, full
    del kept  # an error in a finalizer would fail this test
    gc.collect()
    really()
