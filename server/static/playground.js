import { getJson, setKey, stream } from "./api.js";
import { HeatMap, legend, readLogprobs } from "./heat.js";

const BUSY_POLL_MS = 500;
const IDLE_POLL_MS = 3000;
const NUM_ALTERNATIVES = 5;

const at = (id) => document.getElementById(id);
const mode = () => document.querySelector("input[name=mode]:checked").value;
let messages = []; // of the conversation so far
let model = null;
let running = null; // AbortController of the answer under way

// ---- what is asked

function number(id) {
  const text = at(id).value.trim();
  return text === "" ? {} : { [id]: Number(text) };
}

function sampling() {
  const stop = at("stop-strings").value.split("\n").filter((line) => line);
  return {
    ...(model ? { model } : {}),
    ...number("temperature"), ...number("top_p"), ...number("top_k"), ...number("max_tokens"), ...number("seed"),
    ...(stop.length ? { stop } : {}),
  };
}

function request(text) {
  const wantsHeat = at("heat").checked;
  if (mode() === "completion") {
    const logprobs = wantsHeat ? { logprobs: NUM_ALTERNATIVES } : {};
    return ["v1/completions", { prompt: text, ...sampling(), ...logprobs }];
  }
  const system = at("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  const logprobs = wantsHeat ? { logprobs: true, top_logprobs: NUM_ALTERNATIVES } : {};
  return ["v1/chat/completions", { messages: [...before, ...messages], ...sampling(), ...logprobs }];
}

// ---- what is shown

function element(tag, className, text) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function complain(text) {
  at("alert").textContent = text;
  at("alert").hidden = !text;
}

const counted = (number) => number.toLocaleString("en");

function share(used, total) {
  return `${counted(used)} of ${counted(total)}`;
}

function forgetFigures() {
  for (const id of ["ttft", "speed", "tokens", "cached"]) at(id).textContent = "–";
}

class Answer {
  constructor(asked) {
    this.text = "";
    this.started = performance.now();
    this.numTokens = 0;
    this.heat = at("heat").checked ? new HeatMap(at("alternatives")) : null;
    this.body = element("div", "text", "");
    const article = element("article", "answer", "");
    const who = mode() === "chat" ? "You" : "Text";
    article.append(element("h3", "who", who), element("div", "text asked", asked));
    article.append(element("h3", "who", mode() === "chat" ? model ?? "Model" : "Continued"), this.body);
    if (this.heat) this.body.append(this.heat.element);
    at("answers").querySelector(".hint")?.remove();
    at("answers").append(article);
    at("answers").scrollTop = at("answers").scrollHeight; // to the question, wherever the list was: its answer follows
    at("legend").hidden = !at("answers").querySelector(".heat");
  }

  take(chunk) {
    const choice = chunk.choices[0];
    const piece = choice?.delta?.content ?? choice?.text ?? "";
    const isAtEnd = at("answers").scrollHeight - at("answers").scrollTop - at("answers").clientHeight < 40;
    this.text += piece;
    this.think(choice?.delta?.reasoning_content);
    if (this.heat) this.heat.add(readLogprobs(choice?.logprobs));
    else if (piece) this.body.append(piece);
    if (isAtEnd) at("answers").scrollTop = at("answers").scrollHeight;
    this.measure(chunk.usage?.completion_tokens ?? 0);
    if (chunk.usage) at("cached").textContent = share(chunk.usage.prompt_tokens_details.cached_tokens, chunk.usage.prompt_tokens);
    this.reason = choice?.finish_reason ?? this.reason;
  }

  think(piece) {
    if (!piece) return;
    if (!this.thought) {
      this.thought = element("div", "text thought", "");
      this.body.before(element("h3", "who", "Thought"), this.thought, element("h3", "who", "Answer"));
    }
    this.thought.append(piece);
  }

  measure(numTokens) {
    if (numTokens <= this.numTokens) return;
    const now = performance.now();
    this.numTokens = numTokens;
    this.first ??= { now, numTokens };
    at("ttft").textContent = `${counted(Math.round(this.first.now - this.started))} ms`;
    at("tokens").textContent = counted(numTokens);
    const seconds = (now - this.first.now) / 1000;
    if (seconds > 0) at("speed").textContent = counted(Math.round((numTokens - this.first.numTokens) / seconds));
  }
}

function setRunning(controller) {
  running = controller;
  at("send").disabled = Boolean(controller);
  at("stop").disabled = !controller;
  at("answers").setAttribute("aria-busy", String(Boolean(controller))); // read aloud once it is whole
}

async function ask() {
  const text = at("prompt").value;
  if (running || !text.trim()) return;
  const isChat = mode() === "chat";
  const conversation = messages; // which may be cleared meanwhile
  if (isChat) conversation.push({ role: "user", content: text });
  const [path, body] = request(text);
  const answer = new Answer(text);
  complain("");
  forgetFigures();
  at("status").textContent = "Answering …";
  if (isChat) at("prompt").value = "";
  setRunning(new AbortController());
  pollSoon();
  try {
    for await (const chunk of stream(path, body, running.signal)) answer.take(chunk);
    at("status").textContent = answer.reason === "length" ? "Ended at max tokens" : "Done";
  } catch (error) {
    const isStopped = error.name === "AbortError";
    at("status").textContent = isStopped ? "Stopped" : "Failed";
    if (!isStopped) complain(error.message);
  }
  if (isChat && answer.text) conversation.push({ role: "assistant", content: answer.text });
  else if (isChat) conversation.pop(); // a question without an answer would be asked again with the next
  setRunning(null);
  pollSoon();
}

function clear() {
  running?.abort();
  messages = [];
  at("answers").replaceChildren(element("p", "hint", "Ask something, or continue a text."));
  at("alternatives").hidden = true;
  at("legend").hidden = true;
  at("status").textContent = "";
  forgetFigures();
  complain("");
}

// ---- the engine

function gauge(id, used, total) {
  at(id).max = total;
  at(id).value = used;
  at(`${id}-text`).textContent = share(used, total);
}

async function pollLoad() {
  const load = await getJson("load");
  gauge("slots", load.state_slots_used, load.state_slots_total);
  gauge("blocks", load.kv_blocks_used, load.kv_blocks_total);
  gauge("snapshots", load.snapshots_used, load.snapshots_total);
  gauge("drafts", load.accepted_tokens_total, load.draft_tokens_total);
  at("speculation").hidden = !load.draft_tokens_total;
  at("queue").textContent = `${counted(load.num_requests_running)}, ${counted(load.num_requests_waiting)}`;
}

async function describeServer() {
  const info = await getJson("server_info");
  model = info.served_model_name;
  at("served").textContent = `${model} · ${info.linear_backend} on ${info.device_name}`;
  const facts = {
    Architecture: info.architecture,
    Layers: Object.entries(info.layer_counts).map(([kind, count]) => `${count} ${kind}`).join(", "),
    "Linear backend": `${info.linear_backend} (${info.kernels} kernels)`,
    Numbers: `${info.dtype} weights, ${info.state_dtype} state`,
    Context: `${counted(info.max_model_len)} tokens`,
    Version: info.version,
  };
  at("facts").replaceChildren(
    ...Object.entries(facts).flatMap(([name, value]) => [element("dt", "", name), element("dd", "", value)]),
  );
}

let timer = 0;
async function poll() {
  clearTimeout(timer);
  if (!document.hidden) {
    try {
      if (!model) await describeServer();
      await pollLoad();
    } catch (error) {
      if (!model) at("served").textContent = error.message;
    }
  }
  timer = setTimeout(poll, running ? BUSY_POLL_MS : IDLE_POLL_MS);
}
const pollSoon = () => { clearTimeout(timer); timer = setTimeout(poll, 50); };

// ---- events

at("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); ask(); }
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", clear);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
document.addEventListener("visibilitychange", pollSoon);
at("unlock").addEventListener("submit", (event) => event.preventDefault());
at("key").addEventListener("change", () => { setKey(at("key").value); model = null; poll(); });
for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    at("prompt-label").textContent = mode() === "chat" ? "Message" : "Text to continue";
    at("system-label").hidden = mode() !== "chat";
    clear();
  });
}
at("legend").append(...legend());
if (matchMedia("(max-width: 52rem)").matches) at("sampling").open = false;
poll();
