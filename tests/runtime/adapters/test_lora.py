"""LoRA files at run time, against diffusers with the same file fused and LyCORIS's own merge."""

import copy
import json
import re

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from sdonnx_export.export import export
from sdonnx_runtime.adapters.merging import load_adapters, merge_lora
from sdonnx_runtime.graphs.initializers import unpack_int4
from sdonnx_runtime.outputs.metadata import save_png
from support import families
from support import lora as lora_fixture
from support.cli import run_cli
from support.reference import PROMPT, SEED, SIZE, psnr, reference
from support.tiling import circular

import sdonnx

MAKERS = {"sd1": families.sd1, "sd2": families.sd2, "sdxl": families.sdxl}
SETTINGS = {"negative_prompt": "blurry", "num_inference_steps": 3, "guidance_scale": 4.0, **SIZE}


@pytest.fixture(scope="module")
def family(export_once, tmp_path_factory):
    """A family's pipeline, and a package of it in a precision; made once."""
    pipes, directory = {}, tmp_path_factory.mktemp("lora")

    def get(name, precision="fp32"):
        source, package = directory / name, directory / f"{name}-{precision}"
        if name not in pipes:
            pipes[name] = MAKERS[name]()
            pipes[name].set_progress_bar_config(disable=True)
            pipes[name].save_pretrained(source)
        if not package.exists():
            export_once(source, package, precision=precision, calibration="none")
        return copy.deepcopy(pipes[name]), package

    return get


def fused(pipe, files):
    """diffusers' image with files and their scales."""
    for index, (path, scale) in enumerate(files):
        pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=f"a{index}")
        pipe.set_adapters([f"a{index}"], [1.0])
        pipe.fuse_lora(lora_scale=scale, adapter_names=[f"a{index}"])
        pipe.unload_lora_weights()
    return reference(pipe, prompt=PROMPT, **SETTINGS)


def ours(package, loras=(), **settings):
    with sdonnx.load(package, loras=loras) as pipe:
        return pipe.generate(PROMPT, seed=SEED, **{**SETTINGS, **settings})


def assert_equal(result, wanted, plain):
    """As diffusers has it, and not as without adapters."""
    assert np.abs(result.latents - wanted[0]).max() < 1e-3
    assert psnr(result.images[0], wanted[1]) > 50
    assert psnr(result.images[0], plain.images[0]) < 35


FILES = {
    "kohya": lora_fixture.kohya,
    "kohya with kernels": lambda pipe: lora_fixture.kohya(pipe, kernels=True),
    "peft": lora_fixture.peft,
    "old diffusers": lora_fixture.old_diffusers,
    "dora": lora_fixture.dora,
}


@pytest.mark.parametrize("name", ["sd1", "sd2"])
@pytest.mark.parametrize("kind", FILES)
def test_images_equal_those_of_diffusers(family, tmp_path, name, kind):
    pipe, package = family(name)
    file = lora_fixture.save(FILES[kind](pipe), tmp_path / "a.safetensors")
    scale = 1.0 if kind == "dora" else 0.7  # peft's norms go with its scale, ours with the whole
    assert_equal(ours(package, [(file, scale)]), fused(pipe, [(file, scale)]), ours(package))


def test_an_image_that_tiles_equals_that_of_diffusers(family, tmp_path):
    pipe, package = family("sd1")
    file = lora_fixture.save(lora_fixture.kohya(pipe, kernels=True), tmp_path / "a.safetensors")
    with circular(pipe.unet, pipe.vae, axes="xy"):
        wanted = fused(pipe, [(file, 0.7)])
    assert_equal(ours(package, [(file, 0.7)], tiling="xy"), wanted, ours(package, tiling="xy"))
    assert psnr(ours(package, [(file, 0.7)]).images[0], wanted[1]) < 35


