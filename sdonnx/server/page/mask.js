// @ts-check
/** <mask-editor>: paint over an image what is to be repainted. */

import { make } from "./dom.js"
import { MaskPixels, clamp, decode } from "./mask-pixels.js"
import { button, group, labelled } from "./mask-tools.js"
import { MaskView } from "./mask-view.js"

/** @import {Point} from "./mask-pixels.js" */

/** @typedef {{start: PointerEvent | null, erases: boolean}} Stroke of a pointer, or of the keyboard */

const ZOOM = 1.25
const NOTCH = 40 // how far a wheel turns for the next size
const PAN = 40 // CSS pixels per arrow key
const PINCH_SLACK = 24 // CSS pixels that a first finger may move before a second one
const PEN_END = 5 // a button of pointers
const HELP =
  "Arrow keys move a crosshair, with Shift by 10 pixels. Space or Enter paints there, and on while it is held. " +
  "B is the brush, E the eraser; [ and ] change its size; plus, minus and 0 zoom."

/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }

/** An editor of an image's mask. It sends `change` whenever the mask has changed. */
export class MaskEditor extends HTMLElement {
  #view = new MaskView()
  #canvas = this.#view.canvas
  #brush = make("input", { type: "radio", name: "mask-tool", checked: true })
  #eraser = make("input", { type: "radio", name: "mask-tool" })
  #size = make("input", { type: "range", min: "1", max: "500", title: "Brush size ([ and ])", ariaLabel: "Brush size" })
  #sizeText = make("span")
  #file = make("input", { type: "file", accept: "image/*" })
  #undo = button("Undo", () => this.#edit("Undone", (pixels) => pixels.travel("undo")))
  #redo = button("Redo", () => this.#edit("Redone", (pixels) => pixels.travel("redo")))
  #clear = button("Clear", () => this.clear())
  #caption = make("p")
  #alert = make("p", { role: "alert" })
  #speech = make("p", { role: "status" })
  #speechTimer = 0
  #pointers = /** @type {Map<number, Point>} those that are down */ (new Map())
  #stroke = /** @type {Stroke | null} */ (null)
  #last = /** @type {Point | null} of the image, where a line starts */ (null)
  #hover = /** @type {Point | null} where the pointer is */ (null)
  #crosshair = /** @type {Point | null} of the image, where the keyboard paints while no pointer does */ (null)
  #spaceHeld = false
  #turned = 0

