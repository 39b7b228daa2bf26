// @ts-check
/** What a request will take: seconds and memory, before it runs. */

import { ApiError, api } from "./api.js"
import { debounce, find } from "./dom.js"
import { currentModel, form, requestFields, setField, showError } from "./form.js"
import { imageFields } from "./inputs.js"

/** @import {Fields, Plan} from "./api.js" */

const line = find("plan", HTMLParagraphElement)
const smaller = find("smaller", HTMLButtonElement)
const SMALLER = [3 / 4, 1 / 2, 3 / 8, 1 / 4]

/** @type {AbortController | undefined} */
let asking

/** Whether the error of a job is shown. */
let isKept = false

/**
 * Write a number of seconds as people say it.
 * @param {number} seconds
 */
export function duration(seconds) {
  if (seconds < 0.095) return `${Math.round(seconds * 1000)} ms`
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`
  if (seconds < 99.5) return `${Math.round(seconds)} s`
  if (seconds < 5970) return `${Math.round(seconds / 60)} min`
  return `${Math.round(seconds / 3600)} h`
}

/** @param {number} bytes */
function memory(bytes) {
  return bytes < 1e9 ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`
}

/**
 * @param {Fields} fields
 * @param {AbortSignal} signal
 * @returns {Promise<Plan>}
 */
function ask(fields, signal) {
  return api("/api/plan", { json: fields, signal })
}

async function update() {
  asking?.abort()
  asking = new AbortController()
  const { signal } = asking
  try {
    const fields = requestFields()
    const images = await imageFields({ isPlan: true })
    const plan = await ask({ ...fields, ...images }, signal)
    if (!isKept) showError("")
    show(plan)
    if (!plan.memory.fits) await suggest({ ...fields, ...images }, plan, signal)
    await showCosts({ ...fields, ...images }, plan, signal)
  } catch (error) {
    if (signal.aborted) return
    if (!(error instanceof ApiError)) throw error
    if (error.status === 0) return // which the page says already
    line.textContent = ""
    smaller.hidden = true
    showError(error.message)
  }
}

/** @param {Plan} plan */
function show({ width, height, num_images, seconds, memory: { peak, smallest, room, fits } }) {
  line.classList.toggle("refused", !fits)
  line.role = fits ? null : "alert"
  smaller.hidden = true
  const images = num_images > 1 ? `${num_images} images of ` : ""
  if (fits) {
    const time = seconds === null ? [] : [`About ${duration(seconds)}`]
    const bytes = peak === null ? [] : [memory(peak)]
    line.textContent = [...time, ...bytes, `${images}${width} × ${height}`].join(" · ")
  } else {
    const least = smallest === null ? "more memory" : `at least ${memory(smallest)} of memory`
    line.textContent = `${width} × ${height} requires ${least}; the server has ${memory(room ?? 0)}.`
  }
}

/**
 * Offer the largest of some smaller sizes that fits.
 * @param {Fields} fields
 * @param {Plan} plan
 * @param {AbortSignal} signal
 */
async function suggest(fields, plan, signal) {
  const { multiple, defaults } = currentModel()
  const scale = Number(fields.hires_scale ?? 1)
  for (const factor of SMALLER) {
    const [width, height] = [plan.width, plan.height].map((side) =>
      Math.max(multiple, Math.round((side / scale) * factor / multiple) * multiple))
    const { memory: found } = await ask({ ...fields, width, height }, signal)
    if (!found.fits) continue
    smaller.textContent = `Use ${width} × ${height}${found.peak === null ? "" : `, ${memory(found.peak)}`}`
    smaller.hidden = false
    smaller.onclick = () => {
      setField("width", width === defaults.width && height === defaults.height ? "" : width)
      setField("height", width === defaults.width && height === defaults.height ? "" : height)
    }
    return
  }
}

/**
 * Say beside their switches what hires fix and the faster way would take.
 * @param {Fields} fields
 * @param {Plan} plan
 * @param {AbortSignal} signal
 */
async function showCosts(fields, plan, signal) {
  const { scale } = find("hires", HTMLInputElement).dataset
  /** @type {Record<string, Fields>} */
  const switches = { hires: { hires_scale: Number(scale) }, fast: currentModel().fast }
  for (const [name, change] of Object.entries(switches)) {
    const place = find(`${name}-cost`, HTMLSpanElement)
    if (place.closest("[hidden]")) continue
    const { checked } = find(name, HTMLInputElement)
    place.textContent = checked ? "" : await ask({ ...fields, ...change }, signal).then((other) => cost(other, plan), (error) => {
      if (signal.aborted) throw error
      return error.message
    })
  }
}

/**
 * What a changed request would take; an estimate is as far off as that of the request as it is.
 * @param {Plan} changed
 * @param {Plan} plan
 */
function cost({ width, height, seconds, seconds_from, estimated_seconds, memory: { fits } }, plan) {
  const scaled = plan.seconds !== null && plan.estimated_seconds && estimated_seconds !== null
    ? plan.seconds * (estimated_seconds / plan.estimated_seconds) : seconds
  const expected = seconds_from === "measured" ? seconds : scaled
  const time = expected === null ? [] : [`about ${duration(expected)}`]
  return fits ? [...time, `${width} × ${height}`].join(", ") : "does not fit into memory"
}

/** Plan again after each change. */
export function startPlanning() {
  const plan = debounce(250, () => void update())
  form.addEventListener("change", () => {
    isKept = false
    plan()
  })
  void update()
}

/** From now on leave the errors that are shown until the request changes: they are of a job, and not of a plan. */
export function keepError() {
  isKept = true
}

/** Plan again: a measured time may have replaced an estimate. */
export const planAgain = debounce(50, () => void update())
