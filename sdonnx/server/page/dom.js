// @ts-check
/** Finding and making elements. */

/**
 * Find an element by its id; throws a TypeError if it is missing or of another type.
 * @template {HTMLElement} T
 * @param {string} id
 * @param {{new (): T}} type
 * @returns {T}
 */
export function find(id, type) {
  const element = document.getElementById(id)
  if (!(element instanceof type)) throw new TypeError(`#${id} is not a ${type.name}`)
  return element
}

/**
 * Make an element with these properties and children; texts become text nodes, never markup.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Partial<HTMLElementTagNameMap[K]>} [properties]
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties)
  element.append(...children)
  return element
}

/**
 * Make a button.
 * @param {string} text
 * @param {(event: MouseEvent) => unknown} act
 * @returns {HTMLButtonElement}
 */
export function button(text, act) {
  const element = make("button", { type: "button", textContent: text })
  element.addEventListener("click", act)
  return element
}

/**
 * Say something at the page's edge, with buttons that answer it; it stays until one of them is pressed.
 * @param {string} text
 * @param {Record<string, () => unknown>} answers
 */
export function notice(text, answers = {}) {
  const place = find("offer", HTMLDivElement)
  const choices = Object.entries({ ...answers, Dismiss: () => {} }).map(([label, act]) =>
    button(label, () => {
      place.replaceChildren()
      act()
    }),
  )
  place.replaceChildren(make("p", { textContent: text }), ...choices)
}

/**
 * Call a function once it was not asked to for a while.
 * @param {number} milliseconds
 * @param {() => unknown} act
 * @returns {() => void}
 */
export function debounce(milliseconds, act) {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer
  return () => {
    clearTimeout(timer)
    timer = setTimeout(act, milliseconds)
  }
}
