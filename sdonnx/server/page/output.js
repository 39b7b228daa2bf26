// @ts-check
/** The large image: the preview and progress of this browser's job, then what came of it. */

import { api, attempt } from "./api.js"
import { button, find, make } from "./dom.js"
import { setField } from "./form.js"
import { setInitImage } from "./inputs.js"
import { cancelJob, countAhead, isMine, jobs, latestOwn, ownJob } from "./jobs.js"
import { duration, planAgain } from "./plan.js"
import { keep, recall, recallInputs } from "./store.js"
import { view } from "./viewer.js"

/** @import {ImageLink, Job, Safety} from "./api.js" */

const TITLE = document.title

const shown = find("shown", HTMLDivElement)
const welcome = find("welcome", HTMLDivElement)
const failure = find("failure", HTMLParagraphElement)
const progress = find("progress", HTMLProgressElement)
const status = find("status", HTMLParagraphElement)
const announcement = find("announcement", HTMLParagraphElement)
const cancel = find("cancel", HTMLButtonElement)
const compare = find("compare", HTMLLabelElement)
const slider = find("compare-range", HTMLInputElement)
const lastSeed = find("last-seed", HTMLButtonElement)

/** The job that is shown while it waits or runs. @type {string | undefined} */
let followed

/** The result, if it is one image. @type {ImageLink | undefined} */
let single

const useSeed = button("Use the seed", () => setField("seed", recall("lastSeed", "")))
const useImage = button("Use as init image", async () => {
  if (single) await setInitImage(await (await fetch(single.url)).blob())
})
const download = button("Download", () => {
  if (single) make("a", { href: single.url, download: single.name }).click()
})
const details = button("Parameters", () => single && void view(single.name))
find("actions", HTMLDivElement).append(useSeed, useImage, download, details)

/**
 * Show a text, which screen readers say too.
 * @param {string} text
 */
function announce(text) {
  status.textContent = text
  if (announcement.textContent !== text) announcement.textContent = text
}

/** Answer to the click that asks for a job: the server's own answer may take a while. */
export function showRequested() {
  if (!followed) announce("Starting")
}

/** Take that answer back: the job was refused. */
export function showRefused() {
  if (!followed) announce("")
}

/** @param {ImageLink | undefined} image */
function enableActions(image) {
  single = image
  for (const each of [useSeed, useImage, download, details]) each.disabled = !image
}

/** Show this browser's job that runs, or else waits first. */
function showOwn() {
  const job = ownJob()
  if (job && job.id !== followed) begin(job)
  if (job && job.state === "queued") showPosition(job)
  if (!job && followed) void conclude(followed)
  cancel.disabled = !job
}

/** @param {Job} job */
function begin(job) {
  followed = job.id
  failure.textContent = ""
  progress.value = job.progress
  if (job.preview) showPreview(job.preview)
  if (job.loading) announce(loading(job.loading))
  else if (job.decoding) announce("Decoding")
  else if (job.step > 0) showStep({ ...job, seconds: job.seconds_per_step })
  else announce("Starting")
}

/** @param {Job} job */
function showPosition(job) {
  const ahead = countAhead(job)
  announce(ahead === 0 ? "Starting" : `Waiting for ${ahead === 1 ? "another job" : `${ahead} other jobs`}`)
}

/** What is done with a component once it is loaded. @type {Record<string, string>} */
const LOADED = { vae_decoder: "Decoding", "upscaler/upscaler": "Upscaling" }

/** @param {string} component */
function loading(component) {
  return `Loading ${component.replace(/^(upscaler|safety)\//, "").replaceAll("_", " ").replace("unet", "U-Net").replace("vae", "VAE")}`
}

/**
 * @param {{image: number, num_images: number, step: number, num_steps: number, seconds: number | null,
 *   eta: number | null, progress: number}} step
 */
function showStep({ image, num_images, step, num_steps, seconds, eta, progress: share }) {
  const parts = [`Step ${step} of ${num_steps}`]
  if (num_images > 1) parts.unshift(`Image ${image + 1} of ${num_images}`)
  if (seconds !== null) parts.push(`${duration(seconds)} per step`)
  if (eta !== null) parts.push(`${duration(eta)} left`)
  status.textContent = parts.join(" · ")
  progress.value = share
  document.title = `(${Math.floor(share * 100)} %) ${TITLE}`
  const quarter = Math.floor(share * 4) * 25
  if (quarter > 0 && quarter < 100 && announcement.textContent !== `${quarter} %`) announcement.textContent = `${quarter} %`
}

/** @param {string} url */
function showPreview(url) {
  welcome.hidden = compare.hidden = true
  enableActions(undefined)
  shown.dataset.count = "1"
  const image = shown.querySelector(":only-child.preview")
  if (image instanceof HTMLImageElement) image.src = url
  else shown.replaceChildren(make("img", { className: "preview", alt: "Preview", src: url }))
}

/**
 * Ask what became of a job whose last event this page missed.
 * @param {string} id
 */
async function conclude(id) {
  /** @type {Job | null} */
  const job = await api(`/api/jobs/${id}`).catch(() => null)
  if (id !== followed) return
  if (job) await showOutcome(job)
  else end("The server does not know this job any more")
}

/** @param {Job} job */
async function showOutcome({ state, error, step, ...job }) {
  if (state === "done") await showImages({ ...job, seeds: job.seeds.filter((_, index) => !isRefused(job.safety[index])) })
  else if (state === "failed") end("Failed", error ?? "")
  else if (state === "cancelled") end(cancelled(step))
}

