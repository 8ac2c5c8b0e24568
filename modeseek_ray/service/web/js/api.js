// The service's HTTP API, with the key of whoever uses this browser.

const SLOT = "modeseek.key";

/** What the service said was wrong: code, place and how to mend it. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message || `The service answered ${status}.`);
    this.status = status;
    this.code = error?.code || String(status);
    this.param = error?.param || null;
    this.mend = error?.mend || null;
  }
}

export function getKey() {
  return sessionStorage.getItem(SLOT) || localStorage.getItem(SLOT);
}

export function setKey(key, remember) {
  sessionStorage.removeItem(SLOT);
  localStorage.removeItem(SLOT);
  if (key) (remember ? localStorage : sessionStorage).setItem(SLOT, key);
}

let askForKey = async () => false;

/** `ask(why)` shows the dialog and resolves to whether there is a new key to try. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** A response of the service, asked again with a key where it wants one. Throws `ApiError`. */
export async function request(method, path, { body, json, headers = {}, signal } = {}) {
  for (let attempt = 0; ; attempt += 1) {
    const key = getKey();
    const answer = await send(method, path, {
      body: json === undefined ? body : JSON.stringify(json),
      signal,
      headers: {
        ...(json === undefined ? {} : { "Content-Type": "application/json" }),
        ...(key ? { Authorization: `Bearer ${key}` } : {}),
        ...headers,
      },
    });
    if (answer.ok) return answer;
    const error = await readError(answer);
    if (answer.status !== 401 || attempt > 2 || !(await askForKey(error.message))) throw error;
  }
}

async function send(method, path, options) {
  try {
    return await fetch(path, { method, cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { code: "unreachable", message: "The service does not answer.", mend: "Is `modeseek serve` running?" });
  }
}

async function readError(answer) {
  try {
    return new ApiError(answer.status, (await answer.json()).error);
  } catch {
    return new ApiError(answer.status, null);
  }
}

export async function get(path, options) {
  return (await request("GET", path, options)).json();
}

export async function post(path, json, options = {}) {
  return (await request("POST", path, { json, ...options })).json();
}

const JOBS = "/v1/fine_tuning/jobs";

export const jobPath = (id, part = "") => `${JOBS}/${encodeURIComponent(id)}${part}`;
export const listJobs = (limit, after, options) =>
  get(`${JOBS}?limit=${limit}${after ? `&after=${encodeURIComponent(after)}` : ""}`, options);
export const getJob = (id, options) => get(jobPath(id), options);
export const act = (id, action) => request("POST", jobPath(id, `/${action}`)).then((answer) => answer.json());
export const validate = (body, options) => post(`${JOBS}/validate`, body, options);
export const submit = (body, idempotencyKey) => post(JOBS, body, { headers: { "Idempotency-Key": idempotencyKey } });

/** Upload a file for jobs to read. */
export async function upload(file) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file);
  return (await request("POST", "/v1/files", { body: form })).json();
}

let document_ = null;

/** The OpenAPI document: what this service can do, and the schema of a job. */
export function openapi() {
  document_ ??= get("/openapi.json").catch((error) => {
    document_ = null;
    throw error;
  });
  return document_;
}

/** Whether the service has a route, so that no button is shown for one it lacks. */
export async function supports(method, template) {
  const paths = (await openapi()).paths;
  return Boolean(paths[template]?.[method.toLowerCase()]);
}

/** Save what a route answers as a file: a link could not carry the key. */
export async function download(path, filename) {
  const blob = await (await request("GET", path)).blob();
  const url = URL.createObjectURL(blob);
  const link = document.createElement("a");
  link.href = url;
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
