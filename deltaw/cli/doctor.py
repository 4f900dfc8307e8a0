"""`deltaw doctor`: what this machine can do."""

from deltaw.cli.show import facts
from deltaw.words import size


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
