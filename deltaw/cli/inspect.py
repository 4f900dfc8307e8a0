"""`deltaw inspect` and `deltaw doctor`: what a model, an adapter or a run is, and what this machine can do."""

from pathlib import Path
from typing import Any

from deltaw.cli.show import facts
from deltaw.words import count, size


def inspect(name: str, /, *, runs: Path = Path("runs"), json: bool = False) -> None:
    """Say what a model, an adapter or a run is.

    Parameters
    ----------
    name
        A model (folder, GGUF file, short name), an adapter file, or a run's name or folder.
    runs
        Folder of the run folders.
    json
        Print one JSON object.
    """
    from deltaw.models.source import is_model

    facts(name, _model(name) if is_model(name) else _adapter(name, runs), json)


def _model(name: str) -> dict[str, Any]:
    from deltaw.models import checkpoint, source

    path = source.find(name)
    model = checkpoint.load(path)
    config, origin = model.config, source.note(path)
    checkpoint.check_seal(path, fingerprint := checkpoint.fingerprint(model))
    rows = {
        "path": str(path),
        "parameters": count(checkpoint.count(model)),
        "layers": f"{config.layers}, width {config.width}, {config.heads} heads, {config.kv_heads} for keys and values",
        "vocabulary": f"{config.vocab:,}" + (", tied to the output" if config.tied else ""),
        "context": f"{config.context:,} tokens",
        "fingerprint": fingerprint,
    }
    if form := checkpoint.form_of(model):
        rows["weights"] = f"packed as {form}: {checkpoint.stored(model)[1]:.3f} bits a number in the layers' matrices"
    elif (packing := source.packing(path)) and packing not in ("F32", "F16", "BF16"):
        bits = packing[1] if packing[:1] == "Q" else packing
        rows["weights"] = (f"dequantised: this base is a {packing} file ({bits}-bit codes) unpacked to "
                           "float32; the precision of the original is lost")  # fmt: skip
    return rows | {k: v for k, v in origin.items() if k in ("source", "licence", "sha256")}


def _adapter(name: str, runs: Path) -> dict[str, Any]:
    from deltaw.api.persona import locate
    from deltaw.files import adapters

    shown, path = locate(name, runs)
    header, tensors = adapters.read(path)
    owners = {t.rpartition(".")[0].removesuffix(".weight") for t in tensors if not t.startswith("shared.")}
    layers = sorted(owners, key=_natural) or ["none"]
    return {
        "adapter": shown,
        "path": str(path),
        "size": size(path.stat().st_size),
        "method": header.method,
        **{f"  {k}": v for k, v in header.settings.items() if v not in ({}, None)},
        "numbers": count(sum(t.numel() for t in tensors.values())),
        "layers": f"{len(layers)}, from {layers[0]} to {layers[-1]}",
        **({"system prompt": header.system} if header.system else {}),
        "base": f"{header.base} ({header.fingerprint})"
        + (f", packed as {header.base_format}" if header.base_format else ""),
        "made by": f"deltaw {header.version}",
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort layer 9 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def doctor(*, json: bool = False) -> None:
    """Say what this machine can do.

    Parameters
    ----------
    json
        Print one JSON object.
    """
    from deltaw.advise.machine import Machine
    from deltaw.kernels.library import REFERENCE

    m = Machine()
    best = "bfloat16" if m.bf16_native else "float32"
    native = [name for name in m.kernels_available if name != REFERENCE]
    unbuilt = "not built (no C++ compiler at installation): torch does their work, more slowly"
    rows = {
        "system": f"{m.system}, Python {m.python}, torch {m.torch}",
        "cores": f"{m.cores} ({m.threads} threads)",
        "instructions": ", ".join(m.instruction_sets) or "none that matter",
        "native kernels": f"{m.kernels} (of {', '.join(native)})" if native else unbuilt,
        "memory": f"{size(m.available_bytes)} free of {size(m.ram_bytes)}",
        "disk": f"{size(m.disk_free_bytes)} free at {m.cache}",
        "matrix products": f"{m.fp32_gflops:.0f} GFLOP/s in float32, {m.bf16_gflops:.0f} in bfloat16",
        "GPU": f"{m.gpu} ({size(m.gpu_bytes)})" if m.gpu else "none",
        "trains in": best if not m.gpu else "bfloat16 on the GPU",
        "models": ", ".join(m.models) or "none yet (the first training fetches smollm2-135m)",
    }
    facts("This machine", rows, json, vars(m))
