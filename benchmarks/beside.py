"""What benchmarks of speed share: a side is measured in a process of its own, rows are kept as JSON, and drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
DATA = Path(os.environ.get("DELTAW_DATA", HERE.parent / ".." / "shared" / "data")).resolve()


def python_of(side):
    """What runs a side: ours, or the peers' environment."""
    if side.startswith("deltaw"):
        return sys.executable
    if not PEERS.exists():
        sys.exit("The peers are not installed: make bench-peers")
    return PEERS


def alone(file, side, *told):
    """What `file --one SIDE ...` says in its last line, in a process of its own."""
    command = [str(python_of(side)), str(file), "--one", side, *map(str, told)]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "DELTAW_DATA": str(DATA)}
    said = subprocess.run(command, env=quiet, check=True, text=True, stdout=subprocess.PIPE).stdout
    return json.loads(said.splitlines()[-1])


def peak_bytes():
    """The most memory that this process held; getrusage would tell that of the process that began it, if it is more."""
    told = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in told if line.startswith("VmHWM"))


def type_here():
    """What is computed with: bfloat16 where the processor multiplies it, else float32."""
    from deltaw.models.device import choose_device, choose_dtype

    return str(choose_dtype("auto", choose_device("cpu"))).removeprefix("torch.")


def base():
    """Where the default model lies."""
    from deltaw.models import source

    return source.find("smollm2-135m")


def keep(name, rows, folder):
    """Write rows as JSON and, where the peers' matplotlib is, draw them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if PEERS.exists():
        subprocess.run([str(PEERS), str(HERE / "draw.py"), name, str(folder)], check=True)
