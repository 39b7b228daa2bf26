// @ts-check
/** The images on the server's disk, by day, and places for those that are being made. */

import { api, attempt } from "./api.js"
import { button, find, make } from "./dom.js"
import { activeJobs, isMine, jobs } from "./jobs.js"
import { view } from "./viewer.js"

/** @import {Job, StoredImage} from "./api.js" */

const PAGE = 48
const THUMBNAIL = 320
const DAY_MS = 24 * 60 * 60 * 1000

const days = find("gallery-days", HTMLDivElement)
const more = find("more", HTMLButtonElement)
const failure = find("gallery-error", HTMLParagraphElement)
const newImages = find("new-images", HTMLButtonElement)

/** The images that are listed, the newest first. @type {StoredImage[]} */
let listed = []

/** @type {string | null} */
let next = null

/** Images of others that came since, which would move everything. @type {Set<string>} */
const unseen = new Set()

/** Read the newest images. */
export async function loadGallery() {
  await attempt(failure, async () => {
    const page = await api(`/api/images?count=${PAGE}`)
    listed = page.images
    next = page.next
    unseen.clear()
    show()
    showUnseen()
  })
}

async function loadMore() {
  more.disabled = true
  await attempt(failure, async () => {
    const page = await api(`/api/images?count=${PAGE}&before=${encodeURIComponent(next ?? "")}`)
    listed = [...listed, ...page.images]
    next = page.next
    show()
  })
  more.disabled = false
}

/** Find what came while the server was not followed. */
async function catchUp() {
  const page = await api(`/api/images?count=${PAGE}`).catch(() => ({ images: [] }))
  const known = new Set(listed.map((each) => each.name))
  /** @type {StoredImage[]} */
  const found = page.images.filter((/** @type {StoredImage} */ each) => !known.has(each.name) && each.name > (listed[0]?.name ?? ""))
  for (const { job, name } of found) if (placesFor(job).length === 0) unseen.add(name)
  for (const job of new Set(found.map((each) => each.job))) place(job, found.filter((each) => each.job === job))
  const active = new Set(activeJobs().map((each) => each.id))
  for (const { dataset } of /** @type {NodeListOf<HTMLElement>} */ (days.querySelectorAll("li.place:not(.ended)")))
    if (dataset.job && !active.has(dataset.job)) fail(dataset.job, "Lost")
  showUnseen()
}

function show() {
  const places = activeJobs().filter((job) => isMine(job.id)).flatMap(placesOf)
  days.replaceChildren()
  for (const image of listed) dayOf(image.created).append(tile(image))
  if (places.length > 0) dayOf(now()).prepend(...places)
  if (listed.length === 0 && places.length === 0)
    days.append(make("p", { className: "hint", textContent: "Finished images are kept here." }))
  more.hidden = next === null
}

/** Today in the server's form; its clock is this machine's or near it. */
function now() {
  const date = new Date()
  return new Date(date.getTime() - date.getTimezoneOffset() * 60_000).toISOString()
}

/**
 * The list of a day's images, made if there is none.
 * @param {string} created ISO 8601
 */
function dayOf(created) {
  const day = created.slice(0, 10)
  const found = days.querySelector(`ul[data-day="${day}"]`)
  if (found) return found
  const list = make("ul", { className: "tiles" })
  list.dataset.day = day
  days.querySelector("p")?.remove()
  const section = make("section", {}, make("h3", { textContent: dayName(day) }), list)
  if (day >= now().slice(0, 10)) days.prepend(section)
  else days.append(section)
  return list
}

/** @param {string} day */
function dayName(day) {
  const age = Math.round((Date.parse(now().slice(0, 10)) - Date.parse(day)) / DAY_MS)
  const date = new Date(`${day}T12:00`)
  const names = ["Today", "Yesterday"]
  const isThisYear = date.getFullYear() === new Date().getFullYear()
  return names[age] ?? date.toLocaleDateString("en", { weekday: "long", day: "numeric", month: "long",
    year: isThisYear ? undefined : "numeric" })
}

/** @param {StoredImage} image */
function tile(image) {
  const open = button("", () => void view(image.name))
  const text = `${image.prompt || "Image"}, ${image.created.slice(11, 16)}`
  open.title = text
  open.append(make("img", { src: `${image.url}?format=webp&side=${THUMBNAIL}`, alt: text,
    loading: "lazy", width: THUMBNAIL, height: THUMBNAIL }))
  const item = make("li", {}, open)
  item.dataset.name = image.name
  return item
}

/** @param {Job} job */
function placesOf(job) {
  return Array.from({ length: job.num_images }, () => {
    const item = make("li", { className: "place", textContent: "…" })
    item.dataset.job = job.id
    return item
  })
}

/** @param {string} id */
function placesFor(id) {
  return [...days.querySelectorAll(`li[data-job="${CSS.escape(id)}"]`)]
}

/** Keep places for the images of this browser's jobs, so that nothing moves when they come. */
function reserve() {
  for (const job of activeJobs())
    if (isMine(job.id) && placesFor(job.id).length === 0) dayOf(now()).prepend(...placesOf(job))
}

/** Take the places out whose jobs made nothing. */
export function forgetEnded() {
  for (const stale of days.querySelectorAll("li.ended")) stale.remove()
}

function showUnseen() {
  const count = unseen.size
  newImages.textContent = count === 0 ? "" : `Show ${count} new ${count === 1 ? "image" : "images"}`
}

/** @param {CustomEvent<{id: string, images: {name: string}[]}>} event */
async function fill({ detail: { id, images } }) {
  if (placesFor(id).length === 0) {
    for (const { name } of images) unseen.add(name)
  } else {
    const page = await api(`/api/images?count=${Math.min(500, PAGE + images.length)}`)
    place(id, page.images.filter((/** @type {StoredImage} */ each) => each.job === id))
  }
  showUnseen()
}

/**
 * Put a job's images into their places.
 * @param {string} job
 * @param {StoredImage[]} images the newest first
 */
function place(job, images) {
  const places = placesFor(job)
  if (places.length === 0) return
  listed = [...images, ...listed.filter((each) => each.job !== job)]
  images.forEach((image, index) => {
    unseen.delete(image.name)
    places[images.length - 1 - index]?.replaceWith(tile(image))
  })
  for (const refused of placesFor(job)) refused.remove()
}

/**
 * Keep one place of a job that made no images, to say so.
 * @param {string} job
 * @param {string} text
 */
function fail(job, text) {
  const [first, ...others] = placesFor(job)
  if (!first) return
  first.classList.add("ended")
  first.textContent = text
  for (const each of others) each.remove()
}

/**
 * Take a deleted image out.
 * @param {string} name
 */
function forget(name) {
  listed = listed.filter((each) => each.name !== name)
  unseen.delete(name)
  const item = days.querySelector(`li[data-name="${CSS.escape(name)}"]`)
  if (item?.parentElement?.childElementCount === 1) item.closest("section")?.remove()
  item?.remove()
  showUnseen()
}

more.addEventListener("click", () => void loadMore())
newImages.addEventListener("click", () => void loadGallery())
jobs.addEventListener("queue", reserve)
jobs.addEventListener("online", () => void catchUp())
jobs.addEventListener("done", (event) => void fill(/** @type {any} */ (event)))
jobs.addEventListener("failed", (event) => fail(/** @type {any} */ (event).detail.id, "Failed"))
jobs.addEventListener("cancelled", (event) => fail(/** @type {any} */ (event).detail.id, "Cancelled"))
jobs.addEventListener("deleted", (event) => forget(/** @type {any} */ (event).detail.name))
