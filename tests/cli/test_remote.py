"""``sdonnx run --server``: files, JSON and exit codes are those of a local run, whatever becomes of the servers."""

import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress

import pytest
from PIL import Image
from sdonnx_models import DEFAULT, bundled
from sdonnx_runtime.outputs.staging import lock_file
from support.cli import run_cli, running_cli
from support.server import running_server, server_process, wait_until

from sdonnx.client import pool
from sdonnx.client import server as client

FAST = ["--size", "64x64", "--steps", "2"]
SLOW = {"prompt": "a cat", "num_inference_steps": 200}


@pytest.fixture(scope="module")
def server():
    with running_server() as running:
        yield running


@pytest.fixture
def impatient(monkeypatch):
    """Waits of a second take a hundredth."""
    monkeypatch.setattr(client, "_DELAY", 0.01)
    monkeypatch.setattr(pool, "_DELAYS", (0.01, 0.05))
    monkeypatch.setattr(pool, "PATIENCE", 0.3)


def run(*arguments, cwd):
    return run_cli("run", *arguments, cwd=cwd)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def states(server):
    return [job.state.value for job in server.context.queue.jobs]


def same_files(first, second):
    assert names(first) == names(second)
    for name in names(first):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.fixture
def folders(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    return tmp_path / "here", tmp_path / "there"


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "7", "--no-enlarge", "-o", "o.png"],
        ["--seed", "7", "--count", "2", "--variation", "3:0.2", "--sigmas", "9,3,0.5"],
        ["--seed", "7", "--image", "../rgba.png", "--strength", "0.8", "--hires", "2x:0.5:2"],
        ["--seed", "7", "--image", "../cmyk.jpg", "--mask", "../mask.png", "--only-masked", "8"],
    ],
)
def test_files_and_json_are_those_of_a_local_run(server, folders, options):
    here, there = folders
    noise = Image.effect_noise((64, 64), 90)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 48, 48))
    Image.merge("RGBA", [noise, mask, noise, mask]).save(here.parent / "rgba.png")
    Image.merge("RGB", [noise, mask, noise]).convert("CMYK").save(here.parent / "cmyk.jpg")
    mask.save(here.parent / "mask.png")
    local = run("a red apple", *FAST, *options, "--json", cwd=here)
    remote = run("a red apple", *FAST, *options, "--json", "--server", server.url, cwd=there)
    assert (remote.returncode, remote.stderr) == (0, ""), remote.stderr
    same_files(here, there)
    expected, report = json.loads(local.stdout), json.loads(remote.stdout)
    assert report["timings"].keys() == expected["timings"].keys()
    assert {**report, "timings": None} == {**expected, "timings": None}


def test_controls_are_those_that_the_server_has(package, control, folders):
    here, there = folders
    Image.effect_noise((64, 64), 90).save(here.parent / "pose.png")
    options = [*FAST, "--seed", "1", "--control-preprocessor", "canny"]
    run("a cat", "-m", package, "--control", f"{control}:../pose.png:0.8:0:0.9", *options, cwd=here)
    with running_server(packages=(package, control)) as other:
        options += ["--server", other.url, "-m", package.name]
        ran = run("a cat", "--control", f"{control.name}:../pose.png:0.8:0:0.9", *options, cwd=there)
        assert ran.returncode == 0, ran.stderr
        same_files(here, there)
        for wrong in (["--control", "depth:../pose.png"], ["--control", "edges-onnx:../pose.png", "--vae", "taesd"]):
            ran = run("a cat", *wrong, *options, cwd=there)
            assert (ran.returncode, "serves no" in ran.stderr) == (1, True), ran.stderr


def test_an_image_that_is_not_enlarged_is_the_servers_file(server, tmp_path):
    assert run("a cat", *FAST, "--no-enlarge", "-o", "o.png", "--server", server.url, cwd=tmp_path).returncode == 0
    (stored,) = server.context.store.latest(1)
    assert (tmp_path / "o.png").read_bytes() == server.context.store.read(stored.name)


