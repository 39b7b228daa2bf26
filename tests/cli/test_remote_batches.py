"""``sdonnx run --server --batch-file``: the files of a local run, whatever becomes of the servers."""

import json
import signal
import sys
import threading

import pytest
from PIL import Image
from sdonnx_runtime.storage.staging import lock_file
from support.cli import running_cli
from support.remote import FAST, SLOW, names, run, same_files, states, write_lines
from support.server import running_server, server_process, wait_until


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
    last = ran[0].stderr.splitlines()[-1]
    assert last.startswith("error: no server is left; ")
    assert url in last
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
