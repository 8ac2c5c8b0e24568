// What went wrong, where, and how to mend it.

import { h } from "./dom.js";

/** An error of the service, or a job's own, as a box. */
export function notice(error, heading = null) {
  const mend = error.mend && !error.message?.includes(error.mend) ? error.mend : null;
  return h("div.notice.error", { role: "alert" },
    h("p", {}, h("strong", {}, heading ?? "That did not work."), " ", error.code ? h("code", {}, error.code) : ""),
    h("p", {}, error.message),
    error.param ? h("p", {}, "Where: ", h("code", {}, error.param)) : "",
    mend ? h("p", {}, "How to mend it: ", mend) : "");
}

/** Something that is not there, said rather than left out. */
export function absent(text) {
  return h("p.quiet.absent", {}, text);
}
