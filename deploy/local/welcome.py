"""What `make run` prints before the service starts: how to talk to it."""

import sys

from inference_service.config import BadSettings, load_settings

ANY_MODEL = "NAME"


def welcome(port: int, model: str) -> str:
    """A curl line and a five-line Python example that work as printed, once the service listens."""
    url = f"http://127.0.0.1:{port or 'PORT'}/v1"
    message = '{"role": "user", "content": "What is the capital of France?"}'
    body = f'{{"model": "{model}", "messages": [{message}], "temperature": 0}}'
    return f"""
Starting at http://127.0.0.1:{port} (Ctrl-C ends it). In another terminal, in this directory:

curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'

.venv/bin/python - <<'EOF'
from openai import OpenAI
client = OpenAI(base_url="{url}", api_key="none")
question = {message}
answer = client.chat.completions.create(model="{model}", messages=[question], temperature=0)
print(answer.choices[0].message.content)
EOF

{f"NAME is any model that `curl {url}/models` lists." if model == ANY_MODEL else ""}
The first answer waits for the engine's start, ten seconds or so; add "stream": true to see tokens come.
"""


if __name__ == "__main__":
    try:
        print(welcome(load_settings().port, *(sys.argv[1:] or [ANY_MODEL])), flush=True)
    except BadSettings as error:
        raise SystemExit(f"inference-service: {error}") from error
