"""The page's files: typed, without findings, light, and on their own."""

import re
import subprocess
from pathlib import Path

import pytest
from support.javascript import install_packages

import sdonnx.server

PAGE = Path(sdonnx.server.__file__).parent / "page"
TSC = (
    "--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "es2023", "--module", "esnext",
    "--moduleResolution", "bundler", "--lib", "es2023,dom,dom.iterable,dom.asynciterable",
)  # fmt: skip


@pytest.fixture(scope="module")
def tools():
    return install_packages(Path(__file__).parent / "js")


def run(*command):
    ran = subprocess.run(command, cwd=PAGE, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_types_are_right(tools):
    run(tools / "node_modules" / ".bin" / "tsc", *TSC, *sorted(PAGE.glob("*.js")))


def test_the_linter_finds_nothing(tools):
    run(tools / "node_modules" / ".bin" / "eslint", "--config", tools / "eslint.config.js", "--max-warnings", "0", ".")


def test_every_module_is_type_checked():
    for path in PAGE.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith("// @ts-check\n"), path.name
        assert not re.search(r"@ts-(ignore|nocheck|expect-error)", text), path.name


def test_it_names_no_other_host():
    for path in PAGE.iterdir():
        if path.is_file():
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            found = re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]\S*", text)
            assert not found, f"{path.name}: {found}"
