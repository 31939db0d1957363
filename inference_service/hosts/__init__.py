"""The programs that run inside host processes. The rest of the service does not import them.

The contract of a host, which engines/process_engine.py relies on:

`run(spec, listener)`
    A host is a module with this function; HostSpec.program names it. It builds the engine that the HostSpec
    describes, then serves HTTP on `listener`, a unix socket that already listens and that only the service
    connects to. It returns after SIGTERM, within GRACE_SECONDS (engines/base.py); the service then sends
    SIGKILL to the process group. If the engine cannot be built or dies, `run` raises; the process exits with
    status 1 and the last error in its log becomes the reason that clients see.

GET /health
    The first request, sent before the engine exists: it waits in the socket's queue. 200 once the engine can
    serve. The body is empty or {"backend": name, "notes": [text, ...]}, which /admin/stats shows; an empty
    body means the backend of HostSpec.program. Any other status fails the start.

GET /control/heartbeat
    200 {"running": n, "steps": n}: unfinished requests, and a number that changes with every step of the
    engine. An engine with running requests whose steps do not change for ENGINE_STALL_TIMEOUT is ended. 503
    if the engine is dead. Must answer while requests run.

GET /control/weight-check
    200 {"fingerprint": [[token, logprob], ...]}: the most likely tokens after a fixed prompt, most likely
    first, computed with the current weights. Called after each start.

POST /control/swap
    Takes a HostSpec as JSON: serve its snapshot, whose weights have the same shapes, under its name, and
    remove all adapters. 200 {"fingerprint": as above, "seconds": {"weights": s, "warm-up": s},
    "copied_bytes": n, "total_bytes": n, "copied_from": {source: n}}: of the checkpoint's bytes, those that
    had to be copied, and from where: `prepared`, `read_ahead` or `mapped`. A host that copies them all may
    leave these out. It wakes a host that sleeps. The service sends no other request meanwhile, and ends the
    host if the swap fails.

POST /control/sleep
    Free the device of weights, KV cache and adapters, and keep the process and what it has compiled. 200
    {"freed_bytes": n}, on each device. The service sends no request until the next swap, which brings weights
    back, but GET /control/heartbeat, POST /control/prepare and /control/forget. A host that cannot sleep
    answers 404 and is stopped in good order; after any other status it is killed.

POST /control/prepare
    Takes {"directory": path}: a swap to this snapshot is likely. Make its weights ready in host memory while
    requests run, and hold them until POST /control/forget. 200 {"ready_bytes": n, "total_bytes": n,
    "refused": reason or null} when done, or when a swap has ended it early. A host without this route
    answers 404.

POST /control/forget
    Takes {"directory": path}: hold its weights no longer. 200 {}, also if none are held.

POST /control/adapters
    Takes {"name": name, "id": n, "directory": path}: load a LoRA adapter and serve it under `name`, which
    includes its revision. `id` is never used twice. 200 {}. After a failure the host serves on without it.

DELETE /control/adapters/{name}
    Unload an adapter that no request uses. 200 {}, also if there is none of this name.

POST /v1/chat/completions, POST /v1/completions
    OpenAI's API, with the service's `x-request-id`; `model` is the name in the HostSpec or an adapter's.
    `stream` answers with server-sent events, ended by [DONE]; with `stream_options.include_usage` the last
    event before it has empty `choices` and the usage. An error is {"error": {"message", "param", "code",
    ...}}: with its status, or, once a stream has begun, as the last event, with the status in `code` and no
    [DONE]. 400, 413, 422 and 501 are the client's fault; any other is reported as a fault of the engine.
    Responses name a model without its revision. Closing the connection aborts the generation.

The weight check, the swap, the sleep and the adapter routes answer a failure with 422 {"error": reason}
(control_replies.py). stdout and stderr are relayed to the service's log, except lines that begin with
PHASE_MARK: they name the phase that a start has reached: `start`, `weights`, `compile`, `warm-up`, `graphs`
or `server` (phases.py), each at most once.
"""
