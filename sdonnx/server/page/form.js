// @ts-check
/** The form: what the user asks for, kept in the browser. */

import { ApiError, wholeNumber } from "./api.js"
import { button, find, make } from "./dom.js"
import { keep, recall } from "./store.js"

/** @import {Field, Fields, Model, Titled} from "./api.js" */

/** @typedef {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement} Control */

const ASPECTS = { Square: [1, 1], "Portrait 3:4": [3, 4], "Portrait 2:3": [2, 3], "Portrait 9:16": [9, 16],
  "Landscape 4:3": [4, 3], "Landscape 3:2": [3, 2], "Landscape 16:9": [16, 9] }

const HIRES_SCALE = 2
const LATENT = "latent" // what hires fix upscales by default
const RANDOM = "-1" // as a seed in AUTOMATIC1111
const MASK_PADDING = 32
const LARGE_MULTIPLE = 64

const element = find("form", HTMLFormElement)
const model = find("model", HTMLSelectElement)
const vae = find("vae", HTMLSelectElement)
const size = find("size", HTMLSelectElement)
const hires = find("hires", HTMLInputElement)
hires.dataset.scale = String(HIRES_SCALE)
const fast = find("fast", HTMLInputElement)
const onlyMasked = find("only_masked", HTMLInputElement)

/** Sends `change` when a request would be another one, and `model` when another model is chosen. */
export const form = new EventTarget()

/** @type {Model[]} */
let models = []

/** Fields that were restored and have no control of their own. @type {Fields} */
let extras = {}

/** @returns {Control[]} the controls that are named after fields of a request */
function named() {
  return /** @type {Control[]} */ ([...element.elements].filter((each) => "name" in each && each.name))
}

/** @returns {Model} */
export function currentModel() {
  return models.find((each) => each.name === model.value) ?? models[0]
}

/** @returns {Fields} the request without its images; throws an ApiError if something is not a number */
export function requestFields() {
  /** @type {Fields} */
  const fields = { ...numbers(extras), model: model.value }
  for (const control of named()) {
    if (control.closest("[hidden]")) continue
    if (control.validity.badInput) throw new ApiError(0, `${control.name} is not a number; give one, or nothing`)
    if (control.value === "" || (control.name === "seed" && control.value === RANDOM)) continue
    const isNumber = control instanceof HTMLInputElement && control.type === "number"
    fields[control.name] = isNumber ? wholeNumber(control.value) : control.value
  }
  if (vae.value) fields.vae = vae.value
  if (hires.checked && !hires.closest("[hidden]")) fields.hires_scale = Number(hires.dataset.scale)
  if (fast.checked && !fast.closest("[hidden]")) Object.assign(fields, currentModel().fast)
  if (onlyMasked.checked && !onlyMasked.closest("[hidden]"))
    fields.padding_mask_crop = Number(onlyMasked.dataset.padding ?? MASK_PADDING)
  return fields
}

/**
 * Values with the whole numbers that `parse` kept as texts.
 * @param {any} value
 * @returns {any}
 */
function numbers(value) {
  if (Array.isArray(value)) return value.map(numbers)
  if (typeof value === "string" && /^\d{16,}$/.test(value)) return wholeNumber(value)
  if (typeof value !== "object" || value === null) return value
  return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, numbers(each)]))
}

/**
 * Replace everything in the form; what has no control becomes an extra.
 * @param {Fields} fields of a request, as `/api/info` has them
 * @param {{model?: string | null, vae?: string | null}} names
 */
export function setRequest(fields, names) {
  const rest = { ...fields }
  if (rest.hires_upscaler === LATENT) delete rest.hires_upscaler
  for (const control of named()) if (assign(control, rest[control.name])) delete rest[control.name]
  if (names.model && models.some((each) => each.name === names.model)) model.value = names.model
  vae.value = names.vae ?? ""
  hires.checked = "hires_scale" in rest
  hires.dataset.scale = String(rest.hires_scale ?? HIRES_SCALE)
  onlyMasked.checked = "padding_mask_crop" in rest
  onlyMasked.dataset.padding = String(rest.padding_mask_crop ?? MASK_PADDING)
  delete rest.hires_scale
  delete rest.padding_mask_crop
  const speed = Object.entries(currentModel().fast)
  fast.checked = speed.length > 0 && speed.every(([name, value]) => rest[name] === value)
  if (fast.checked) for (const [name] of speed) delete rest[name]
  extras = rest
  adaptToModel()
  form.dispatchEvent(new Event("model"))
  changed()
}

/**
 * Give a control a value, for a choice also its title; false if there is no such choice.
 * @param {Control} control
 * @param {unknown} value
 */
function assign(control, value) {
  const text = String(value ?? "")
  const options = control instanceof HTMLSelectElement ? [...control.options] : []
  control.value = options.find((each) => each.text === text)?.value ?? text
  return control.value !== "" || text === ""
}

