"""Measure `sdonnx serve`'s page in Chromium: weight, first paint, and what jumps while an image is made.

python bench/page.py --loads 5
python bench/page.py --screenshot docs/page.png

Each load is a new visitor's, over loopback. The layout shift is that of Web Vitals, but shifts after input count too.
"""

import argparse
import io
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from chromium import find_chromium, open_chromium, read_layout_shifts, watch_layout_shifts
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect
from server import running

SIZES = {"phone": (360, 760), "laptop": (1280, 800), "desktop": (1680, 900), "screen": (2560, 1300)}

PROMPTS = {
    "a whale on a white background": 1, "a mushroom on a gray background": 2, "a frog on a yellow background": 3,
    "a cat on a pink background": 4, "a cherry on a green background": 5, "a tiger on a white background": 2,
    "a red apple on a blue background": 5, "a penguin on an orange background": 7, "a fox on a pink background": 4,
}  # fmt: skip
"""Prompts of the gallery with their seeds; the last is the image that is shown."""


@contextmanager
def visit(browser: Browser, url: str, size: tuple[int, int], scheme: str = "light", scale: float = 1) -> Iterator[Page]:
    """Open a page as a new visitor."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=scale,
        locale="en-GB",
    )
    try:
        page = context.new_page()
        page.goto(url)
        yield page
    finally:
        context.close()


def weigh(browser: Browser, url: str) -> dict[str, int]:
    """Bytes that travel of each file of the page, its API aside."""
    requests: list[Request] = []
    with visit(browser, "about:blank", SIZES["laptop"]) as page:
        page.on("requestfinished", lambda each: requests.append(each))
        page.goto(url, wait_until="load")
        files = {urlsplit(each.url).path: each for each in requests if "/api/" not in each.url}
        return {path: each.sizes()["responseBodySize"] for path, each in files.items()}


def first_paints(browser: Browser, url: str, loads: int) -> list[float]:
    """Milliseconds from a navigation to the first contentful paint, for each load."""
    found = []
    for _ in range(loads):
        with visit(browser, url, SIZES["laptop"]) as page:
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            found.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    return found


def layout_shift(browser: Browser, url: str, size: tuple[int, int]) -> float:
    """The sum of layout shifts from a page that has loaded to an image that is shown."""
    with visit(browser, url, size) as page:
        expect(page.locator("body.ready #plan")).not_to_be_empty(timeout=60_000)
        page.wait_for_timeout(500)
        watch_layout_shifts(page)
        make(page, "a fox on a pink background", 4)
        shifts = read_layout_shifts(page)
        for each in shifts:
            print(f"{size}: {each}", file=sys.stderr)
        return sum(each["value"] for each in shifts)


def make(page: Page, prompt: str, seed: int) -> None:
    """Make an image by keyboard, and wait until it is shown."""
    page.get_by_role("spinbutton", name="Seed", exact=True).fill(str(seed))
    box = page.get_by_role("textbox", name="Prompt", exact=True)
    box.fill(prompt)
    with page.expect_response(lambda each: each.request.method == "POST" and each.url.endswith("/api/jobs")) as reply:
        box.press("Control+Enter")
    image = page.get_by_role("region", name="Image", exact=True).get_by_role("img").first
    name = reply.value.json()["id"]
    expect(image).to_have_attribute("src", re.compile(f"/api/images/[^/]*{name}"), timeout=120_000)


def take_screenshot(browser: Browser, url: str, path: Path, size: tuple[int, int], scheme: str) -> None:
    """Save the page with an image and a gallery, in 256 colours."""
    with visit(browser, url, size, scheme) as page:
        expect(page.locator("body.ready #plan")).not_to_be_empty(timeout=60_000)
        for prompt, seed in PROMPTS.items():
            make(page, prompt, seed)
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    """Print a table, or save a screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="pictogram")
    parser.add_argument("--loads", type=int, default=5, metavar="N")
    parser.add_argument("--screenshot", type=Path, metavar="FILE.png")
    parser.add_argument("--size", choices=SIZES, default="desktop")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("Chromium is not installed")
    with running(args.model, "max", None) as server, open_chromium(program) as browser:
        if args.screenshot is not None:
            take_screenshot(browser, server.url, args.screenshot, SIZES[args.size], args.scheme)
            return
        files = weigh(browser, server.url)
        paints = first_paints(browser, server.url, args.loads)
        shifts = {name: layout_shift(browser, server.url, size) for name, size in SIZES.items()}
    print("| | |\n| --- | --- |")
    print(f"| weight | {sum(files.values()) / 1000:.1f} kB in {len(files)} files |")
    print(f"| first paint, median of {len(paints)} | {statistics.median(paints):.0f} ms |")
    for name, shift in shifts.items():
        print(f"| layout shift, {'x'.join(map(str, SIZES[name]))} | {shift:.3f} |")


if __name__ == "__main__":
    main()
