"""The programs that run inside hosts. Nothing in the service imports them.

Each is a module with `run(spec, listener)`: serve OpenAI's HTTP on `listener` until SIGTERM, with
`GET /health` answering once the engine does and `GET /control/running` telling its running requests.
"""
