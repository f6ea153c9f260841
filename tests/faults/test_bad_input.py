"""What a server must refuse, and how: every refusal is a typed error in the one shape, no refusal makes a job."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfpruner.config import SearchConfig
from selfpruner.errors import ConfigError, SelfprunerError
from server.admission import admit, local_models
from server.security import trusted_host
from server.settings import ServerSettings, load_settings
from tests.helpers.serving import Running, error_of, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_server(ServerSettings(home=tmp_path_factory.mktemp("home"))) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        yield client


def post(http: httpx.Client, body: str | bytes, media: str = "application/json") -> httpx.Response:
    return http.post("/v1/jobs", content=body, headers={"content-type": media})


# -- values ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"nonsense": 1}, "unknown_field", "nonsense"),
        ({"limits": {"money": 1}}, "unknown_field", "limits.money"),
        ({"base_url": "http://169.254.169.254"}, "unknown_field", "base_url"),
        ({"api_key": "x"}, "unknown_field", "api_key"),
        ({"rate": None}, "invalid_value", "rate"),
        ({"rate": 0}, "invalid_value", "rate"),
        ({"rate": -0.1}, "invalid_value", "rate"),
        ({"rate": 1}, "invalid_value", "rate"),
        ({"rate": 1.5}, "invalid_value", "rate"),
        ({"rate": "250%"}, "invalid_value", "rate"),
        ({"rate": [0.2]}, "invalid_value", "rate"),
        ({"criterion": "magic"}, "unknown_name", "criterion"),
        ({"operators": ["mutate", "grow"]}, "unknown_name", "operators"),
        ({"proposer": "gpt"}, "unknown_name", "proposer"),
        ({"proposer": "http://169.254.169.254/v1"}, "unknown_name", "proposer"),
        ({"device": "tpu"}, "invalid_value", "device"),
        ({"generations": -1}, "invalid_value", "generations"),
        ({"generations": 10**9}, "invalid_value", "generations"),
        ({"seed": 2**31}, "invalid_value", "seed"),
        ({"stages": []}, "invalid_value", "stages"),
        ({"calibration": {"sources": [{"source": "auto", "weight": 0}]}}, "invalid_value", "calibration.sources.0.weight"),
        ({"calibration": {"sources": [{"source": "a\x00b"}]}}, "invalid_value", "calibration.sources.0.source"),
        ({"metadata": {"a": "x\x00"}}, "invalid_value", "metadata"),
        ({"metadata": {"a": "\ud800"}}, "invalid_value", "metadata.a"),
        ({"metadata": {"a": 1}}, "invalid_value", "metadata.a"),
        ({"metadata": {"k" * 65: ""}}, "invalid_value", None),
        ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata"),
        ({"metadata": ["a"]}, "invalid_value", "metadata"),
    ],
)
def test_values(http: httpx.Client, fields: dict[str, Any], code: str, param: str | None) -> None:
    error = error_of(
        http.post("/v1/jobs", content=json.dumps({"rate": 0.2, **fields}), headers={"content-type": "application/json"}), 422
    )
    assert error["code"] == code
    assert param is None or error["param"] == param


def test_a_missing_field_and_a_missing_body(http: httpx.Client) -> None:
    assert error_of(http.post("/v1/jobs", json={}), 422)["code"] == "missing_field"
    assert error_of(http.post("/v1/jobs"), 422)["code"] == "missing_field"


@pytest.mark.parametrize("model", [
    "../../etc", "/etc", "file:///etc/passwd", "http://169.254.169.254/latest", "https://user:pw@huggingface.co/a/b", "a/../b",
    "..", "no-such-model", "a\\b", "a\x00b", "org/name/extra", "%2e%2e%2fetc", "\N{RIGHT-TO-LEFT OVERRIDE}x/y", "x" * 1024, "",
])  # fmt: skip
def test_models_a_request_may_not_name(http: httpx.Client, model: str) -> None:
    error = error_of(http.post("/v1/jobs", json={"rate": 0.2, "model": model}), 422)
    assert error["param"] in ("model", None)


@pytest.mark.parametrize(
    "source",
    ["/etc/passwd", "../secret.txt", "file:///etc/x.txt", "http://169.254.169.254/x.txt", "hub:/etc", "hub:../x", "hub:a/b/c"],
)
def test_texts_a_request_may_not_name(http: httpx.Client, source: str) -> None:
    error = error_of(http.post("/v1/jobs", json={"rate": 0.2, "report_text": {"sources": [{"source": source}]}}), 422)
    assert error["param"] == "report_text.sources.0.source"


# -- bodies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_json(http: httpx.Client, number: str) -> None:
    assert error_of(post(http, f'{{"rate": {number}}}'), 400)["code"] == "invalid_json"


def test_a_number_beyond_float(http: httpx.Client) -> None:
    assert error_of(post(http, '{"rate": 1e309}'), 422)["param"] == "rate"
    assert error_of(post(http, '{"rate": ' + "9" * 5000 + "}"), 400)["code"] == "invalid_json"


@pytest.mark.parametrize("body", [
    "", "{", "rate=0.2", '{"rate": 0.2} x', '"text"', "[]", "null", b"\xff\xfe\x00", '{"rate": 0.2, "model": "\\ud8"}',
    "[" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, '{"rate": 0.2, "metadata": ' + "[" * 100 + "]" * 100 + "}",
])  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, body: str | bytes) -> None:
    reply = post(http, body)
    error_of(reply, reply.status_code)
    assert reply.status_code in (400, 422)


def test_brackets_inside_strings_do_not_count(http: httpx.Client) -> None:
    assert http.post("/v1/jobs", json={"rate": 0.2, "metadata": {"a": '\\"[{' * 100}}).status_code == 201


def test_a_large_body(http: httpx.Client) -> None:
    big = b'{"rate": 0.2, "metadata": {"a": "' + b"x" * (10 << 20) + b'"}}'

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    for content in (big, chunks()):
        try:
            reply = http.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
        except httpx.TransportError:
            continue  # the server closed the connection before all was sent
        assert error_of(reply, 413)["code"] == "body_too_large"
    assert http.get("/healthz").status_code == 200


def test_a_body_that_does_not_arrive(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.middleware.BODY_SECONDS", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    with socket.create_connection((host, int(port)), timeout=20) as slow:
        slow.sendall(head)
        answer = b"".join(iter(lambda: slow.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    with socket.create_connection((host, int(port)), timeout=20) as gone:
        gone.sendall(head)
    assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_content_type(http: httpx.Client, media: str) -> None:
    assert error_of(post(http, '{"rate": 0.2}', media), 415)["code"] == "unsupported_media_type"


# -- addresses ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("identity", [
    "job_none", "..", "../jobs", "%2e%2e%2f", "%252e%252e", "..%5c..%5c", "a\\b", "%00", "x" * 5000, "'; DROP TABLE job; --",
    "\N{PILE OF POO}", "%ff", "job_%0d%0aset-cookie:a=b",
])  # fmt: skip
@pytest.mark.parametrize("rest", ["", "/events", "/cancel"])
def test_ids(http: httpx.Client, identity: str, rest: str) -> None:
    reply = http.post(f"/v1/jobs/{identity}{rest}") if rest == "/cancel" else http.get(f"/v1/jobs/{identity}{rest}")
    if reply.is_redirect or str(reply.url.path).rstrip("/") in ("/v1/jobs", "/v1/events", "/v1"):
        return  # the client itself resolved the dots
    error_of(reply, reply.status_code)
    assert reply.status_code in (404, 405, 422)
    assert "set-cookie" not in reply.headers


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/jobs/JOB/events", "/v1/jobs/JOB/candidates", "/v1/jobs/JOB/checkpoints"])
@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=1000000000", "limit=x", "limit=1e1", "after=ckpt_of_another_list"])
def test_paging(http: httpx.Client, path: str, query: str) -> None:
    job_id = http.post("/v1/jobs", json={"rate": 0.2}, headers={"idempotency-key": "paging"}).json()["id"]
    error = error_of(http.get(f"{path.replace('JOB', job_id)}?{query}"), 422)
    assert error["param"] == query.split("=")[0]


def test_addresses_and_methods_that_do_not_exist(http: httpx.Client) -> None:
    for path in ("/", "/v1", "/v2/jobs", "/docs", "/v1/jobs/a/b/c"):
        assert error_of(http.get(path), 404)["code"] == "not_found"
    reply = http.delete("/v1/jobs")
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert "POST" in reply.headers["allow"] or "GET" in reply.headers["allow"]
    assert error_of(http.get("/v1/jobs?status=lost"), 422)["param"] == "status"


def test_a_foreign_host_name_is_refused(http: httpx.Client) -> None:
    assert error_of(http.get("/v1/jobs", headers={"host": "evil.example"}), 403)["code"] == "untrusted_host"
    open_to_all = ServerSettings(host="0.0.0.0", token="long-enough")
    assert trusted_host("pruner.example:8000", open_to_all)
    assert trusted_host("[::1]:8000", ServerSettings())
    assert not trusted_host("localhost.evil.example", ServerSettings())


def test_a_request_id_that_could_split_headers_is_replaced(http: httpx.Client) -> None:
    assert http.get("/healthz", headers={"x-request-id": "a b;c"}).headers["x-request-id"].startswith("req_")


# -- anything at all ---------------------------------------------------------------------------------------------------
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from([*SearchConfig.model_fields, "metadata", "other"]), JSON, max_size=4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON | FIELDS.map(lambda fields: {"rate": 0.2, **fields}))
def test_no_body_is_a_server_error(http: httpx.Client, body: Any) -> None:
    reply = post(http, json.dumps(body))
    if reply.status_code != 201:
        error_of(reply, reply.status_code)
        assert reply.status_code in (400, 422)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80))
def test_no_bytes_are_a_server_error(http: httpx.Client, body: bytes) -> None:
    reply = post(http, body)
    error_of(reply, reply.status_code)
    assert reply.status_code in (400, 422)


# -- the description ---------------------------------------------------------------------------------------------------
def test_openapi_describes_errors_as_they_are_sent(http: httpx.Client) -> None:
    description = http.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert not {"HTTPValidationError", "ValidationError"} & set(schemas)
    references = {part.split('"')[0] for part in json.dumps(description).split('"#/components/schemas/')[1:]}
    assert references <= set(schemas)
    operations = [(path, method, operation) for path, item in description["paths"].items() for method, operation in item.items()]
    assert len(operations) == 16
    for path, _, operation in operations:
        if path == "/healthz":
            continue
        assert operation["security"] == [{"HTTPBearer": []}]
        for status, reply in operation["responses"].items():
            if status >= "400":
                assert reply["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorReply"), (path, status)
        assert {"401", "422", "500"} <= set(operation["responses"])
    assert schemas["JobRequest"]["additionalProperties"] is False
    assert "location" in {name.lower() for name in description["paths"]["/v1/jobs"]["post"]["responses"]["201"]["headers"]}


# -- what the operator allows ------------------------------------------------------------------------------------------
def test_admission_of_models_and_texts(tmp_path: Path, tiny_llama: Path) -> None:
    root, outside = tmp_path / "models", tmp_path / "outside"
    for folder in (root / "mine", root / "org" / "deep", outside):
        shutil.copytree(tiny_llama, folder)
    write_gguf(root / "small.gguf", {"general.architecture": "llama"})
    (root / "text.txt").write_text("words")
    (root / "way-out").symlink_to(outside)
    allowed = ServerSettings(model_root=root, text_root=root, models="Qwen/*,one/model")
    assert local_models(allowed) == ["mine", "org/deep", "small.gguf"]

    def model(name: str, by: ServerSettings = allowed) -> str:
        return admit(SearchConfig(rate=0.2, model=name), by).model

    assert model("smollm2-135m") == "smollm2-135m"
    assert model("mine") == str(root / "mine")
    assert model(str(root / "small.gguf")) == str(root / "small.gguf")
    assert model("org/deep") == str(root / "org/deep")
    assert model("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    for name in ("way-out", "mine/../../outside", str(outside), "other/model", "one/model2", ".", "mine/none"):
        with pytest.raises(SelfprunerError) as caught:
            model(name)
        assert "smollm2-135m" in caught.value.message
        assert caught.value.param == "model"
    with pytest.raises(ConfigError, match="fitness text has 2 sequences"):
        admit(SearchConfig(rate=0.2, fitness_text={"sequences": 2}), allowed)
    assert model("any/model", ServerSettings()) == "any/model"
    with pytest.raises(SelfprunerError):
        model("any/model", ServerSettings(token="long-enough"))

    text = {"sources": [{"source": "text.txt"}, {"source": "hub:wikitext:wikitext-2-raw-v1:test:text"}, {"source": "self"}]}
    config = admit(SearchConfig(rate=0.2, calibration=text), allowed)
    assert config.calibration.sources[0].source == str(root / "text.txt")
    (root / "lines.jsonl.gz").write_bytes(gzip.compress(b'{"body": "words"}'))
    for name, words in (
        ("small.gguf", "a model, not text"),
        ("lines.jsonl.gz", "its fields are: body"),
        ("none.raw", "No text source"),
    ):
        with pytest.raises(SelfprunerError, match=words) as refused:
            admit(SearchConfig(rate=0.2, report_text={"sources": [{"source": name}]}), allowed)
        assert refused.value.param == "report_text.sources.0.source"
    for name in ("lines.jsonl.gz:body", "text.txt"):
        found = admit(SearchConfig(rate=0.2, fitness_text={"sources": [{"source": name}]}), allowed).fitness_text.sources[0].source
        assert found == str(root / name)


def write_gguf(path: Path, facts: dict[str, str | int | float]) -> None:
    """The beginning of a GGUF file: strings and numbers, then an array as a vocabulary is."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"GGUF" + struct.pack("<IQQ", 3, 0, len(facts) + 1)
    for key, value in facts.items():
        number = struct.pack("<If", 6, value) if isinstance(value, float) else b""
        body += text(key) + (
            number or (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value))
        )
    path.write_bytes(body + text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 1) + text("a"))


