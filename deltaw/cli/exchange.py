"""`deltaw export` and `deltaw import`: to other tools, and from them."""

from dataclasses import asdict
from pathlib import Path

from deltaw.api import exchange as api
from deltaw.api.merge import home, known_rows
from deltaw.api.persona import load, load_base, locate
from deltaw.cli.show import Flat, busy, differences, facts, notice
from deltaw.files.runs import Run
from deltaw.settings import Machine, plain
from deltaw.words import size

NAMES = {"peft": "peft", "vllm": "vllm", "ollama": "ollama", "gguf": "{name}.gguf", "gguf-lora": "{name}-lora.gguf"}


def export(run: str | None = None, /, *, to: api.Target, out: Path | None = None, packing: api.Packing | None = None,
           base: str | None = None, runs: Path = Path("runs"), machine: Flat[Machine] = None,
           json: bool = False) -> None:  # fmt: skip
    """Write a persona for other tools, read it back, and compare both on the run's own data.

    Parameters
    ----------
    run
        A run's name or folder, or an adapter file. By default: the newest run.
    to
        peft: a folder for PEFT. vllm: the same with one rank and scale. gguf: one merged file for llama.cpp.
        ollama: the same in a folder with a Modelfile. gguf-lora: the adapter alone, for llama.cpp.
    out
        Folder or file to write. By default: in the run's folder.
    packing
        How a merged GGUF file stores matrices. By default: F16.
    base
        The base model, if it is not where the adapter was trained on it.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    name, path = locate(run, runs)
    folder = home(path)
    with busy(json) as say:
        persona = load(str(path), runs, base, **plain(machine or Machine()), say=say)
        say(f"Exporting {name}")
        card = folder / "MODEL_CARD.md"
        examples = known_rows(folder)
        done = api.export(persona, to, out or folder / NAMES[to].format(name=name), packing, examples,
                        card.read_text(encoding="utf-8") if card.exists() else None)  # fmt: skip
    for text in done.notices:
        notice(text)
    rows = {"written": f"{done.path} ({size(done.size_bytes)})"}
    if done.difference is not None:
        rows |= differences(done.difference, "exported", bool(examples))
    if persona.system:
        rows["system prompt"] = f"{persona.system} (give it to whatever runs it)"
    facts(f"Exported {name}", rows, json, asdict(done))


def bring(folder: Path, /, *, base: str, base_format: str = "", name: str | None = None, runs: Path = Path("runs"),
          machine: Flat[Machine] = None, json: bool = False) -> None:  # fmt: skip
    """Take in a LoRA that PEFT or mlx-lm wrote: it becomes a run, to chat with, measure, merge and export.

    Parameters
    ----------
    folder
        The folder with adapter_config.json.
    base
        The base model that it was trained on.
    base_format
        How its matrices were packed meanwhile, such as nf4-dq. By default: not at all.
    name
        The new run's name. By default: the folder's.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    with busy(json) as say:
        loaded = load_base(base, **plain(machine or Machine()), say=say, base_format=base_format)
        path = api.bring(folder, loaded, name or folder.resolve().name, runs)
    rows = {"written": str(path), "talk to it": Run(path.parent.parent).command("chat")}
    facts(f"Imported {folder}", rows, json, {"adapter": str(path)})
