"""``sdonnx serve`` as a process: how it starts, how it ends, and what it says of mistakes."""

import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from support.cli import run_cli
from support.server import server_process, wait_until

import sdonnx
from sdonnx.server.serving import listen

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows sends signals to the whole console")


@posix
def test_it_starts_without_options_and_ends_by_ctrl_c(tmp_path):
    with (
        server_process(cwd=tmp_path) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))),
    ):
        assert httpx.get(server.url + "/health").json() == {"status": "ok"}
        assert "pictogram" in server.printed and "Ctrl-C" in server.printed
        ended, seconds = server.end(signal.SIGINT)
    assert ended == 130
    assert seconds < 3
    assert server.printed.endswith("stopped\n")
    assert "Traceback" not in server.printed


def test_the_token_from_the_environment(tmp_path):
    with server_process(
        "--host", "0.0.0.0", "--allow-host", "nas.local", cwd=tmp_path, SDONNX_TOKEN="secret"
    ) as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/missing").status_code == 401
        assert httpx.get(url + "/missing", auth=("", "secret"), headers={"Host": "nas.local"}).status_code == 404
        assert httpx.get(url + "/missing", headers={"Host": "evil.example"}).status_code == 403
        assert "secret" not in server.printed


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--port", "{taken}"], 1, "port {taken} is in use; give another --port"),
        (["--port", "70000"], 2, "65535"),
        (["--host", "203.0.113.1", "--token", "t"], 2, "203.0.113.1 is not an address of this machine"),
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 lets other machines in; it requires --token"),
        (["--token", "two words"], 2, "the token is to have"),
        (["--cors", "example.org"], 2, "'example.org' is not an origin"),
        (["--allow-host", "http://a"], 2, "'http://a' is not a host name"),
        (["-m", "missing"], 1, "there is no model 'missing'"),
        (["--models", "missing"], 1, "missing can't be read"),
        (["--models", "."], 1, "no package with a U-Net is served"),
        (["--lora-dir", "missing"], 2, "missing is not a directory; give another --lora-dir"),
        (["--embedding-dir", "missing"], 2, "missing is not a directory; give another --embedding-dir"),
        (["-o", "file"], 1, "file can't be used"),
        (["--memory", "much"], 2, "memory is 'much'"),
        (["--threads", "0"], 2, "threads"),
        (["--device", "cpu", "--compute", "bf16"], 1, "device 'cpu' computes in f32, not in bf16"),
    ],
)
def test_mistakes(arguments, code, message, taken, tmp_path):
    (tmp_path / "file").touch()
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    result = run_cli("serve", *(each.format(taken=taken) for each in arguments), cwd=tmp_path)
    assert result.returncode == code
    assert message.format(taken=taken) in result.stderr
    assert "Traceback" not in result.stderr
    if "70000" not in arguments:
        assert result.stderr.count("\n") == 1


WITHOUT_EXTRA = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("starlette", "uvicorn", "anyio", "h11", "python_multipart"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Missing())
from sdonnx.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "stderr"),
    [
        (["serve", "--help"], 0, ""),
        (["samplers"], 0, ""),
        (["serve"], 1, 'error: sdonnx serve requires h11, which is not installed; pip install "sdonnx[serve]"\n'),
    ],
)
def test_without_the_extra(arguments, code, stderr, tmp_path):
    command = [sys.executable, "-c", WITHOUT_EXTRA, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, stderr)


def create(server, **fields):
    reply = httpx.post(server.url + "/api/jobs", json={"prompt": "a secret cat", "width": 64, "height": 64, **fields})
    assert reply.status_code == 202, reply.text
    return reply.json()["id"]


def wait_for_state(server, job, state):
    wait_until(lambda: httpx.get(f"{server.url}/api/jobs/{job}").json()["state"] == state)


@posix
@pytest.mark.parametrize(("name", "code", "logged"), [("SIGINT", 130, False), ("SIGTERM", 143, True)])
def test_a_signal_within_a_job_loses_no_finished_image(tmp_path, name, code, logged):
    options = ["-o", "images", "--memory", "max", *(["--log-prompts"] if logged else [])]
    with server_process(*options, cwd=tmp_path) as server:
        finished = create(server, num_inference_steps=2, num_images=2)
        wait_for_state(server, finished, "done")
        wait_for_state(server, create(server, num_inference_steps=200, num_images=60), "running")
        create(server, num_inference_steps=200, num_images=60)
        waiting = WaitingClient(server)
        ended, seconds = server.end(getattr(signal, name))
    assert ended == code
    assert seconds < 3
    assert sorted(each.name[-6:] for each in (tmp_path / "images").iterdir()) == ["-0.png", "-1.png"]
    assert f"job {finished} done" in server.printed
    assert ("secret" in server.printed) == logged
    assert server.printed.endswith("stopped\n")
    assert "Traceback" not in server.printed
    assert waiting.status() in (409, 503)


class WaitingClient:
    """A client of a synchronous API, whose job is queued."""

    def __init__(self, server):
        self._answers = []
        self._thread = threading.Thread(target=self._ask, args=(server.url,))
        self._thread.start()
        wait_until(lambda: len(httpx.get(server.url + "/api/jobs").json()["jobs"]) == 4)

    def _ask(self, url):
        body = {"prompt": "a dog", "steps": 50, "size": "64x64"}
        self._answers.append(httpx.post(url + "/v1/images/generations", json=body, timeout=30))

    def status(self):
        self._thread.join()
        return self._answers[0].status_code


def test_localhost_is_served_where_one_of_its_addresses_is_absent(monkeypatch):
    """Containers without IPv6 have a localhost of ::1 all the same."""
    absent = socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0)
    present = socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)
    for addresses in ([absent, present], [present, absent]):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=addresses, **__: found)
        (listener,) = listen("localhost", 0)
        with listener:
            assert listener.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [absent])
    with pytest.raises(sdonnx.RequestError, match="localhost is not an address of this machine"):
        listen("localhost", 0)
