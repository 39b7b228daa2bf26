"""A server with a token: the page asks for it, keeps it in a cookie that scripts can't read, and forgets it."""

import re

import pytest
from playwright.sync_api import expect
from support.browser import open_tab
from support.page import button, make, prompt, shown
from support.server import running_server


@pytest.fixture(scope="module")
def server():
    with running_server(token="a-secret-%-unlike-others") as running:
        yield running


@pytest.fixture(autouse=True)
def refused(visits):
    visits.refusals.add(401)


def sign_in(page, token):
    dialog = page.get_by_role("dialog", name="Sign in")
    dialog.get_by_label("Token").fill(token)
    button(dialog, "Sign in").click()
    return dialog


def test_the_token_lets_in_and_is_forgotten(page):
    dialog = sign_in(page, "a guess")
    expect(dialog.get_by_role("alert")).to_have_text(re.compile("token"))
    expect(dialog).to_be_visible()
    sign_in(page, "a-secret-%-unlike-others")
    expect(dialog).to_be_hidden()
    make(page, "a fox", Steps=2)
    assert page.evaluate("document.cookie") == ""
    assert "secret" not in page.evaluate("JSON.stringify([localStorage, sessionStorage, location.href])")
    tab = open_tab(page)
    expect(prompt(tab)).to_have_value("a fox")
    expect(tab.get_by_role("dialog")).to_be_hidden()
    tab.close()
    button(page, "Sign out").click()
    expect(dialog).to_be_visible()
    page.reload()
    expect(dialog).to_be_visible()


def test_the_keyboard_alone_signs_in(page):
    dialog = page.get_by_role("dialog", name="Sign in")
    expect(dialog.get_by_label("Token")).to_be_focused()
    page.keyboard.type("a-secret-%-unlike-others")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()


def test_nothing_that_is_typed_gets_lost_by_signing_in_again(page):
    sign_in(page, "a-secret-%-unlike-others")
    dialog = page.get_by_role("dialog", name="Sign in")
    expect(page.locator("#plan")).not_to_be_empty()
    prompt(page).fill("a tiger on a white background")
    page.context.clear_cookies()
    prompt(page).press("Control+Enter")
    expect(dialog).to_be_visible()
    sign_in(page, "a-secret-%-unlike-others")
    expect(shown(page)).to_be_visible()
    expect(prompt(page)).to_have_value("a tiger on a white background")


def test_a_server_without_a_token_has_no_sign_out(serve, visits):
    page = visits(serve().url)
    expect(page.locator("#plan")).not_to_be_empty()
    expect(button(page, "Sign out")).to_be_hidden()
    expect(page.get_by_role("dialog")).to_be_hidden()
