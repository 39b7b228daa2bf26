// @ts-check
/** The images of a request: init image, mask and depth map, as far as the model takes them. */

import { find } from "./dom.js"
import { currentModel, form } from "./form.js"
import { ImageInput, blankUrl, dataUrl } from "./images.js"
import { MaskEditor } from "./mask.js"
import { NO_INPUTS, keepInputs, recallInputs } from "./store.js"

/** @import {Fields} from "./api.js" */
/** @import {Inputs} from "./store.js" */

const init = find("init-image", ImageInput)
const depth = find("depth-image", ImageInput)
const editor = find("mask-editor", MaskEditor)
const dialog = find("mask", HTMLDialogElement)

/** @type {Blob | null} */
let mask = null

/** @returns {Inputs} */
export function inputs() {
  return { image: takes("image") ? init.blob : null, mask: takes("mask") && init.blob ? mask : null,
    depth: takes("depth") ? depth.blob : null }
}

/** @param {"image" | "mask" | "depth"} what */
export function takes(what) {
  const { tasks, requires } = currentModel()
  const needs = { image: ["image-to-image", "inpainting", "pix2pix"], mask: ["inpainting"], depth: ["depth"] }[what]
  return needs.some((task) => tasks.includes(task)) || requires.includes(what === "depth" ? "depth_image" : `${what}_image`)
}

/**
 * The images as fields of a job; of a plan they are blank, for only their size counts.
 * @param {{isPlan?: boolean}} [options]
 * @returns {Promise<Fields>}
 */
export async function imageFields({ isPlan = false } = {}) {
  const given = inputs()
  /** @type {Fields} */
  const fields = {}
  const encode = (/** @type {Blob} */ blob, /** @type {ImageInput} */ { width, height }) =>
    isPlan ? blankUrl(width, height) : dataUrl(blob)
  if (given.image) fields.image = await encode(given.image, init)
  if (given.mask) fields.mask_image = await encode(given.mask, init)
  if (given.depth) fields.depth_image = await encode(given.depth, depth)
  return fields
}

/**
 * Replace all images.
 * @param {Inputs} given
 */
export async function setInputs(given) {
  await init.set(given.image)
  mask = given.mask
  await depth.set(given.depth)
  changed()
}

/**
 * Take an image as init image, without a mask.
 * @param {Blob} blob
 */
export async function setInitImage(blob) {
  await init.set(blob)
  find("init", HTMLFieldSetElement).scrollIntoView({ block: "nearest" })
}

/** The `<img>` of the init image, or null. */
export function initImage() {
  return init.blob && init.image
}

function changed() {
  show()
  void keepInputs({ image: init.blob, mask, depth: depth.blob })
  form.dispatchEvent(new Event("change"))
}

function show() {
  const { tasks } = currentModel()
  find("init", HTMLFieldSetElement).hidden = !takes("image")
  find("depth", HTMLFieldSetElement).hidden = !takes("depth")
  find("init-fields", HTMLDivElement).hidden = !init.blob
  find("paint", HTMLButtonElement).hidden = !takes("mask")
  find("paint", HTMLButtonElement).textContent = mask ? "Change the mask" : "Paint a mask"
  find("remove-mask", HTMLButtonElement).hidden = find("mask-fields", HTMLDivElement).hidden = !mask || !takes("mask")
  find("hires-field", HTMLDivElement).hidden = inputs().mask !== null
  find("image-guidance", HTMLDivElement).hidden = !tasks.includes("pix2pix")
  const strength = find("strength", HTMLInputElement)
  strength.placeholder = mask ? "1" : "0.75"
  if (!strength.value) find("strength-range", HTMLInputElement).value = strength.placeholder
  init.cover(takes("mask") ? mask : null)
}

/** Let the user paint the mask; nothing changes if he cancels. */
async function paint() {
  dialog.showModal()
  await editor.setImage(init.image, mask)
  editor.querySelector("canvas")?.focus()
}

form.addEventListener("model", show)
init.addEventListener("change", () => {
  mask = null
  changed()
})
depth.addEventListener("change", changed)
find("paint", HTMLButtonElement).addEventListener("click", () => void paint())
find("remove-mask", HTMLButtonElement).addEventListener("click", () => {
  mask = null
  changed()
})
/** Take what is painted. */
async function finishMask() {
  mask = await editor.toBlob()
  dialog.close()
  changed()
}

find("mask-cancel", HTMLButtonElement).addEventListener("click", () => dialog.close())
find("mask-done", HTMLButtonElement).addEventListener("click", () => void finishMask())
dialog.addEventListener("cancel", () => void finishMask()) // Esc loses nothing

/** Restore the images of the form. */
export async function restoreInputs() {
  await setInputs((await recallInputs()) ?? NO_INPUTS)
}

