"""A host that was not forked from the launcher and imports its backend itself.

Runs as `python -m inference_service.engines.spawned_host SPEC LISTENER_FD LIFELINE_FD`, as the leader of its
process group, with its output going to the log. Its start takes longer by the time of the imports, and
depends on nothing that must survive a fork.
"""

import importlib
import json
import os
import socket
import sys
import traceback

from inference_service.engines.base import HostSpec
from inference_service.engines.lifeline import end_group_with_service
from inference_service.engines.process_title import SPAWNED, title_host


def main() -> None:
    spec = HostSpec.from_json(json.loads(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    title_host(spec.model, SPAWNED)
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
