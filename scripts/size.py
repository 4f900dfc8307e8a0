"""Size budget: lines of Python code and of C++, the longest file, the longest function. Leaves with 1 if one is over.

A line of code is neither empty nor only a comment or a docstring: docs/decisions/0004-what-the-budget-counts.md. Files
and functions are counted with everything, as that is what a reader scrolls through.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

CODE_LINES, NATIVE_LINES, FILE_LINES, FUNCTION_LINES = 12_000, 4_000, 300, 60
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def span(node):
    return range(node.lineno, node.end_lineno + 1)


def code(text, tree):
    """How many lines hold something that Python runs."""
    held = {line for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in LAYOUT
            for line in range(t.start[0], t.end[0] + 1)}  # fmt: skip
    said = (n for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
            and isinstance(n.value.value, str))  # fmt: skip
    return len(held.difference(*map(span, said)))


def main() -> int:
    over, whole, total, longest = [], {}, 0, 0
    for path in sorted(Path("deltaw").rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        whole[path], total = len(text.splitlines()), total + code(text, tree)
        longest = max([longest, *(len(span(f)) for f in functions(tree))])
        over += [f"{path}:{f.lineno} {f.name}: {len(span(f))} lines, budget {FUNCTION_LINES}"
                 for f in functions(tree) if len(span(f)) > FUNCTION_LINES]  # fmt: skip
    over += [f"{path}: {n} lines, budget {FILE_LINES}" for path, n in whole.items() if n > FILE_LINES]
    over += [f"deltaw: {total} lines of code, budget {CODE_LINES}"] if total > CODE_LINES else []
    native = {path: len(path.read_text().splitlines()) for path in sorted(Path("native").glob("*.?pp"))}
    over += [f"{path}: {n} lines, budget {FILE_LINES}" for path, n in native.items() if n > FILE_LINES]
    over += (
        [f"native: {sum(native.values())} lines, budget {NATIVE_LINES}"] if sum(native.values()) > NATIVE_LINES else []
    )
    print(f"{total:,} of {CODE_LINES:,} lines of code ({sum(whole.values()):,} with what explains them) "
          f"in {len(whole)} files; median {sorted(whole.values())[len(whole) // 2]}, longest {max(whole.values())} "
          f"(function: {longest}); C++: {sum(native.values())} of {NATIVE_LINES:,}")  # fmt: skip
    print("\n".join(over))
    return bool(over)


sys.exit(main())
