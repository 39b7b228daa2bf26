"""OpenAI's edits and variations: masks, image to image, and editing by instruction."""

import io

import numpy as np
import openai
import pytest
import random_checkpoint
from PIL import Image, ImageDraw
from support.openai_client import connect, encode, images, pixels
from support.server import running_server

import sdonnx

STEPS = {"seed": 7, "steps": 3}
BOX = (16, 20, 40, 48)


@pytest.fixture(scope="module")
def client(server):
    return connect(server)


@pytest.fixture
def photo():
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    return Image.fromarray(np.stack([x * 4, y * 4, 255 - x * 2], axis=-1).astype(np.uint8))


def alpha_mask(size=(64, 64), box=BOX, alpha=0):
    """Opaque, but transparent in a box."""
    mask = Image.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, alpha), box)
    return mask


def white_mask(size=(64, 64), box=BOX):
    """The same in sdonnx' form."""
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def file(image, name="image.png", form="PNG"):
    stream = io.BytesIO()
    image.save(stream, format=form)
    return name, stream.getvalue(), f"image/{form.lower()}"


def test_what_is_transparent_in_the_mask_is_repainted(client, pipeline, photo):
    reply = client.images.edit(image=file(photo), mask=file(alpha_mask()), prompt="a red star", extra_body=STEPS)
    edited = pixels(images(reply)[0])
    wanted = pipeline.generate(
        "a red star", image=photo, mask_image=white_mask(), seed=7, num_inference_steps=3
    ).images[0]
    assert np.array_equal(edited, pixels(wanted))
    outside = pixels(white_mask())[..., 0] == 0
    assert np.array_equal(edited[outside], pixels(photo)[outside])
    assert not np.array_equal(edited[~outside], pixels(photo)[~outside])


def test_only_what_is_fully_transparent_is_repainted(client, pipeline, photo):
    mask = alpha_mask()
    ImageDraw.Draw(mask).rectangle((0, 0, 63, 10), fill=(255, 255, 255, 1))
    reply = client.images.edit(image=file(photo), mask=file(mask), prompt="a red star", extra_body=STEPS)
    assert np.array_equal(pixels(images(reply)[0])[:11], pixels(photo)[:11])


