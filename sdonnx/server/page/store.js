// @ts-check
/** What the browser keeps: settings in localStorage, images in IndexedDB. Where neither is allowed, it forgets. */

const DATABASE = "sdonnx"
const IMAGES = "images"
const KEPT_INPUTS = 30

/** What is kept where the browser keeps nothing. @type {Map<string, unknown>} */
const values = new Map()

/**
 * @param {string} key
 * @param {any} fallback
 * @returns {any}
 */
export function recall(key, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`sdonnx.${key}`) ?? "null") ?? fallback
  } catch {
    return values.get(key) ?? fallback
  }
}

/**
 * @param {string} key
 * @param {unknown} value of JSON
 */
export function keep(key, value) {
  values.set(key, value)
  try {
    localStorage.setItem(`sdonnx.${key}`, JSON.stringify(value))
  } catch {
    // It is known until the page is left.
  }
}

/** @returns {Promise<IDBDatabase>} */
function open() {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open(DATABASE, 1)
    opening.onupgradeneeded = () => opening.result.createObjectStore(IMAGES)
    opening.onsuccess = () => resolve(opening.result)
    opening.onerror = () => reject(opening.error)
  })
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(store: IDBObjectStore) => IDBRequest<T>} ask
 * @returns {Promise<T | undefined>} undefined where there is no database
 */
async function inStore(mode, ask) {
  try {
    const database = await open()
    return await new Promise((resolve, reject) => {
      const request = ask(database.transaction(IMAGES, mode).objectStore(IMAGES))
      request.onsuccess = () => resolve(request.result)
      request.onerror = () => reject(request.error)
      request.transaction?.addEventListener("complete", () => database.close())
    })
  } catch {
    return undefined
  }
}

/**
 * @typedef {{image: Blob | null, mask: Blob | null, depth: Blob | null}} Inputs images of a request
 */

/** @type {Inputs} */
export const NO_INPUTS = { image: null, mask: null, depth: null }

/**
 * The images of the form, or of a job.
 * @param {string} [job]
 * @returns {Promise<Inputs | undefined>}
 */
export function recallInputs(job = "form") {
  return inStore("readonly", (store) => store.get(job))
}

/**
 * Keep the images of the form, or of a job; those of the oldest jobs are dropped.
 * @param {Inputs} inputs
 * @param {string} [job]
 */
export async function keepInputs(inputs, job = "form") {
  await inStore("readwrite", (store) => store.put(inputs, job))
  if (job === "form") return
  const jobs = [...recall("inputs", []), job]
  for (const old of jobs.slice(0, -KEPT_INPUTS)) await inStore("readwrite", (store) => store.delete(old))
  keep("inputs", jobs.slice(-KEPT_INPUTS))
}
