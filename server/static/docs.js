// The API reference: /openapi.json as headings and tables.

import { getJson, setKey } from "./api.js";

const at = (id) => document.getElementById(id);

function element(tag, content, className = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

function typeOf(schema) {
  if (schema.anyOf) return [...new Set(schema.anyOf.map(typeOf))].filter((type) => type !== "null").join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return schema.items ? `list of ${typeOf(schema.items)}` : "list";
  return schema.type ?? "any JSON";
}

const BOUNDS = { minimum: "at least", exclusiveMinimum: "more than", maximum: "at most", exclusiveMaximum: "less than",
  maxItems: "entries at most", maxLength: "characters at most" };

// Beyond 2^53 a script cannot hold every integer.
const rounded = (value) => (Math.abs(value) > Number.MAX_SAFE_INTEGER ? value.toExponential(2) : value);

function boundsOf(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const told = (part) => Object.keys(BOUNDS).filter((key) => key in part).map((key) => `${BOUNDS[key]} ${rounded(part[key])}`);
  return parts.flatMap(told).join(", ");
}

function defaultOf(schema, isRequired) {
  if (isRequired) return "required";
  return schema.default === undefined || schema.default === null ? "–" : JSON.stringify(schema.default);
}

const TITLES = ["Type", "Default", "Bounds"];

function fieldTable(schema) {
  const required = new Set(schema.required ?? []);
  const head = element("tr", ["Field", ...TITLES].map((title) => {
    const cell = element("th", title);
    cell.scope = "col";
    return cell;
  }));
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const texts = [typeOf(field), defaultOf(field, required.has(name)), boundsOf(field)];
    const first = element("th", [element("code", name), element("span", field.description ?? "", "about")]);
    first.scope = "row";
    return element("tr", [first, ...texts.map((text, i) => {
      const cell = element("td", text);
      cell.dataset.title = TITLES[i];
      return cell;
    })]);
  });
  return element("table", [element("thead", head), element("tbody", rows)]);
}

function routeCard(path, method, operation) {
  const title = element("h2", [element("span", method.toUpperCase(), `method ${method}`), " ", element("code", path)]);
  const card = element("section", [title, element("p", operation.description ?? operation.summary ?? "")], "card route");
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  if (schema) {
    const details = element("details", [element("summary", `Body: ${Object.keys(schema.properties ?? {}).length} fields`), fieldTable(schema)]);
    details.open = path.startsWith("/v1/");
    card.append(details);
  }
  return card;
}

async function show() {
  at("alert").hidden = true;
  try {
    const document_ = await getJson("openapi.json");
    const cards = Object.entries(document_.paths).flatMap(([path, methods]) =>
      Object.entries(methods).map(([method, operation]) => routeCard(path, method, operation)));
    at("routes").replaceChildren(...cards);
    at("unlock").hidden = true;
  } catch (error) {
    at("alert").textContent = error.message;
    at("alert").hidden = false;
    at("unlock").hidden = !error.message.startsWith("401");
  }
}

at("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value);
  show();
});
show();
