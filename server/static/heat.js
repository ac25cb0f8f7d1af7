// Tokens coloured by their probability. Hovering or focusing one shows what else the model thought of.

const LEVELS = [0.9, 0.7, 0.5, 0.3, 0.1, 0.03]; // less likely than LEVELS[i] is at least level i + 1

const level = (probability) => LEVELS.filter((bound) => probability < bound).length;
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
};

// A coloured word for each level, the likeliest first.
export function legend() {
  const words = LEVELS.map((bound) => `≥ ${100 * bound} %`).concat("less");
  return words.map((word, i) => {
    const span = document.createElement("span");
    span.className = `token p${i}`;
    span.textContent = word;
    return span;
  });
}

// Both shapes of the API -> [{ name, logprob, top: [[name, logprob], ...] }].
export function readLogprobs(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((entry) => ({
      name: entry.token,
      logprob: entry.logprob,
      top: entry.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return logprobs.tokens.map((name, i) => ({
    name,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}),
  }));
}

const visible = (name) => name.replaceAll("\n", "↵\n") || "∅"; // some tokens have no text
const quoted = (name) => name.replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";

// One answer's tokens. They are one stop of the Tab key; arrow keys walk among them.
export class HeatMap {
  constructor(panel) {
    this.panel = panel;
    this.tokens = [];
    this.element = document.createElement("div");
    this.element.className = "heat";
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", "Tokens by probability; arrow keys move");
    this.element.addEventListener("pointerover", (event) => this.show(event.target));
    this.element.addEventListener("focusin", (event) => this.show(event.target));
    this.element.addEventListener("keydown", (event) => this.walk(event));
  }

  add(entries) {
    for (const entry of entries) {
      const span = document.createElement("span");
      span.className = `token p${level(Math.exp(entry.logprob))}`;
      span.textContent = visible(entry.name);
      span.tabIndex = this.tokens.length ? -1 : 0;
      span.setAttribute("role", "button");
      span.setAttribute("aria-label", `${quoted(entry.name)}, ${percent(entry.logprob)}`);
      span.dataset.index = this.tokens.length;
      this.tokens.push({ span, entry });
      this.element.append(span);
    }
  }

  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = step && this.tokens[Number(event.target.dataset.index) + step];
    if (!next) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    next.span.tabIndex = 0;
    next.span.focus();
  }

  show(span) {
    const token = this.tokens[span.dataset.index];
    if (!token) return;
    this.shown?.classList.remove("shown");
    this.shown = span;
    span.classList.add("shown");
    const { name, logprob, top } = token.entry;
    const others = top.some(([other]) => other === name) ? top : [...top, [name, logprob]];
    this.panel.replaceChildren(...others.map(([other, value]) => row(other, value, other === name)));
    this.panel.hidden = false;
  }
}

function row(name, logprob, isChosen) {
  const line = document.createElement("p");
  line.className = isChosen ? "alternative chosen" : "alternative";
  const token = document.createElement("code");
  token.textContent = quoted(name);
  const bar = document.createElement("meter");
  bar.value = Math.exp(logprob);
  bar.setAttribute("aria-hidden", "true");
  const share = document.createElement("span");
  share.textContent = percent(logprob) + (isChosen ? " ✓" : "");
  line.append(token, bar, share);
  return line;
}
