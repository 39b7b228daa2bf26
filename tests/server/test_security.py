"""Who may use the server, and what hostile or broken clients can do to it: nothing. Over raw sockets, mostly."""

import json
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest
from support.server import running_server

import sdonnx
from sdonnx.server import serving
from sdonnx.server.security import middleware
from sdonnx.server.security.access import Access
from sdonnx.server.settings import Settings

TOKEN = "correct-horse"


@pytest.fixture(scope="module")
def server():
    with running_server(max_body=1 << 20, cors=("https://lite.koboldai.net",), allowed_hosts=("nas.local",)) as running:
        yield running


@pytest.fixture(scope="module")
def locked():
    with running_server(token=TOKEN) as running:
        yield running


def exchange(server, *parts, pause=0.0, end_writing=False):
    """Send bytes over a new connection and read until the server closes it."""
    with socket.create_connection(server.address, timeout=10) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
        if end_writing:
            with suppress(OSError):  # the server may have closed it
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                received += chunk
    return received


def request(method="GET", path="/health", *, host="localhost", body=b"", **headers):
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def status(response):
    return int(response.split(b" ", 2)[1]) if response else None


def headers_of(response):
    lines = response.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


GOOD_HOSTS = ["localhost", "LOCALHOST:80", "127.0.0.1:7860", "[::1]:7860", "[::1]", "localhost.", "nas.local:1"]
BAD_HOSTS = [
    "evil.example",
    "localhost.evil.example",
    "127.0.0.1.evil.example:7860",
    "192.168.1.7",
    "localhost:port",
    "localhost:7860:1",
    "user@localhost",
    "[::1].evil.example",
    "[evil.example]",
    "[::2]",
    "",
]


@pytest.mark.parametrize(("host", "expected"), [*((h, 200) for h in GOOD_HOSTS), *((h, 403) for h in BAD_HOSTS)])
def test_host(server, host, expected):
    response = exchange(server, request(host=host))
    assert status(response) == expected
    if expected == 403:
        assert "--allow-host" in json.loads(response.partition(b"\r\n\r\n")[2])["detail"]


@pytest.mark.parametrize("raw", [request(host=None), request(host="localhost", Host="evil.example")])
def test_missing_or_second_host(server, raw):
    assert status(exchange(server, raw)) == 400


def test_host_of_http_1_0(server):
    assert status(exchange(server, b"GET /health HTTP/1.0\r\n\r\n")) == 403


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost:7860", 200),
        ("http://LOCALHOST:7860", 200),
        ("http://localhost:7861", 403),
        ("https://localhost:7860", 200),  # a proxy that ends TLS
        ("http://evil.example", 403),
        ("https://lite.koboldai.net", 200),
        ("https://lite.koboldai.net.evil.example", 403),
        ("http://lite.koboldai.net", 403),
        ("null", 403),
        ("", 403),
        ("file://", 403),
        ("http://localhost:7860@evil.example", 403),
    ],
)
def test_origin(server, origin, expected):
    response = exchange(server, request(host="localhost:7860", Origin=origin))
    assert status(response) == expected
    allowed = headers_of(response).get("access-control-allow-origin")
    assert allowed == (origin if origin == "https://lite.koboldai.net" else None)
    assert "access-control-allow-credentials" not in headers_of(response)


def test_origin_of_the_default_port(server):
    assert status(exchange(server, request(host="localhost", Origin="http://localhost"))) == 200
    assert status(exchange(server, request(host="localhost:80", Origin="http://localhost"))) == 200
    assert status(exchange(server, request(host="localhost", Origin="http://localhost:7860"))) == 403


