// @ts-check
/** The prompt: its tokens, weights of words by keys, and the LoRAs and embeddings that it may name. */

import { api } from "./api.js"
import { button, debounce, find, make } from "./dom.js"
import { chosenStyles, currentModel, form, showExtras, toggleStyle } from "./form.js"

const prompt = find("prompt", HTMLTextAreaElement)
const WEIGHT_STEP = 0.1
const MANY = 12

/** @typedef {{text: string, start: number, end: number}} Selection a text and what is selected of it */

const TAG = /<\w+:[^<>:]+(:(-?\d*\.?\d+))?[^<>]*>/g
const GROUP = /(?<!\\)\(((?:[^()\\]|\\.)*?)(?::(-?\d*\.?\d+))?\)/g
const OF_A_WORD = /[^\s,:()<>[\]\\]/

/**
 * Add to the weight of the selected words, or of the word, group or tag at the cursor, in AUTOMATIC1111's syntax.
 * @param {Selection} selection
 * @param {number} change
 * @returns {Selection} the text after it, with the same words selected
 */
export function weigh({ text, start, end }, change) {
  const tag = around(text, start, end, TAG)
  if (tag) {
    const [whole, given, weight] = tag
    const raised = `:${rounded(Number(weight ?? 1) + change)}`
    const changed = given ? whole.replace(given, () => raised) : `${whole.slice(0, -1)}${raised}>`
    return { text: splice(text, tag.index, whole, changed), start, end }
  }
  const group = around(text, start, end, GROUP)
  if (group) {
    const [whole, words, weight] = group
    const raised = rounded(Number(weight ?? 1) + change)
    const from = group.index + (raised === "1" ? 0 : 1)
    const changed = raised === "1" ? words : `(${words}:${raised})`
    return { text: splice(text, group.index, whole, changed), start: from, end: from + words.length }
  }
  if (start === end) {
    while (OF_A_WORD.test(text[start - 1] ?? " ")) start -= 1
    while (OF_A_WORD.test(text[end] ?? " ")) end += 1
  }
  const words = text.slice(start, end)
  if (!words.trim()) return { text, start, end }
  return { text: splice(text, start, words, `(${words}:${rounded(1 + change)})`), start: start + 1, end: end + 1 }
}

/**
 * Replace a part of a text.
 * @param {string} text
 * @param {number} at
 * @param {string} part
 * @param {string} changed
 */
function splice(text, at, part, changed) {
  return text.slice(0, at) + changed + text.slice(at + part.length)
}

/**
 * The match of a pattern that a selection lies in.
 * @param {string} text
 * @param {number} start
 * @param {number} end
 * @param {RegExp} pattern
 */
function around(text, start, end, pattern) {
  return [...text.matchAll(pattern)].find((match) => match.index <= start && end <= match.index + match[0].length)
}

/** @param {number} weight */
function rounded(weight) {
  return String(Math.round(weight * 100) / 100)
}

/**
 * Replace the whole text so that the browser's undo still works.
 * @param {HTMLTextAreaElement} area
 * @param {Selection} selection
 */
function replace(area, { text, start, end }) {
  area.focus()
  area.select()
  if (!document.execCommand("insertText", false, text)) area.value = text
  area.setSelectionRange(start, end)
  area.dispatchEvent(new Event("input", { bubbles: true }))
}

for (const area of [prompt, find("negative_prompt", HTMLTextAreaElement)]) {
  area.addEventListener("keydown", (event) => {
    const change = { ArrowUp: WEIGHT_STEP, ArrowDown: -WEIGHT_STEP }[event.key]
    if (change === undefined || !(event.ctrlKey || event.metaKey)) return
    event.preventDefault()
    replace(area, weigh({ text: area.value, start: area.selectionStart, end: area.selectionEnd }, change))
  })
}

async function countTokens() {
  const place = find("tokens", HTMLParagraphElement)
  const text = prompt.value
  const found = await api("/api/tokens", { json: { prompt: text, model: currentModel().name } }).catch(() => null)
  if (prompt.value !== text) return
  place.textContent = found === null ? "" : describe(found)
}

/**
 * @param {{count: number, chunks: number[], texts: string[], length: number, unknown: string[],
 *   loras: {name: string, served: boolean}[], drawn: string | null}} tokens
 */
