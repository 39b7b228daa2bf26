// @ts-check
/** What the mask editor shows: the image, the mask over it and the brush, zoomed and panned. */

import { make } from "./dom.js"
import { MaskPixels, clamp, snap, unite } from "./mask-pixels.js"

/** @import {Point, Rect} from "./mask-pixels.js" */

const MARGIN = 12 // around an image that fits
const LARGEST = 40 // per pixel of the image
const SMOOTH_BELOW = 3 // larger pixels keep their edges

// Stripes within an outline of two colours: one of them shows on any image. 0xAABBGGRR.
const STRIPES = [0x99f03cff, 0x99a01478]
const OUTLINE = [0xffffffff, 0xff000000]

/** The view of a mask, in CSS pixels. */
export class MaskView {
  pixels = new MaskPixels(1, 1)
  canvas = make("canvas", { tabIndex: 0, role: "application", ariaLabel: "Mask canvas" })
  #photo = make("canvas")
  #brush = make("div", { className: "mask-brush" })
  element = make("div", { className: "mask-stage" }, this.canvas, this.#photo, this.#brush)
  #image = /** @type {CanvasImageSource} */ (make("canvas"))
  #scale = 1 // per pixel of the image
  #left = 0
  #top = 0
  #fits = true
  #moved = false
  #frame = 0
  #dirty = /** @type {Rect | null} of the image */ (null)
  #cursor = /** @type {Point | null} of the image */ (null)
  #size = 1

  constructor() {
    new ResizeObserver(() => this.resize()).observe(this.element)
  }

  /** @param {CanvasImageSource} image
   * @param {MaskPixels} pixels */
  show(image, pixels) {
    this.#image = image
    this.pixels = pixels
    this.fit()
  }

  get middle() {
    return { x: this.element.clientWidth / 2, y: this.element.clientHeight / 2 }
  }

  get #fitScale() {
    const { x, y } = this.middle
    return clamp(0.001, Math.min((x - MARGIN) / this.pixels.width, (y - MARGIN) / this.pixels.height) * 2, LARGEST)
  }

  fit() {
    this.#scale = this.#fitScale
    this.#left = this.middle.x - (this.pixels.width * this.#scale) / 2
    this.#top = this.middle.y - (this.pixels.height * this.#scale) / 2
    this.#move(true)
  }

