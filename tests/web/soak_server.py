"""A server as `deltaw serve` has it, that looks every second whether all is where it should be; ends with 9 if not."""

import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

from serve.integrity import check

from deltaw.api.persona import load_base
from deltaw.settings import Serving
from deltaw.web.app import application
from deltaw.web.server import Listener, bound, hub_of


def main(base, folder, port, budget_gb):
    serving = Serving(port=int(port), budget_gb=float(budget_gb), most=8, chunk=64, first_token_seconds=20.0)
    with bound(serving) as at, hub_of(load_base(base, dtype="float32"), [Path(folder)], serving) as (hub, shelf):

        def look():
            while not hub.service.closed:
                time.sleep(1)
                try:
                    hub.service.do(partial(check, hub.service.engine)).result(30)
                except AssertionError as e:
                    sys.stderr.write(f"integrity: {e}\n")
                    os._exit(9)
                except RuntimeError:
                    return  # it is closed

        threading.Thread(target=look, daemon=True).start()
        sys.stdout.write(f"{at.getsockname()[1]}\n")
        sys.stdout.flush()
        Listener(application(hub, shelf, serving), hub, sys.stderr.write).run([at])


if __name__ == "__main__":
    main(*sys.argv[1:])
