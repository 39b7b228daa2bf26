"""Where a package is written: nothing is replaced but a package, one export at a time, under a name that is its own."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from sdonnx_export.export import _calibration_cache, export
from sdonnx_export.packaging.output_directory import default_output, replace_package
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.errors import ExportError
from sdonnx_runtime.packages.package import Package
from sdonnx_runtime.storage.staging import open_staging
from support.cli import run_cli
from support.users import run_without_privileges, shared_directory

posix = pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")


def make_package(directory, text="old"):
    """A directory as an export writes it, as far as its names go."""
    files = {"unet/model.onnx": {}, "unet/model.onnx_data": {}}
    manifest = {"format": 2, "components": {"unet": {"files": files}}, "source": {"name": "x", "exporter": "sdonnx 0"}}
    small = ("unet/config.json", "tokenizer/merges.txt", "tokenizer/vocab.json", "scheduler/scheduler_config.json")
    for name in (*files, *small, "model_index.json"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    (directory / "sdonnx.json").write_text(json.dumps(manifest))
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write(output, sources=(), *, force=True, text="new"):
    with replace_package(Path(output), sources=sources, force=force) as directory:
        make_package(directory, text)


@pytest.fixture
def old(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_package(tmp_path / "old")


def test_a_package_is_replaced(old):
    (old / ".DS_Store").write_text("of a file manager")
    write("old")
    assert (old / "unet" / "model.onnx").read_text() == "new"
    assert not (old / ".DS_Store").exists()


@pytest.mark.parametrize("files", [["model_index.json"], ["sdonnx.json"], ["thesis.txt"]])
def test_what_no_manifest_proves_a_package_stays(files, tmp_path):
    """A diffusers checkpoint has a model_index.json; the manifest here is no JSON."""
    for name in files:
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(ExportError, match="is not a package"):
        write(tmp_path / "mine")
    assert (tmp_path / "mine" / files[0]).read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="is not a directory"):
        write(tmp_path / "file")


@pytest.mark.parametrize("files", [5, [["keep.bin"]], None, "keep.bin", ["keep.bin"]])
def test_a_manifest_without_a_table_of_files_proves_nothing(files, tmp_path):
    (tmp_path / "keep.bin").write_text("mine")
    manifest = {"components": {"unet": {"files": files}}, "source": {"exporter": "sdonnx 0"}}
    (tmp_path / "sdonnx.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="holds keep.bin"):
        write(tmp_path)


@posix
def test_a_read_only_package_is_refused_before_the_work():
    def replace():
        with pytest.raises(ExportError, match="is read-only"), replace_package(package, sources=[], force=True):
            raise AssertionError("the work has begun")

    with shared_directory() as directory:
        package = make_package(directory / "package")
        package.chmod(0o555)
        assert run_without_privileges(replace)
        package.chmod(0o755)


def test_a_package_called_as_a_calibration_is_replaced(old, checkpoint):
    old.rename("full")
    with pytest.raises(ExportError, match="full exists"):
        export(str(checkpoint), Path("full"))


@pytest.mark.parametrize("name", ["thesis.txt", "unet/lora.safetensors", "documents/notes.json", "README.md"])
def test_a_package_with_something_of_the_users_stays(name, old):
    (old / name).parent.mkdir(exist_ok=True)
    (old / name).write_text("mine")
    with pytest.raises(ExportError, match=f"old holds {name}, which is no part of a package"):
        write("old")
    assert (old / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("output", "source"),
    [
        ("old", "old"),
        ("old", "./old/"),
        ("old/../old", "old"),
        ("old", "old/unet/model.onnx"),
        ("old", "old/unet"),
        ("inner/package", "inner"),
        ("inner/package", "inner/package/../"),
        ("link", "old"),
        ("old", "link"),
        ("old", "link/unet"),
        ("OLD", "old"),
    ],
)
@posix
def test_what_is_read_is_never_replaced(output, source, old, tmp_path, monkeypatch):
    shutil.copytree(old, tmp_path / "inner" / "package")
    (tmp_path / "link").symlink_to("old")
    if output == "OLD":  # a file system that ignores case: another spelling, the same directory
        (tmp_path / "OLD").symlink_to("old")
        monkeypatch.setattr(Path, "resolve", Path.absolute)
        monkeypatch.setattr(os.path, "realpath", os.path.abspath)
        monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    before = contents(tmp_path)
    with pytest.raises(ExportError, match="which the export reads"):
        write(output, ["org/model", source])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("option", ["source", "vae", "lora", "calibration", "precision"])
def test_each_source_of_an_export(option, old, checkpoint):
    (old / "file").touch()
    path = old / "file" if option in ("lora", "calibration", "precision") else old
    options = {
        "source": {"source": str(path)},
        "vae": {"source": str(checkpoint), "vae": str(path)},
        "lora": {"source": str(checkpoint), "loras": [Lora(path=path)]},
        "calibration": {"source": str(checkpoint), "calibration": str(path)},
    }
    before = contents(old)
    if option == "precision":
        path.write_text('base = "fp16"')
        before = contents(old)
        ran = run_cli("export", checkpoint, "-o", old, "--force", "--precision", f"mixed:{path}")
        assert (ran.returncode, "which the export reads" in ran.stderr) == (1, True), ran.stderr
    else:
        with pytest.raises(ExportError, match="which the export reads"):
            export(output=old, force=True, **options[option])
    assert contents(old) == before


@pytest.mark.parametrize("output", [".", "..", "../..", "HOME", "/"])
def test_no_directory_that_someone_is_in(output, old, monkeypatch):
    (old / "tokenizer").mkdir(exist_ok=True)
    monkeypatch.chdir(old / "tokenizer")
    monkeypatch.setenv("HOME", str(old))
    monkeypatch.setenv("USERPROFILE", str(old))
    if output == "HOME":
        monkeypatch.chdir("/")
    before = contents(old)
    with pytest.raises(ExportError, match=r"is or contains (the working|your home) directory"):
        write(old if output == "HOME" else output)
    assert contents(old) == before


def test_no_mount_point(old, monkeypatch):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == old)
    with pytest.raises(ExportError, match="is a mount point"):
        write("old")


@posix
def test_a_link_stays_and_its_directory_is_written(old, tmp_path):
    (tmp_path / "disk").mkdir()
    old.rename(tmp_path / "disk" / "old")
    (tmp_path / "link").symlink_to("disk/old")
    (tmp_path / "dangling").symlink_to("disk/new")
    (tmp_path / "loop").symlink_to("loop")
    write("link")
    write("dangling", force=False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    for name in ("old", "new"):
        assert (tmp_path / "disk" / name / "unet" / "model.onnx").read_text() == "new"
    with pytest.raises(ExportError, match="link to itself"):
        write("loop")
    assert names(tmp_path) == ["dangling", "disk", "link", "loop"]
    assert names(tmp_path / "disk") == ["new", "old"]


def test_two_exports_to_one_directory(checkpoint, tmp_path):
    """The second is refused before it reads anything."""
    with open_staging(tmp_path, target="out"):
        ran = run_cli("export", tmp_path / "absent.safetensors", "-o", "out", cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr == "error: out can't be written: another export is writing it; choose another path\n"


@pytest.mark.parametrize("force", [True, False])
def test_the_loser_of_a_race_says_so(force, old):
    """What appears while a package is made is replaced only if it is a package, too, and --force is given."""
    with pytest.raises(ExportError, match=r"mine is not a package|mine exists"), replace_package(
        Path("mine"), sources=[], force=force
    ) as directory:  # fmt: skip
        make_package(directory, "new")
        shutil.copytree(old, "mine")
        if force:
            Path("mine/sdonnx.json").unlink()
    assert (Path("mine") / "unet" / "model.onnx").read_text() == "old"
    assert names(Path()) == ["mine", "old"]


def test_a_failure_leaves_no_directories(tmp_path):
    with pytest.raises(ExportError, match="damaged"), replace_package(
        tmp_path / "a" / "b" / "c", sources=[], force=False
    ) as directory:  # fmt: skip
        make_package(directory)
        raise ExportError("damaged")
    assert names(tmp_path) == []
    write(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c" / "sdonnx.json").is_file()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("src/unet/model.safetensors", r"src.unet.model.safetensors can't be read: Input/output error"),
        (None, "out can't be written: Input/output error"),
    ],
)
def test_an_error_of_reading_is_not_one_of_writing(path, message, old):
    with pytest.raises(ExportError, match=message), replace_package(Path("out"), sources=["src"], force=False):
        raise OSError(errno.EIO, "Input/output error", path)
    assert names(Path()) == ["old"]


@posix
@pytest.mark.parametrize("mode", [0o700, 0o775])
def test_the_mode_of_the_directory_stays(mode, old):
    old.chmod(mode)
    write("old")
    assert old.stat().st_mode & 0o7777 == mode


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("my-model-v1.4", "my-model-v1.4-onnx"),
        ("./models/my-model-v1.5/", "my-model-v1.5-onnx"),
        ("models/a.b.safetensors", "a.b-onnx"),
        ("A.SAFETENSORS", "A-onnx"),
        ("model.fp16.ckpt", "model.fp16-onnx"),
        ("v1-5.pruned", "v1-5.pruned-onnx"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0-onnx"),
        (".", "here-onnx"),
        ("..", "above.v2-onnx"),
        ("inner.ckpt", "inner.ckpt-onnx"),
    ],
)
def test_the_name_of_a_package(source, expected, tmp_path, monkeypatch):
    (tmp_path / "above.v2" / "here" / "inner.ckpt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above.v2" / "here")
    assert default_output(source) == Path(expected)


def test_the_longest_name(checkpoint, tmp_path):
    """Also with a calibration, whose directory has a longer name."""
    longest = os.pathconf(tmp_path, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    with pytest.raises(ExportError, match="choose a shorter name"):
        export("absent", tmp_path / ("x" * (longest + 1)))
    output = export(None, tmp_path / ("x" * longest), vae=str(checkpoint / "vae"))
    assert Package.open(output).root == output
    assert names(tmp_path) == [output.name]
    work = _calibration_cache(output)
    work.mkdir()
    assert work.parent == tmp_path
    assert work != _calibration_cache(tmp_path / ("y" * longest))


def test_a_directory_that_only_has_the_name_of_a_calibration_stays(checkpoint, tmp_path):
    (tmp_path / ".out.calibration").mkdir()
    (tmp_path / ".out.calibration" / "thesis.txt").write_text("years of work")
    vae = str(checkpoint / "vae")
    export(None, tmp_path / "out", vae=vae)
    with pytest.raises(ExportError, match=r"\.out\.calibration is in the way"):
        export(None, tmp_path / "out", vae=vae, precision="int8", force=True)
    assert (tmp_path / ".out.calibration" / "thesis.txt").read_text() == "years of work"
    assert Package.open(tmp_path / "out").manifest.components["vae_decoder"].precision == "fp32"


def test_what_an_export_wrote_is_all_known(package, checkpoint, tmp_path):
    """--force knows every file of a real package as its own."""
    shutil.copytree(package, tmp_path / "out")
    with replace_package(tmp_path / "out", sources=[checkpoint], force=True) as directory:
        make_package(directory, "new")
    assert (tmp_path / "out" / "unet" / "model.onnx").read_text() == "new"
