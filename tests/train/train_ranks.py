"""One of several processes that train the runs of a folder together, to be compared with what one does alone."""

import errno
import json
import sys
from pathlib import Path

from small import gone_on, losses, prepared, stopping_at

from deltaw.api import finetune
from deltaw.files import adapters
from deltaw.models.ranks import Ranks
from deltaw.train.events import Sampled


def main(folder):
    own, save = Ranks.joined().own, adapters.save

    def full(adapter, header, path):
        if path.name == "best.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(adapter, header, path)

    for name, values in json.loads((folder / "fresh.json").read_text()).items():
        stop, asks = stopping_at(values.pop("stop", 0) * own), values.pop("asks", False)  # only the second is asked to
        prepare = finetune.prepare if asks else prepared
        adapters.save = full if values.pop("full", False) and not own else save
        finished(
            folder / f"{name}.json",
            own,
            prepare([str(folder / "rows.jsonl")] if asks else folder / "rows.jsonl", values, stop),
        )
    for name in json.loads((folder / "begun.json").read_text()):
        finished(folder / f"{name}.json", own, gone_on(folder / "runs" / name))


def finished(file, own, made):
    """What the first saw, and how much of the model it held; all have the same adapter in the end."""
    held, events = 0, []
    for event in made.events():
        events.append(event)
        held = held or sum(p.to_local().numel() for p in made.job.model.layers.parameters())
    assert len(set(Ranks.joined().all(str(made.job.adapter.state_dict())))) == 1
    if not own:
        told = {"losses": losses(events), "reason": events[-1].reason, "held": held,
                "said": [event.answer for event in events if isinstance(event, Sampled)]}  # fmt: skip
        file.write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
