"""`<mask-editor>` on a page of its own, driven with the mouse."""

import base64
import functools
import http.server
import io
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page

import sdonnx.server

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'"
MARGIN = 12  # CSS pixels around an image that fits
HOST = b"""<!doctype html><html lang="en"><head><meta name="viewport" content="width=device-width"><title>Mask</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="/mask.css"><link rel="stylesheet" href="/host.css">
<script type="module" src="/mask.js"></script></head><body><main><mask-editor></mask-editor></main></body></html>"""
STYLE = b":root{color-scheme:light dark} body{margin:0} main{height:100vh}"
OPEN = """async ([width, height]) => {
  const canvas = new OffscreenCanvas(width, height)
  canvas.getContext("2d").fillRect(0, 0, width, height)
  const editor = document.querySelector("mask-editor")
  window.changes = 0
  editor.addEventListener("change", () => window.changes++)
  await editor.setImage(canvas.transferToImageBitmap())
}"""
READ = """async () => {
  const blob = await document.querySelector("mask-editor").toBlob()
  if (blob === null) return null
  const url = await new Promise((resolve) => {
    const reader = new FileReader()
    reader.onload = () => resolve(reader.result)
    reader.readAsDataURL(blob)
  })
  return url.split(",")[1]
}"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page's folder and a page of nothing but the editor, with the server's policy."""

    def do_GET(self):
        own = {"/": ("text/html", HOST), "/host.css": ("text/css", STYLE)}.get(self.path)
        if own is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", own[0])
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(own[1])

    def log_message(self, *args):
        pass


@contextmanager
def editor_site():
    """Serve the editor's page; yields its URL."""
    folder = Path(sdonnx.server.__file__).parent / "page"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True, kw_only=True)
class Editor:
    """An editor of the mask of a black image."""

    page: Page
    width: int
    height: int

    @property
    def canvas(self):
        return self.page.get_by_role("application", name="Mask canvas")

    def at(self, x, y):
        """Where a point of the image is in the window, while the image fits."""
        box = self.canvas.bounding_box()
        scale = min((box["width"] - 2 * MARGIN) / self.width, (box["height"] - 2 * MARGIN) / self.height)
        left = box["x"] + (box["width"] - self.width * scale) / 2
        top = box["y"] + (box["height"] - self.height * scale) / 2
        return left + x * scale, top + y * scale

    def stroke(self, *points, steps=7):
        """Draw through points of the image with the mouse."""
        mouse = self.page.mouse
        mouse.move(*self.at(*points[0]))
        mouse.down()
        for point in points[1:]:
            mouse.move(*self.at(*point), steps=steps)
        mouse.up()

    def set_size(self, size):
        self.page.get_by_role("slider", name="Brush size").fill(str(size))

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def choose(self, tool):
        self.page.get_by_role("radio", name=tool, exact=True).check(force=True)

    def blob(self):
        encoded = self.page.evaluate(READ)
        return None if encoded is None else base64.b64decode(encoded)

    def mask(self):
        """True where it is painted; fails if the PNG isn't of the image's size, opaque and of two colours."""
        blob = self.blob()
        if blob is None:
            return np.zeros((self.height, self.width), bool)
        image = Image.open(io.BytesIO(blob))
        assert (image.format, image.size) == ("PNG", (self.width, self.height))
        pixels = np.asarray(image.convert("RGBA"))
        assert (pixels[..., 3] == 255).all()
        assert np.isin(pixels[..., :3], (0, 255)).all()
        assert (pixels[..., 0] == pixels[..., 1]).all()
        assert (pixels[..., 0] == pixels[..., 2]).all()
        return pixels[..., 0] == 255

    @property
    def changes(self):
        return self.page.evaluate("changes")


def distances(shape, start, end):
    """How far each pixel's centre is from a segment."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    (ax, ay), (bx, by) = start, end
    length = (bx - ax) ** 2 + (by - ay) ** 2
    t = 0 if length == 0 else np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0, 1)
    return np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay))


def assert_is_stroke(mask, start, end, size, slack=1.0):
    far = distances(mask.shape, start, end)
    assert mask[far <= size / 2 - slack].all()
    assert not mask[far >= size / 2 + slack].any()


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
