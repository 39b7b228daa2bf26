// @ts-check
/** The controls of the mask editor. */

import { make } from "./dom.js"

const ZOOM = "M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zm5 11.5L21 21M7.5 10.5h6"

/** Paths of 24 × 24 pixels, by the control's label. */
const ICONS = {
  Brush: "M20 4l-9.5 9.5M20 4l-7 12-2.5-2.5zM9.5 14.5c-3 0-4 1.5-4 3.5 0 1-.5 1.5-2 2 4 1 8-.5 8-3.5z",
  Eraser: "M4.5 14.5l9-9a2 2 0 0 1 3 0l3 3a2 2 0 0 1 0 3L12 19H8zM9 10l6 6M8 19h12",
  Undo: "M8 4L4 8l4 4M4 8h10a5 5 0 0 1 0 11H8",
  Redo: "M16 4l4 4-4 4M20 8H10a5 5 0 0 0 0 11h6",
  Invert: "M4 4h16v16H4zM4 20L20 4M8 20L20 8M12 20l8-8M16 20l4-4",
  Clear: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5M14 11v5",
  "Zoom in": ZOOM + "M10.5 7.5v6",
  "Zoom out": ZOOM,
  Fit: "M4 9V4h5M15 4h5v5M20 15v5h-5M9 20H4v-5",
  "Load a mask": "M12 16V4M7 9l5-5 5 5M4 15v5h16v-5",
}

/** @typedef {keyof typeof ICONS} Label */

/** An icon and a label, which hides where there is no room.
 * @param {Label} label */
function face(label) {
  const [icon, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag))
  icon.setAttribute("viewBox", "0 0 24 24")
  icon.ariaHidden = "true"
  path.setAttribute("d", ICONS[label])
  icon.append(path)
  return [icon, make("span", { textContent: label })]
}

/** Controls side by side.
 * @param {string} ariaLabel
 * @param {...Node} children */
export const group = (ariaLabel, ...children) => make("div", { role: "group", ariaLabel }, ...children)

/** A button; it keeps the focus while it is disabled.
 * @param {Label} label
 * @param {() => unknown} act */
export const button = (label, act) => {
  const onclick = () => element.ariaDisabled !== "true" && act()
  const element = make("button", { type: "button", title: label, onclick }, ...face(label))
  return element
}

/** An input within its label.
 * @param {Label} label
 * @param {HTMLInputElement} input */
export const labelled = (label, input) => make("label", { title: label }, input, ...face(label))