@pytest.mark.parametrize("kind", ["kohya", "kohya with kernels", "original names", "peft", "dora"])
def test_images_of_sdxl_equal_those_of_diffusers(family, tmp_path, kind):
    pipe, package = family("sdxl")
    original = {"original names": lambda pipe: lora_fixture.kohya(pipe, kernels=True, original=True)}
    file = lora_fixture.save({**FILES, **original}[kind](pipe), tmp_path / "a.safetensors")
    scale = 1.0 if kind == "dora" else 0.7
    assert_equal(ours(package, [(file, scale)]), fused(pipe, [(file, scale)]), ours(package))


@pytest.mark.parametrize(
    "kind", ["loha", "loha with kernels", "lokr", "lokr with kernels", "locon", "dora of inputs", "full", "norm"]
)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_images_equal_those_with_lycoris_in_the_unet(family, tmp_path, name, kind):
    pipe, package = family(name)
    file = lora_fixture.save(lora_fixture.lycoris_network(pipe, kind), tmp_path / "a.safetensors")
    wanted = reference(pipe, prompt=PROMPT, **SETTINGS)
    assert_equal(ours(package, [file]), wanted, ours(package))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision(family, tmp_path, dtype):
    pipe, package = family("sd1")
    state = lora_fixture.kohya(pipe)
    half = lora_fixture.save(state, tmp_path / "half.safetensors", dtype)
    whole = lora_fixture.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "whole.safetensors")
    assert np.array_equal(ours(package, [half]).latents, ours(package, [whole]).latents)
    assert_equal(ours(package, [half]), fused(pipe, [(whole, 1.0)]), ours(package))


@pytest.fixture
def file(family, tmp_path):
    return lora_fixture.save(lora_fixture.kohya(family("sd1")[0], kernels=True), tmp_path / "a.safetensors")


def test_two_files_are_their_sum(family, file, tmp_path):
    pipe, package = family("sd1")
    other = lora_fixture.save(lora_fixture.peft(pipe), tmp_path / "b.safetensors")
    both = [(file, 0.5), (other, -0.4)]
    assert_equal(ours(package, both), fused(pipe, both), ours(package))


@pytest.mark.parametrize("memory", ["auto", "max"])
def test_removing_loras_restores_the_model(family, file, tmp_path, memory):
    pipe, package = family("sd1")
    other = lora_fixture.save(lora_fixture.peft(pipe), tmp_path / "b.safetensors")
    before = {path: path.read_bytes() for path in package.rglob("*") if path.is_file()}
    with sdonnx.load(package, memory=memory) as pipe:
        found = []
        for loras in ([], [file], [(file, 0.0)], [other], [file], []):
            pipe.set_loras(loras)
            found.append(pipe.generate(PROMPT, seed=SEED, **SETTINGS).latents)
    plain, first, zero, second, again, last = found
    assert np.array_equal(plain, zero)
    assert np.array_equal(plain, last)
    assert np.array_equal(first, again)
    assert np.abs(first - plain).max() > 0.1
    assert np.abs(second - first).max() > 0.1
    assert {path: path.read_bytes() for path in package.rglob("*") if path.is_file()} == before


def test_with_steps_reused_and_tokens_downsampled(family, file):
    pipe, package = family("sd1")
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(file.parent / "fused")
    fused_package = export(str(file.parent / "fused"), file.parent / "fused-onnx")
    for settings in (sdonnx.FAST, {"cache_interval": 2}, {"token_downsampling": True}):
        found, wanted = ours(package, [file], **settings), ours(fused_package, **settings)
        assert np.abs(found.latents - wanted.latents).max() < 1e-3
        assert np.abs(found.latents - ours(package, **settings).latents).max() > 0.1


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_package_with_adapters_for_good(family, tmp_path, name):
    pipe, package = family(name)
    file = lora_fixture.save(lora_fixture.kohya(pipe, kernels=True), tmp_path / "a.safetensors")
    fused_package = export(str(package.parent / name), tmp_path / "fused", loras=[sdonnx.Lora(path=file, scale=0.7)])
    assert_equal(ours(fused_package), fused(pipe, [(file, 0.7)]), ours(package))
    again = export(str(package), tmp_path / "again", loras=[sdonnx.Lora(path=file, scale=0.7)])
    assert np.array_equal(ours(again).latents, ours(fused_package).latents)
    with pytest.raises(sdonnx.ExportError, match="match no layer"):
        other = lora_fixture.save(lora_fixture.kohya(MAKERS["sd2"]()), tmp_path / "b.safetensors")
        export(str(package), tmp_path / "other", loras=[sdonnx.Lora(path=other)])
    assert not (tmp_path / "other").exists()


