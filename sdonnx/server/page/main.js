// @ts-check
/** The page: reads what the server offers, and joins the parts. */

import { ApiError, api } from "./api.js"
import { find } from "./dom.js"
import "./drops.js"
import { currentModel, describeFields, fillForm, form as request, requestFields, setField, showError } from "./form.js"
import { forgetEnded, loadGallery } from "./gallery.js"
import { imageFields, inputs, restoreInputs } from "./inputs.js"
import { followQueue, jobs, queueJob, settle } from "./jobs.js"
import { cancelOwn, showLatest, showRefused, showRequested } from "./output.js"
import { keepError, startPlanning } from "./plan.js"
import { offerAdapters, offerStyles, startCounting } from "./prompt.js"
import "./session.js"
import { keepInputs, recall } from "./store.js"

/** How long the page waits for the queue before it shows itself. */
const QUEUE_MS = 1000

const EXAMPLE = "a red apple on a blue background"

const form = find("form", HTMLFormElement)
const generate = find("generate", HTMLButtonElement)
generate.disabled = false

async function submit() {
  showRequested()
  forgetEnded()
  await started
  try {
    keepError()
    const given = inputs()
    const { job, isOver } = await queueJob({ ...requestFields(), ...(await imageFields()) })
    showError("")
    if (given.image || given.depth) await keepInputs(given, job.id)
    if (isOver) await settle(job.id)
  } catch (error) {
    if (!(error instanceof ApiError)) throw error
    showRefused()
    showError(error.message)?.focus()
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault()
  void submit()
})

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open], :popover-open")) return
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault()
    if (!event.repeat) void submit()
  }
  if (event.key === "Escape") void cancelOwn()
})

find("random-seed", HTMLButtonElement).addEventListener("click", () => setField("seed", ""))
find("copy", HTMLButtonElement).addEventListener("click", async () => {
  const command = find("command", HTMLElement)
  const copied = await navigator.clipboard?.writeText(command.textContent ?? "").then(() => true, () => false)
  if (!copied) getSelection()?.selectAllChildren(command)
  find("copy", HTMLButtonElement).textContent = copied ? "Copied" : "Selected"
})

const offline = find("offline", HTMLParagraphElement)
jobs.addEventListener("offline", () => (offline.textContent = "The server does not answer; trying again …"))
jobs.addEventListener("online", () => {
  offline.textContent = ""
  request.dispatchEvent(new Event("change"))
})

/** Greet somebody who has not been here: an example, and one key makes its image. */
function welcome() {
  const isBundled = currentModel().name === "pictogram"
  find("first-run", HTMLDivElement).hidden = !isBundled
  const isTyping = document.activeElement?.id === "prompt" || requestFields().prompt
  if (recall("form", null) || !isBundled || isTyping) return
  setField("prompt", EXAMPLE)
  generate.focus()
}

async function start() {
  const { models, vaes, upscalers } = await api("/api/models")
  const [{ samplers }, { schedules }, { loras }, { embeddings }, { styles }, { fields, limits }] = await Promise.all(
    ["samplers", "schedules", "loras", "embeddings", "styles", "fields"].map((name) => api(`/api/${name}`)))
  fillForm({ models, vaes, upscalers, samplers, schedules })
  describeFields(fields, limits)
  offerAdapters(loras, embeddings)
  offerStyles(styles)
  welcome()
  await Promise.all([restoreInputs(), loadGallery()])
  const queue = new Promise((resolve) => jobs.addEventListener("queue", resolve, { once: true }))
  followQueue()
  startPlanning()
  startCounting()
  await Promise.race([queue, new Promise((resolve) => setTimeout(resolve, QUEUE_MS))])
  await showLatest()
  document.body.classList.add("ready")
}

const started = start().catch((error) => showError(error instanceof Error ? error.message : String(error)))