def test_a_batch_over_two_servers_is_that_of_a_local_run(server, folders):
    here, there = folders
    lines = [
        {"prompt": "a cat", "num_images": 2},
        {"prompt": "a cat", "steps": 3},
        "",
        {"prompt": "a dog", "negative_prompt": "red", "sampler": "euler"},
        '{"prompt": "a dog"',
        {"seed": 3},
        {"prompt": "a fox", "width": 65},
        {"prompt": "a fox", "image": "start.png", "strength": 0.5},
        {"prompt": "a fox", "image": "absent.png"},
        {"prompt": "a fox", "guidance_scale": "high"},
        {"prompt": "a red apple"},
    ]
    for folder in folders:
        write_lines(folder / "r.jsonl", *lines)
        Image.new("RGB", (64, 64), "teal").save(folder / "start.png")
    batch = ["--batch-file", "r.jsonl", *FAST, "--seed", "1", "-o", "out.png", "--json"]
    local = run(*batch, cwd=here)
    with running_server() as other:
        before = len(states(server))
        remote = run(*batch, "--server", f"{server.url},{other.url}", cwd=there)
        assert states(other)
        assert len(states(server)) > before
    (there / "out.journal").unlink()
    same_files(here, there)
    assert (remote.returncode, local.returncode) == (1, 1)
    note = "4 of 10 requests are done; the same command goes on with the others\n"
    bundled = local.stderr.splitlines(keepends=True)[0]
    assert remote.stderr.replace(note, "") == local.stderr.replace(bundled, "")
    reports = [
        {report["line"]: {**report, "timings": None} for report in map(json.loads, ran.stdout.splitlines())}
        for ran in (local, remote)
    ]
    assert reports[0] == reports[1]


