"""The page's files: in the wheel, small, of nobody else's, and served so that a browser runs nothing but them."""

import re

import httpx
import pytest
from hatchling.builders.wheel import WheelBuilder
from support.paths import ROOT
from support.server import running_server

from sdonnx.server.static import MEDIA_TYPES, page_files

FILES = page_files()
FOLDER = ROOT / "sdonnx/server/page"
MOST_BYTES = 100_000
SVG = "http://www.w3.org/2000/svg"


@pytest.fixture(scope="module")
def client():
    """Of a server that requires a token, which the page needs not have."""
    with running_server(token="correct-horse") as server, httpx.Client(base_url=server.url) as each:
        yield each


def url_of(name):
    return "/" if name == "index.html" else f"/page/{name}"


def test_every_file_is_served_and_in_the_wheel():
    assert {"index.html", "main.js", "style.css"} <= FILES.keys()
    assert {each.name for each in FOLDER.iterdir()} == FILES.keys()
    in_wheel = {each.distribution_path for each in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"sdonnx/server/page/{name}" for name in FILES} <= in_wheel


@pytest.mark.parametrize("name", FILES)
def test_a_file_comes_as_it_is_and_a_second_time_as_304(client, name):
    reply = client.get(url_of(name))
    assert (reply.status_code, reply.content) == (200, (FOLDER / name).read_bytes())
    assert reply.headers["content-type"].split(";")[0] == MEDIA_TYPES[(FOLDER / name).suffix]
    assert reply.headers["cache-control"] == "no-cache"
    tag = reply.headers["etag"]
    assert re.fullmatch(r'W/"[0-9a-f]{32}"', tag)
    for known in (tag, f'"other", {tag}', "*"):
        again = client.get(url_of(name), headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get(url_of(name), headers={"If-None-Match": '"other"'}).status_code == 200
    head = client.head(url_of(name))
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)


@pytest.mark.parametrize("name", FILES)
def test_browsers_run_nothing_but_the_page(client, name):
    headers = client.get(url_of(name)).headers
    policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' blob: data:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["", "missing.js", "..%2fstatic.py", "%2e%2e/static.py", "a/main.js", "MAIN.JS"])
def test_other_names_are_not_found(client, name):
    assert client.get(f"/page/{name}", headers={"Authorization": "Bearer correct-horse"}).status_code == 404


def test_the_page_is_small(client):
    replies = [client.get(f"/page/{name}") for name in FILES]
    assert all(each.headers["content-encoding"] == "gzip" for each in replies if len(each.content) > 500)
    assert sum(int(each.headers["content-length"]) for each in replies) <= MOST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    text = FILES[name].content.decode()
    assert {each for each in re.findall(r"(?:https?|wss?)://[^\s\"'`)]+", text) if each != SVG} == set()
    assert re.findall(r"""["'`(=]\s*//[\w$]""", text) == []


def test_the_html_has_no_inline_script_or_style():
    html = FILES["index.html"].content.decode()
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", html) == []
    assert re.findall(r"<script(?![^>]*\ssrc=)", html) == []
