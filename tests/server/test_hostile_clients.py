"""What hostile or broken clients can do to the server: nothing. Over raw sockets, mostly."""

import json
import threading
import time

import httpx
import pytest
from support.raw_http import exchange, request, status
from support.server import running_server

from sdonnx.server import serving
from sdonnx.server.security import middleware


@pytest.fixture(scope="module")
def server():
    with running_server(max_body=1 << 20) as running:
        yield running


CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"


def test_a_body_of_100_mb_is_refused_before_it_comes(server):
    start = request("POST", "/health", Content_Length=100 << 20)
    assert status(exchange(server, start)) == 413
    expecting = request("POST", "/health", Content_Length=100 << 20, Expect="100-continue")
    assert exchange(server, expecting).startswith(b"HTTP/1.1 413")


def test_requests_reads_413(server):
    answer = httpx.post(server.url + "/sdapi/v1/txt2img", content=b"x" * (8 << 20))
    assert (answer.status_code, list(answer.json())) == (413, ["detail"])
    assert list(httpx.post(server.url + "/v1/images/edits", content=b"x" * (2 << 20)).json()) == ["error"]


def test_absurd_lengths(server):
    for length in ("9" * 18, "9" * 30, "9" * 6000, "-1", "1e3"):
        assert status(exchange(server, request("POST", "/health", Content_Length=length))) in (400, 413)


def reading_app():
    """An application that reads each body, and takes every ValueError for bad JSON."""

    async def app(scope, receive, send):
        try:
            while (await receive()).get("more_body"):
                pass
            code = 200
        except ValueError:
            code = 400
        await send({"type": "http.response.start", "status": code, "headers": []})
        await send({"type": "http.response.body"})

    return app


@pytest.fixture
def reading(server, monkeypatch):
    """The server, whose routes read bodies to their ends."""
    stack = server.app.middleware_stack or server.app.build_middleware_stack()
    layer = stack
    while not isinstance(layer, middleware.BodyLimit):
        layer = layer.__dict__.get("app") or layer.__dict__["_app"]
    monkeypatch.setattr(layer, "_app", reading_app())
    monkeypatch.setattr(server.app, "middleware_stack", stack)
    return server


def test_chunked_bodies(reading):
    start = request("POST", "/x", Transfer_Encoding="chunked")
    assert status(exchange(reading, start, CHUNK * 15, b"0\r\n\r\n")) == 200
    assert status(exchange(reading, start, CHUNK * 20)) == 413
    assert status(exchange(reading, start, b"zz\r\n")) == 400


def test_slow_bodies(reading, monkeypatch):
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.3)
    start = request("POST", "/x", Content_Length=10)
    began = time.monotonic()
    assert status(exchange(reading, start, b"a")) == 408
    assert status(exchange(reading, start, *[b"a"] * 6, pause=0.1)) == 408
    assert time.monotonic() - began < 3
    assert status(exchange(reading, start, b"a" * 10)) == 200


def test_slow_headers(server, monkeypatch):
    monkeypatch.setattr(serving, "HEADER_TIMEOUT", 0.3)
    began = time.monotonic()
    assert exchange(server) == b""
    assert exchange(server, b"GET / HTTP/1.1\r\n", b"a: b\r\n", b"c: d\r\n", b"e: f\r\n", pause=0.1) == b""
    again = request().replace(b"Connection: close\r\n", b"")
    assert exchange(server, again, b"GET /health HT", pause=0.1).count(b"200 OK") == 1
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100),  # TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"x: " + b"y" * (1 << 20) + b"\r\n\r\n",
        b"GET /missing HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /missing HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_not_http(server, raw):
    assert status(exchange(server, raw, end_writing=True)) in (None, 400, 403, 404)
    assert status(exchange(server, request())) == 200


def test_methods(server):
    head = exchange(server, request("HEAD"))
    assert (status(head), head.partition(b"\r\n\r\n")[2]) == (200, b"")
    assert status(exchange(server, request("OPTIONS"))) == 405
    assert status(exchange(server, request("POST"))) == 405
    assert status(exchange(server, request("TRACE"))) == 405
    for path in ("/missing", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/%ff%00", "*"):
        assert status(exchange(server, request(path=path))) == 404
    assert status(exchange(server, request("GET", "/health", Upgrade="websocket", Connection="Upgrade"))) == 200


def test_half_closed_connections(server):
    """A client that ends its own side is taken for gone; nothing is left of it."""
    for _ in range(5):
        exchange(server, request("POST", Content_Length=10), b"abc", end_writing=True)
        exchange(server, request(), end_writing=True)
    assert status(exchange(server, request())) == 200


def test_50_clients_at_once(server):
    barrier, statuses = threading.Barrier(50), []

    def ask():
        barrier.wait()
        statuses.append(status(exchange(server, request())))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 50


def test_unknown_errors_tell_nothing(server, monkeypatch, caplog):
    async def fail(scope, receive, send):
        raise KeyError("secret")

    monkeypatch.setattr(server.app.router, "default", fail)
    for path, key in (("/missing", "detail"), ("/v1/missing", "error")):
        answer = httpx.get(server.url + path)
        assert (answer.status_code, list(answer.json())) == (500, [key])
        assert "secret" not in answer.text
        assert "Traceback" not in answer.text
    assert "KeyError" in caplog.text


def test_bodies_that_break_python_are_the_clients_mistake(server, monkeypatch):
    async def parse(scope, receive, send):
        json.loads("[" * 200_000)

    monkeypatch.setattr(server.app.router, "default", parse)
    assert httpx.get(server.url + "/missing").status_code == 400


def test_answers_come_at_once(server):
    """Nagle's algorithm and delayed acknowledgements make it 40 ms on connections that are kept."""
    with httpx.Client(base_url=server.url) as client:
        client.get("/health")
        began = time.monotonic()
        for _ in range(20):
            client.get("/health")
        assert time.monotonic() - began < 0.5


def test_json_of_countless_values_is_refused_before_it_is_parsed():
    """A list of empty lists takes forty times its size in memory, and all other clients wait while it is parsed."""
    paths = "/api/jobs", "/api/tokens", "/sdapi/v1/txt2img", "/sdapi/v1/options", "/v1/images/generations"
    with running_server() as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for path in paths:
            for many in ("[]," * 200_000, "{}," * 200_000, "0," * 200_000):
                reply = client.post(path, content=f'{{"prompt": "", "a": [{many}0]}}')
                assert reply.status_code == 413
                assert "more than 200000 values" in reply.text
