// @ts-check
/** Images that are dropped onto the page or pasted: their parameters are offered, others become the init image. */

import { ApiError, api } from "./api.js"
import { notice } from "./dom.js"
import { showError } from "./form.js"
import { imageOf } from "./images.js"
import { setInitImage, takes } from "./inputs.js"
import { use } from "./viewer.js"

/** @import {Recipe} from "./api.js" */

const INFOTEXT = /(^|\n)Steps: \d+, /
const NAMES = { sdonnx: "sdonnx", a1111: "AUTOMATIC1111" }

/** @param {Blob} file */
async function take(file) {
  /** @type {Recipe | null} */
  const recipe = await api("/api/info", { body: file }).catch((error) => {
    if (!(error instanceof ApiError)) throw error
    return null // of a format that only the browser reads
  })
  if (recipe?.source) offerRecipe(recipe, file)
  else await start(file)
}

/** @param {Blob} file */
async function start(file) {
  if (takes("image")) await setInitImage(file)
  else showError("This model takes no init image, and the image has no parameters to restore.")
}

/**
 * @param {Recipe} recipe
 * @param {Blob} [file] that has it
 */
function offerRecipe(recipe, file) {
  const name = NAMES[/** @type {keyof typeof NAMES} */ (recipe.source)] ?? recipe.source
  const prompt = String(recipe.fields.prompt ?? "")
  const text = `${file ? "This image" : "This text"} has parameters of ${name}${prompt ? `: “${prompt.slice(0, 80)}”` : ""}`
  notice(text, {
    "Use its parameters": () => use(recipe),
    ...(file && takes("image") ? { "Use as init image": () => start(file) } : {}),
  })
}

document.addEventListener("dragover", (event) => {
  if ([...(event.dataTransfer?.types ?? [])].includes("Files")) event.preventDefault()
})
document.addEventListener("drop", (event) => {
  const other = event.dataTransfer?.files[0]
  if (event.defaultPrevented || !other) return
  event.preventDefault()
  const file = imageOf(event.dataTransfer)
  if (file) void take(file)
  else showError(`${other.name} is not an image. Drop a PNG, JPEG or WebP.`)
})
document.addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData)
  const infotext = event.clipboardData?.getData("text/plain") ?? ""
  const isTyped = infotext !== "" && event.target instanceof HTMLElement && event.target.matches("input, textarea")
  const hasParameters = INFOTEXT.test(infotext)
  if (!hasParameters && (!file || isTyped)) return
  event.preventDefault()
  if (hasParameters) void api("/api/info", { json: { infotext } }).then((recipe) => offerRecipe(recipe))
  else if (file) void take(file)
})
