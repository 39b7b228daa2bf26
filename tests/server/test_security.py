"""Who may use the server: hosts, origins of pages, tokens. Over raw sockets, mostly."""

import json

import httpx
import pytest
from support.raw_http import exchange, headers_of, request, status
from support.server import running_server

import sdonnx
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


def test_a_cookie_does_not_count_of_a_foreign_page():
    """A page of another port of localhost is of the same site, so the browser sends the cookie."""
    page, cookie = {"Origin": "http://localhost:3000"}, {"Cookie": "sdonnx_token=secret"}
    with running_server(token="secret", cors=("http://localhost:3000",)) as server:
        url = f"{server.url}/sdapi/v1/interrupt"
        assert httpx.post(url, headers=cookie).status_code == 200
        assert httpx.post(url, headers={**cookie, "Origin": server.url}).status_code == 200
        assert httpx.post(url, headers={**cookie, **page}).status_code == 401
        assert httpx.post(url, headers={**page, "Authorization": "Bearer secret"}).status_code == 200