def test_a_batch_goes_on_where_it_stopped(server, tmp_path):
    write_lines(tmp_path / "r.jsonl", {"prompt": "a cat"}, {"prompt": 5}, {"prompt": "a fox"}, {"prompt": "a dog"})
    batch = ["--batch-file", "r.jsonl", *FAST, "--server", server.url]
    first = run(*batch, cwd=tmp_path)
    assert first.returncode == 1
    assert "3 of 4 requests are done" in first.stderr
    assert names(tmp_path) == ["r-0001.png", "r-0003.png", "r-0004.png", "r.journal", "r.jsonl"]
    (tmp_path / "r-0003.png").unlink()
    with (tmp_path / "r.journal").open("a") as file:
        file.write('{"line": 4, "re')  # as kill -9 leaves it
    write_lines(
        tmp_path / "r.jsonl", {"prompt": "a cat"}, {"prompt": "a bat"}, {"prompt": "a fox"}, {"prompt": "a dog"}
    )
    kept = [(tmp_path / name).read_bytes() for name in ("r-0001.png", "r-0004.png")]
    before = len(states(server))
    second = run(*batch, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "2 of 4 requests were done before; delete r.journal to repeat them" in second.stderr
    assert [line.split("  ")[0] for line in second.stderr.splitlines()[1:]] == ["r-0002.png", "r-0003.png"]
    assert len(states(server)) == before + 2
    assert names(tmp_path) == ["r-0001.png", "r-0002.png", "r-0003.png", "r-0004.png", "r.jsonl"]
    assert [(tmp_path / name).read_bytes() for name in ("r-0001.png", "r-0004.png")] == kept


def test_a_journal_is_no_other_file_and_no_other_process_has_it(server, tmp_path):
    write_lines(tmp_path / "p.txt", "a cat")
    batch = ["--batch-file", "p.txt", *FAST, "--server", server.url]
    (tmp_path / "p.journal").write_text("My diary")
    ran = run(*batch, cwd=tmp_path)
    assert (ran.returncode, "p.journal is not a journal of sdonnx" in ran.stderr) == (1, True), ran.stderr
    assert (tmp_path / "p.journal").read_text() == "My diary"
    with (tmp_path / "p.journal").open("wb") as file:
        lock_file(file)
        ran = run(*batch, cwd=tmp_path)
    assert (ran.returncode, "is in use by another process" in ran.stderr) == (1, True), ran.stderr
    assert names(tmp_path) == ["p.journal", "p.txt"]


def test_another_request_is_not_taken_for_one_that_was_done(server, tmp_path):
    write_lines(tmp_path / "r.jsonl", {"prompt": "a cat"}, {"prompt": 5})
    batch = ["--batch-file", "r.jsonl", "--server", server.url, "--size", "64x64", "-o", "o.png"]
    run(*batch, "--steps", "1", cwd=tmp_path)
    assert "1 of 2 requests were done" in run(*batch, "--steps", "1", cwd=tmp_path).stderr
    assert "were done" not in run(*batch, "--steps", "2", cwd=tmp_path).stderr


def test_what_a_killed_server_had_is_generated_by_another_one(server, tmp_path, impatient):
    slow = {"prompt": "a cat", "num_inference_steps": 30}
    write_lines(tmp_path / "r.jsonl", *[{"prompt": f"a cat {number}"} for number in range(6)], slow, slow)
    options = ["-o", tmp_path / "killed", "--threads", "1", "--memory", "max"]
    with server_process(*options) as other:
        process, url = other.process, other.url
        command = ["--batch-file", "r.jsonl", *FAST, "-o", "o.png", "--server", f"{url},{server.url}"]
        ran = []
        thread = threading.Thread(target=lambda: ran.append(run(*command, cwd=tmp_path)))
        thread.start()
        wait_until(lambda: list((tmp_path / "killed").glob("*.png")))
        process.kill()
        thread.join(60)
    assert ran[0].returncode == 0, ran[0].stderr
    assert f"there is no server at {url}" in ran[0].stderr or f"{url} closed the connection" in ran[0].stderr
    assert names(tmp_path) == ["killed", *(f"o-{number:04}.png" for number in range(1, 9)), "r.jsonl"]


def test_without_servers_the_batch_ends_and_can_go_on(server, tmp_path, impatient):
    write_lines(tmp_path / "r.jsonl", {"prompt": "a cat"}, SLOW, {"prompt": "a dog"})
    command = ["--batch-file", "r.jsonl", *FAST]
    options = ["-o", tmp_path / "ended", "--threads", "1", "--memory", "max"]
    with server_process(*options) as other:
        process, url = other.process, other.url
        ran = []
        thread = threading.Thread(target=lambda: ran.append(run(*command, "--server", url, cwd=tmp_path)))
        thread.start()
        wait_until(lambda: (tmp_path / "r-0001.png").exists())
        process.terminate()
        thread.join(60)
    assert ran[0].returncode == 1
    assert "1 of 3 requests are done" in ran[0].stderr
    assert f"no server is left; there is no server at {url}" in ran[0].stderr
    write_lines(tmp_path / "r.jsonl", {"prompt": "a cat"}, {"prompt": "a fox"}, {"prompt": "a dog"})
    assert run(*command, "--server", server.url, cwd=tmp_path).returncode == 0
    assert names(tmp_path) == ["ended", "r-0001.png", "r-0002.png", "r-0003.png", "r.jsonl"]


def test_a_full_server_is_asked_again(server, tmp_path, impatient):
    write_lines(tmp_path / "p.txt", "a cat", "a dog")
    with running_server(max_queued=0) as full:
        ran = run("--batch-file", "p.txt", *FAST, "--server", f"{full.url},{server.url}", cwd=tmp_path)
        assert states(full) == []
    assert (ran.returncode, len(ran.stderr.splitlines())) == (0, 2), ran.stderr


def test_a_request_that_is_lost_again_and_again_fails(tmp_path, impatient):
    write_lines(tmp_path / "r.jsonl", SLOW, {"prompt": "a dog"})
    with running_server() as other:
        ran = []
        command = ["--batch-file", "r.jsonl", *FAST, "--server", other.url]
        thread = threading.Thread(target=lambda: ran.append(run(*command, cwd=tmp_path)))
        thread.start()
        for count in (1, 2, 3):
            wait_until(lambda count=count: len(states(other)) == count and states(other)[-1] == "running")
            other.context.queue.interrupt()
        thread.join(60)
    assert f"line 1: 3 attempts were lost with their servers; {other.url} cancelled the job" in ran[0].stderr
    assert names(tmp_path) == ["r-0002.png", "r.journal", "r.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to the whole console")
def test_ctrl_c_cancels_the_jobs_on_the_servers(server, tmp_path):
    write_lines(tmp_path / "r.jsonl", {"prompt": "a cat"}, {"prompt": 5}, SLOW, SLOW)
    with (
        running_server() as other,
        running_cli(
            "run", "--batch-file", "r.jsonl", *FAST, "--server", f"{server.url},{other.url}", cwd=tmp_path
        ) as process,
    ):  # fmt: skip
        wait_until(lambda: (tmp_path / "r.journal").exists() and (tmp_path / "r.journal").read_text())
        wait_until(lambda: states(server)[-1:] == states(other)[-1:] == ["running"])
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        assert states(server)[-1:] == states(other)[-1:] == ["cancelled"]
    assert process.returncode == 130
    assert "line 2: prompt is 5" in stderr
    assert "1 of 4 requests are done" in stderr
    assert "Traceback" not in stderr
    assert names(tmp_path) == ["r-0001.png", "r.journal", "r.jsonl"]


def test_a_preview_is_written(server, tmp_path):
    options = [*FAST, "-o", "o.png", "--preview", "p.png", "--server", server.url]
    assert run("a red apple", *options, cwd=tmp_path).returncode == 0
    assert Image.open(tmp_path / "p.png").size == (64, 64)


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


@contextmanager
def listening(answer):
    """Something that calls ``answer(connection)`` for every connection; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    answer(connection)

        threading.Thread(target=listen, daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):  # macOS has none for sockets that listen
            listener.shutdown(socket.SHUT_RDWR)


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


def answering(data):
    """Something that answers every connection with these bytes; yields its port."""

    def answer(connection):
        connection.recv(1 << 16)
        connection.sendall(data)

    return listening(answer)


def http(status, body, more=""):
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}\r\n{body}".encode()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device has no effect on a --server"),
        (["--threads", "2"], "--threads has no effect on a --server"),
        (["--memory", "auto"], "--memory has no effect on a --server"),
        (["--lora", "x.safetensors"], "--lora has no effect on a --server; put the file into the server's --lora-dir"),
        (["--lora-dir", "."], "--lora-dir has no effect"),
        (["--embedding", "x.pt"], "--embedding has no effect"),
        (["--refiner", "x"], "--refiner has no effect"),
        (["--save-latents", "x.npz"], "--save-latents has no effect"),
        (["--outpaint", "8,8,8,8"], "--outpaint has no effect"),
        (["--server", "ftp://a"], "'ftp://a' is not a server's address"),
        (["--server", "http://:secret@a:b"], "'a:b' is not a server's address"),
        (["-o", "o.bmp"], "give a name that ends in .png"),
        (["--steps", "0"], "num_inference_steps is 0"),
        (["--size", "66x64"], "width 66 is not a multiple of 4"),
    ],
)
def test_what_is_refused(server, tmp_path, options, message):
    before = len(states(server))
    ran = run("a cat", *FAST, "--server", server.url, *options, cwd=tmp_path)
    assert (ran.returncode, message in ran.stderr, "secret" in ran.stderr) == (2, True, False), ran.stderr
    assert len(states(server)) == before
    assert names(tmp_path) == []