def test_models_that_cannot_be_pruned_are_refused_before_they_are_queued(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, hub = tmp_path / "models", tmp_path / "hub"
    wanted = {}

    def folder(name: str, says: str, remove: str = "", **config: Any) -> None:
        shutil.copytree(tiny_llama, root / name)
        body = json.loads((root / name / "config.json").read_text())
        (root / name / "config.json").write_text(json.dumps({**body, **config}))
        if remove:
            (root / name / remove).unlink()
        wanted[name] = says

    folder("gpt2", "'gpt2' is not supported. Supported: llama", model_type="gpt2")
    folder("mixtral", "'mixtral' is not supported", model_type="mixtral")
    folder("own-code", "its own Python code", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    folder("quantised", "quantised weights", quantization_config={"bits": 4})
    folder("nan", "rms_norm_eps = nan", rms_norm_eps=float("nan"))
    folder("empty", "no weights", "model.safetensors")
    folder("wordless", "no tokenizer", "tokenizer.json")
    folder("other-shape", "not of the same model", hidden_size=48, head_dim=12)
    for name, facts, says in (
        ("falcon.gguf", {"general.architecture": "falcon"}, "of architecture 'falcon'"),
        ("nan.gguf", {"general.architecture": "llama", "llama.rope.freq_base": float("nan")}, "llama.rope.freq_base = nan"),
        ("moe.gguf", {"general.architecture": "llama", "llama.expert_count": 8}, "a mixture of experts"),
    ):
        write_gguf(root / name, facts)
        wanted[name] = says
    (root / "text.gguf").write_text("no model")
    (root / "torn.gguf").write_bytes(b"GGUF\x03\0\0\0\1")
    wanted |= {"text.gguf": "not a GGUF file", "torn.gguf": "damaged"}

    # As the hub's own client keeps what it fetched.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    kept = hub / "models--some--mixture"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("1234")
    (kept / "snapshots" / "1234").mkdir(parents=True)
    (kept / "snapshots" / "1234" / "config.json").write_text('{"model_type": "mixtral"}')
    wanted["some/mixture"] = "'mixtral' is not supported"

    for name, says in wanted.items():
        with pytest.raises(SelfprunerError) as caught:
            admit(SearchConfig(rate=0.2, model=name), ServerSettings(model_root=root))
        assert says in caught.value.message, name
        assert caught.value.param == "model"
    assert admit(SearchConfig(rate=0.2, model="not/fetched"), ServerSettings(model_root=root)).model == "not/fetched"


def test_admission_of_devices_and_proposers() -> None:
    offered = ServerSettings(devices="cuda:0,cpu", proposers={"gpt": {"kind": "openai", "model": "m", "api_key": "k"}})
    assert offered.devices == ("cuda:0", "cpu")
    for device in ("auto", "cpu", "cuda:0"):
        admit(SearchConfig(rate=0.2, device=device, proposer="gpt"), offered)
    with pytest.raises(ConfigError, match="Known: auto, cpu, cuda:0"):
        admit(SearchConfig(rate=0.2, device="cuda:1"), offered)
    with pytest.raises(ConfigError, match="Did you mean 'gpt'"):
        admit(SearchConfig(rate=0.2, proposer="gptt"), offered)
    with pytest.raises(ConfigError):
        admit(SearchConfig(rate=0.2, proposer="unused", preset="evolution"), offered)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"HOST": "0.0.0.0"}, "needs a token"),
        ({"HOST": "example.org"}, "needs a token"),
        ({"TOKEN": "short"}, "shorter than 8"),
        ({"PORT": "99999"}, "SELFPRUNER_PORT"),
        (
            {"PROPOSERS": '{"gpt": {"kind": "openai", "model": "m", "api_key": "KEY", "base_url": "ftp://x"}}'},
            "SELFPRUNER_PROPOSERS",
        ),
        ({"PROPOSERS": "{KEY"}, "JSON"),
        ({"MODEL_ROOT": "/no/such/folder"}, "not a folder"),
        ({"MODEL_ROOT": ""}, "SELFPRUNER_MODEL_ROOT: is empty"),
        ({"HOME": ""}, "SELFPRUNER_HOME: is empty"),
        ({"DEVICES": ","}, "SELFPRUNER_DEVICES"),
    ],
)
def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"SELFPRUNER_{name}", value)
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings()
    assert "KEY" not in caught.value.message


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SELFPRUNER_HOME", str(tmp_path))
    monkeypatch.setenv("SELFPRUNER_TOKENS", '{"ann": "long-enough"}')
    monkeypatch.setenv("SELFPRUNER_PROPOSERS__GPT", '{"kind": "openai", "model": "m", "api_key": "sk-hidden"}')
    found = load_settings(host="0.0.0.0", port=None)
    assert found.database == tmp_path / "selfpruner.db"
    assert set(found.all_proposers) == {"local", "gpt"}
    assert found.all_proposers["gpt"].model == "m"
    assert "sk-hidden" not in repr(found)
    assert "long-enough" not in repr(found)
