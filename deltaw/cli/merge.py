"""`deltaw merge` and `deltaw quantize`: base and adapter as one plain model, checked; a model in fewer bits."""

from dataclasses import asdict
from pathlib import Path

from deltaw.cli.show import Flat, busy, differences, facts
from deltaw.settings import Machine, plain
from deltaw.words import size

QUANTISED = ("quantised", "quantized")


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
    from deltaw.api.exchange import requantised
    from deltaw.api.merge import home, known_rows, merge as merged_into
    from deltaw.api.persona import load, load_base, locate
    from deltaw.data.files import read
    from deltaw.models.checkpoint import form_of

    name, path = locate(run, runs)
    folder = home(path)
    how = plain(machine or Machine())
    with busy(json) as say:
        persona = load(str(path), runs, base, **how, say=say)
        other = None if into in ("base", *QUANTISED) else load_base(into, **how, say=say)
        say(f"Merging {name}")
        examples = read(check) if check else known_rows(folder)
        again = "merged-packed" if form_of(persona.base.model) else "merged.gguf"
        done = (requantised(persona, out or folder / again, examples) if into in QUANTISED else
                merged_into(persona, out or folder / "merged", examples, other))  # fmt: skip
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
    from deltaw.api.merge import quantize as quantised

    with busy(json) as say:
        done = quantised(model, format, out or Path(f"{Path(model).stem}-{format}"), calibrate, say)
    facts(f"Packed {model}", {"written": f"{done.folder} ({size(done.size_bytes)})",
                              "matrices": f"{size(done.packed_bytes)}, {done.bits:.3f} bits a number"},
          json, asdict(done))  # fmt: skip
