"""Formats by name, as flags, adapter files and model folders say them.

nf4, nf3, nf2, nf8, fp4     codes into a table, a scale for 64 numbers; -b32: for 32; -dq: scales quantised as in QLoRA;
                            -s8.fp32.256: scales as in LQ-LoRA, of 8 bits, with fp32 maxima of 256 of them
int2 … int8                 whole numbers with scales and offsets in groups of 32 inputs; -g64: of 64; -actorder: of
                            inputs that matter as much; -moved: with offsets of 32 bits, as a merged QA-LoRA has them
fp32, bf16, fp16            plain numbers
"""

import re

from deltaw.errors import UserError
from deltaw.weights import Format, Plainly
from deltaw.weights.codebook import Codebook, Double, Plain, TwoLevel
from deltaw.weights.grid import Grid

CODES = r"(nf|fp)([2348])(?:-b(\d+))?(?:-(dq)|-s([2348])\.(fp32|bf16|fp16)\.(\d+))?"
WHOLE = r"int([2348])(?:-g(\d+))?(-actorder)?(-moved)?"
MOST = 65536
EXAMPLES = "For example: nf4, nf4-dq, fp4, nf3, int4-g32, int8, bf16."


def parse(name: str) -> Format:
    """The format of this name.

    Raises:
        UserError: there is no such format.
    """
    if name in ("fp32", "bf16", "fp16"):
        return Plainly(name)
    if any(int(number) > MOST for number in re.findall(r"\d+", name)):
        raise UserError(f"There is no format '{name}'.", why=f"Blocks and groups have {MOST:,} numbers at most.")
    if (said := re.fullmatch(WHOLE, name)) and int(said[2] or 32):
        return Grid(int(said[1]), int(said[2] or 32), bool(said[3]), bool(said[4]))
    said = re.fullmatch(CODES, name)
    if said is None or (said[1] == "fp" and said[2] != "4") or int(said[3] or 64) < 2 or int(said[7] or 2) < 2:
        raise UserError(f"There is no format '{name}'.", remedy=EXAMPLES)
    scales = TwoLevel(int(said[5]), said[6], int(said[7])) if said[5] else Double() if said[4] else Plain()
    return Codebook(int(said[2]), int(said[3] or 64), scales, said[1] == "fp")