def test_preflight(server):
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, content-type"}
    answer = exchange(server, request("OPTIONS", "/sdapi/v1/txt2img", Origin="https://lite.koboldai.net", **asked))
    assert status(answer) == 204
    found = headers_of(answer)
    assert found["access-control-allow-origin"] == "https://lite.koboldai.net"
    assert found["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in found["access-control-allow-methods"]
    assert found["vary"] == "Origin"
    foreign = exchange(server, request("OPTIONS", "/sdapi/v1/txt2img", Origin="https://evil.example", **asked))
    assert status(foreign) == 403
    assert "access-control-allow-origin" not in headers_of(foreign)


def test_preflight_needs_no_token_and_the_request_after_it_does():
    with running_server(token=TOKEN, cors=("*",)) as server:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        preflight = httpx.options(server.url + "/v1/models", headers=asked)
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, "*")
        answer = httpx.get(server.url + "/missing", headers={"Origin": "https://a.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "*")
        assert "access-control-allow-credentials" not in answer.headers
        assert httpx.get(server.url + "/health", headers={"Origin": "null"}).status_code == 403


def test_headers_of_every_response(server):
    for raw in (request(), request(path="/missing"), request(host="evil.example"), request("POST")):
        found = headers_of(exchange(server, raw))
        assert found["x-content-type-options"] == "nosniff"
        assert found["referrer-policy"] == "no-referrer"
        assert "default-src 'none'" in found["content-security-policy"]
        assert found["cross-origin-resource-policy"] == "same-origin"
        assert found["server-timing"].startswith("total;dur=")
        assert "server" not in found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 401),
        ({"headers": {"Authorization": ""}}, 401),
        ({"headers": {"Authorization": f"Bearer {TOKEN}"}}, 404),
        ({"headers": {"Authorization": f"bearer  {TOKEN}"}}, 404),
        ({"headers": {"Authorization": f"Bearer {TOKEN}x"}}, 401),
        ({"headers": {"Authorization": f"Bearer {TOKEN[:-1]}"}}, 401),
        ({"headers": {"Authorization": TOKEN}}, 401),
        ({"headers": {"Authorization": "Bearer caf\xe9".encode("latin-1")}}, 401),
        ({"headers": {"Authorization": "Basic !!!"}}, 401),
        ({"auth": ("", TOKEN)}, 404),
        ({"auth": ("anybody", TOKEN)}, 404),
        ({"auth": (TOKEN, "")}, 401),
        ({"auth": ("anybody", "wrong")}, 401),
        ({"headers": {"Cookie": f"a=b; sdonnx_token={TOKEN}"}}, 404),
        ({"headers": {"Cookie": "sdonnx_token=wrong"}}, 401),
        ({"headers": {"Cookie": f"xsdonnx_token={TOKEN}"}}, 401),
        ({"params": {"token": TOKEN}}, 401),
    ],
)
def test_token(locked, given, expected):
    assert httpx.get(locked.url + "/missing", **given).status_code == expected


def test_unauthorized_answers_suit_their_api(locked):
    openai = httpx.get(locked.url + "/v1/models")
    assert openai.status_code == 401
    assert openai.headers["www-authenticate"].startswith("Bearer")
    assert set(openai.json()["error"]) == {"message", "type", "param", "code"}
    a1111 = httpx.get(locked.url + "/sdapi/v1/options")
    assert a1111.headers["www-authenticate"].startswith("Basic")
    assert list(a1111.json()) == ["detail"]
    assert httpx.get(locked.url + "/health").status_code == 200


def test_a_token_may_be_a_user_and_a_password():
    """As of A1111's --api-auth."""
    with running_server(token="user:secret") as server:
        statuses = [
            httpx.get(server.url + "/missing", auth=auth).status_code
            for auth in [("user", "secret"), ("other", "secret"), ("other", "user:secret")]
        ]
    assert statuses == [404, 401, 404]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": ""}, "printable ASCII"),
        ({"token": "caf\xe9"}, "printable ASCII"),
        ({"token": "two words"}, "printable ASCII"),
        ({"host": "0.0.0.0"}, "requires --token"),
        ({"host": "192.168.1.7"}, "requires --token"),
        ({"host": "::"}, "requires --token"),
        ({"cors": ("*",)}, "requires --token"),
        ({"cors": ("lite.koboldai.net",)}, "not an origin"),
        ({"cors": ("https://lite.koboldai.net/page",)}, "not an origin"),
        ({"cors": ("null",)}, "not an origin"),
        ({"cors": ("https://user@host",)}, "not an origin"),
        ({"cors": ("http://a:99999",)}, "not an origin"),
        ({"allowed_hosts": ("http://nas.local",)}, "not a host name"),
        ({"allowed_hosts": ("nas.local:7860",)}, "not a host name"),
        ({"allowed_hosts": ("*",)}, "not a host name"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(sdonnx.RequestError, match=message):
        Access.of(Settings(packages=(), **settings))


def test_hosts_of_a_server_for_other_machines():
    """Pages can't have an IP address as the host name that leads a browser here."""
    access = Access.of(Settings(packages=(), host="0.0.0.0", token=TOKEN, cors=("HTTPS://A.example:443/",)))
    assert all(map(access.allows_host, ("localhost", "192.168.1.7", "fe80::1")))
    assert not access.allows_host("evil.example")
    assert access.allows_origin("https://a.example")
    named = Access.of(Settings(packages=(), host="Box.local", token=TOKEN))
    assert named.allows_host("box.local")


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
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
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


def test_a_cookie_does_not_count_of_a_foreign_page():
    """A page of another port of localhost is of the same site, so the browser sends the cookie."""
    page, cookie = {"Origin": "http://localhost:3000"}, {"Cookie": "sdonnx_token=secret"}
    with running_server(token="secret", cors=("http://localhost:3000",)) as server:
        url = f"{server.url}/sdapi/v1/interrupt"
        assert httpx.post(url, headers=cookie).status_code == 200
        assert httpx.post(url, headers={**cookie, "Origin": server.url}).status_code == 200
        assert httpx.post(url, headers={**cookie, **page}).status_code == 401
        assert httpx.post(url, headers={**page, "Authorization": "Bearer secret"}).status_code == 200
