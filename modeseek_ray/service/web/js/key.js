// The dialog that asks for an API key: once, however many requests wait for it.

import { getKey, setKey } from "./api.js";
import { say } from "./dom.js";

const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key-input");
const remember = document.getElementById("key-remember");
const why = document.getElementById("key-why");
const usual = why.textContent;

let asking = null;

/** Resolves to whether there is another key now. `reason` is what the service said, null where a person asks. */
export function askForKey(reason) {
  asking ??= ask(reason).finally(() => {
    asking = null;
  });
  return asking;
}

function ask(reason) {
  say(why, reason && getKey() ? `${reason} Give another key.` : usual);
  input.value = "";
  dialog.returnValue = "cancel";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(take(dialog.returnValue)), { once: true });
  });
}

function take(choice) {
  if (choice === "forget") setKey(null, false);
  if (choice !== "use" || !input.value.trim()) return choice === "forget";
  setKey(input.value.trim(), remember.checked);
  input.value = "";
  return true;
}
