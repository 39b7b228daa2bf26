"""``sdonnx run --server``: tokens, TLS, broken connections, and what is no server or has other packages."""

import re
import shutil
import socket
import ssl
import subprocess

import pytest
from sdonnx_models import DEFAULT, bundled
from support.remote import FAST, answering, http, listening, names, run, states
from support.server import running_server


def test_the_token(tmp_path, monkeypatch):
    with running_server(token="a/secret") as guarded:
        host = guarded.url.removeprefix("http://")
        for options, expected in [
            ([], "requires a token; give the one it was started with as --token or SDONNX_TOKEN"),
            (["--token", "another"], "refuses the token"),
        ]:
            ran = run("a cat", *FAST, "--server", guarded.url, *options, cwd=tmp_path)
            assert (ran.returncode, f"{guarded.url} {expected}" in ran.stderr) == (1, True), ran.stderr
        assert run("a cat", *FAST, "--server", f"http://:a%2Fsecret@{host}", cwd=tmp_path).returncode == 0
        assert run("a cat", *FAST, "--server", guarded.url, "--token", "a/secret", cwd=tmp_path).returncode == 0
        monkeypatch.setenv("SDONNX_TOKEN", "a/secret")
        assert run("a cat", *FAST, "--server", guarded.url, cwd=tmp_path).returncode == 0


def test_a_job_is_followed_on_over_broken_connections(server, tmp_path, impatient):
    """Of a proxy that breaks each connection after some bytes: the events go on where they were."""
    followed, before = [], len(states(server))

    def forward(connection):
        request = connection.recv(1 << 16)
        while request.startswith(b"POST") and not request.endswith(b"}"):
            request += connection.recv(1 << 16)
        with socket.create_connection(server.address) as target:
            target.sendall(request)
            left = 1 << 30
            if b"/events" in request:
                followed.append(int(re.search(rb"Last-Event-ID: (\d+)", request)[1]))
                left = 900
            while left > 0 and (data := target.recv(min(left, 1 << 16))):
                left -= len(data)
                connection.sendall(data)

    with listening(forward) as port:
        ran = run("a cat", "--steps", "20", "--server", f"http://127.0.0.1:{port}", "-o", "o.png", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(followed) > 2
    assert followed == sorted(set(followed))
    assert len(states(server)) == before + 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate")
def test_certificates(tmp_path, monkeypatch):
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    options = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(["openssl", "req", "-x509", *options, *name, *files], cwd=tmp_path, capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    def answer(connection):
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1 << 16)
            secured.sendall(http(404, "{}"))

    with listening(answer) as port:
        for url, certificates, message in [
            (f"https://localhost:{port}", None, f"certificate of https://localhost:{port} is not trusted (self-signed"),
            (f"https://localhost:{port}", tmp_path / "cert.pem", "is not an sdonnx server"),
            (f"http://localhost:{port}", None, "closed the connection"),
        ]:
            if certificates is not None:
                monkeypatch.setenv("SSL_CERT_FILE", str(certificates))
            ran = run("a cat", "--server", url, cwd=tmp_path)
            assert (ran.returncode, message in ran.stderr) == (1, True), ran.stderr


@pytest.mark.parametrize(
    ("answer", "scheme", "message"),
    [
        (http(404, '{"detail": "Not Found"}'), "http", "is not an sdonnx server"),
        (http(200, "<html>"), "http", "is not an sdonnx server"),
        (http(200, '{"models": [{"name": "llama"}]}'), "http", "is not an sdonnx server"),
        (http(302, "", "Location: http://example.org/\r\n"), "http", "is not an sdonnx server (it answered 302)"),
        (b"SSH-2.0-OpenSSH_9.7\r\n", "http", "does not speak HTTP"),
        (b"", "http", "closed the connection"),
        (http(400, "plain HTTP"), "https", "does not speak TLS; write http://"),
        (
            http(200, '{"version": "99.1", "models": [], "vaes": [], "controls": []}'),
            "http",
            "has sdonnx 99.1, this is",
        ),
    ],
)
def test_what_is_no_server_is_told_in_one_line(tmp_path, answer, scheme, message):
    with answering(answer) as port:
        ran = run("a cat", "--server", f"{scheme}://127.0.0.1:{port}", cwd=tmp_path)
    assert (ran.returncode, len(ran.stderr.splitlines())) == (1, 1), ran.stderr
    assert f"127.0.0.1:{port} {message}" in ran.stderr


def test_a_server_that_is_not_there(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ran = run("a cat", "--server", f"127.0.0.1:{port}", cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == f"error: there is no server at http://127.0.0.1:{port}; start one there with: sdonnx serve\n"


def test_servers_with_other_packages(server, tmp_path):
    """By their default, by what they have, and by the weights behind a name."""
    first, second = tmp_path / "another", tmp_path / "packages" / DEFAULT
    for copy in (first, second):
        shutil.copytree(bundled()[DEFAULT], copy)
    manifest = second / "sdonnx.json"
    manifest.write_text(re.sub(r'"sha256": "[0-9a-f]{4}', '"sha256": "0000', manifest.read_text(), count=1))
    with running_server(packages=(first, second)) as other:
        both = ["--server", f"{server.url},{other.url}"]
        for options, message in [
            ([], f"{other.url} another ["),
            (["-m", "another"], f"{server.url} serves no model 'another'; it has {DEFAULT}"),
            (["-m", DEFAULT], "serve the same packages"),
        ]:
            ran = run("a cat", *both, *options, cwd=tmp_path)
            assert (ran.returncode, message in ran.stderr) == (1, True), ran.stderr
    assert names(tmp_path) == ["another", "packages"]
