"""How much memory packing takes, by what the system says of a process of its own; where it says so (Linux)."""

import platform
import subprocess
import sys

import pytest
from conftest import write_tiny

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process held at most is read from /proc")
WIDE = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "num_attention_heads": 16,
        "num_key_value_heads": 4, "num_hidden_layers": 5}  # fmt: skip
LAYER = 4 * (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 4096 * 1024)
"""Bytes of the plain matrices of one layer."""
HELD = """
import sys, torch
from deltaw.api.merge import quantize
from deltaw.api.persona import load_base
from pathlib import Path

def held(name):
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name + ":"))

what, model, form, out = sys.argv[1:]
ways = {
    "quantize": lambda model, out: quantize(model, form, Path(out)),
    "load, packed before": lambda model, out: load_base(out, "float32"),
    "load, packed now": lambda model, out: load_base(model, "float32", base_format=form),
}
quantize(model + "-small", form, Path(out + "-" + what))  # whatever is loaded once is loaded
load_base(out + "-" + what, "float32")
open("/proc/self/clear_refs", "w").write("5")
before = held("VmRSS")
made = ways[what](model, out)
print(held("VmHWM") - before)
"""
EARLY = """
import sys, torch, psutil
from deltaw.kernels.memory import frugal
held = lambda: psutil.Process().memory_info().rss
torch.ones(24 << 18)  # 24 MB, and freed: glibc now keeps all that is smaller
before, last = held(), []
with frugal(sys.argv[1] == "frugal"):
    large = []
    for _ in range(10):
        large.append(torch.ones(10 << 18))
        last.append(torch.ones(1 << 14))
    del large
print(held() - before - sum(t.nbytes for t in last))
"""


def printed(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


@pytest.mark.parametrize("form", ["nf4-dq", "int4-g32"])
def test_packing_holds_what_is_packed_and_one_layer(form, tmp_path):
    write_tiny(tmp_path / "model-small")
    write_tiny(tmp_path / "model", WIDE)
    peaks = {what: printed(HELD, what, tmp_path / "model", form, tmp_path / "packed")
             for what in ("quantize", "load, packed before", "load, packed now")}  # fmt: skip
    packed = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert packed < WIDE["num_hidden_layers"] * LAYER / 4
    assert {what: peak for what, peak in peaks.items() if peak > packed + LAYER} == {}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps what was freed")
def test_memory_that_is_free_is_given_back_at_once_when_asked_to():
    kept, given_back = printed(EARLY, "usual"), printed(EARLY, "frugal")
    assert kept > 50e6
    assert given_back < 10e6


def test_a_peak_is_not_that_of_the_process_that_began_this_one():
    child = "import torch; from deltaw.kernels.memory import peak_bytes; print(peak_bytes(torch.device('cpu')))"
    begun = f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    parent = f"import subprocess, sys; held = b'x' * (2 << 30); {begun}"
    said = subprocess.run([sys.executable, "-c", parent], check=True, text=True, stdout=subprocess.PIPE).stdout
    assert 1 << 26 < int(said) < 2 << 30
