// @ts-check
/** Images that the user gives: choosing, dropping, and what the server takes of them. */

import { button, make } from "./dom.js"

const TYPES = ["image/png", "image/jpeg", "image/webp"]

/**
 * The first image of a drop or a paste.
 * @param {DataTransfer | null} transfer
 * @returns {File | undefined}
 */
export function imageOf(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"))
}

/**
 * Encode an image for JSON.
 * @param {Blob} blob
 * @returns {Promise<string>}
 */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader()
    reader.onload = () => resolve(String(reader.result))
    reader.onerror = () => reject(reader.error)
    reader.readAsDataURL(blob)
  })
}

/** The latest white image. */
let blank = { width: 0, height: 0, url: "" }

/**
 * A white image: of a plan only the size counts, so the pixels need not travel.
 * @param {number} width
 * @param {number} height
 * @returns {string} a data URL
 */
export function blankUrl(width, height) {
  if (blank.width === width && blank.height === height) return blank.url
  const canvas = make("canvas", { width, height })
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }))
  context.fillStyle = "white"
  context.fillRect(0, 0, width, height)
  blank = { width, height, url: canvas.toDataURL("image/png") }
  return blank.url
}

/**
 * Convert an image that only the browser can read, such as AVIF; throws an Error if it can't either.
 * @param {Blob} blob
 * @returns {Promise<Blob>}
 */
async function readable(blob) {
  const bitmap = await createImageBitmap(blob).catch(() => {
    throw new Error("This is not an image that the browser can read. Choose a PNG, JPEG or WebP.")
  })
  if (TYPES.includes(blob.type)) return blob
  const canvas = make("canvas", { width: bitmap.width, height: bitmap.height })
  canvas.getContext("2d")?.drawImage(bitmap, 0, 0)
  return new Promise((resolve, reject) =>
    canvas.toBlob((png) => (png ? resolve(png) : reject(new Error("The image is too large for the browser."))), "image/png"),
  )
}

/** `<image-input label="…">`: a place for one image, by choosing, dropping or setting `blob`. It sends `change`. */
export class ImageInput extends HTMLElement {
  /** @type {Blob | null} */
  #blob = null
  /** Counts the images that were set: a slow one does not replace a later one. */
  #turn = 0
  #file = make("input", { type: "file", accept: "image/*", hidden: true })
  #image = make("img", { hidden: true })
  #error = make("p", { className: "error" })
  #overlay = make("div", { className: "overlay" })
  #hint = make("span", { className: "hint", textContent: "or drop or paste one" })
  #remove = button("Remove", () => void this.set(null))
  width = 0
  height = 0

  connectedCallback() {
    const label = this.getAttribute("label") ?? ""
    const choose = button(label, () => this.#file.click())
    this.#image.alt = this.getAttribute("alt") ?? ""
    this.#remove.hidden = true
    this.#file.ariaLabel = `${label}, file`
    this.#file.addEventListener("change", () => {
      const file = this.#file.files?.[0]
      this.#file.value = ""
      if (file) void this.set(file)
    })
    const shown = make("div", { className: "shown" }, this.#image, this.#overlay)
    this.replaceChildren(shown, make("div", { className: "row" }, choose, this.#remove, this.#hint), this.#file, this.#error)
    this.addEventListener("dragover", (event) => {
      event.preventDefault()
      this.classList.add("over")
    })
    this.addEventListener("dragleave", () => this.classList.remove("over"))
    this.addEventListener("drop", (event) => {
      this.classList.remove("over")
      const file = imageOf(event.dataTransfer)
      if (!file) return
      event.preventDefault()
      event.stopPropagation()
      void this.set(file)
    })
  }

  get blob() {
    return this.#blob
  }

  /** The `<img>` that shows it. */
  get image() {
    return this.#image
  }

  /**
   * Take an image, or none; one that can't be read is an error in place.
   * @param {Blob | null} blob
   */
  async set(blob) {
    const turn = ++this.#turn
    this.#error.textContent = ""
    try {
      const found = blob && (await readable(blob))
      if (turn !== this.#turn) return
      this.#show(found)
      if (found) await this.#image.decode()
    } catch (error) {
      if (turn !== this.#turn) return
      this.#show(null)
      this.#error.textContent = error instanceof Error ? error.message : String(error)
    }
    if (turn !== this.#turn) return
    this.width = this.#blob ? this.#image.naturalWidth : 0
    this.height = this.#blob ? this.#image.naturalHeight : 0
    this.dispatchEvent(new Event("change", { bubbles: true }))
  }

  /**
   * Show a mask over the image, or none.
   * @param {Blob | null} mask white where it covers
   */
  cover(mask) {
    const { style } = this.#overlay
    URL.revokeObjectURL(style.maskImage.slice(5, -2))
    style.maskImage = mask ? `url("${URL.createObjectURL(mask)}")` : ""
    this.#overlay.hidden = !mask
  }

  /** @param {Blob | null} blob */
  #show(blob) {
    URL.revokeObjectURL(this.#image.src)
    this.#blob = blob
    this.#image.hidden = this.#remove.hidden = !blob
    this.#hint.hidden = Boolean(blob)
    if (blob) this.#image.src = URL.createObjectURL(blob)
    else this.#image.removeAttribute("src")
  }
}

customElements.define("image-input", ImageInput)
