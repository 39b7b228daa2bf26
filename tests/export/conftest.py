"""Single files of tiny families, which several modules open."""

import pytest
from support.ldm import save_ldm
from support.single_files import FAMILIES


@pytest.fixture(scope="session")
def single_files(tmp_path_factory):
    """Single files by family, made when they are asked for."""
    made = {}

    def find(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("files") / "model.safetensors"
            save_ldm(FAMILIES[name](), made[name])
        return made[name]

    return find
