"""The token, given by the clients themselves."""

import openai
import pytest
import webuiapi
from support.server import running_server


@pytest.fixture(scope="module")
def server():
    with running_server(token="user:correct-horse") as running:
        yield running


@pytest.mark.parametrize(
    ("user", "password", "is_right"),
    [("user", "correct-horse", True), ("", "user:correct-horse", True), ("user", "wrong", False), ("user", "", False)],
)
def test_webuiapi(server, user, password, is_right):
    api = webuiapi.WebUIApi(host="127.0.0.1", port=server.address[1])
    api.set_auth(user, password)
    if is_right:
        with pytest.raises(RuntimeError, match="400|404|422"):
            api.txt2img(prompt="a cat", sampler_name="no such sampler", steps=1)
    else:
        with pytest.raises(RuntimeError, match="401"):
            api.txt2img(prompt="a cat", steps=1)


def test_openai(server):
    right = openai.OpenAI(base_url=server.url + "/v1", api_key="user:correct-horse", max_retries=0)
    assert [each.id for each in right.models.list()] == ["pictogram"]
    with pytest.raises(openai.AuthenticationError, match="token") as caught:
        openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0).models.list()
    assert caught.value.code == "invalid_api_key"


def test_no_token_means_that_any_is_taken():
    """Clients send what was typed into their settings once."""
    with running_server() as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="whatever", max_retries=0)
        assert client.models.retrieve("pictogram").id == "pictogram"