  /** Zoom around a point. */
  zoom(/** @type {number} */ factor, at = this.middle) {
    const { x, y } = this.toImage(at)
    this.#scale = clamp(Math.min(this.#fitScale, 1) / 2, this.#scale * factor, LARGEST)
    this.pan(at.x - x * this.#scale - this.#left, at.y - y * this.#scale - this.#top)
  }

  /** Move the image; some of it stays in the middle.
   * @param {number} dx
   * @param {number} dy */
  pan(dx, dy) {
    const { x, y } = this.middle
    this.#left = clamp(x - this.pixels.width * this.#scale, this.#left + dx, x)
    this.#top = clamp(y - this.pixels.height * this.#scale, this.#top + dy, y)
    this.#move(false)
  }

  /** Pan and zoom as one or two pointers move.
   * @param {Point[]} from
   * @param {Point[]} to */
  follow(from, to) {
    const [before, after] = [spread(from), spread(to)]
    this.pan(after.x - before.x, after.y - before.y)
    if (before.size && after.size) this.zoom(after.size / before.size, after)
  }

  /** Pan until a point of the image is in the view.
   * @param {Point} point */
  reveal(point) {
    const [x, y] = [this.#left + point.x * this.#scale, this.#top + point.y * this.#scale]
    const dx = clamp(MARGIN, x, 2 * this.middle.x - MARGIN) - x
    const dy = clamp(MARGIN, y, 2 * this.middle.y - MARGIN) - y
    if (dx || dy) this.pan(dx, dy)
  }

  /** The point below a pointer.
   * @param {MouseEvent} pointer */
  locate({ clientX, clientY }) {
    const { left, top } = this.canvas.getBoundingClientRect()
    return { x: clientX - left, y: clientY - top }
  }

  /** The image's point at a point.
   * @param {Point} point */
  toImage({ x, y }) {
    return { x: (x - this.#left) / this.#scale, y: (y - this.#top) / this.#scale }
  }

  /** Show a brush at a point of the image, or none.
   * @param {Point | null} point
   * @param {number} size
   * @param {boolean} crosshair */
  showBrush(point, size, crosshair) {
    this.#cursor = point && snap(point, size)
    this.#size = size
    this.#brush.classList.toggle("mask-crosshair", crosshair)
    this.#placeBrush()
  }

  /** Draw a rectangle of the mask with the next frame. */
  redraw(/** @type {Rect} */ rect = this.pixels.bounds) {
    this.#dirty = unite(this.#dirty, rect)
    this.#frame ||= requestAnimationFrame(() => this.#draw())
  }

  /** @param {boolean} fits */
  #move(fits) {
    this.#fits = fits
    this.#moved = true
    this.redraw()
  }

  resize() {
    const { clientWidth, clientHeight } = this.element
    if (!clientWidth || !clientHeight) return
    for (const canvas of [this.#photo, this.canvas]) {
      canvas.width = Math.round(clientWidth * devicePixelRatio)
      canvas.height = Math.round(clientHeight * devicePixelRatio)
    }
    if (this.#fits) this.fit()
    else this.pan(0, 0)
    this.#draw()
  }

  #draw() {
    cancelAnimationFrame(this.#frame)
    this.#frame = 0
    const [photo, context] = [this.#photo, this.canvas].map((canvas) => canvas.getContext("2d"))
    if (!this.#dirty || !photo || !context || !this.element.clientWidth) return
    const ratio = this.canvas.width / this.element.clientWidth
    const [scale, left, top] = [this.#scale * ratio, Math.round(this.#left * ratio), Math.round(this.#top * ratio)]
    if (this.#moved) {
      for (const each of [photo, context]) each.clearRect(0, 0, this.canvas.width, this.canvas.height)
      photo.imageSmoothingEnabled = this.#scale < SMOOTH_BELOW
      photo.imageSmoothingQuality = "medium"
      photo.drawImage(this.#image, left, top, this.pixels.width * scale, this.pixels.height * scale)
      this.#placeBrush()
    }
    drawMask(context, this.pixels, this.#dirty, scale, left, top)
    this.#dirty = null
    this.#moved = false
  }

  #placeBrush() {
    this.#brush.hidden = this.#cursor === null
    if (this.#cursor === null) return
    const { style } = this.#brush
    const x = this.#left + (this.#cursor.x - this.#size / 2) * this.#scale
    const y = this.#top + (this.#cursor.y - this.#size / 2) * this.#scale
    style.width = style.height = `${this.#size * this.#scale}px`
    style.transform = `translate(${x}px, ${y}px)`
  }
}

/** The middle of one or two points and how far they are apart.
 * @param {Point[]} points */
const spread = ([a, b = a]) => ({ x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, size: Math.hypot(a.x - b.x, a.y - b.y) })

/** Draw a rectangle of a mask, and what is beside it, whose outline may have changed.
 * @type {(context: CanvasRenderingContext2D, pixels: MaskPixels, rect: Rect, scale: number, x: number, y: number) => void} */
function drawMask(context, { data, width, height }, rect, scale, x, y) {
  const left = Math.max(0, x, Math.floor(x + (rect.left - 1) * scale))
  const top = Math.max(0, y, Math.floor(y + (rect.top - 1) * scale))
  const right = Math.min(context.canvas.width, Math.ceil(x + Math.min(rect.right + 1, width) * scale))
  const bottom = Math.min(context.canvas.height, Math.ceil(y + Math.min(rect.bottom + 1, height) * scale))
  if (left >= right || top >= bottom) return
  const columns = Int32Array.from({ length: right - left + 1 }, (_, k) => sample(left + k - 1 - x, scale, width))
  const image = new ImageData(right - left, bottom - top)
  const colours = new Uint32Array(image.data.buffer)
  const stripe = devicePixelRatio < 1.5 ? 2 : 3
  for (let j = top, k = 0; j < bottom; j++) {
    const row = sample(j - y, scale, height) * width
    const above = sample(j - 1 - y, scale, height) * width
    for (let i = left; i < right; i++, k++) {
      const column = columns[i - left + 1]
      const value = data[row + column]
      const edge = value !== data[row + columns[i - left]] || value !== data[above + column]
      if (edge || value) colours[k] = (edge ? OUTLINE : STRIPES)[((i + j) >> stripe) & 1]
    }
  }
  context.putImageData(image, left, top)
}

/** The pixel of the image below a device pixel, in one dimension.
 * @type {(at: number, scale: number, count: number) => number} */
const sample = (at, scale, count) => clamp(0, Math.floor((at + 0.5) / scale), count - 1)
