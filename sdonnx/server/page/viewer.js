// @ts-check
/** One finished image with its parameters, and what can be done with them. */

import { api, attempt } from "./api.js"
import { button, find, make, notice } from "./dom.js"
import { format, setField, setRequest } from "./form.js"
import { setInitImage, setInputs, takes } from "./inputs.js"
import { NO_INPUTS, recallInputs } from "./store.js"

/** @import {Recipe, StoredImage} from "./api.js" */

const dialog = find("viewer", HTMLDialogElement)
const shown = find("viewed", HTMLImageElement)
const link = find("viewed-link", HTMLAnchorElement)
const actions = find("viewer-actions", HTMLDivElement)
const failure = find("viewer-error", HTMLParagraphElement)

/** @type {(StoredImage & Recipe) | undefined} */
let viewed

/** The name of the image that was asked for last. */
let asked = ""

const useImage = button("Use as init image", async () => {
  if (!viewed) return
  await setInitImage(await (await fetch(viewed.url)).blob())
  dialog.close()
})
const remove = button("Delete", () => void askAndDelete())
actions.append(
  button("Use everything", () => viewed && void use(viewed, viewed.job)),
  button("Use the prompt", () => useOnly("prompt", "negative_prompt")),
  button("Use the seed", () => useOnly("seed")),
  useImage,
  button("Download", () => viewed && make("a", { href: viewed.url, download: viewed.name }).click()),
  remove,
)

/**
 * Put all parameters of an image into the form, and its input images as far as this browser has them.
 * @param {Recipe} recipe
 * @param {string} [job] that made it
 */
export async function use(recipe, job) {
  setRequest(recipe.fields, recipe)
  const inputs = (job ? await recallInputs(job) : undefined) ?? NO_INPUTS
  await setInputs(inputs)
  showForm()
  const missing = [
    ...(recipe.model ? [] : ["its model, which this server does not have"]),
    ...(recipe.fields.strength !== undefined && !inputs.image ? ["its init image, which this browser does not have"] : []),
    ...(recipe.controls.length > 0 ? ["its controls"] : []),
  ]
  if (missing.length > 0) notice(`Everything is taken but ${missing.join("; ")}.`)
}

/** Close, and show where the parameters went. */
function showForm() {
  dialog.close()
  find("prompt", HTMLTextAreaElement).focus()
}

/** @param {...string} names */
function useOnly(...names) {
  for (const name of names) setField(name, viewed?.fields[name])
  showForm()
}

async function askAndDelete() {
  if (!viewed) return
  if (remove.textContent === "Delete") {
    remove.textContent = "Delete for good"
    return
  }
  const { name } = viewed
  const following = neighbour(1) ?? neighbour(-1)
  if (!(await attempt(failure, () => api(`/api/images/${name}`, { method: "DELETE" })))) return
  if (following) await view(following)
  else dialog.close()
}

/**
 * The name of another image of the gallery.
 * @param {number} offset 1 is the next older one
 */
function neighbour(offset) {
  const names = [...document.querySelectorAll("#gallery [data-name]")].map((each) => each.getAttribute("data-name"))
  const at = names.indexOf(viewed?.name ?? "")
  return at < 0 ? null : names[at + offset]
}

/**
 * Show an image and its parameters.
 * @param {string} name
 */
export async function view(name) {
  asked = name
  remove.textContent = "Delete"
  /** @type {(StoredImage & Recipe) | undefined} */
  let found
  await attempt(failure, async () => {
    found = await api(`/api/images/${encodeURIComponent(name)}/info`)
  })
  if (asked !== name) return
  show(found)
  if (!dialog.open) dialog.showModal()
}

/** @param {(StoredImage & Recipe) | undefined} image none if it can't be had */
function show(image) {
  viewed = image
  actions.inert = link.hidden = !image
  find("recipe", HTMLDListElement).replaceChildren()
  if (!image) return
  link.href = shown.src = image.url
  shown.alt = String(image.fields.prompt ?? "The image")
  shown.width = image.width
  shown.height = image.height
  useImage.hidden = !takes("image")
  find("newer", HTMLButtonElement).disabled = !neighbour(-1)
  find("older", HTMLButtonElement).disabled = !neighbour(1)
  const { prompt, negative_prompt, ...rest } = image.fields
  const rows = { prompt, negative_prompt, Model: image.model, vae: image.vae, ...rest, File: image.name }
  const given = Object.entries(rows).filter(([, value]) => value !== undefined && value !== null && value !== "")
  find("recipe", HTMLDListElement).replaceChildren(
    ...given.flatMap(([key, value]) => [
      make("dt", { textContent: nameOf(key) }),
      make("dd", { textContent: titleOf(key, value) }),
    ]),
  )
}

/**
 * What the form calls a field.
 * @param {string} key
 */
function nameOf(key) {
  return document.querySelector(`label[for="${CSS.escape(key)}"]`)?.textContent ?? key.replaceAll("_", " ")
}

/**
 * What the form calls a value.
 * @param {string} key
 * @param {unknown} value
 */
function titleOf(key, value) {
  const choices = document.getElementById(key)
  const options = choices instanceof HTMLSelectElement ? [...choices.options] : []
  return options.find((each) => each.value === value)?.text ?? format(value)
}

find("viewer-close", HTMLButtonElement).addEventListener("click", () => dialog.close())
for (const [id, key, offset] of /** @type {const} */ ([["newer", "ArrowLeft", -1], ["older", "ArrowRight", 1]])) {
  const go = () => {
    const other = neighbour(offset)
    if (other) void view(other)
  }
  find(id, HTMLButtonElement).addEventListener("click", go)
  dialog.addEventListener("keydown", (event) => event.key === key && go())
}
