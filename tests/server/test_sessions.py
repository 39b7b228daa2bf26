"""The page's sign-in: the token becomes a cookie that scripts and other sites can't use."""

import time
from concurrent.futures import ThreadPoolExecutor
from http.cookies import SimpleCookie

import httpx
import pytest
from support.server import running_server

from sdonnx.server.security import access

TOKEN = 'user:a;b"c%41,\\'
"""A cookie's value can have none of these as they are."""

FOREIGN = "https://a.example"


@pytest.fixture(scope="module")
def server():
    with running_server(token=TOKEN, cors=(FOREIGN,)) as running:
        yield running


def sign_in(server, token=TOKEN, **headers):
    return httpx.post(f"{server.url}/api/session", json={"token": token}, headers=headers)


def cookie_of(reply):
    """The cookie that a reply sets, and what a browser sends of it."""
    cookie = SimpleCookie(reply.headers["set-cookie"])["sdonnx_token"]
    return cookie, {"Cookie": f"sdonnx_token={cookie.coded_value}"}


def test_the_token_becomes_a_cookie_that_opens_the_api(server):
    reply = sign_in(server)
    assert (reply.status_code, reply.content) == (204, b"")
    cookie, sent = cookie_of(reply)
    assert cookie["httponly"] and not cookie["secure"]
    assert (cookie["samesite"].lower(), cookie["path"], cookie["domain"]) == ("strict", "/", "")
    assert int(cookie["max-age"]) > 24 * 3600
    assert httpx.get(f"{server.url}/api/models", headers=sent).status_code == 200
    assert httpx.get(f"{server.url}/sdapi/v1/options", headers=sent).status_code == 200


def test_the_cookie_of_a_page_behind_tls_is_secure(server):
    origin = server.url.replace("http:", "https:")
    assert cookie_of(sign_in(server, Origin=origin))[0]["secure"]
    assert not cookie_of(sign_in(server, Origin=server.url))[0]["secure"]


def test_the_cookie_does_not_count_of_another_page(server):
    _, sent = cookie_of(sign_in(server))
    for origin, status in ((server.url, 200), (FOREIGN, 401), ("https://b.example", 403)):
        reply = httpx.get(f"{server.url}/api/models", headers={**sent, "Origin": origin})
        assert reply.status_code == status
    assert sign_in(server, Origin="https://b.example").status_code == 403


def test_a_wrong_token_costs_time_and_holds_nobody_up(server, monkeypatch):
    """By whichever way it comes; a request without any is answered at once."""
    monkeypatch.setattr(access, "GUESS_SECONDS", 2.0)
    url, began = f"{server.url}/api/models", time.monotonic()
    with ThreadPoolExecutor() as threads:
        guesses = [
            threads.submit(sign_in, server, token="user"),
            threads.submit(httpx.get, url, headers={"Authorization": "Bearer guess"}),
            threads.submit(httpx.get, url, headers={"Cookie": "sdonnx_token=guess"}),
        ]
        time.sleep(0.2)
        assert httpx.get(url).status_code == 401
        assert sign_in(server).status_code == 204
        assert not any(each.done() for each in guesses)
        replies = [each.result() for each in guesses]
    assert time.monotonic() - began > 2
    assert [each.status_code for each in replies] == [401, 401, 401]
    assert "not the server's token" in replies[0].json()["detail"]
    assert "set-cookie" not in replies[0].headers


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{}", 401),
        (b'{"token": null}', 401),
        (b'{"token": ""}', 401),
        (b'{"token": "\\ud800"}', 401),
        (b'{"token": 7}', 400),
        (b'{"password": "x"}', 400),
        (b"[]", 400),
        (b"{", 400),
        (b'{"token": "' + b"x" * 5000 + b'"}', 413),
    ],
)
def test_bodies_that_are_something_else(server, body, status):
    assert httpx.post(f"{server.url}/api/session", content=body).status_code == status


def test_signing_out_deletes_the_cookie(server):
    cookie, sent = cookie_of(httpx.delete(f"{server.url}/api/session"))
    assert (cookie.value, cookie["max-age"], cookie["path"]) == ("", "0", "/")
    assert httpx.get(f"{server.url}/api/models", headers=sent).status_code == 401


def test_without_a_token_there_is_no_cookie():
    with running_server() as server:
        reply = sign_in(server, token="whatever")
        assert (reply.status_code, "set-cookie" in reply.headers) == (204, False)


def test_a_page_without_the_token_gets_no_dialog_of_the_browser(server):
    """Which browsers show for Basic, but not for Bearer, nor without a scheme."""

    def scheme(path, **headers):
        reply = httpx.get(server.url + path, headers=headers)
        assert reply.status_code == 401
        return reply.headers.get("www-authenticate", "").split(" ")[0]

    assert scheme("/sdapi/v1/options") == "Basic"
    assert scheme("/api/models") == "Bearer"
    for path in ("/sdapi/v1/options", "/api/models"):
        assert scheme(path, **{"Sec-Fetch-Dest": "empty"}) == ""
