// What the page asks of the server: an answer as it is made, the end of its thinking, the figures.

const headers = (key) => ({
  "Content-Type": "application/json",
  ...(key ? { Authorization: `Bearer ${key}` } : {}),
});

/** The chunks of an answer to `body`; an error of the server is thrown in its own words. */
export async function* ask(body, key, signal) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(key),
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The connection to the server ended before the answer did.");
}

/** Have a running answer end its thinking and begin to answer. */
export async function endThinking(id, key) {
  const path = `v1/chat/completions/${encodeURIComponent(id)}/end_thinking`;
  await fetch(path, { method: "POST", headers: headers(key), body: "{}" });
}

/** The server's figures, or null where it gives none. */
export async function health(key) {
  const response = await fetch("health", { headers: headers(key) }).catch(() => null);
  return response?.json().catch(() => null) ?? null;
}

async function refusal(response) {
  const told = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const words = told?.error?.message ?? `The server answered ${response.status}.`;
  return wait ? `${words} (try again in ${wait} s)` : words;
}

/** The data of each server-sent event; comments keep the connection alive and say nothing. */
async function* events(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    if (line === "" && data.length) {
      yield data.join("\n");
      data = [];
    }
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    for (const part of parts) yield part.replace(/\r$/, "");
  }
}