  /** @type {Record<string, () => void>} */
  #keys = {
    "[": () => this.#resize(Math.floor(this.#size.valueAsNumber / 1.1)),
    "]": () => this.#resize(Math.ceil(this.#size.valueAsNumber * 1.1)),
    "+": () => this.#view.zoom(ZOOM),
    "=": () => this.#view.zoom(ZOOM),
    "-": () => this.#view.zoom(1 / ZOOM),
    0: () => this.#view.fit(),
    b: () => (this.#brush.checked = true),
    e: () => (this.#eraser.checked = true),
    "mod+z": () => this.#undo.click(),
    "mod+y": () => this.#redo.click(),
    "mod+shift+z": () => this.#redo.click(),
  }

  connectedCallback() {
    if (this.firstChild) return
    const help = make("p", { id: "mask-help", textContent: HELP })
    this.#canvas.setAttribute("aria-describedby", help.id)
    this.append(this.#tools(), this.#alert, this.#view.element, this.#caption, this.#speech, help)
    this.#listenToPointers(this.#canvas)
    this.#listenToKeys(this.#canvas)
    this.#refresh()
  }

  /** Whether nothing is painted. */
  get isEmpty() {
    return this.#view.pixels.painted === 0
  }

  /** Edit the mask of another image, which may have one; the history starts anew.
   * @param {ImageBitmap | HTMLImageElement} image
   * @param {Blob | null} [mask] */
  async setImage(image, mask) {
    if (image instanceof HTMLImageElement) await image.decode()
    const photo = await createImageBitmap(image)
    const pixels = new MaskPixels(photo.width, photo.height, mask && (await decode(mask)))
    this.#stroke = this.#last = this.#crosshair = null
    this.#pointers.clear()
    this.#view.show(photo, pixels)
    this.#size.max = String(Math.min(500, Math.max(photo.width, photo.height)))
    this.#resize(Math.max(photo.width, photo.height) / 12)
    this.#refresh()
  }

  /** Take an image as the mask, scaled; white is painted. Rejects if the browser can't read it.
   * @param {Blob} blob */
  async setMask(blob) {
    const bitmap = await decode(blob)
    this.#edit("Mask loaded", (pixels) => pixels.load(bitmap))
  }

  clear() {
    this.#edit("Cleared", (pixels) => pixels.fill(0))
  }

  /** A PNG of the image's size, white where it is repainted and black elsewhere; null if nothing is. */
  async toBlob() {
    this.#endStroke()
    return this.isEmpty ? null : this.#view.pixels.toBlob()
  }

  #tools() {
    const invert = button("Invert", () => this.#edit("Inverted", (pixels) => pixels.invert()))
    const tools = group("Mask tools",
      group("Tool", labelled("Brush", this.#brush), labelled("Eraser", this.#eraser)),
      make("label", {}, make("span", { textContent: "Brush size" }), this.#size, this.#sizeText),
      group("Changes", this.#undo, this.#redo, invert, this.#clear),
      group("View", button("Zoom in", this.#keys["+"]), button("Zoom out", this.#keys["-"]), button("Fit", this.#keys[0])),
      labelled("Load a mask", this.#file),
    )
    this.#size.oninput = () => this.#resize(this.#size.valueAsNumber)
    this.#file.onchange = () => {
      this.#load(this.#file.files?.[0])
      this.#file.value = ""
    }
    // A change of the editor is one of its mask.
    tools.oninput = tools.onchange = (event) => event.stopPropagation()
    return tools
  }

  /** @param {HTMLElement} canvas */
  #listenToPointers(canvas) {
    canvas.onpointerdown = (event) => this.#press(event)
    canvas.onpointermove = (event) => this.#drag(event)
    canvas.onpointerup = canvas.onpointercancel = ({ pointerId }) => {
      this.#pointers.delete(pointerId)
      if (this.#stroke?.start?.pointerId === pointerId) this.#endStroke()
      if (this.#pointers.size === 0) canvas.classList.remove("mask-panning")
    }
    canvas.onpointerleave = () => this.#point(this.#crosshair, null)
    canvas.onwheel = (event) => {
      event.preventDefault()
      const delta = event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : NOTCH)
      if (event.ctrlKey || event.metaKey) {
        this.#view.zoom(Math.exp(clamp(-NOTCH, -delta, NOTCH) / 100), this.#view.locate(event))
        this.#point(this.#crosshair, this.#hover)
      } else if (Math.abs((this.#turned += delta)) >= NOTCH) {
        this.#keys[this.#turned < 0 ? "]" : "["]()
        this.#turned = 0
      }
    }
    this.addEventListener("dragover", (event) => event.preventDefault())
    this.addEventListener("drop", (event) => this.#take(event, event.dataTransfer))
    this.addEventListener("paste", (event) => this.#take(event, event.clipboardData))
  }

  /** @param {PointerEvent} event */
  #press(event) {
    const { pointerId, pointerType, button: pressed } = event
    if (this.#stroke?.start?.pointerType === "pen" && pointerType === "touch") return // a palm
    const point = this.#view.locate(event)
    this.#point(null, pointerType === "touch" ? null : point)
    this.#canvas.setPointerCapture(pointerId)
    this.#pointers.set(pointerId, point)
    if (this.#pointers.size > 1) this.#startPinch()
    else if (pressed === 1 || this.#spaceHeld) this.#canvas.classList.add("mask-panning")
    else if (pressed === 0 || pressed === PEN_END) {
      if (!event.shiftKey) this.#last = null
      this.#startStroke(event, this.#view.toImage(point))
    } else this.#pointers.delete(pointerId)
    if (pressed === 1) event.preventDefault() // it would scroll
  }

  /** @param {PointerEvent} event */
  #drag(event) {
    const { pointerId, pointerType } = event
    const point = this.#view.locate(event)
    if (pointerType !== "touch") this.#point(this.#crosshair, point)
    if (!this.#pointers.has(pointerId)) return
    const before = [...this.#pointers.values()]
    this.#pointers.set(pointerId, point)
    if (this.#stroke === null) return this.#view.follow(before, [...this.#pointers.values()])
    if (this.#stroke.start?.pointerId !== pointerId) return
    for (const each of [...event.getCoalescedEvents(), event]) this.#strokeTo(this.#view.toImage(this.#view.locate(each)))
  }

  /** A second finger has come: what the first has drawn counts only if it went far. */
  #startPinch() {
    if (!this.#stroke?.start) return
    const [{ x, y }] = this.#pointers.values()
    const from = this.#view.locate(this.#stroke.start)
    if (Math.hypot(x - from.x, y - from.y) > PINCH_SLACK) return this.#endStroke()
    this.#stroke = null
    this.#view.pixels.revert()
    this.#view.redraw()
  }

  /** @param {PointerEvent | null} start
   * @param {Point} point of the image */
  #startStroke(start, point) {
    this.#stroke = { start, erases: this.#eraser.checked || start?.button === PEN_END }
    this.#strokeTo(point)
  }

  /** @param {Point} point of the image */
  #strokeTo(point) {
    if (this.#stroke === null) return
    const value = this.#stroke.erases ? 0 : 1
    this.#view.redraw(this.#view.pixels.stroke(this.#last ?? point, point, this.#size.valueAsNumber, value))
    this.#last = point
  }

  #endStroke() {
    const done = this.#stroke?.erases ? "Erased" : "Painted"
    this.#stroke = null
    if (this.#view.pixels.commit()) this.#changed(done)
  }

  /** @param {string} done
   * @param {(pixels: MaskPixels) => boolean | void} edit true if it needs no commit */
  #edit(done, edit) {
    this.#endStroke()
    const moved = edit(this.#view.pixels)
    this.#view.redraw()
    if (this.#view.pixels.commit() || moved) this.#changed(done)
  }

  /** @param {string} done */
  #changed(done) {
    this.#alert.textContent = ""
    this.#say(`${done}, ${this.#refresh()}`)
    this.dispatchEvent(new Event("change", { bubbles: true }))
  }

  /** Load a file that is dropped or pasted.
   * @param {Event} event
   * @param {DataTransfer | null} data */
  #take(event, data) {
    if (!data?.files.length) return
    event.preventDefault()
    event.stopPropagation()
    this.#load(data.files[0])
  }

  /** @param {File | undefined} file */
  #load(file) {
    if (file) this.setMask(file).catch((error) => (this.#alert.textContent = error.message))
  }

  /** @param {HTMLElement} canvas */
  #listenToKeys(canvas) {
    this.addEventListener("keydown", (event) => {
      const mod = (event.ctrlKey || event.metaKey || event.altKey) && !event.getModifierState("AltGraph")
      const key = event.key.toLowerCase()
      const act = mod ? !event.altKey && this.#keys[`mod+${event.shiftKey ? "shift+" : ""}${key}`] : this.#keys[key]
      if (act) act()
      else if (mod || event.target !== canvas || !this.#useKey(event)) return
      event.preventDefault()
    })
    canvas.onkeyup = ({ key }) => (key === " " || key === "Enter") && this.#release()
    canvas.onblur = () => this.#release()
    canvas.onfocus = () => canvas.matches(":focus-visible") && this.#showCrosshair()
  }

  /** Move, paint or hold; false if the canvas has no use for the key.
   * @param {KeyboardEvent} event */
  #useKey({ key, shiftKey, repeat }) {
    if (key in ARROWS) this.#move(ARROWS[key], shiftKey ? 10 : 1)
    else if (key !== " " && key !== "Enter") return false
    else if (this.#crosshair === null && key === "Enter") this.#showCrosshair()
    else if (this.#crosshair === null) this.#canvas.classList.toggle("mask-hand", (this.#spaceHeld = true))
    else if (!repeat && !this.#stroke) {
      this.#last = null
      this.#startStroke(null, this.#crosshair)
    }
    return true
  }

  /** @param {[number, number]} direction
   * @param {number} step */
  #move([dx, dy], step) {
    if (this.#crosshair === null) return this.#view.pan(-dx * PAN, -dy * PAN)
    const { width, height, data } = this.#view.pixels
    const x = clamp(0, this.#crosshair.x + dx * step, width - 1)
    const y = clamp(0, this.#crosshair.y + dy * step, height - 1)
    this.#point({ x, y }, this.#hover)
    this.#view.reveal({ x, y })
    this.#strokeTo({ x, y })
    this.#say(`${x}, ${y}, ${data[y * width + x] ? "painted" : "not painted"}`)
  }

  /** End what a key holds. */
  #release() {
    this.#canvas.classList.toggle("mask-hand", (this.#spaceHeld = false))
    if (this.#stroke?.start === null) this.#endStroke()
  }

  /** @param {number} size */
  #resize(size) {
    this.#size.value = String(Math.round(size))
    this.#sizeText.textContent = `${this.#size.value} px`
    this.#point(this.#crosshair, this.#hover)
  }

  #showCrosshair() {
    this.#view.resize() // a dialog gets the focus before it has a size
    const { x, y } = this.#view.toImage(this.#view.middle)
    this.#point(this.#crosshair ?? { x: Math.floor(x), y: Math.floor(y) }, this.#hover)
  }

  /** Show the brush where the keyboard or a pointer paints.
   * @param {Point | null} crosshair
   * @param {Point | null} hover */
  #point(crosshair, hover) {
    this.#crosshair = crosshair
    this.#hover = hover
    const point = crosshair ?? (hover && this.#view.toImage(hover))
    this.#view.showBrush(point, this.#size.valueAsNumber, crosshair !== null)
  }

  /** Show what can be done and how much is painted, which is returned. */
  #refresh() {
    const { width, height, painted, undo, redo } = this.#view.pixels
    const share = `${Number(((100 * painted) / (width * height)).toPrecision(2))} % painted`
    this.#caption.textContent = `Mask ${width} × ${height}, ${share}`
    this.#undo.ariaDisabled = String(!undo.length)
    this.#redo.ariaDisabled = String(!redo.length)
    this.#clear.ariaDisabled = String(this.isEmpty)
    return share
  }

  /** Tell a screen reader the latest of several texts.
   * @param {string} text */
  #say(text) {
    clearTimeout(this.#speechTimer)
    this.#speechTimer = setTimeout(() => (this.#speech.textContent = text), 250)
  }
}

customElements.define("mask-editor", MaskEditor)
