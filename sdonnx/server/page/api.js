// @ts-check
/** Requests to the server, and the shapes of its replies; docs/server-api.md describes them. */

/**
 * @typedef {Record<string, unknown>} Fields of a generation request, as a job takes them
 * @typedef {{name: string, url: string}} ImageLink
 * @typedef {{checker: string, score: number, flagged: boolean, mode: "mark" | "blur" | "refuse"}} Safety
 * @typedef {{name: string, url: string, job: string, index: number, created: string, prompt?: string | null}} StoredImage
 * @typedef {{
 *   id: string, state: "queued" | "running" | "done" | "failed" | "cancelled", model: string, kind: "generation" | "upscaling",
 *   position: number | null, progress: number, eta: number | null, seconds_per_step: number | null,
 *   image: number, num_images: number, step: number, num_steps: number, loading: string | null, decoding: boolean,
 *   preview: string | null, images: ImageLink[], seeds: (number | string)[], safety: Safety[],
 *   error: string | null, request: Fields,
 * }} Job
 * @typedef {{
 *   name: string, title: string, family: string, default: boolean, preview: boolean, multiple: number,
 *   tasks: string[], requires: string[], fast: Fields,
 *   defaults: {width: number, height: number, num_inference_steps: number, guidance_scale: number,
 *     sampler: string | null, enlarge: number},
 * }} Model
 * @typedef {{name: string, title: string}} Titled
 * @typedef {{help: string, range: [number, number] | null, choices: string[] | null}} Field
 * @typedef {{
 *   width: number, height: number, num_images: number, num_steps: number, seconds: number | null,
 *   estimated_seconds: number | null, seconds_from: "measured" | "estimated" | null,
 *   memory: {peak: number | null, smallest: number | null, room: number | null, fits: boolean},
 * }} Plan
 * @typedef {{
 *   width: number, height: number, source: string | null, fields: Fields, model: string | null, vae: string | null,
 *   controls: unknown[], infotext: string | null,
 * }} Recipe
 */

/** What the server refused, in its words. */
export class ApiError extends Error {
  /**
   * @param {number} status of HTTP; 0 without an answer
   * @param {string} message
   */
  constructor(status, message) {
    super(message)
    this.status = status
  }
}

/** @type {{signIn: () => Promise<void>}} */
export const access = { signIn: () => Promise.reject(new Error("nobody asks for the token")) }

/**
 * Send a request; a server that requires its token is asked again once the user has signed in.
 * @param {string} path
 * @param {{method?: string, json?: unknown, body?: Blob, signal?: AbortSignal}} [options]
 * @returns {Promise<any>} the JSON of the reply; undefined of an empty one
 */
export async function api(path, { method, json, body, signal } = {}) {
  const content = json === undefined ? body : JSON.stringify(json)
  const headers = new Headers(json === undefined ? {} : { "Content-Type": "application/json" })
  const init = { method: method ?? (content === undefined ? "GET" : "POST"), headers, body: content, signal }
  const response = await fetch(path, init).catch((error) => {
    if (signal?.aborted) throw error
    throw new ApiError(0, "The server does not answer. Is sdonnx serve still running?")
  })
  if (response.status === 401 && path !== "/api/session") {
    await access.signIn()
    return api(path, { method, json, body, signal })
  }
  const text = await response.text()
  if (!response.ok) throw new ApiError(response.status, detail(text) ?? `The server answered ${response.status}.`)
  return text === "" ? undefined : parse(text)
}

/**
 * Do something that the server may refuse, and show its reason.
 * @param {HTMLElement} place of the error
 * @param {() => Promise<unknown>} act
 * @returns {Promise<boolean>} whether it was done
 */
export async function attempt(place, act) {
  place.textContent = ""
  try {
    await act()
    return true
  } catch (error) {
    if (!(error instanceof ApiError)) throw error
    place.textContent = error.message
    return false
  }
}

/**
 * @param {string} text
 * @returns {string | undefined}
 */
function detail(text) {
  try {
    const found = JSON.parse(text).detail
    return typeof found === "string" ? found : undefined
  } catch {
    return undefined
  }
}

/**
 * Parse JSON; whole numbers that a double can't hold, which seeds may be, stay texts.
 * @param {string} text
 * @returns {any}
 */
export function parse(text) {
  /** @type {(key: string, value: unknown, context?: {source?: string}) => unknown} */
  const keepDigits = (_, value, context) =>
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value)
      ? (context?.source ?? value)
      : value
  return JSON.parse(text, keepDigits)
}

/**
 * The number of digits that a user typed, which may have more of them than a double.
 * @param {string} text
 * @returns {unknown}
 */
export function wholeNumber(text) {
  const number = Number(text)
  if (Number.isSafeInteger(number) || !/^\d+$/.test(text)) return number
  return "rawJSON" in JSON ? /** @type {any} */ (JSON).rawJSON(text) : number
}