function describe({ count, chunks, texts, length, unknown, loras, drawn }) {
  const parts = [`${count} of ${chunks.length * length} tokens${drawn === null ? "" : ` in “${drawn.slice(0, 80)}”`}`]
  if (chunks.length > 1) parts[0] += ` in ${chunks.length} chunks`
  const later = texts.slice(1, 4).map((text) => text.split(/\s+/).slice(0, 3).join(" ")).filter(Boolean)
  if (later.length > 0) parts[0] += `; new ones begin at ${later.map((text) => `“${text} …”`).join(", ")}`
  if (unknown.length > 0) parts.push(`${currentModel().name} does not know: ${unknown.join(", ")}`)
  const missing = loras.filter((each) => !each.served)
  if (missing.length > 0) parts.push(`not on this server: ${missing.map((each) => each.name).join(", ")}`)
  return parts.join(" · ")
}

/**
 * Put a word or a tag into the prompt, or take it out.
 * @param {string} word
 */
function toggle(word) {
  const at = indexOf(word)
  const { value } = prompt
  const changed = at >= 0
    ? value.slice(0, at).replace(/[\s,]+$/, "") + value.slice(at + lengthAt(word, at))
    : [value.trimEnd(), word].filter(Boolean).join(" ")
  const text = changed.trimStart()
  replace(prompt, { text, start: text.length, end: text.length })
}

/**
 * Where the prompt has a word, or a tag with any weight.
 * @param {string} word
 */
function indexOf(word) {
  const match = prompt.value.match(pattern(word))
  return match?.index ?? -1
}

/**
 * @param {string} word
 * @param {number} at
 */
function lengthAt(word, at) {
  return prompt.value.slice(at).match(pattern(word))?.[0].length ?? 0
}

/** @param {string} word */
function pattern(word) {
  const quoted = (/** @type {string} */ text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
  const tag = word.match(/^(<lora:.*:)[^:]*>$/)
  return new RegExp(tag ? `${quoted(tag[1])}[^<>]*>` : `(?<![\\w-])${quoted(word)}(?![\\w-])`)
}

/**
 * Offer the LoRAs and embeddings.
 * @param {{name: string, tag: string}[]} loras
 * @param {{name: string, word: string}[]} embeddings
 */
export function offerAdapters(loras, embeddings) {
  const filter = find("adapters-filter", HTMLInputElement)
  const words = [...loras.map((each) => ({ name: each.name, word: each.tag })), ...embeddings]
  const chips = words.map(({ name, word }) => ({ name, word, chip: make("li", {}, button(name, ({ currentTarget }) => {
    toggle(word)
    if (currentTarget instanceof HTMLElement) currentTarget.focus()
  })) }))
  find("adapters", HTMLFieldSetElement).hidden = words.length === 0
  find("adapters-list", HTMLUListElement).replaceChildren(...chips.map((each) => each.chip))
  filter.hidden = words.length <= MANY
  filter.addEventListener("input", () => {
    for (const { name, chip } of chips) chip.hidden = !name.toLowerCase().includes(filter.value.toLowerCase())
  })
  const press = () => {
    for (const { word, chip } of chips) {
      const pressed = chip.firstElementChild
      if (pressed) pressed.ariaPressed = String(indexOf(word) >= 0)
    }
  }
  form.addEventListener("change", press)
  press()
}

/**
 * Offer the styles, whose prompts the server merges with this one.
 * @param {{name: string, prompt: string}[]} styles
 */
export function offerStyles(styles) {
  const chips = styles.map(({ name, prompt: text }) => {
    const chip = button(name, () => toggleStyle(name))
    chip.title = text
    return chip
  })
  find("styles", HTMLFieldSetElement).hidden = styles.length === 0
  find("styles-list", HTMLUListElement).replaceChildren(...chips.map((chip) => make("li", {}, chip)))
  const press = () => {
    const chosen = chosenStyles()
    styles.forEach(({ name }, index) => (chips[index].ariaPressed = String(chosen.includes(name))))
  }
  form.addEventListener("change", press)
  press()
  showExtras()
}

/** Count the tokens after each change. */
export function startCounting() {
  form.addEventListener("change", debounce(250, () => void countTokens()))
  void countTokens()
}
