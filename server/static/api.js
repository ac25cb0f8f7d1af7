// Talks to the server this page came from. The key lives in this module alone: no storage, no cookie.

let key = "";

export function setKey(text) {
  key = text.trim();
}

function headers(extra) {
  return key ? { ...extra, Authorization: `Bearer ${key}` } : extra;
}

async function check(response) {
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Error(`${response.status}: ${body?.error?.message ?? response.statusText}`);
}

export async function getJson(path) {
  const response = await check(await fetch(path, { headers: headers({}), cache: "no-store" }));
  return response.json();
}

// The chunks of a streamed answer. Aborting `signal` closes the connection, which ends the work on the server too.
export async function* stream(path, body, signal) {
  const response = await check(
    await fetch(path, {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const frames = (held + value).split("\n\n");
    held = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue; // a comment, sent while there is nothing else to say
      const data = frame.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}
