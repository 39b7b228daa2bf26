"""Shared fixtures: a tiny random checkpoint and packages; one thread for each process of the tests."""

import os

# Before anything is imported that reads them. What runs in parallel are the processes of pytest-xdist.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", COLUMNS="100", NO_COLOR="1")

import gc
import hashlib
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import random_checkpoint
from filelock import FileLock
from sdonnx_export.export import export
from sdonnx_runtime.execution import arena, ort
from sdonnx_runtime.execution import staged_model as chain
from sdonnx_runtime.execution.devices import choosing
from sdonnx_runtime.text.tokenizer import Tokenizer
from sdonnx_runtime.text.tokenizer_files import is_fast

import sdonnx

# A shell that starts the tests in the background ignores Ctrl-C, and what they start would do so too.
signal.signal(signal.SIGINT, signal.default_int_handler)

_open_session = onnxruntime.InferenceSession.__init__


def _open_session_with_one_thread(self, model, sess_options=None, *arguments, **options):
    sess_options = onnxruntime.SessionOptions() if sess_options is None else sess_options
    sess_options.intra_op_num_threads = sess_options.intra_op_num_threads or 1
    _open_session(self, model, sess_options, *arguments, **options)


onnxruntime.InferenceSession.__init__ = _open_session_with_one_thread


@pytest.fixture
def all_threads(monkeypatch):
    """ONNX Runtime's own number of threads, one for each core, where a test is about what they share out."""
    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", _open_session)


def pytest_xdist_auto_num_workers():
    """One process more than there are cores: some always wait, for a server, a browser, a cluster or a file."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish():
    """Keep the garbage collector from looking in every test at what imports and collecting made."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)  # a graph is many objects, hardly one of them in a cycle


@pytest.fixture(autouse=True, scope="session")
def equal_signatures_once():
    """Read each ONNX operator's signature once: onnxscript reads it for every node that is written."""
    read, known = onnx_ir.schemas.OpSignature.from_op_schema, {}

    def get(schema):
        key = schema.domain, schema.name, schema.since_version
        if key not in known:
            known[key] = read(schema)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_ir.schemas.OpSignature, "from_op_schema", get)
        yield


@pytest.fixture(autouse=True, scope="session")
def equal_tokenizers_once():
    """Read equal vocabularies once: CLIP's takes longer to read than a tiny model to run."""
    opened, open_tokenizer = {}, Tokenizer.open

    def get(directory, **options):
        key = hashlib.sha256(repr((options, is_fast(directory))).encode())
        for path in sorted(path for path in directory.glob("*.*") if path.is_file()):
            key.update(path.name.encode() + path.read_bytes())
        if key.digest() not in opened:
            opened[key.digest()] = open_tokenizer(directory, **options)
        return opened[key.digest()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "open", get)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_plugins():
    """Plugins of execution providers are not installed but where a fixture imports them: `auto` is the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "find_spec", sys.modules.get)
        yield


@pytest.fixture(autouse=True)
def first_notes(monkeypatch):
    """A process that has said nothing about devices, as that of a command."""
    monkeypatch.setattr(choosing, "NOTES", choosing.Notes())


@pytest.fixture(autouse=True, scope="session")
def kept_memory():
    """What is freed stays with this process, and so does torch's code; `test_memory_plan` measures other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "set_malloc_thresholds", lambda **_: None)
        for module, name in ((arena, "trim_heap"), (chain, "trim_heap"), (chain, "unmap_code")):
            patch.setattr(module, name, lambda: None)
        yield


