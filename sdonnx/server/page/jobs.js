// @ts-check
/** The server's queue, as it changes: everybody's jobs, and which of them this browser asked for. */

import { api, attempt, parse } from "./api.js"
import { button, find, make } from "./dom.js"
import { keep, recall } from "./store.js"

/** @import {Fields, Job} from "./api.js" */

const KEPT = 100
const RETRY_MS = 3000

/**
 * Sends `queue` when jobs come or go, `online` and `offline`, and for each event of a job its kind, with the event's
 * data as `detail`: `step`, `preview`, `loading`, `loaded`, `decoding`, `done`, `failed`, `cancelled`; and `deleted` of an image.
 */
export const jobs = new EventTarget()

const FINAL = ["done", "failed", "cancelled"]
const KINDS = ["step", "preview", "loading", "loaded", "decoding", ...FINAL, "deleted"]

/** @type {Job[]} */
let active = []

/** Jobs that ended since the page was opened. @type {Set<string>} */
const ended = new Set()

/** @type {EventSource | undefined} */
let source

/** The jobs that run or wait, in their order. */
export function activeJobs() {
  return active
}

/** @param {string} id */
export function isMine(id) {
  return recall("jobs", []).includes(id)
}

/**
 * How many jobs have to end before this one begins.
 * @param {Job} job
 */
export function countAhead(job) {
  const running = active.filter((each) => each.state === "running").length
  return Math.max(active.indexOf(job) - Math.max(running - 1, 0), 0) // the first of several that run to end makes room
}

/** This browser's first job that runs or waits. */
export function ownJob() {
  return active.find((job) => isMine(job.id))
}

/** The latest job that this browser asked for. @returns {string | undefined} */
export function latestOwn() {
  return recall("jobs", []).at(-1)
}

/**
 * Queue a job; throws an ApiError as the server words it.
 * @param {Fields} fields
 * @returns {Promise<{job: Job, isOver: boolean}>} and whether its last event came before
 */
export async function queueJob(fields) {
  /** @type {Job} */
  const job = await api("/api/jobs", { json: fields })
  keep("jobs", [...recall("jobs", []), job.id].slice(-KEPT))
  const isOver = ended.has(job.id)
  if (!isOver && !active.some((each) => each.id === job.id)) active = [...active, job]
  setActive(active)
  return { job, isOver }
}

/**
 * Send the last event of a job again: nobody knew whose it was.
 * @param {string} id
 */
export async function settle(id) {
  /** @type {Job} */
  const job = await api(`/api/jobs/${id}`)
  jobs.dispatchEvent(new CustomEvent(job.state, { detail: job }))
}

/** @param {string} id */
export async function cancelJob(id) {
  await api(`/api/jobs/${id}`, { method: "DELETE" })
}

/** @param {Job[]} found */
function setActive(found) {
  active = found
  showQueue()
  jobs.dispatchEvent(new Event("queue"))
}

function showQueue() {
  find("queue-count", HTMLSpanElement).textContent = active.length > 0 ? `(${active.length})` : ""
  find("queue-empty", HTMLParagraphElement).hidden = active.length > 0
  const entry = (/** @type {Job} */ job) => {
    const cancel = button("Cancel job", () => void attempt(find("queue-error", HTMLParagraphElement), () => cancelJob(job.id)))
    const { prompt, width, height } = job.request
    const what = job.kind === "upscaling" ? "Upscaling" : String(prompt || "No prompt")
    cancel.ariaDescription = what
    const size = `${job.num_images > 1 ? `${job.num_images} × ` : ""}${width} × ${height}, ${job.model}`
    const ahead = countAhead(job)
    const state = job.state === "running" ? "Running" : ahead === 0 ? "Next" : `${ahead} before it`
    const text = make("p", {}, make("strong", { textContent: isMine(job.id) ? "Yours" : "Another's" }),
      ` · ${state} · ${size}`)
    const progress = make("progress", { max: 1, value: job.progress, ariaLabel: "Progress", hidden: job.state !== "running" })
    const item = make("li", {}, text, make("p", { className: "prompt", textContent: what }), progress, cancel)
    item.dataset.job = job.id
    return item
  }
  const list = find("queue-list", HTMLOListElement)
  const focused = document.activeElement?.closest("li")?.dataset.job
  list.replaceChildren(...active.map(entry))
  const same = focused && list.querySelector(`[data-job="${CSS.escape(focused)}"] button`)
  if (same instanceof HTMLElement) same.focus()
  else if (focused) find("queue", HTMLElement).focus()
}

/** @param {{id: string, progress: number}} step */
function showProgress({ id, progress }) {
  const job = active.find((each) => each.id === id)
  const bar = document.querySelector(`#queue-list [data-job="${CSS.escape(id)}"] progress`)
  if (!job || !(bar instanceof HTMLProgressElement)) return
  job.progress = bar.value = progress
}

/** Follow the queue, and go on after a lost connection; a hidden page that waits for nothing leaves. */
export function followQueue() {
  if (source && source.readyState !== EventSource.CLOSED) return
  source = new EventSource("/api/events")
  source.addEventListener("open", () => jobs.dispatchEvent(new Event("online")))
  source.addEventListener("jobs", (event) => setActive(parse(event.data).jobs))
  for (const kind of KINDS) {
    source.addEventListener(kind, (event) => {
      const detail = parse(event.data)
      if (kind === "step") showProgress(detail)
      if (FINAL.includes(kind)) ended.add(detail.id)
      jobs.dispatchEvent(new CustomEvent(kind, { detail }))
    })
  }
  source.addEventListener("error", () => {
    jobs.dispatchEvent(new Event("offline"))
    if (source?.readyState === EventSource.CLOSED) setTimeout(() => void reconnect(), RETRY_MS)
  })
}

/** The browser gave up: the server refused, and a request tells why, or asks for the token. */
async function reconnect() {
  await api("/api/samplers").then(followQueue, () => setTimeout(() => void reconnect(), RETRY_MS))
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) followQueue()
  else if (!ownJob()) source?.close()
})
