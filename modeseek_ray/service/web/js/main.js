// Which page is shown: the part of the address behind the `#`. One view at a time, ended before the next begins.

import { onKeyNeeded } from "./api.js";
import { compareView } from "./compare.js";
import { h, put } from "./dom.js";
import { jobView } from "./job.js";
import { jobsView } from "./jobs.js";
import { askForKey } from "./key.js";
import { notice } from "./notice.js";
import { submitView } from "./submit.js";

const main = document.getElementById("main");
let end = () => {};

/** A view gets a place and the rest of the address, and returns how to end it. */
const VIEWS = { "": jobsView, jobs: jobView, compare: compareView, submit: submitView };

function show() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page, ...rest] = path.split("/").map(decodeURIComponent);
  end();
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.dataset.page === (page || "jobs") && rest.length === 0;
    if (here) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const view = VIEWS[page];
  const place = put(main, h("div")).firstChild;
  if (!view) {
    put(place, h("h1", {}, "There is no such page"), h("p", {}, h("a", { href: "#/" }, "All jobs")));
    end = () => {};
    return;
  }
  try {
    end = view(place, rest.join("/"), new URLSearchParams(query)) ?? (() => {});
  } catch (error) {
    put(place, notice(error));
    end = () => {};
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address behind # is ours
  main.focus();
});
document.getElementById("key-button").addEventListener("click", () => askForKey(null).then((changed) => changed && show()));
onKeyNeeded(askForKey);
addEventListener("hashchange", () => {
  show();
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
});
show();
