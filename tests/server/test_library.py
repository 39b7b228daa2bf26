"""The packages that a server offers, and how it changes from one to another."""

import shutil

import httpx
import numpy as np
import pytest
from PIL import Image
from sdonnx_models import bundled
from support.server import running_server

import sdonnx
from sdonnx.server.errors import NotFound
from sdonnx.server.library import Library, Selection
from sdonnx.server.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two packages of the same name, one of another, and what is none."""
    root = tmp_path_factory.mktemp("models")
    for name in ("a/pictogram", "other"):
        shutil.copytree(bundled()["pictogram"], root / name)
    (root / "empty").mkdir()
    (root / "damaged").mkdir()
    (root / "damaged" / "sdonnx.json").write_text("{")
    return root


def test_names_come_from_directories_and_are_unique(folder):
    pictogram = bundled()["pictogram"]
    library = Library(Settings(packages=(pictogram, folder / "a/pictogram"), model_folders=(folder, folder)))
    assert [each.name for each in library.models] == ["pictogram", "pictogram-2", "other"]
    assert library.default.package.root == pictogram


@pytest.mark.parametrize("end", ["", ".safetensors", ".ckpt [1234567890]"])
def test_a_model_is_found_by_name_title_and_file_name(folder, end):
    library = Library(Settings(packages=(folder / "other",)))
    assert library.find(f"other{end}").name == "other"
    assert library.find(library.default.title).name == "other"


@pytest.mark.parametrize("name", ["", "../other", "/etc/passwd", "OTHER\0", "x" * 5000])
def test_no_path_is_ever_opened(folder, name):
    with pytest.raises(NotFound, match="there are: other"):
        Library(Settings(packages=(folder / "other",))).find(name)


def test_folders_are_read_again(folder, tmp_path):
    library = Library(Settings(packages=(folder / "other",), model_folders=(tmp_path,)))
    shutil.copytree(folder / "other", tmp_path / "new")
    library.refresh()
    assert [each.name for each in library.models] == ["other", "new"]
    opened, planner = library.open(Selection(model="new")), library.planner(Selection(model="new"))
    library.refresh()
    assert library.open(Selection(model="new")) is opened, "what has not changed stays open"
    assert library.planner(Selection(model="new")) is planner


def test_a_server_without_a_model_is_refused(tmp_path):
    with pytest.raises(sdonnx.PackageError, match="--models"):
        Library(Settings(packages=(), model_folders=(tmp_path,)))


def test_planners_are_kept_for_the_latest_selections_alone(folder):
    library = Library(Settings(packages=(folder / "other",)))
    first = library.planner(Selection(model="other"))
    assert library.planner(Selection(model="other")) is first
    for count in range(1, 9):
        library._planners[Selection(model="other", controls=("x",) * count)] = first
    library.planner(Selection(model="other", vae=None))
    assert len(library._planners) <= 9


def test_models_change_at_run_time(folder, pipeline):
    fields = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 2}
    with running_server(model_folders=(folder,)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        made = list[tuple[str, np.ndarray]]()
        for name in ("pictogram", "other", "pictogram"):
            job = client.post("/api/jobs", json={**fields, "model": name}).json()["id"]
            client.get(f"/api/jobs/{job}/events")
            image = client.get(f"/api/jobs/{job}").json()["images"][0]["name"]
            made.append(np.asarray(Image.open(server.context.store.folder / image)))
            loaded = [each["name"] for each in client.get("/api/models").json()["models"] if each["loaded"]]
            assert loaded == [name], "one after another"
    expected = np.asarray(pipeline.generate(sdonnx.Request(**fields)).images[0])
    for image in made:
        np.testing.assert_array_equal(image, expected)


def test_clients_learn_no_path_of_the_server(tmp_path):
    """Errors about files name them from the served folders on, in every API."""
    models, loras = tmp_path / "models", tmp_path / "loras"
    shutil.copytree(bundled()["pictogram"], models / "broken")
    loras.mkdir()
    (loras / "bad.safetensors").write_bytes(b"text")
    prompt = {"prompt": "a cat <lora:bad:1>"}
    with running_server(model_folders=(models,), lora_folder=loras) as server:
        (models / "broken/text_encoder/model.onnx").unlink()
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for path in ("/sdapi/v1/txt2img", "/v1/images/generations", "/api/jobs"):
                reply = client.post(path, json=prompt)
                assert reply.status_code == 400 and "loras/bad.safetensors" in reply.text
                assert str(tmp_path) not in reply.text
            reply = client.post("/v1/images/generations", json={"prompt": "a cat", "model": "broken"})
            assert reply.status_code == 500
            assert reply.json()["error"]["message"].startswith("models/broken/text_encoder/model.onnx is missing")
            assert all(str(tmp_path) not in str(each["error"]) for each in client.get("/api/jobs").json()["jobs"])


def test_folders_may_hold_dangling_links_and_may_vanish(tmp_path):
    models, loras, embeddings = (tmp_path / name for name in ("models", "loras", "embeddings"))
    shutil.copytree(bundled()["pictogram"], models / "pictogram")
    for folder in (loras, embeddings):
        folder.mkdir()
        (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere")
        (folder / "folder.safetensors").mkdir()
    settings = {"packages": (), "model_folders": (models,), "lora_folder": loras, "embedding_folder": embeddings}
    with running_server(**settings) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/api/loras").json() == {"loras": []}
        for folder in (loras, embeddings, models / "pictogram"):
            shutil.rmtree(folder)
        listings = [f"/api/{name}" for name in ("loras", "embeddings")] + ["/sdapi/v1/loras", "/sdapi/v1/embeddings"]
        assert {client.get(path).status_code for path in [*listings, "/v1/models", "/api/models"]} == {200}
        reply = client.post("/api/jobs", json={"prompt": "a cat"})
        assert reply.status_code == 404 and "no model is served" in reply.json()["detail"]
