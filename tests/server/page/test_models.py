"""What may be chosen: models, LoRAs and embeddings; what a package can't do is not shown."""

import json
import re
import shutil

import numpy as np
import pytest
from playwright.sync_api import expect
from sdonnx_models import DEFAULT, bundled
from support.page import make, number, prompt, saved
from support.paths import ROOT
from support.server import running_server

import sdonnx

ADAPTERS = ROOT / "models" / "pictogram" / "adapters"


def sketch(directory):
    """pictogram with other defaults, and without a VAE encoder, previews and the graphs of `FAST`."""
    shutil.copytree(bundled()[DEFAULT], directory)
    manifest = json.loads((directory / "sdonnx.json").read_text())
    del manifest["components"]["vae_encoder"]
    manifest["latents"]["preview"] = None
    manifest["defaults"] |= {"size": 32, "num_inference_steps": 7, "guidance_scale": 3.0}
    graphs = manifest["components"]["unet"]["graphs"]
    for name in [name for name in graphs if name != "plain"]:
        (directory / graphs.pop(name)).unlink()
    files = manifest["components"]["unet"]["files"]
    manifest["components"]["unet"]["files"] = {name: files[name] for name in files if (directory / name).exists()}
    (directory / "sdonnx.json").write_text(json.dumps(manifest))
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    loras, embeddings = tmp_path_factory.mktemp("loras"), tmp_path_factory.mktemp("embeddings")
    shutil.copy(ADAPTERS / "grey.safetensors", loras)
    shutil.copy(ADAPTERS / "teal.safetensors", embeddings)
    packages = (bundled()[DEFAULT], sketch(tmp_path_factory.mktemp("packages") / "sketch"))
    styles = tmp_path_factory.mktemp("styles") / "styles.csv"
    styles.write_text('name,prompt,negative_prompt\nBlue,"{prompt} on {blue|navy}",red\nPlain,flat,\n')
    folders = {"lora_folder": loras, "embedding_folder": embeddings, "styles": styles}
    with running_server(packages=packages, **folders) as running:
        yield running


def model(page):
    return page.get_by_role("combobox", name="Model", exact=True)


def test_another_model_has_other_defaults(page, server):
    model(page).select_option("sketch")
    for name, value in {"Steps": "7", "Guidance": "3", "Width": "32", "Height": "32"}.items():
        expect(number(page, name)).to_have_attribute("placeholder", value)
    job = make(page, "a red apple", Seed=3)
    with sdonnx.load(server.context.library.find("sketch").package.root, threads=1) as pipe:
        expected = pipe.generate("a red apple", seed=3).images[0]
    np.testing.assert_array_equal(saved(server, job), np.asarray(expected))
    page.reload()
    expect(model(page)).to_have_value("sketch")


def test_what_a_package_cannot_do_is_not_shown(page):
    offered = page.get_by_role("group", name="Init image"), page.get_by_role("checkbox", name="Fast")
    for each in offered:
        expect(each).to_be_visible()
    model(page).select_option("sketch")
    for each in offered:
        expect(each).to_be_hidden()
    model(page).select_option(DEFAULT)
    for each in offered:
        expect(each).to_be_visible()


def test_loras_and_embeddings_write_themselves_into_the_prompt(page, server):
    adapters = page.get_by_role("group", name="LoRAs and embeddings")
    prompt(page).fill("a fox")
    adapters.get_by_role("button", name=re.compile("grey")).click()
    expect(prompt(page)).to_have_value(re.compile(r"^a fox,? ?<lora:grey:1>$"))
    with_lora = make(page, Seed=4, Steps=4)
    prompt(page).fill("a fox on a background, ")
    adapters.get_by_role("button", name=re.compile("teal")).click()
    expect(prompt(page)).to_have_value(re.compile(r"^a fox on a background, \S+$"))
    make(page, Steps=4)
    without = make(page, "a fox", Seed=4, Steps=4)
    assert not np.array_equal(saved(server, with_lora), saved(server, without))


def test_styles_are_chosen_by_their_names(page, server):
    blue = page.get_by_role("group", name="Styles").get_by_role("button", name="Blue")
    blue.click()
    expect(blue).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("group", name="Also set")).to_be_hidden()
    page.reload()
    job = make(page, "a {red|green} fox", Seed=4, Steps=2)
    (prompts,) = server.context.queue.find(job.id).request.prompts
    assert re.fullmatch("a (red|green) fox on (blue|navy)", prompts.prompt)
    assert prompts.negative_prompt == "red"
    page.get_by_role("button", name="Reset the settings").click()
    expect(blue).to_have_attribute("aria-pressed", "false")


def test_lists_without_entries_are_not_shown(serve, visits):
    page = visits(serve().url)
    expect(page.locator("#plan")).not_to_be_empty()
    expect(page.get_by_role("group", name="LoRAs and embeddings")).to_be_hidden()
    expect(page.get_by_role("group", name="Styles")).to_be_hidden()
    expect(page.get_by_role("combobox", name="VAE")).to_be_hidden()


def test_a_package_that_is_added_is_found_without_a_restart(serve, visits, tmp_path):
    page = visits(serve(model_folders=(tmp_path,)).url)
    expect(model(page).get_by_role("option")).to_have_count(1)
    sketch(tmp_path / "sketch")
    page.reload()
    expect(model(page).get_by_role("option")).to_have_count(2)