def test_a_palette_with_a_transparent_color_is_a_mask(client, photo):
    mask = Image.new("P", (64, 64), 1)
    mask.putpalette([0, 0, 0, 255, 255, 255])
    mask.paste(0, BOX)
    mask.info["transparency"] = 0
    same = [
        client.images.edit(image=file(photo), mask=file(each), prompt="a star", extra_body=STEPS).data[0].b64_json
        for each in (mask, alpha_mask())
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_without_a_mask_it_is_image_to_image(client, pipeline, photo, form):
    given = file(photo, form=form)
    reply = client.images.edit(image=given, prompt="a star", n=2, extra_body=STEPS)
    image = Image.open(io.BytesIO(given[1]))
    wanted = pipeline.generate("a star", image=image, strength=0.75, seed=7, num_inference_steps=3)
    assert len(reply.data) == 2 and np.array_equal(pixels(images(reply)[0]), pixels(wanted.images[0]))


def test_texts_of_a_form_are_numbers(client, pipeline, photo):
    extra = {**STEPS, "cfg_scale": 2.5, "strength": 0.4, "sampler": "euler"}
    options = {"size": "72x48", "output_format": "webp", "output_compression": 90}
    reply = client.images.edit(image=file(photo), prompt="a star", **options, extra_body=extra)
    settings = {"strength": 0.4, "guidance_scale": 2.5, "width": 72, "height": 48, "sampler": "euler"}
    wanted = pipeline.generate("a star", image=photo, seed=7, num_inference_steps=3, **settings).images[0]
    assert np.array_equal(pixels(images(reply)[0]), pixels(encode(wanted, format="WEBP", quality=90)))


def test_a_list_of_one_image(client, photo):
    same = [
        client.images.edit(image=each, prompt="a star", extra_body=STEPS).data[0].b64_json
        for each in (file(photo), [file(photo)])
    ]
    assert same[0] == same[1]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
def test_variations(client, pipeline, photo):
    reply = client.images.create_variation(image=file(photo), n=1, size="64x64", extra_body=STEPS)
    wanted = pipeline.generate("", image=photo, seed=7, num_inference_steps=3, width=64, height=64)
    assert np.array_equal(pixels(images(reply)[0]), pixels(wanted.images[0]))


def test_partial_images_of_an_edit(client, photo):
    events = list(
        client.images.edit(image=file(photo), prompt="a star", stream=True, partial_images=1, extra_body=STEPS)
    )
    assert [each.type for each in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    "changes, param, message",
    [
        ({"image": [("a.png", b"1"), ("b.png", b"2")]}, "image", "2 images were sent; local models edit one"),
        ({"image": ("a.png", b"GIF89a")}, "image", "image can't be read: it is not an image"),
        ({"mask": ("m.png", b"")}, "mask", "mask can't be read"),
        ({"mask": file(alpha_mask(size=(32, 64)))}, "mask", "mask has 32x64 pixels, image has 64x64"),
        ({"mask": file(alpha_mask(alpha=1))}, "mask", "mask has no transparent pixels"),
        ({"mask": file(white_mask())}, "mask", "mask has no transparent pixels"),
        ({"markup": file(alpha_mask())}, "markup", "markup is not supported; send a mask"),
        ({"extra_body": {"steps": "many"}}, "steps", "steps is 'many'"),
        ({"extra_body": {"strength": "nan"}}, "strength", "strength is nan; give a number from 0 to 1"),
        ({"n": 99}, "n", "n is 99"),
    ],
)
def test_bad_requests_name_the_parameter(client, photo, changes, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.images.edit(**{"image": file(photo), "prompt": "a star", **changes})
    assert caught.value.param == param


def test_bodies_that_are_no_form(client, server, photo):
    post, url = client._client.post, f"{server.url}/v1/images/edits"
    form = {"content-type": "multipart/form-data; boundary=x"}
    many = {f"field{index}": (None, "") for index in range(200)}
    for options in (
        {"json": {"prompt": "a star"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"--y\r\n\r\n", "headers": form},
        {"content": b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", "headers": form},
        {"files": {"prompt": (None, "a star")}},
        {"files": {"prompt": (None, "a star"), "image": (None, "aGVsbG8=")}},
        {"files": {"image": file(photo)}},
        {"files": {"prompt": (None, "a star"), "image": file(photo), **many}},
    ):
        found = post(url, **options)
        assert found.status_code == 400 and found.json()["error"]["type"] == "invalid_request_error", options


@pytest.fixture
def instruct_package(export_once, monkeypatch, tmp_path):
    """A package of InstructPix2Pix' shape."""
    tiny = random_checkpoint.SIZES["tiny"]
    monkeypatch.setitem(random_checkpoint.SIZES, "tiny", {**tiny, "unet": {**tiny["unet"], "in_channels": 8}})
    random_checkpoint.make(tmp_path / "instruct")
    index = tmp_path / "instruct" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "StableDiffusionInstructPix2PixPipeline"))
    return export_once(tmp_path / "instruct", tmp_path / "instruct-onnx")


def test_a_model_that_edits_by_instruction(instruct_package, photo):
    with running_server(packages=(instruct_package,)) as server, sdonnx.load(instruct_package) as pipe:
        client = connect(server)
        options = {"image": file(photo), "prompt": "make it red", "extra_body": STEPS}
        wanted = pipe.generate("make it red", image=photo, seed=7, num_inference_steps=3)
        assert np.array_equal(pixels(images(client.images.edit(**options))[0]), pixels(wanted.images[0]))
        with pytest.raises(openai.BadRequestError, match="pix2pix models do not support strength and mask_image"):
            client.images.edit(mask=file(alpha_mask()), **options)
        with pytest.raises(openai.BadRequestError, match="this model requires image"):
            client.images.generate(prompt="a star")
