"""Line budget: the package's Python lines, the longest file and the longest function. Leaves with 1 if one is over."""

import ast
import sys
from pathlib import Path

PACKAGE_LINES, FILE_LINES, FUNCTION_LINES = 12_000, 300, 60


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def main() -> int:
    files = {p: p.read_text() for p in sorted(Path("deltaw").rglob("*.py"))}
    lines = {p: len(text.splitlines()) for p, text in files.items()}
    over = [f"{p}: {n} lines, budget {FILE_LINES}" for p, n in lines.items() if n > FILE_LINES]
    longest = 0
    for path, text in files.items():
        for f in functions(ast.parse(text)):
            length = f.end_lineno - f.lineno + 1
            longest = max(longest, length)
            if length > FUNCTION_LINES:
                over.append(f"{path}:{f.lineno} {f.name}: {length} lines, budget {FUNCTION_LINES}")
    total = sum(lines.values())
    if total > PACKAGE_LINES:
        over.append(f"deltaw: {total} lines, budget {PACKAGE_LINES}")
    median = sorted(lines.values())[len(lines) // 2]
    print(f"{total:,} of {PACKAGE_LINES:,} lines in {len(lines)} files; median {median}, longest {max(lines.values())} "
          f"(function: {longest})")  # fmt: skip
    print("\n".join(over))
    return bool(over)


sys.exit(main())