/** @param {Safety | undefined} safety */
function isRefused(safety) {
  return safety !== undefined && safety.flagged && safety.mode === "refuse"
}

/** @param {number | undefined} step */
function cancelled(step) {
  return step ? `Cancelled after step ${step}` : "Cancelled"
}

/**
 * Stop following the job.
 * @param {string} text
 */
function settle(text) {
  followed = undefined
  document.title = TITLE
  announce(text)
}

/**
 * Show that a job has no result.
 * @param {string} text
 * @param {string} [error]
 */
function end(text, error = "") {
  settle(text)
  progress.value = 0
  failure.textContent = error
  shown.querySelector(":only-child.preview")?.remove()
  welcome.hidden = shown.childElementCount > 0 || error !== ""
}

/**
 * Show the images of a job that is done.
 * @param {{id: string, images: ImageLink[], seeds?: (number | string)[], safety?: Safety[]}} job
 */
async function showImages({ id, images, seeds = [], safety = [] }) {
  const seed = seeds.length > 0 ? [`seed ${seeds[0]}`] : []
  settle(["Done", ...flagged(safety), ...(images.length > 1 ? ["choose an image to use it"] : seed)].join(" · "))
  progress.value = 1
  if (document.hidden) document.title = `Done · ${TITLE}`
  if (seeds.length > 0) keep("lastSeed", seeds[0])
  lastSeed.disabled = recall("lastSeed", null) === null
  planAgain()
  const results = await Promise.all(images.map(result))
  if (followed) return // another job has begun
  shown.replaceChildren(...results)
  welcome.hidden = true
  compare.hidden = true
  arrange()
  enableActions(images.length === 1 ? images[0] : undefined)
  await offerComparison(id)
}

/**
 * What the safety checker did, in a few words; none where it flagged nothing.
 * @param {Safety[]} safety
 */
function flagged(safety) {
  const count = safety.filter((each) => each.flagged).length
  const [first] = safety
  if (count === 0 || !first) return []
  const done = { mark: "marked", blur: "blurred", refuse: "refused" }[first.mode]
  return [`${count} of ${safety.length} ${done} as not safe for work`]
}

/**
 * Make a button of an image once it can be shown.
 * @param {ImageLink} image
 * @param {number} index
 * @param {ImageLink[]} images
 */
async function result({ name, url }, index, images) {
  const image = make("img", { src: url, alt: images.length > 1 ? `Result ${index + 1}` : "Result" })
  await image.decode().catch(() => {}) // its text is shown instead
  const open = button("", () => void view(name))
  open.dataset.result = name
  open.append(image)
  return open
}

/** Lay out as many results as there are. */
function arrange() {
  shown.dataset.count = String(Math.min(shown.childElementCount, 9))
}

/**
 * Let the user compare a single result with its init image.
 * @param {string} id of the job
 */
async function offerComparison(id) {
  const given = await recallInputs(id)
  if (!single || !given?.image || shown.childElementCount !== 1) return
  const url = URL.createObjectURL(given.image)
  const before = make("img", { className: "before", alt: "Init image", src: url })
  await before.decode()
  URL.revokeObjectURL(url)
  shown.append(before)
  compare.hidden = false
  slider.value = "0"
  reveal()
}

function reveal() {
  const before = shown.querySelector(".before")
  if (before instanceof HTMLElement) before.style.clipPath = `inset(0 ${100 - Number(slider.value)}% 0 0)`
}

/** Cancel this browser's job that runs, or else waits first. */
export async function cancelOwn() {
  const job = ownJob()
  if (!job) return
  cancel.disabled = true
  announce("Cancelling")
  if (!(await attempt(failure, () => cancelJob(job.id)))) cancel.disabled = false
}

slider.addEventListener("input", reveal)
cancel.addEventListener("click", () => void cancelOwn())
lastSeed.addEventListener("click", () => setField("seed", recall("lastSeed", "")))
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !followed) document.title = TITLE
})

jobs.addEventListener("queue", showOwn)

/** @type {Record<string, (detail: any) => unknown>} */
const handlers = {
  loading: ({ component }) => announce(loading(component)),
  loaded: ({ component }) => (status.textContent = LOADED[component] ?? "Starting"),
  step: showStep,
  preview: ({ url }) => showPreview(url),
  decoding: () => announce("Decoding"),
  done: showImages,
  failed: ({ error }) => end("Failed", error),
  cancelled: ({ step }) => end(cancelled(step)),
}
for (const [kind, handle] of Object.entries(handlers)) {
  jobs.addEventListener(kind, (event) => {
    const { detail } = /** @type {CustomEvent} */ (event)
    if (detail.id === followed || (!followed && isMine(detail.id))) handle(detail)
  })
}

jobs.addEventListener("deleted", (event) => {
  const { name } = /** @type {CustomEvent} */ (event).detail
  const result = shown.querySelector(`[data-result="${CSS.escape(name)}"]`)
  if (!result) return
  result.remove()
  arrange()
  if (shown.querySelector("[data-result]")) return
  shown.replaceChildren()
  compare.hidden = true
  enableActions(undefined)
  welcome.hidden = false
})

/** Show what the latest job of this browser made, if none of its jobs waits or runs. */
export async function showLatest() {
  enableActions(undefined)
  lastSeed.disabled = recall("lastSeed", null) === null
  const id = latestOwn()
  if (!id) return
  /** @type {Job | null} */
  const job = await api(`/api/jobs/${id}`).catch(() => null)
  if (job && !followed) await showOutcome(job)
}
