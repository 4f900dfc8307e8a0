"""The record of a run: what is written comes back, a full disk or a torn line costs no more than itself."""

from __future__ import annotations

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deltaw.train.events import Evaluated, Finished, Planned, Sampled, Started, Stepped, Warned, is_event
from deltaw.train.record import EventFile, TensorBoard, fold, read


def started(**changes: Any) -> Started:
    return replace(
        Started(run="toy", base="tiny", method="lora", trained_parameters=4_884_480, base_parameters=134_515_008,
                rows=950, val_rows=50, tokens=183_412, trained_tokens=92_117, batch_rows=8, dtype="bfloat16",
                device="cpu", threads=2, learning_rate=2e-4), **changes)  # fmt: skip


def planned(**changes: Any) -> Planned:
    return replace(
        Planned(seconds=5.0, steps=180, train_seconds=160.0, low_seconds=140.0, high_seconds=185.0,
                peak_bytes=1_900_000_000, available_bytes=23_400_000_000, recompute=False), **changes)  # fmt: skip


def stepped(step: int, **changes: Any) -> Stepped:
    return replace(
        Stepped(seconds=10.0 + step, step=step, steps=20, epoch=step / 10, loss=2.0 - step / 20, learning_rate=1e-4,
                gradient_norm=0.5, tokens=1500, trained_tokens=700, tokens_per_second=1750.0,
                memory_bytes=1_800_000_000), **changes)  # fmt: skip


class Full:
    """A file on a disk that takes `room` more bytes and then is full, or fails in another way."""

    def __init__(self, file: Any, room: int = 0, fault: int = errno.ENOSPC) -> None:
        self.file, self.room, self.fault = file, room, fault

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(self.fault, "simulated")
        written, self.room = self.file.write(data[: self.room]), 0
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_events_come_back_as_they_were(tmp_path: Path) -> None:
    events = [
        started(notices=("3 rows were cut.",)),
        stepped(1),
        Sampled(step=1, question="Wie?", answer="So:\n„gut“ \u2028"),
    ]
    file = EventFile(tmp_path / "events.jsonl")
    for event in events:
        file(event)
    # Not closed: each line is on the disk when the call returns.
    records = read(tmp_path / "events.jsonl")
    file.close()
    assert records == json.loads(json.dumps([event.record() for event in events]))
    assert [r["event"] for r in records] == ["started", "stepped", "sampled"]
    assert records.count(None) == 0


def test_numbers_json_does_not_have_become_null(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.jsonl")
    file(stepped(1, loss=math.nan, gradient_norm=math.inf))
    file.close()
    line = (tmp_path / "events.jsonl").read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    record = json.loads(line)
    assert record["loss"] is None
    assert record["gradient_norm"] is None
    assert record["learning_rate"] == 1e-4


def test_an_answer_with_half_a_character_is_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.jsonl")
    file(Sampled(step=0, question="?", answer="a\udc80b"))
    file.close()
    assert read(tmp_path / "events.jsonl")[0]["answer"] == "a\udc80b"


@pytest.mark.parametrize("room", [0, 7])
def test_a_full_disk_costs_its_lines_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    file = EventFile(tmp_path / "events.jsonl")
    file(stepped(1))
    with monkeypatch.context() as patch:
        patch.setattr(file, "_file", Full(file._file, room))
        file(stepped(2))
        file(stepped(3))
    file(stepped(4))
    file.close()
    records = read(tmp_path / "events.jsonl")
    assert [r["step"] for r in records if r] == [1, 4]
    assert file.lost == 2
    assert records.count(None) == 0


def test_a_device_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path("/dev/full")  # Linux has one; elsewhere its error is simulated
    file = EventFile(real if real.exists() else tmp_path / "events.jsonl")
    if not real.exists():
        monkeypatch.setattr(file, "_file", Full(file._file, fault=errno.ENOSPC))
    file(stepped(1))
    file(stepped(2))
    file.close()
    assert file.lost == 2


def test_other_errors_of_the_disk_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, board = EventFile(tmp_path / "events.jsonl"), TensorBoard(tmp_path / "events.jsonl" / "tb")
    monkeypatch.setattr(file, "_file", Full(file._file, fault=errno.EIO))
    with pytest.raises(OSError, match="simulated"):
        file(stepped(1))
    with pytest.raises(NotADirectoryError):
        board(stepped(1))
    file.close()


def test_a_torn_last_line_is_counted_and_spoils_no_later_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = json.dumps(stepped(1).record())
    path.write_text(whole + "\n" + whole[:30])
    records = read(path)
    assert [r["step"] for r in records if r] == [1]
    assert records.count(None) == 1

    file = EventFile(path)
    file(stepped(2))
    file.close()
    records = read(path)
    assert [r["step"] for r in records if r] == [1, 2]
    assert records.count(None) == 1


def test_what_is_no_event_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'7\n\n{"step": 1}\n\xff\xfe\n')
    records = read(path)
    assert records == [None] * 3


