"""A host that was not forked from a process with vLLM in it: it imports everything by itself.

Runs as `python -m inference_service.engines.cold_host SPEC LISTENER_FD LIFELINE_FD` in the place of a forked
host, as leader of its group, with the log for its output. Slower by the imports; what depends on a fork of a
warm process does not matter to it.
"""

import importlib
import json
import os
import socket
import sys
import traceback

from inference_service.engines.base import HostSpec
from inference_service.engines.lifeline import end_group_with_service


def main() -> None:
    spec = HostSpec.from_json(json.loads(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    end_group_with_service(int(sys.argv[3]))
    try:
        importlib.import_module(spec.program).run(spec, listener)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
