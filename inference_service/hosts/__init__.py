"""The programs that run inside hosts. Nothing in the service imports them.

Each is a module with `run(spec, listener)`: serve OpenAI's HTTP on `listener` until SIGTERM, with
`GET /health` answering once the engine does and `GET /control/heartbeat` telling its running requests and a
number that changes with every step of its work.
"""