def test_a_resumption_replaces_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "events.jsonl")
    first = [started(), *(stepped(i) for i in range(1, 9)), Evaluated(step=4, loss=1.5, best=True),
             Evaluated(step=8, loss=0.1, best=True), Sampled(step=8, question="?", answer="old"),
             Finished(seconds=20.0, reason="interrupted", step=8)]  # fmt: skip
    second = [started(resumed_at=5), Warned(text="slow"), *(stepped(i, loss=9.0, seconds=i - 5.0) for i in (6, 7))]
    for event in [*first, *second]:
        file(event)
    file.close()
    run = fold(read(tmp_path / "events.jsonl"))
    assert [x for x, _ in run.curve("loss")] == [1, 2, 3, 4, 5, 6, 7]
    assert [y for _, y in run.curve("loss")][5:] == [9.0, 9.0]
    assert list(run.evaluations) == [4]
    assert run.best() == run.evaluations[4]
    assert run.questions() == {}
    assert run.finished == {}, "the interruption is over"
    assert list(run.warnings) == ["slow"]
    assert run.seconds == pytest.approx(20.0 + 2.0), "both processes' time, counted from their own beginnings"


def test_the_answers_of_several_questions_keep_apart() -> None:
    run = fold(read_back(Sampled(step=9, question="a", answer="2"), Sampled(step=0, question="a", answer="1"),
                         Sampled(step=0, question="b", answer="3")))  # fmt: skip
    assert {q: [s["answer"] for s in answers] for q, answers in run.questions().items()} == {
        "a": ["1", "2"],
        "b": ["3"],
    }


def read_back(*events: Any) -> Any:
    return [event.record() for event in events]


def board(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_holds_the_curves_and_the_answers(tmp_path: Path) -> None:
    listener = TensorBoard(tmp_path / "tb")
    listener(started())
    assert not (tmp_path / "tb").exists(), "nothing is made, nor torch's writer imported, before there is a number"
    listener(stepped(1))
    listener(stepped(2, loss=math.nan))
    listener(Evaluated(step=2, loss=1.25, best=True))
    listener(Sampled(step=2, question="Why?", answer="<b>Because</b>"))
    listener.close()
    read_in = board(tmp_path / "tb")
    curves = {f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second")}
    assert set(read_in.Tags()["scalars"]) == {*curves, "memory/bytes", "val/loss"}
    assert [e.step for e in read_in.Scalars("train/loss")] == [1, 2]
    assert read_in.Scalars("train/loss")[0].value == pytest.approx(1.95)
    assert read_in.Scalars("memory/bytes")[0].value == pytest.approx(1.8e9)
    assert read_in.Scalars("val/loss")[0].value == 1.25
    text = read_in.Tensors("sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    Why?" in text
    assert "    <b>Because</b>" in text
    assert listener.lost == 0


def test_tensorboard_forgets_the_steps_that_are_trained_again(tmp_path: Path) -> None:
    for resumed_at, steps in ((0, range(1, 9)), (5, range(6, 8))):
        listener = TensorBoard(tmp_path / "tb")
        listener(started(resumed_at=resumed_at))
        for step in steps:
            listener(stepped(step))
        listener.close()
    assert [e.step for e in board(tmp_path / "tb").Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_without_room_counts_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = TensorBoard(tmp_path / "tb")
    listener(stepped(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(listener._writer, "add_scalar", full)
        listener(stepped(2))
    listener(stepped(3))
    listener.close()
    assert listener.lost == 1
    assert [e.step for e in board(tmp_path / "tb").Scalars("train/loss")] == [1, 3]


def test_tensorboard_unused_leaves_nothing(tmp_path: Path) -> None:
    TensorBoard(tmp_path / "tb").close()
    assert not (tmp_path / "tb").exists()


def test_an_event_of_an_earlier_version_is_one_and_one_that_lacks_more_is_none() -> None:
    whole = json.loads(json.dumps(started().record()))
    assert is_event(whole)
    later = {"packed", "base_form", "kernels"}
    assert is_event({key: value for key, value in whole.items() if key not in later})
    for lacking in whole.keys() - {*later, "event"}:
        assert not is_event({key: value for key, value in whole.items() if key != lacking})
    assert not is_event({**whole, "packed": [1]})
