// @ts-check
/** Signing in to a server that requires its token. */

import { access, api } from "./api.js"
import { find } from "./dom.js"
import { keep, recall } from "./store.js"

const dialog = find("sign-in", HTMLDialogElement)
const token = find("token", HTMLInputElement)
const failure = find("token-error", HTMLParagraphElement)
const signOut = find("sign-out", HTMLButtonElement)

/** @type {Promise<void> | undefined} */
let asking

/** Ends the asking. */
let finish = () => {}

access.signIn = () => {
  asking ??= new Promise((resolve) => {
    finish = () => {
      asking = undefined
      signOut.hidden = false
      token.value = ""
      dialog.close()
      resolve()
    }
    dialog.showModal()
    find("sign-in-form", HTMLFormElement).onsubmit = async (event) => {
      event.preventDefault()
      failure.textContent = ""
      try {
        await api("/api/session", { json: { token: token.value } })
      } catch (error) {
        failure.textContent = error instanceof Error ? error.message : String(error)
        token.select()
        return
      }
      keep("signedIn", true)
      finish()
    }
  })
  return asking
}

dialog.addEventListener("close", () => asking && dialog.showModal())
addEventListener("storage", ({ key }) => {
  if (key !== "sdonnx.signedIn") return
  if (!recall("signedIn", false)) location.reload()
  else if (asking) finish()
})
signOut.hidden = !recall("signedIn", false)
signOut.addEventListener("click", async () => {
  await api("/api/session", { method: "DELETE" })
  keep("signedIn", false)
  location.reload()
})
