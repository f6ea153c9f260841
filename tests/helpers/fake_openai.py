"""A scripted OpenAI-compatible server on loopback: real HTTP, good replies built from the request's schema, and every fault.

The fixture ``fake_openai`` starts one: ``fake_openai.script("429", "good")``, ``.base_url``, ``.requests``.

By hand: ``python -m tests.helpers.fake_openai --port 8001 [--script fenced,500]``. A script names what each request gets, in
order; when it is used up, ``then`` (default ``good``) answers the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROSE = "I would prune the middle layers most, since they matter least."


class FakeOpenAI:
    """The server. ``requests`` are the bodies received, ``keys`` the Authorization headers; ``hang`` is how long ``hang`` hangs."""

    def __init__(self, port: int = 0, seed: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.then = "good"
        self.hang = 30.0
        self.usage = True
        self._rng = random.Random(seed)
        self._script: list[str] = []
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._last: dict[str, Any] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def script(self, *steps: str, then: str = "good") -> None:
        """What the next requests get. A step that is no name in ``STEPS`` is sent as the text of the reply."""
        self._script[:] = steps
        self.then = then

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, schema: dict[str, Any] | None) -> Any:
        """A value that fits ``schema``, drawn at random: whole numbers near the middle of the lower half of their range."""
        if schema is None:
            return {}
        kind = schema.get("type")
        if kind == "object":
            return {name: self.answer(child) for name, child in schema["properties"].items()}
        if kind == "array":
            items = [self.answer(schema["items"]) for _ in range(schema.get("minItems", 1))]
            # Changes of one plan name different layers, from the whole depth.
            layers = schema["items"].get("properties", {}).get("layer")
            if layers:
                drawn = self._rng.sample(range(layers["minimum"], layers["maximum"] + 1), len(items))
                items = [{**item, "layer": layer} for item, layer in zip(items, drawn, strict=True)]
            # Two numbers in one list are a pair of candidates: never the same one twice.
            if len(items) == 2 and items[0] == items[1] and isinstance(items[0], int):
                items[1] = items[0] % schema["items"]["maximum"] + 1
            return items
        if kind == "string":
            return self._rng.choice(
                schema.get("enum", ["Early layers are sensitive: keep more of ffn 1.", "Prune attention 3 more."])
            )
        low, high = schema["minimum"], schema["maximum"]
        return self._rng.randint(low, max(low + 1, (low + high) // 2)) if high > low else low

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake._lock:
                    fake.requests.append(body)
                    fake.keys.append(self.headers.get("Authorization", ""))
                    step = fake._script.pop(0) if fake._script else fake.then
                fake._reply(self, step, body)

            def do_GET(self) -> None:
                fake._send(self, 200, {"object": "list", "data": [{"id": "fake", "object": "model"}]})

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def _reply(self, http: BaseHTTPRequestHandler, step: str, body: dict[str, Any]) -> None:
        wanted = body.get("response_format") or {}
        schema = wanted.get("json_schema", {}).get("schema") or _schema_in_prompt(body)
        if step == "hang":
            self._closing.wait(self.hang)
            http.close_connection = True
        elif step == "reset":
            # A zero linger time makes close() send RST instead of FIN.
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            http.connection.close()
            http.close_connection = True
        elif step == "cut":
            http.send_response(200)
            http.send_header("Content-Length", "1000")
            http.end_headers()
            http.wfile.write(b'{"choices": [')
            http.close_connection = True
        elif step == "drip":
            http.send_response(200)
            http.send_header("Content-Length", "100000")
            http.end_headers()
            http.close_connection = True
            until = time.monotonic() + self.hang
            while time.monotonic() < until and not self._closing.wait(0.05):
                try:
                    http.wfile.write(b" ")
                except OSError:
                    return
        elif step == "huge":
            http.send_response(200)
            http.send_header("Content-Type", "application/json")
            http.send_header("Content-Length", str(10 * 2**20))
            http.end_headers()
            http.close_connection = True
            try:
                for _ in range(160):
                    http.wfile.write(b" " * 65_536)
            except OSError:
                return
        elif step.startswith("429"):
            error = {"error": {"message": "slow down", "type": "rate_limit", "code": "rate_limit"}}
            self._send(http, 429, error, {"Retry-After": step.partition(":")[2] or "0.01"})
        elif step == "500":
            self._send(http, 500, {"error": {"message": "internal", "type": "server_error"}}, {"Retry-After-Ms": "10"})
        elif step == "401":
            message = f"Incorrect API key: {http.headers.get('Authorization')}"
            self._send(http, 401, {"error": {"message": message, "type": "invalid_request_error", "code": "invalid_api_key"}})
        elif step == "redirect":
            self._send(http, 307, {}, {"Location": "http://127.0.0.1:9/v1/chat/completions"})
        elif step == "no_json_schema" and wanted.get("type") == "json_schema":
            self._send(
                http, 400, {"error": {"message": "response_format json_schema is not supported", "param": "response_format"}}
            )
        elif step == "no_response_format" and wanted:
            self._send(http, 400, {"error": {"message": "unknown field response_format", "param": "response_format"}})
        elif step == "no_max_tokens" and "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            self._send(http, 400, {"error": {"message": message, "param": "max_tokens"}})
        elif step == "no_temperature" and "temperature" in body:
            self._send(
                http, 400, {"error": {"message": "temperature does not support 0.8 with this model", "param": "temperature"}}
            )
        elif step.startswith("400"):
            self._send(http, 400, {"error": {"message": step.partition(":")[2] or "context length exceeded"}})
        elif step == "html":
            self._send(http, 200, "<html>a proxy's page</html>")
        else:
            self._send(http, 200, self._completion(step, body, schema))

    def _completion(self, step: str, body: dict[str, Any], schema: dict[str, Any] | None) -> dict[str, Any]:
        """The reply to a request that reached the model."""
        good = self.answer(schema)
        if step == "duplicate" and self._last is not None:
            good = self._last
        else:
            self._last = good
        text, reason, refusal = json.dumps(good), "stop", None
        if step == "fenced":
            text = f"Here is the plan:\n```json\n{text}\n```\nGood luck!"
        elif step == "thinking":
            text = f'<think>Maybe {{"plans": []}}? No.</think>\n{text}'
        elif step == "in_prose":
            text = f"Sure! {text} I hope that helps."
        elif step == "prose":
            text = PROSE
        elif step == "empty":
            text = ""
        elif step == "truncated":
            text, reason = text[: len(text) // 2], "length"
        elif step == "refusal":
            text, refusal = "", "I cannot help with pruning."
        elif step == "wrong_length":
            text = json.dumps(_numbers(good, lambda numbers: numbers[:-1]))
        elif step == "out_of_range":
            text = json.dumps(_numbers(good, lambda numbers: [1000, *numbers[1:]]))
        elif step == "nan":
            text = json.dumps(_numbers(good, lambda numbers: [float("nan"), *numbers[1:]]))
        elif step == "overflow":
            text = json.dumps(_numbers(good, lambda numbers: ["1e309", *numbers[1:]])).replace('"1e309"', "1e309")
        elif step == "nested":
            text = "[" * 10_000 + "]" * 10_000
        elif step == "long":
            text = "x" * 200_000
        elif step not in STEPS:
            text = step
        prompt = sum(len(message["content"]) for message in body["messages"]) // 4
        return {
            "id": "chatcmpl-fake",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text, "refusal": refusal}}
            ],
            **(
                {
                    "usage": {
                        "prompt_tokens": prompt,
                        "completion_tokens": len(text) // 4 + 1,
                        "total_tokens": prompt + len(text) // 4 + 1,
                    }
                }
                if self.usage
                else {}
            ),
        }

    def _send(self, http: BaseHTTPRequestHandler, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        http.send_response(status)
        http.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        http.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            http.send_header(name, value)
        http.end_headers()
        http.wfile.write(data)


STEPS = frozenset(
    """good fenced thinking in_prose prose empty truncated refusal wrong_length out_of_range nan overflow nested long duplicate
    429 500 401 400 redirect reset cut drip hang huge html no_json_schema no_response_format no_max_tokens no_temperature""".split()  # noqa: SIM905
)


def _numbers(value: Any, change: Any) -> Any:
    """``value`` with ``change`` applied to every list of numbers in it."""
    if isinstance(value, dict):
        return {name: _numbers(child, change) for name, child in value.items()}
    if isinstance(value, list):
        return change(value) if value and isinstance(value[0], int) else [_numbers(child, change) for child in value]
    return value


def _schema_in_prompt(body: dict[str, Any]) -> dict[str, Any] | None:
    _, found, schema = body["messages"][-1]["content"].rpartition("JSON schema of the answer: ")
    return json.JSONDecoder().raw_decode(schema)[0] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--script", default="", help="comma-separated steps")
    parser.add_argument("--then", default="good", choices=sorted(STEPS))
    arguments = parser.parse_args()
    server = FakeOpenAI(arguments.port)
    server.script(*filter(None, arguments.script.split(",")), then=arguments.then)
    print(server.base_url, flush=True)
    try:
        server._thread.join()
    except KeyboardInterrupt:
        server.close()


if __name__ == "__main__":
    main()