@pytest.fixture(autouse=True)
def seeded_torch():
    """Weights that a test makes at random are the same whichever tests ran before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def rng():
    """Random numbers that are the same whichever tests ran before."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def export_once(tmp_path_factory):
    """`export` for fixtures: of the same files and options it works once, for all modules and processes."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    shared.mkdir(exist_ok=True)

    def get(source, output, **options):
        if options.get("precision") != "int8":
            options.pop("calibration", None)  # which says nothing elsewhere
        key = hashlib.sha256(repr((source.name, sorted(options.items()))).encode())
        for path in sorted(source.rglob("*")) if source.is_dir() else [source, source.with_suffix(".yaml")]:
            key.update(str(path.relative_to(source.parent)).encode() + (path.read_bytes() if path.is_file() else b""))
        made = shared / key.hexdigest()
        with FileLock(f"{made}.lock"):
            if not made.exists():
                export(str(source), made, **options)
        shutil.copytree(made, output)
        return output

    return get


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    random_checkpoint.make(directory)
    return directory


@pytest.fixture(scope="session")
def package(checkpoint, export_once, tmp_path_factory) -> Path:
    return export_once(checkpoint, tmp_path_factory.mktemp("packages") / "tiny-onnx")


@pytest.fixture(scope="session")
def checked(checkpoint, package, export_once, tmp_path_factory):
    """`package` with a safety checker of its own, for images of which it flags one; see `Checked`."""
    from support.safety import THREE, Checked, reference, safety_checker

    images = sdonnx.load(package).generate(THREE).images
    checker = safety_checker(images)
    directory = tmp_path_factory.mktemp("checked")
    shutil.copytree(checkpoint, directory / "tiny")
    checker.save_pretrained(directory / "tiny" / "safety_checker")
    path = export_once(directory / "tiny", directory / "tiny-onnx", safety_checker=True)
    return Checked(path=path, images=images, flags=reference(checker, images)[-1])


@pytest.fixture(scope="session")
def control(checkpoint, export_once, tmp_path_factory) -> Path:
    """A ControlNet for `package`."""
    from diffusers import UNet2DConditionModel  # with torch
    from support.controls import controlnet

    directory = tmp_path_factory.mktemp("control")
    controlnet(UNet2DConditionModel.from_pretrained(checkpoint / "unet")).save_pretrained(directory / "edges")
    return export_once(directory / "edges", directory / "edges-onnx")


@pytest.fixture(scope="session")
def upscaler(export_once, tmp_path_factory):
    """An upscaler by 4: what its network makes of an RGB image, as a function, and its package."""
    from safetensors.torch import save_file  # with torch
    from support.upscalers import random_upscaler, upscale

    directory = tmp_path_factory.mktemp("upscaler")
    model = random_upscaler("Compact")
    save_file(model.state_dict(), directory / "sharp.safetensors")
    return partial(upscale, model), export_once(directory / "sharp.safetensors", directory / "sharp-onnx")


@pytest.fixture(scope="session")
def image_prompter(checkpoint, export_once, tmp_path_factory) -> Path:
    """An IP-Adapter for `package`."""
    from diffusers import UNet2DConditionModel  # with torch
    from support.ip_adapters import image_encoder, ip_adapter, save_ip_adapter

    directory = tmp_path_factory.mktemp("ip_adapter")
    image_encoder().save_pretrained(directory / "image_encoder")
    state = ip_adapter(UNet2DConditionModel.from_pretrained(checkpoint / "unet"))
    source = save_ip_adapter(state, directory / "ip-adapter_tiny.bin")
    return export_once(source, tmp_path_factory.mktemp("packages") / "style-onnx")


@pytest.fixture(scope="session")
def openvino_folder(tmp_path_factory):
    """The folder where Python finds a plugin that lists OpenVINO's CPU device."""
    from support import openvino

    if (what := openvino.missing()) is not None:
        pytest.skip(what)
    return openvino.find_plugin(tmp_path_factory.mktemp("openvino"))


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    """The directory of compiled graphs, for all tests."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def openvino(openvino_folder, compiled_folder, monkeypatch):
    """OpenVINO's CPU device for a test, and for the processes that it starts."""
    from support import openvino

    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(compiled_folder))
    monkeypatch.setenv("PYTHONPATH", str(openvino_folder), prepend=os.pathsep)
    with openvino.installed(openvino_folder):
        yield openvino_folder


@pytest.fixture(scope="session")
def opened(export_once, tmp_path_factory):
    """A pipeline of diffusers of those in PROMPTED, and our package of it, opened; made once."""
    from support import families

    made, directory = {}, tmp_path_factory.mktemp("prompted")

    def get(name, **options):
        if name not in made:
            pipe = families.PROMPTED[name]()
            pipe.set_progress_bar_config(disable=True)
            pipe.save_pretrained(directory / name / "diffusers")
            made[name] = pipe, export_once(directory / name / "diffusers", directory / name / "package")
        pipe, package = made[name]
        return pipe, sdonnx.load(package, **options)

    return get


@pytest.fixture
def recorded_inputs(monkeypatch):
    """What every call of a U-Net was given from now on, and every call of a text encoder."""
    calls, texts, real = [], [], chain.Session.run

    def run(self, feeds, keep=()):
        if "timestep" in feeds:
            calls.append(feeds)
        if "input_ids" in feeds:
            texts.append(feeds["input_ids"])
        return real(self, feeds, keep)

    monkeypatch.setattr(chain.Session, "run", run)
    return calls, texts
