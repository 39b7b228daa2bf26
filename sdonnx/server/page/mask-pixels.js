// @ts-check
/** The pixels of a mask and their history. */

/** @typedef {{x: number, y: number}} Point */
/** @typedef {{left: number, top: number, right: number, bottom: number}} Rect without the right and bottom edge */
/** @typedef {Rect & {bits: Uint8Array}} Step of the history: a bit per pixel that changed, rows in whole bytes */

const STEPS = 50
const BYTES = 32 * 2 ** 20 // more steps are kept while they fit
const STRIP = 256 // rows that are converted at a time
const WHITE = 0xffffffff
const BLACK = 0xff000000

/** @type {(low: number, value: number, high: number) => number} */
export const clamp = (low, value, high) => Math.max(low, Math.min(value, high))

/** Where a brush sits: on a pixel's centre if its size is odd, on a corner if even.
 * @type {(point: Point, size: number) => Point} */
export const snap = ({ x, y }, size) =>
  size % 2 ? { x: Math.floor(x) + 0.5, y: Math.floor(y) + 0.5 } : { x: Math.round(x), y: Math.round(y) }

/** The smallest rectangle around both.
 * @type {(a: Rect | null, b: Rect) => Rect} */
export const unite = (a, b) => a === null ? b : {
  left: Math.min(a.left, b.left), top: Math.min(a.top, b.top),
  right: Math.max(a.right, b.right), bottom: Math.max(a.bottom, b.bottom),
}

/** @param {number} width
 * @param {number} height */
const opaqueCanvas = (width, height) => /** @type {OffscreenCanvasRenderingContext2D} */ (
  new OffscreenCanvas(width, height).getContext("2d", { alpha: false, willReadFrequently: true }))

/** Read an image file.
 * @param {Blob} blob */
export async function decode(blob) {
  return createImageBitmap(blob, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error("The browser can't read this file as an image; choose a PNG, JPEG or WebP.")
  })
}

/** A binary mask. What changes is a step of its history once it is committed. */
export class MaskPixels {
  undo = /** @type {Step[]} */ ([])
  redo = /** @type {Step[]} */ ([])
  #dirty = /** @type {Rect | null} */ (null)

  /** @param {number} width
   * @param {number} height
   * @param {ImageBitmap | null} [mask] to start with */
  constructor(width, height, mask) {
    this.width = width
    this.height = height
    this.bounds = { left: 0, top: 0, right: width, bottom: height }
    this.data = new Uint8Array(width * height) // 1 where it is painted
    if (mask) this.load(mask)
    this.painted = mask ? this.data.reduce((sum, value) => sum + value, 0) : 0
    this.#committed = this.data.slice()
    this.#dirty = null
  }

  #committed

  /** Paint (1) or erase (0) along a line.
   * @type {(from: Point, to: Point, size: number, value: number) => Rect} */
  stroke(from, to, size, value) {
    const [dx, dy] = [to.x - from.x, to.y - from.y]
    const dabs = Math.ceil(Math.hypot(dx, dy) / Math.sqrt(size / 2)) || 1 // edges wave by an eighth of a pixel
    let rect = this.#dab(from, size, value)
    for (let k = 1; k <= dabs; k++) {
      rect = unite(rect, this.#dab({ x: from.x + (dx * k) / dabs, y: from.y + (dy * k) / dabs }, size, value))
    }
    this.#dirty = unite(this.#dirty, rect)
    return rect
  }

  /** @type {(at: Point, size: number, value: number) => Rect} */
  #dab(at, size, value) {
    const { width, height } = this
    const { x, y } = snap(at, size)
    const radius = size / 2
    const [top, bottom] = [clamp(0, y - radius, height), clamp(0, y + radius, height)]
    for (let row = top; row < bottom; row++) {
      const half = Math.sqrt(radius ** 2 - (row + 0.5 - y) ** 2)
      const [start, end] = [clamp(0, Math.ceil(x - half - 0.5), width), clamp(0, Math.floor(x + half + 0.5), width)]
      this.data.fill(value, row * width + start, row * width + end)
    }
    return { left: clamp(0, x - radius, width), top, right: clamp(0, x + radius, width), bottom }
  }

  /** @param {number} value */
  fill(value) {
    this.data.fill(value)
    this.#dirty = this.bounds
  }

  invert() {
    for (let k = 0; k < this.data.length; k++) this.data[k] ^= 1
    this.#dirty = this.bounds
  }

  /** Take an image, scaled; what is at least half white and opaque is painted.
   * @param {ImageBitmap} image */
  load(image) {
    const { width, height } = this
    const context = opaqueCanvas(width, STRIP)
    for (let top = 0; top < height; top += STRIP) {
      context.fillRect(0, 0, width, STRIP)
      context.drawImage(image, 0, -top, width, height)
      const { data } = context.getImageData(0, 0, width, STRIP)
      for (let k = 0; k < data.length; k += 4) {
        const light = 0.299 * data[k] + 0.587 * data[k + 1] + 0.114 * data[k + 2]
        this.data[top * width + k / 4] = Number(light >= 127.5)
      }
    }
    this.#dirty = this.bounds
  }

  /** A PNG, white where it is painted and black elsewhere. */
  toBlob() {
    const { width, height } = this
    const context = opaqueCanvas(width, height)
    const strip = new ImageData(width, STRIP)
    const colours = new Uint32Array(strip.data.buffer)
    for (let top = 0; top < height; top += STRIP) {
      for (let k = 0; k < colours.length; k++) colours[k] = this.#committed[top * width + k] ? WHITE : BLACK
      context.putImageData(strip, 0, top)
    }
    return context.canvas.convertToBlob()
  }

  /** Make a step of what has changed; false if nothing has. */
  commit() {
    if (this.#dirty === null) return false
    const { left, top, right, bottom } = this.#dirty
    const [data, committed] = [this.data, this.#committed]
    const stride = (right - left + 7) >> 3
    const bits = new Uint8Array(stride * (bottom - top))
    for (let y = top; y < bottom; y++) {
      for (let x = left, k = y * this.width + left; x < right; x++, k++) {
        if (data[k] !== committed[k]) bits[(y - top) * stride + ((x - left) >> 3)] |= 1 << ((x - left) & 7)
      }
    }
    const step = { ...this.#dirty, bits }
    this.#dirty = null
    if (!bits.some(Boolean)) return false
    this.#flip(step)
    this.undo.push(step)
    this.redo = []
    let bytes = this.undo.reduce((sum, each) => sum + each.bits.length, 0)
    while (this.undo.length > STEPS && bytes > BYTES) bytes -= this.undo.shift()?.bits.length ?? 0
    return true
  }

  /** Take back what isn't committed. */
  revert() {
    this.data.set(this.#committed)
    this.#dirty = null
  }

  /** Undo or redo a step; false if there is none.
   * @param {"undo" | "redo"} direction */
  travel(direction) {
    const step = this[direction].pop()
    if (step === undefined) return false
    this[direction === "undo" ? "redo" : "undo"].push(step)
    this.#flip(step)
    this.revert()
    return true
  }

  /** @param {Step} step */
  #flip({ left, top, right, bits }) {
    const committed = this.#committed
    const stride = (right - left + 7) >> 3
    for (let index = 0; index < bits.length; index++) {
      if (bits[index] === 0) continue
      const start = (top + Math.floor(index / stride)) * this.width + left + (index % stride) * 8
      for (let bit = 0; bit < 8; bit++) {
        if (!((bits[index] >> bit) & 1)) continue
        committed[start + bit] ^= 1
        this.painted += committed[start + bit] ? 1 : -1
      }
    }
  }
}
