// The server's HTTP interface. Paths are relative, so that it may stand behind a prefix.

const KEY = "dylora-moe-key"; // in sessionStorage
let asking = null; // the question for the key that is open

/** What the server, or the way to it, says is wrong; `code` and `retryAfter` (seconds) as it gives them. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

/** The JSON of an answer. */
export async function fetchJson(path, { body, signal } = {}) {
  return (await send(path, body, signal)).json();
}

/**
 * The chunks of a streamed answer.
 * @throws {ApiError} also for an error in the middle, and for an answer that breaks off
 */
export async function* streamJson(path, body, signal) {
  const response = await send(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await unlessCut(reader.read(), signal);
      if (done) throw new ApiError("The answer broke off: the connection was closed.");
      const lines = (held + value).split(/\r?\n/);
      held = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(chunk.error.message, chunk.error);
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be cut already
  }
}

async function send(path, body, signal) {
  for (let again = false; ; again = true) {
    const headers = {};
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
    const response = await unlessCut(fetch(path, options), signal);
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    if (key === sessionStorage.getItem(KEY)) await askForKey(again || key ? error.message : "", error);
  }
}

async function unlessCut(promise, signal) {
  try {
    return await promise;
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
}

async function errorOf(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  try {
    const { error } = await response.json();
    return new ApiError(error.message, { status: response.status, code: error.code, retryAfter });
  } catch {
    return new ApiError(`The server answered ${response.status}.`, { status: response.status, retryAfter });
  }
}

/** Ask for the key, once for all requests that wait for it. */
function askForKey(why, refused) {
  asking ??= new Promise((resolve, reject) => {
    const dialog = document.getElementById("key-dialog");
    const field = document.getElementById("key");
    document.getElementById("key-why").textContent = why;
    document.getElementById("key-cancel").onclick = () => dialog.close();
    field.value = "";
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      if (dialog.returnValue !== "given") return reject(refused);
      sessionStorage.setItem(KEY, field.value);
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
