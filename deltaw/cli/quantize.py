"""`deltaw quantize`: a model in fewer bits."""

from dataclasses import asdict
from pathlib import Path

from deltaw.cli.show import busy, facts
from deltaw.words import size


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
    from deltaw.api.quantize import quantize as quantised

    with busy(json) as say:
        done = quantised(model, format, out or Path(f"{Path(model).stem}-{format}"), calibrate, say)
    facts(f"Packed {model}", {"written": f"{done.folder} ({size(done.size_bytes)})",
                              "matrices": f"{size(done.packed_bytes)}, {done.bits:.3f} bits a number"},
          json, asdict(done))  # fmt: skip