/**
 * Set one control.
 * @param {string} name
 * @param {unknown} value
 */
export function setField(name, value) {
  const control = named().find((each) => each.name === name)
  if (control) control.value = String(value ?? "")
  changed()
}

/** @returns {string[]} the styles that are chosen */
export function chosenStyles() {
  return Array.isArray(extras.styles) ? extras.styles.map(String) : []
}

/**
 * Choose a style, or leave it out.
 * @param {string} name
 */
export function toggleStyle(name) {
  const others = chosenStyles().filter((each) => each !== name)
  const styles = chosenStyles().includes(name) ? others : [...others, name]
  extras = { ...extras, styles }
  if (styles.length === 0) delete extras.styles
  changed()
}

function changed() {
  if (models.length === 0) return
  showExtras()
  showUpscaler()
  showSize()
  const range = find("strength-range", HTMLInputElement)
  const strength = find("strength", HTMLInputElement)
  range.value = strength.value || strength.placeholder
  const values = Object.fromEntries(named().map((each) => [each.name, each.value]))
  const { checked } = hires
  keep("form", { values, extras, model: model.value, vae: vae.value, hires: checked && hires.dataset.scale,
    fast: fast.checked, onlyMasked: onlyMasked.checked && onlyMasked.dataset.padding })
  form.dispatchEvent(new Event("change"))
}

function restore() {
  const kept = recall("form", null)
  if (!kept) return
  for (const control of named()) control.value ||= kept.values?.[control.name] ?? ""
  extras = kept.extras ?? {}
  vae.value = kept.vae ?? ""
  fast.checked = Boolean(kept.fast)
  hires.checked = Boolean(kept.hires)
  hires.dataset.scale = String(kept.hires || HIRES_SCALE)
  onlyMasked.checked = Boolean(kept.onlyMasked)
  onlyMasked.dataset.padding = String(kept.onlyMasked || MASK_PADDING)
}

function showUpscaler() {
  find("hires-upscaler-field", HTMLDivElement).hidden = !hires.checked
}

/** Show what is set without a control; styles only where they are not offered. */
export function showExtras() {
  const list = find("extras-list", HTMLUListElement)
  const names = Object.keys(extras).filter((name) => name !== "styles" || find("styles", HTMLFieldSetElement).hidden)
  find("extras", HTMLFieldSetElement).hidden = names.length === 0
  const chip = (/** @type {string} */ name) => {
    const remove = button(`${name} ${format(extras[name])} ×`, () => {
      delete extras[name]
      changed()
    })
    remove.ariaLabel = `Remove ${name} ${format(extras[name])}`
    return make("li", {}, remove)
  }
  list.replaceChildren(...names.map(chip))
}

/** @param {unknown} value */
export function format(value) {
  return Array.isArray(value) ? value.join(", ") : String(value)
}

/**
 * Sides of an aspect ratio with about as many pixels as the model's own.
 * @param {number[]} aspect
 */
function sides([across, down]) {
  const { defaults, multiple } = currentModel()
  const step = defaults.width >= 512 ? Math.max(LARGE_MULTIPLE, multiple) : multiple
  const area = defaults.width * defaults.height
  const snap = (/** @type {number} */ side) => Math.max(step, Math.round(side / step) * step)
  return [snap(Math.sqrt((area * across) / down)), snap(Math.sqrt((area * down) / across))]
}

function showSize() {
  const { defaults } = currentModel()
  const [width, height] = ["width", "height"].map((id) => find(id, HTMLInputElement).value)
  const chosen = width || height ? `${width || defaults.width}x${height || defaults.height}` : ""
  size.value = chosen
  if (size.value !== chosen) size.value = "custom"
}

function adaptToModel() {
  const { defaults, multiple, fast: speed } = currentModel()
  const option = (/** @type {string} */ text, /** @type {string} */ value) => new Option(text, value)
  const presets = Object.entries(ASPECTS).map(([name, aspect]) => {
    const [width, height] = sides(aspect)
    return option(`${name}, ${width} × ${height}`, `${width}x${height}`)
  })
  const own = option(`The model's, ${defaults.width} × ${defaults.height}`, "")
  const custom = option("Other", "custom")
  custom.hidden = true
  size.replaceChildren(own, ...presets, custom)
  for (const name of /** @type {const} */ (["width", "height", "num_inference_steps", "guidance_scale"])) {
    const input = find(name, HTMLInputElement)
    input.placeholder = String(defaults[name])
    if (name === "width" || name === "height") input.step = input.min = String(multiple)
  }
  find("fast-field", HTMLDivElement).hidden = Object.keys(speed).length === 0
}

