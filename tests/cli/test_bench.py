"""``sdonnx bench``: what it says and how it fails; marks of memory that are their own process's; what the CPU can."""

import ctypes
import json
import math
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from sdonnx_models import DEFAULT
from sdonnx_runtime.errors import DeviceError, RequestError
from sdonnx_runtime.execution.process_memory import peak_memory
from support.cli import run_cli

from sdonnx import Package
from sdonnx.benchmark import worker as measure
from sdonnx.benchmark.cpu import best_isa, instruction_set
from sdonnx.benchmark.report import psnr
from sdonnx.loading import find_model


def bench(*arguments):
    return run_cli("bench", *arguments)


def test_json_has_each_component_and_the_image():
    ran = bench("pictogram", "--json", "--steps", 2, "--repeat", 1, "--reference", "pictogram", "--threads", 1)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    components = {figures["component"]: figures for figures in report["components"]}
    assert list(components) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    for figures in components.values():
        assert figures["provider"] == "CPUExecutionProvider"
        assert figures["on_cpu"] == {}
        assert min(figures["load_s"], figures["first_s"], figures["median_s"]) > 0
        assert figures["peak_rss_mb"] > 10
    assert components["unet"]["peak_rss_mb"] > components["text_encoder"]["peak_rss_mb"]
    assert report["image"]["num_inference_steps"] == 2
    assert report["image"]["total_s"] > report["image"]["first_step_s"] > 0
    assert (report["threads"], report["batch"], report["width"]) == (1, 1, 64)
    assert {"sdonnx", "onnxruntime", "cpu", "instruction_set"} <= report["machine"].keys()
    assert report["comparison"]["psnr"] == "inf"
    assert report["comparison"]["unet_psnr"] == ["inf", "inf"]


def test_the_table_can_be_pasted(package):
    ran = bench(package, "--reference", package, "--steps", 1, "--size", "64x64", "--batch", 2, "--repeat", 1)
    assert ran.returncode == 0, ran.stderr
    rows = [line for line in ran.stdout.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert [row.split(" |")[0] for row in rows[2:]] == [
        *("| text_encoder", "| unet", "| vae_decoder", "| vae_encoder", "| image, 1 steps")
    ]
    assert "64x64, batch 2" in ran.stdout
    assert "image inf dB" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "no model 'nowhere'"),
        (["pictogram", "--steps", "0"], 2, "num_inference_steps is 0"),
        (["pictogram", "--repeat", "0"], 2, "repeat is 0; give a whole number from 1 to 10000"),
        (["pictogram", "--batch", "1000000"], 2, "batch is 1000000; give a whole number from 1 to 10000"),
        (["pictogram", "--threads", "1024"], 2, "threads is 1024; give a whole number from 1 to "),
        (["pictogram", "--size", "65x64"], 2, "nearest are 64 and 68"),
        (["pictogram", "--device", "cuda"], 1, "sdonnx[cuda]"),
        (["pictogram", "--reference", "nowhere"], 1, "no model 'nowhere'"),
        (["pictogram", "--steps", "1", "--reference", "PACKAGE"], 2, "is another model than"),
    ],
)
def test_mistakes_get_one_clear_line(arguments, code, message, package):
    ran = bench(*[package if argument == "PACKAGE" else argument for argument in arguments])
    assert ran.returncode == code, ran.stderr
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert ran.stdout == ""


def test_a_process_that_dies_is_named():
    with pytest.raises(DeviceError, match="measured unet was killed by the system"):
        measure.run_in_subprocess("unet", os._exit, 9)


def test_what_goes_wrong_in_the_process_comes_back():
    with pytest.raises(RequestError, match="not here"):
        measure.run_in_subprocess("unet", fail)


def fail():
    raise RequestError("not here")


def allocate(megabytes):
    """The mark after so many MB were had and given back, and what the system itself has for it."""
    np.ones(megabytes * 1_000_000, np.uint8)
    return peak_memory()


def test_a_mark_is_of_its_process_alone():
    measure.run_in_subprocess("memory", allocate, 1)  # whose imports may be compiled, which takes memory
    ballast = np.ones(600_000_000, np.uint8)
    small, large = (measure.run_in_subprocess("memory", allocate, megabytes) for megabytes in (1, 300))
    assert small < 300e6 < 600e6 < peak_memory()
    assert large - small == pytest.approx(299e6, rel=0.05)
    assert ballast[-1] == 1


