"""`deltaw export` and `import`, `merge` and `quantize`: to other tools and from them, and plain models, checked."""

from dataclasses import asdict
from pathlib import Path

from deltaw.api import exchange as api
from deltaw.api import merge as plain_models
from deltaw.api.merge import home, known_rows
from deltaw.api.persona import load, load_base, locate
from deltaw.cli.show import Flat, busy, differences, facts, notice
from deltaw.data.files import read
from deltaw.files.runs import Run
from deltaw.models.checkpoint import form_of
from deltaw.settings import Machine, plain
from deltaw.words import size

NAMES = {"peft": "peft", "vllm": "vllm", "ollama": "ollama", "gguf": "{name}.gguf", "gguf-lora": "{name}-lora.gguf"}
QUANTISED = ("quantised", "quantized")


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


def merge(run: str | None = None, /, *, out: Path | None = None, into: str = "base", check: Path | None = None,
          base: str | None = None, runs: Path = Path("runs"), machine: Flat[Machine] = None,
          json: bool = False) -> None:  # fmt: skip
    """Write base and adapter as one plain model that transformers loads, and check it against the adapter.

    Parameters
    ----------
    run
        A run's name or folder, or an adapter file. By default: the newest run.
    out
        Folder (of a quantised model: file) to write. By default: `merged` in the run's folder.
    into
        base: the weights it was trained on, as plain numbers. quantised: the same in the base's own packing again: a
        GGUF file, or of a packed base a folder, to which QA-LoRA merges exactly. Or another model of the same shape,
        such as the original of a quantised base.
    check
        Rows on which both are compared. By default: the run's own data.
    base
        The base model, if it is not where the adapter was trained on it.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    name, path = locate(run, runs)
    folder = home(path)
    how = plain(machine or Machine())
    with busy(json) as say:
        persona = load(str(path), runs, base, **how, say=say)
        other = None if into in ("base", *QUANTISED) else load_base(into, **how, say=say)
        say(f"Merging {name}")
        examples = read(check) if check else known_rows(folder)
        again = "merged-packed" if form_of(persona.base.model) else "merged.gguf"
        done = (api.requantised(persona, out or folder / again, examples) if into in QUANTISED else
                plain_models.merge(persona, out or folder / "merged", examples, other))  # fmt: skip
    rows = {"written": f"{done.folder} ({size(done.size_bytes)}, {done.dtype})"}
    if into != "base":
        rows["into"] = f"{done.dtype} again" if into in QUANTISED else f"{into}, on which it was not trained"
    rows |= differences(done.difference, "merged", bool(examples))
    if persona.system:
        rows["system prompt"] = f"{persona.system} (give it to whatever runs the merged model)"
    facts(f"Merged {name}", rows, json, asdict(done))


def quantize(model: str, /, *, format: str = "nf4-dq", out: Path | None = None,  # noqa: A002 (its name)
             calibrate: Path | None = None, json: bool = False) -> None:  # fmt: skip
    """Write a model with its matrices packed; it is trained on, talked to and measured as any other.

    Parameters
    ----------
    model
        A folder, a GGUF file, a short name or a hub id.
    format
        nf4-dq, nf4 and fp4 (as bitsandbytes has them, which transformers loads), nf3, nf2, int4-g32, int8, …
    out
        Folder to write. By default: the model's name and the format.
    calibrate
        Rows by which int formats are rounded such that layers give what they gave (GPTQ).
    json
        Print one JSON object.
    """
    with busy(json) as say:
        done = plain_models.quantize(model, format, out or Path(f"{Path(model).stem}-{format}"), calibrate, say)
    facts(f"Packed {model}", {"written": f"{done.folder} ({size(done.size_bytes)})",
                              "matrices": f"{size(done.packed_bytes)}, {done.bits:.3f} bits a number"},
          json, asdict(done))  # fmt: skip