/**
 * Fill the lists, and restore what the browser kept.
 * @param {{models: Model[], vaes: Titled[], upscalers: Titled[], samplers: Titled[], schedules: Titled[]}} lists
 */
export function fillForm({ models: served, vaes, upscalers, samplers, schedules }) {
  models = served
  const options = (/** @type {Titled[]} */ items) => items.map((each) => new Option(each.title, each.name))
  model.replaceChildren(...served.map((each) => new Option(each.name, each.name)))
  const byDefault = served.find((each) => each.default) ?? served[0]
  const kept = recall("form", {}).model
  model.value = served.some((each) => each.name === kept) ? kept : byDefault.name
  vae.replaceChildren(new Option("The model's", ""), ...options(vaes))
  find("vae-field", HTMLDivElement).hidden = vaes.length === 0
  find("hires_upscaler", HTMLSelectElement).replaceChildren(new Option("Latent", ""), new Option("Lanczos", "lanczos"),
    ...upscalers.map((each) => new Option(each.name, each.name)))
  find("sampler", HTMLSelectElement).replaceChildren(new Option("The model's", ""), ...options(samplers))
  find("schedule", HTMLSelectElement).replaceChildren(new Option("The model's", ""), ...options(schedules))
  restore()
  adaptToModel()
  showExtras()
  showUpscaler()
  showSize()
}

/**
 * Give the controls their ranges and help.
 * @param {Record<string, Field>} fields
 * @param {{steps: number, images: number}} limits of the server
 */
export function describeFields(fields, limits) {
  /** @type {Record<string, number>} */
  const most = { num_inference_steps: limits.steps, num_images: limits.images }
  for (const control of named()) {
    const range = fields[control.name]?.range
    if (!(control instanceof HTMLInputElement) || !range) continue
    if (!control.min) control.min = String(range[0])
    control.max = String(Math.min(range[1], most[control.name] ?? Infinity))
  }
  for (const group of document.querySelectorAll("[data-help]")) {
    const field = fields[/** @type {HTMLElement} */ (group).dataset.help ?? ""]
    if (field) /** @type {HTMLElement} */ (group).title = field.help
  }
}

/**
 * Show an error beside the field that it names first, or at the end of the form.
 * @param {string} message in the server's words; empty for none
 * @returns {Control | undefined} this field's control
 */
export function showError(message) {
  const place = message.split(/[\s[]/, 1)[0].replace("mask_image", "image")
  const field = place && document.getElementById(`${place}-error`)
  const target = field && !field.closest("[hidden]") ? field : find("error", HTMLParagraphElement)
  for (const each of document.querySelectorAll("#form .error, #settings .error:not(image-input .error)")) each.textContent = ""
  target.textContent = message
  for (const control of named()) control.ariaInvalid = message && control.name === place ? "true" : null
  return named().find((each) => each.name === place && !each.closest("[hidden]"))
}

element.noValidate = true
for (const control of named()) {
  if (!control.hasAttribute("aria-describedby") && document.getElementById(`${control.name}-error`))
    control.setAttribute("aria-describedby", `${control.name}-error`)
}
for (const kind of ["input", "change"]) {
  document.addEventListener(kind, (event) => {
    const control = /** @type {Control} */ (event.target)
    if (control.form !== element || control === size) return
    if (control.id === "strength-range") find("strength", HTMLInputElement).value = control.value
    if (kind === "change" && ["width", "height"].includes(control.id)) snap(/** @type {HTMLInputElement} */ (control))
    changed()
  })
}

/**
 * Round a side to what the model takes.
 * @param {HTMLInputElement} side
 */
function snap(side) {
  const { multiple } = currentModel()
  if (side.value) side.value = String(Math.max(multiple, Math.round(Number(side.value) / multiple) * multiple))
}

/** Give the sides the size that is chosen. */
function takeSize() {
  const [width, height] = size.value.split("x")
  find("width", HTMLInputElement).value = width
  find("height", HTMLInputElement).value = height ?? ""
}

size.addEventListener("change", () => {
  takeSize()
  changed()
})

model.addEventListener("change", () => {
  const aspect = size.selectedIndex
  adaptToModel()
  size.selectedIndex = aspect < size.length - 1 ? aspect : 0
  takeSize()
  form.dispatchEvent(new Event("model"))
  changed()
})

find("swap", HTMLButtonElement).addEventListener("click", () => {
  const width = find("width", HTMLInputElement)
  const height = find("height", HTMLInputElement)
  const { defaults } = currentModel()
  const sidesNow = [width.value || String(defaults.width), height.value || String(defaults.height)]
  ;[height.value, width.value] = sidesNow
  changed()
})

find("reset", HTMLButtonElement).addEventListener("click", () => {
  setRequest({ prompt: find("prompt", HTMLTextAreaElement).value }, { model: model.value })
})