def wide(initializers, module):
    """A module's weight (out, n), of its pieces' codes and scales."""
    pattern = rf"{re.escape(module)}\.weight(?:(?:_\d+)?_quantized)?"
    pieces = [name for name in initializers if re.fullmatch(pattern, name)]
    parts = []
    for name in sorted(pieces, key=lambda name: int("".join(filter(str.isdigit, name.split(".weight")[1])) or 0)):
        data, scales = initializers[name].astype(np.float32), initializers.get(f"{name}_scale")
        if scales is not None and scales.ndim > 1:
            data = data * np.repeat(scales, 32, axis=0 if data.ndim == 2 else 1)
        elif scales is not None:
            data = data * (scales if data.ndim == 2 else scales.reshape(-1, 1, 1, 1))
        parts.append(data.T if data.ndim == 2 else data.reshape(len(data), -1))
    outputs = len(initializers[f"{module}.bias"]) if f"{module}.bias" in initializers else len(parts[0])
    return np.concatenate(parts, axis=0 if len(parts[0]) < outputs else 1)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-weights", "int4"])
def test_weights_of_every_precision(family, file, precision):
    """The merged weights equal the stored ones plus what diffusers adds, but for the second rounding."""
    pipe, package = family("sd1", precision)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(lora_scale=0.7)
    pipe.unload_lora_weights()
    opened = sdonnx.Package.open(package)
    changes = load_adapters(opened, [sdonnx.Lora(path=file, scale=0.7)]).deltas["unet"]
    graph = opened.graph("unet")
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(graph).graph.initializer}
    found = {
        name: unpack_int4(each.data.reshape(-1)[: each.data.size // 2], each.data.size).reshape(each.data.shape)
        if each.data_type == onnx.TensorProto.INT4
        else each.data
        for name, each in merge_lora(graph, changes).items()
    }
    assert len(changes) > 40
    for module in (name.removesuffix(".weight") for name in changes):
        wanted = pipe.unet.state_dict()[f"{module}.weight"] - before[f"{module}.weight"]
        wanted = wanted.numpy().reshape(len(wanted), -1) + wide(stored, module)
        step = {"fp32": 1e-5, "fp16": 1e-3, "int4": np.abs(wanted).max() / 7}.get(precision, np.abs(wanted).max() / 250)
        np.testing.assert_allclose(wide({**stored, **found}, module), wanted, atol=step, rtol=0)


@pytest.mark.parametrize("precision", ["fp16", "int8", "int8-weights", "int4"])
def test_images_of_every_precision_change_as_those_of_float32(family, file, precision):
    changed = {}
    for each in ("fp32", precision):
        package = family("sd1", each)[1]
        difference = ours(package, [file], num_inference_steps=1).latents - ours(package, num_inference_steps=1).latents
        changed[each] = difference.reshape(-1).astype(np.float64)
    wanted, found = changed["fp32"], changed[precision]
    cosine = wanted @ found / np.linalg.norm(wanted) / np.linalg.norm(found)
    assert cosine > (0.8 if precision == "int4" else 0.98)
    assert abs(np.linalg.norm(found) / np.linalg.norm(wanted) - 1) < (0.2 if precision == "int4" else 0.05)


def test_a_file_for_another_model_is_refused(family, tmp_path):
    pipe, package = family("sd1")
    other = lora_fixture.save(lora_fixture.kohya(family("sd2")[0]), tmp_path / "sd2.safetensors")
    with pytest.raises(sdonnx.RequestError, match="match no layer of sd1"):
        sdonnx.load(package, loras=[other])
    wider = {name: value for name, value in lora_fixture.kohya(pipe).items() if "attn2_to_k" in name}
    wider = {name: torch.cat([value, value], 1) if ".lora_down." in name else value for name, value in wider.items()}
    lora_fixture.save(wider, tmp_path / "wide.safetensors")
    with pytest.raises(sdonnx.RequestError, match=r"don't fit the model's .* weights .*was trained for this kind"):
        ours(package, [tmp_path / "wide.safetensors"])


def test_what_has_no_place_is_counted_or_left_out(family, file, tmp_path):
    _, package = family("sd1")
    state = load_file(file)
    strange = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 3),
        "lora_unet_nowhere.lora_up.weight": torch.ones(3, 2),
    }
    more = lora_fixture.save({**state, **strange, "what": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(sdonnx.RequestError, match=rf"2 of {len(state) + 3} tensors match no .*nowhere.*1 of .* kind"):
        sdonnx.load(package, loras=[more])
    with sdonnx.load(package) as pipe:
        pipe.set_loras([more], ignore_unmatched=True)
        found = pipe.generate(PROMPT, seed=SEED, **SETTINGS)
    assert np.array_equal(found.latents, ours(package, [file]).latents)
    alone = lora_fixture.save(strange, tmp_path / "alone.safetensors")
    with sdonnx.load(package) as pipe, pytest.raises(sdonnx.RequestError, match="2 of 2"):
        pipe.set_loras([alone], ignore_unmatched=True)


@pytest.mark.parametrize(("memory", "suffix"), [("auto", ".safetensors"), ("max", ".pt")])
def test_files_that_prompts_name(family, file, tmp_path, memory, suffix):
    _, package = family("sd1")
    other = lora_fixture.save(lora_fixture.peft(family("sd1")[0]), tmp_path / "own.safetensors")
    folder = tmp_path / "loras" / "within"
    folder.mkdir(parents=True)
    (folder / f"fur{suffix}").write_bytes(file.read_bytes())
    with sdonnx.load(package, lora_folder=tmp_path / "loras", memory=memory) as pipe:
        plain = pipe.generate(PROMPT, seed=SEED, **SETTINGS)
        named = pipe.generate(f"{PROMPT}<lora:fur:0.7>", seed=SEED, **SETTINGS)
        again = pipe.generate(PROMPT, seed=SEED, **SETTINGS)
        pipe.set_loras([other])
        both = pipe.generate(f"<lora:fur:0.7>{PROMPT}", seed=SEED, **SETTINGS)
        for wrong in ("<lora:nothing>", "<lora:../loras/within/fur>"):
            with pytest.raises(sdonnx.RequestError, match="has no "):
                pipe.resolve(f"{PROMPT} {wrong}")
    assert np.array_equal(named.latents, ours(package, [(file, 0.7)]).latents)
    assert np.array_equal(both.latents, ours(package, [other, (file, 0.7)]).latents)
    assert np.array_equal(plain.latents, again.latents)
    assert named.loras == ()


@pytest.mark.parametrize("memory", ["auto", "max"])
def test_alternatives_with_other_files(family, file, tmp_path, memory):
    """Images of one batch may have different LoRAs: each is as it is alone, in its place."""
    _, package = family("sd1")
    (tmp_path / "fur.safetensors").write_bytes(file.read_bytes())
    template = f"{PROMPT}{{<lora:fur:0.7>|<lora:fur:0.3>|}}"
    settings = {**SETTINGS, "hires_scale": 1.5, "hires_strength": 0.7}
    with sdonnx.load(package, lora_folder=tmp_path, memory=memory) as pipe:
        stream = pipe.stream(template, seed=1, num_images=5, **settings)
        steps = [(step.image, step.num_images, step.step) for step in stream]
        assert len(set(pipe.resolve(stream.request).loras)) == 3
        per_image = steps[-1][2] + 1
        assert {(image, step) for image, _, step in steps} == {(i, s) for i in range(5) for s in range(per_image)}
        result = stream.result
        assert np.array_equal(stream.latents, result.latents)
        assert len(result.timings.steps) == len(steps)
        for index in (1, 2, 4):
            alone = pipe.generate(template, seed=1 + index, **settings)
            assert alone.prompts == (result.prompts[index],)
            assert np.array_equal(alone.latents[0], result.latents[index])
            assert alone.images[0].tobytes() == result.images[index].tobytes()
        with pytest.raises(sdonnx.RequestError, match="has no none"):
            pipe.resolve("{<lora:fur:1>|<lora:none:1>}", num_images=20, seed=1)


@pytest.mark.parametrize("memory", ["auto", "min"])
def test_two_strengths(family, file, tmp_path, memory):
    """Those of the text encoders and of the U-Net are as if each had a file of its own."""
    _, package = family("sd1")
    parts = []
    for start in ("lora_te", "lora_unet"):
        part = {name: value for name, value in load_file(file).items() if name.startswith(start)}
        parts.append(lora_fixture.save(part, tmp_path / f"{start}.safetensors"))
    wanted = ours(package, [(parts[0], 0.4), (parts[1], 0.7)]).latents
    with sdonnx.load(package, lora_folder=tmp_path, memory=memory) as pipe:
        named = [
            pipe.generate(f"{PROMPT}<lora:a:{each}>", seed=SEED, **SETTINGS) for each in ("0.4:0.7", "unet=0.7:te=0")
        ]
        pipe.set_loras([sdonnx.Lora(path=file, scale=0.7, text_encoder_scale=0.4)])
        result = pipe.generate(PROMPT, seed=SEED, **SETTINGS)
    np.testing.assert_allclose(named[0].latents, wanted, atol=1e-4)
    np.testing.assert_allclose(result.latents, wanted, atol=1e-4)
    np.testing.assert_allclose(named[1].latents, ours(package, [(parts[1], 0.7)]).latents, atol=1e-4)
    save_png(result, 0, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"].startswith(f"{PROMPT} <lora:a:0.4:0.7>\n")
        assert json.loads(image.info["sdonnx"])["loras"] == [{"name": "a", "scale": 0.7, "text_encoder_scale": 0.4}]


@pytest.mark.parametrize("scale", [float("nan"), 1000.0])
def test_scales_out_of_range(tmp_path, scale):
    with pytest.raises(sdonnx.RequestError, match="give a number from -100 to 100"):
        sdonnx.Lora(path=tmp_path, scale=scale)


def test_alphas_from_the_files_metadata(family, tmp_path):
    pipe, package = family("sd1")
    state = {name: value for name, value in lora_fixture.peft(pipe).items() if name.startswith("unet.")}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[*lora_fixture.LINEAR, *lora_fixture.KERNELS]).to_dict()
    settings = {f"unet.{key}": list(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}
    file = lora_fixture.save(state, tmp_path / "a.safetensors", metadata=metadata)
    assert_equal(ours(package, [(file, 0.5)]), fused(pipe, [(file, 0.5)]), ours(package))
    plain = lora_fixture.save(state, tmp_path / "b.safetensors")
    assert np.abs(ours(package, [(file, 0.5)]).latents - ours(package, [(plain, 1.0)]).latents).max() < 1e-4


def test_from_the_command_line(family, file, tmp_path):
    _, package = family("sd1")

    def run(*arguments):
        return run_cli("run", PROMPT, "-m", package, "--steps", 2, "--seed", 3, *arguments, cwd=tmp_path)

    assert run("--lora", f"{file}:0.5", "--lora", str(file), "-o", "with.png").returncode == 0
    with Image.open(tmp_path / "with.png") as image:
        assert image.info["parameters"].startswith(f"{PROMPT} <lora:a:0.5> <lora:a:1>\n")
        assert json.loads(image.info["sdonnx"])["loras"] == [{"name": "a", "scale": 0.5}, {"name": "a", "scale": 1.0}]
    for argument in ("nowhere.safetensors", f"{file}:1000", str(package / "sdonnx.json")):
        failed = run("--lora", argument)
        assert failed.returncode == 2
        assert failed.stderr.count("\n") == 1
