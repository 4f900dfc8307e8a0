"""The entry point: makes the process ready, then loads the command line.

Ctrl-C while modules load ends the process at once: an import that is cut in half may be swallowed by the library it is
in, and fail later in odd ways.
"""

import os
import signal
import sys


def main() -> None:
    """Run the command line, and leave with its exit code."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    _open_streams()
    from deltaw.cli.app import run

    sys.exit(run(sys.argv[1:]))


def _open_streams() -> None:
    """Make the standard streams able to take any text, and stand in for those that the caller closed."""
    shown = "backslashreplace"
    for name, mode, errors in (("stdin", "r", "replace"), ("stdout", "w", shown), ("stderr", "w", shown)):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for the whole process)
        else:
            stream.reconfigure(errors=errors)


if __name__ == "__main__":
    main()