@pytest.mark.core
def test_operators_are_those_of_the_graph(tmp_path):
    graph = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 20]>
        g (float[N] x) => (float[N] y) { a = Exp(x) b = Sin(a) y = Exp(b) }"""
    )
    ir.save(graph, tmp_path / "model.onnx")
    placed = measure.count_operators(tmp_path / "model.onnx", {"x": np.ones(3)}, device="cpu")
    assert placed == {"CPUExecutionProvider": {"Exp": 2, "Sin": 1}}


def test_nodes_that_another_device_leaves_to_the_cpu(monkeypatch):
    """ONNX Runtime's profile as it is, but with all but additions on CUDA."""

    class OnCuda(measure.Session):
        def __init__(self, path, *, device, **options):
            super().__init__(path, device="cpu", **options)
            self.device = "cuda"

        def finish_profile(self):
            events = super().finish_profile()
            for event in events:
                if event.get("args", {}).get("op_name") != "Add":
                    event["args"] = {**event.get("args", {}), "provider": "CUDAExecutionProvider"}
            return events

    monkeypatch.setattr(measure, "Session", OnCuda)
    opened = Package.open(find_model(DEFAULT))
    latents = {"latent_sample": np.zeros((1, 4, 4, 4), np.float32)}
    figures, _ = measure.measure_component(opened, "vae_decoder", [latents], 2, {"device": "cuda", "threads": 1})
    assert figures.provider == "CUDAExecutionProvider"
    assert list(figures.on_cpu) == ["Add"]


def test_psnr_of_one_grey_level_is_the_textbooks():
    image = np.full((4, 4, 3), 100, np.uint8)
    assert psnr(image + 1, image, 255) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(image - 1, image, 255) == pytest.approx(48.1308, abs=1e-4)
    assert psnr(image, image, 255) == math.inf


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("sse2 avx2 avx512f avx512bw avx512_vnni amx_bf16 amx_int8 avx_vnni", "AMX"),  # Sapphire Rapids
        ("sse2 avx2 avx512f avx512bw avx512_vnni", "AVX-512 with VNNI"),  # Cascade Lake
        ("sse2 avx2 avx512f avx512bw", "AVX-512 without VNNI"),  # Skylake-SP
        ("sse2 avx2 avx_vnni", "AVX2 with VNNI"),  # Alder Lake
        ("sse2 avx avx2", "AVX2 without VNNI"),  # Haswell
        ("sse2 avx", "no AVX2"),  # Sandy Bridge
        ("fp asimd crc32 atomics fphp asimdhp asimddp", "Arm with dot product"),  # Graviton2
        ("fp asimd asimddp sve i8mm bf16", "Arm with int8 matrix multiplication"),  # Graviton3
        ("fp asimd crc32", "Arm without dot product"),  # Raspberry Pi 4
        ("neon AdvSIMD FEAT_DotProd FEAT_SHA3", "Arm with dot product"),  # M1, hw.optional
        ("", "unknown"),
    ],
)
def test_instruction_sets_of_known_cpus(features, name):
    assert best_isa(features.lower().split()) == name


def test_this_cpu_is_what_torch_takes_it_for():
    import torch  # which takes memory in each process that `allocate` runs in

    found = instruction_set()
    assert ("AVX-512" in found or found == "AMX") == torch.cpu._is_avx512_supported()
    assert (found in ("AVX-512 with VNNI", "AMX")) == torch.cpu._is_vnni_supported()


@pytest.mark.parametrize(
    ("listing", "name"),
    [
        ("hw.optional.avx2_0: 1\nhw.optional.avx512bw: 1\nhw.optional.avx512vnni: 1", "AVX-512 with VNNI"),  # Ice Lake
        ("hw.optional.sse2: 1\nhw.optional.avx2_0: 1\nhw.optional.avx512bw: 0", "AVX2 without VNNI"),
        ("hw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0", "Arm with dot product"),
    ],
)
def test_what_macos_says(listing, name, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    answer = subprocess.CompletedProcess([], 0, stdout=listing)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert instruction_set() == name


@pytest.mark.parametrize(
    ("architecture", "present", "name"),
    [  # numbers of winnt.h
        ("AMD64", {40, 41}, "AVX-512, VNNI unknown"),
        ("AMD64", {40}, "AVX2, VNNI unknown"),
        ("ARM64", {43}, "Arm with dot product"),
        ("ARM64", set(), "Arm without dot product"),
    ],
)
def test_what_windows_says(architecture, present, name, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    kernel = SimpleNamespace(IsProcessorFeaturePresent=present.__contains__)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    assert instruction_set() == name


def test_a_system_that_says_nothing_is_unknown(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert instruction_set() == "unknown"


def test_info_says_what_the_cpu_can():
    assert instruction_set() in run_cli("info", "pictogram").stdout
