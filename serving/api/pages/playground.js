// The playground. Text of models and servers only ever becomes text nodes, never markup; nothing is stored, and
// nothing is asked of another origin.

const $ = (id) => document.getElementById(id);
const BASE = new URL(".", document.baseURI); // "/", or where a proxy has put the server
const KEY_VARIABLE = "WEIR_API_KEY";
const STOPPED = "stopped by you";
const EXAMPLES = {
  json: JSON.stringify(
    {
      type: "object",
      properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 120 } },
      required: ["name", "age"],
      additionalProperties: false,
    },
    null,
    2,
  ),
  regex: "(yes|no), because [a-z ]{5,40}\\.",
};

const state = {
  tab: "chat",
  code: "curl",
  history: [], // of the chat: {role, content}
  last: { chat: null, raw: null }, // the last request of each tab
  running: null, // AbortController
  tokens: new WeakMap(), // a token's element to what is known of it
};

// ---------------------------------------------------------------------------------------------------- small things

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (id) => ($(id).value.trim() === "" || Number.isNaN(Number($(id).value)) ? undefined : Number($(id).value));
const given = (fields) => Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
const stops = () => $("stop").value.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
const fixed = (value, digits) => value.toFixed(digits).replace(/^-(0\.0*)$/, "$1");
const visible = (text) => (text === "" ? "(part of a character)" : JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"'));

function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return share < 0.01 ? "< 0.01 %" : `${share.toFixed(share < 9.95 ? 2 : 1)} %`;
}

class Problem extends Error {}

// A seed can be larger than JavaScript's integers, so it travels as its digits.
function encode(body, indent) {
  return JSON.stringify(body, null, indent).replace(/("seed":\s*)"(\d+)"/, "$1$2");
}

function decode(text) {
  return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
}

// --------------------------------------------------------------------------------------------------- what to ask for

function seed() {
  const digits = $("seed").value.trim();
  if (digits === "") return undefined;
  if (!/^\d+$/.test(digits)) throw new Problem("The seed has to be a whole number, 0 or more.");
  return BigInt(digits).toString();
}

function grammar() {
  const kind = $("grammar-kind").value;
  if (kind === "none") return null;
  const source = $("grammar").value;
  if (kind === "regex") return { kind, value: source };
  try {
    return { kind, value: JSON.parse(source) };
  } catch (error) {
    throw new Problem(`The schema is not JSON: ${error.message}`);
  }
}

function chatRequest(messages) {
  const asked = grammar();
  const draws = $("sample").checked;
  const stream = $("stream").checked;
  const logprobs = $("logprobs").checked || undefined;
  const body = given({
    model: "tgi",
    messages,
    max_tokens: number("max-tokens"),
    temperature: draws ? number("temperature") : 0,
    top_p: draws ? number("top-p") : undefined,
    min_p: draws ? number("min-p") : undefined,
    frequency_penalty: number("frequency-penalty"),
    presence_penalty: number("presence-penalty"),
    seed: seed(),
    stop: stops().length ? stops() : undefined,
    logprobs,
    top_logprobs: logprobs && (number("alternatives") || undefined),
    response_format: responseFormat(asked),
    stream: stream || undefined,
    stream_options: stream ? { include_usage: true } : undefined,
  });
  return { tab: "chat", path: "v1/chat/completions", body, stream, grammar: asked };
}

function responseFormat(asked) {
  if (!asked) return undefined;
  if (asked.kind === "regex") return { type: "regex", value: asked.value };
  return { type: "json_schema", json_schema: { name: "answer", schema: asked.value } };
}

function rawRequest() {
  const asked = grammar();
  const draws = $("sample").checked;
  const bestOf = draws ? number("best-of") : undefined;
  const stream = $("stream").checked && !(bestOf > 1);
  const alternatives = $("logprobs").checked ? number("alternatives") : undefined;
  const parameters = given({
    max_new_tokens: number("max-tokens"),
    do_sample: draws,
    temperature: draws ? number("temperature") : undefined,
    top_k: draws ? number("top-k") : undefined,
    top_p: draws ? number("top-p") : undefined,
    typical_p: draws ? number("typical-p") : undefined,
    min_p: draws ? number("min-p") : undefined,
    best_of: bestOf,
    repetition_penalty: number("repetition-penalty"),
    frequency_penalty: number("frequency-penalty"),
    seed: seed(),
    stop: stops().length ? stops() : undefined,
    details: true,
    top_n_tokens: alternatives || undefined,
    grammar: asked ? { type: asked.kind, value: asked.value } : undefined,
  });
  const body = { inputs: $("prompt").value, parameters };
  return { tab: "raw", path: stream ? "generate_stream" : "generate", body, stream, grammar: asked };
}

// --------------------------------------------------------------------------------------------- asking, and listening

function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  const key = $("key").value;
  try {
    if (key) headers.set("authorization", `Bearer ${key}`);
  } catch {
    throw new Problem("The API key has characters that a header cannot carry.");
  }
  return fetch(new URL(path, BASE), { ...options, headers, credentials: "same-origin", cache: "no-store" });
}

async function refused(response) {
  const text = await response.text();
  let message = text;
  try {
    const { error } = JSON.parse(text);
    message = typeof error === "string" ? error : error.message;
  } catch {
    // plain text, as TGI's framework errors are
  }
  const wait = response.headers.get("retry-after");
  return new Problem(`${response.status}  ${message || response.statusText}${wait ? `\nTry again in ${wait} s.` : ""}`);
}

// The payloads of server-sent events, without keep-alives and without the end's mark.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const frames = buffer.split(/\r?\n\r?\n/);
    buffer = frames.pop();
    for (const frame of frames) {
      const lines = frame.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      if (data === "" || data === "[DONE]") continue;
      yield decode(data);
    }
  }
}

// One way to read all four kinds of answers: what is new as {text, tokens}, at the end {finish, count, seed, whole}.
const readers = {
  generate: (body) => readWhole(body),
  generate_stream: (event) => ({
    text: event.token.special ? "" : event.token.text,
    tokens: [nativeToken(event.token, event.top_tokens)],
    finish: event.details?.finish_reason,
    count: event.details?.generated_tokens,
    seed: event.details?.seed,
    whole: event.generated_text,
  }),
  "v1/chat/completions": (body) => {
    const choice = body.choices[0];
    const text = (choice?.message ?? choice?.delta)?.content ?? "";
    const special = text === "" && choice?.finish_reason === "stop"; // the token that ended it, with no text of its own
    return {
      text,
      tokens: choice?.logprobs?.content?.map((token) => chatToken(token, special)),
      finish: choice?.finish_reason,
      count: body.usage?.completion_tokens,
    };
  },
};

function readWhole({ generated_text: whole, details }) {
  const tokens = details.tokens.map((token, place) => nativeToken(token, details.top_tokens?.[place]));
  return { text: whole, tokens, finish: details.finish_reason, count: details.generated_tokens, seed: details.seed, whole };
}

const nativeToken = (token, top) => ({ ...token, top: top ?? [] });

function chatToken({ token: text, logprob, top_logprobs: top }, special) {
  return { text, logprob, special, top: top.map((each) => ({ text: each.token, logprob: each.logprob })) };
}

async function run(request, view) {
  state.last[request.tab] = request;
  state.running = new AbortController();
  busy(true);
  showCode();
  const told = { text: "", count: 0, finish: null, seed: null, began: performance.now(), first: null };
  try {
    const response = await ask(request.path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: encode(request.body),
      signal: state.running.signal,
    });
    if (!response.ok) throw await refused(response);
    for await (const item of request.stream ? events(response) : [decode(await response.text())]) {
      if (item.error) throw new Problem(typeof item.error === "string" ? item.error : item.error.message);
      hear(told, readers[request.path](item), view);
    }
    if (told.finish === null) throw new Problem("The answer ended before its end was told.");
  } catch (error) {
    if (error.name === "AbortError") told.finish = STOPPED;
    else view.problem(error instanceof Problem ? error.message : `The server cannot be reached: ${error.message}`);
  } finally {
    told.ended = performance.now();
    state.running = null;
    busy(false);
    view.end(told, request);
  }
  return told.text;
}

function hear(told, item, view) {
  if (told.first === null && (item.text || item.tokens?.length)) told.first = performance.now();
  told.text = item.whole ?? told.text + item.text;
  told.finish = item.finish ?? told.finish;
  told.seed = item.seed ?? told.seed;
  told.counted = item.count ?? told.counted;
  told.count += item.tokens?.length ?? (item.text ? 1 : 0);
  view.add(item);
}

function busy(yes) {
  for (const button of document.querySelectorAll("[data-stop]")) button.hidden = !yes;
  for (const id of ["send", "generate", "clear"]) $(id).disabled = yes;
}

// ---------------------------------------------------------------------------------------------------- showing answers

// What an answer looks like while it comes: its text, then what it took, and how it fits the grammar.
class View {
  constructor(box, scroller) {
    this.box = box;
    this.scroller = scroller;
    this.coloured = $("logprobs").checked;
    this.text = element("div", "text");
    box.append(this.text);
    box.classList.add("waiting");
    if (this.coloured) {
      $("legend").hidden = false;
      this.text.tabIndex = 0;
      this.text.setAttribute("role", "group");
      this.text.setAttribute("aria-label", "Tokens; the arrow keys go through them");
    }
  }

  add({ text, tokens }) {
    this.following(() => {
      if (this.coloured && tokens) this.text.append(...tokens.map(tokenElement));
      else if (text) this.text.append(text);
    });
  }

  // The end stays in sight, unless the reader has scrolled away from it.
  following(change) {
    const scroller = this.scroller;
    const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    change();
    if (follows) scroller.scrollTop = scroller.scrollHeight;
  }

  problem(message) {
    const box = element("p", "problem", message);
    box.setAttribute("role", "alert");
    this.box.append(box);
  }

  end(told, request) {
    this.box.classList.remove("waiting");
    const parts = [];
    if (told.first !== null) parts.push(summary(told, request));
    else if (told.finish) parts.push(element("p", "meta", told.finish));
    if (told.first !== null && request.grammar && told.finish !== STOPPED) parts.push(...verdict(told, request.grammar));
    if (this.box === this.scroller) this.box.append(...parts);
    else this.following(() => this.box.append(...parts));
  }
}

function tokenElement(token) {
  const made = element("span", "token", token.text);
  const p = Math.exp(token.logprob);
  if (token.special) made.classList.add("special");
  if (token.logprob !== null) made.classList.add(p >= 0.9 ? "p5" : p >= 0.5 ? "p4" : p >= 0.2 ? "p3" : p >= 0.05 ? "p2" : "p1");
  state.tokens.set(made, token);
  return made;
}

function summary(told, request) {
  const count = told.counted ?? told.count;
  const seconds = (told.ended - told.began) / 1000;
  const line = element("p", "meta");
  const parts = [`${count} ${count === 1 ? "token" : "tokens"}`];
  if (request.stream) {
    parts.push(`first after ${Math.round(told.first - told.began)} ms`);
    const rest = (told.ended - told.first) / 1000;
    if (count > 1 && rest > 0.05) parts.push(`${((count - 1) / rest).toFixed(1)} tokens/s`);
  } else if (seconds > 0) parts.push(`${(count / seconds).toFixed(1)} tokens/s`);
  parts.push(`${seconds.toFixed(2)} s`, told.finish ?? "not finished");
  if (told.seed !== null) parts.push(`seed ${told.seed}`);
  line.append(...parts.map((part) => element("span", "", part)));
  return line;
}

// ------------------------------------------------------------------------------------------------------------ tooltip

function showTip(target) {
  const token = state.tokens.get(target);
  const tip = $("tip");
  if (!token) return hideTip();
  target.parentElement.querySelector(".current")?.classList.remove("current");
  target.classList.add("current");
  const head = element("b", "", visible(token.text));
  const facts = [token.id === undefined ? null : `id ${token.id}`, token.logprob === null ? null : `${percent(token.logprob)}, logprob ${fixed(token.logprob, 4)}`, token.special ? "special" : null];
  const nodes = [head, element("p", "", facts.filter(Boolean).join(" · "))];
  if (token.top.length) nodes.push(alternatives(token));
  tip.replaceChildren(...nodes);
  tip.hidden = false;
  const place = [...target.getClientRects()].at(-1) ?? target.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const below = place.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - tip.offsetHeight - 6)}px`;
  target.parentElement.setAttribute("aria-describedby", "tip");
}

function alternatives(token) {
  const table = element("table");
  for (const top of token.top) {
    const row = element("tr", top.text === token.text && top.id === token.id ? "chosen" : "");
    row.append(element("td", "", visible(top.text)));
    if (top.id !== undefined) row.append(element("td", "", String(top.id)));
    row.append(element("td", "", top.logprob === null ? "" : percent(top.logprob)), element("td", "", top.logprob === null ? "" : fixed(top.logprob, 3)));
    table.append(row);
  }
  return table;
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelectorAll(".token.current").forEach((token) => token.classList.remove("current"));
  document.querySelectorAll("[aria-describedby=tip]").forEach((text) => text.removeAttribute("aria-describedby"));
}

function walkTokens(event) {
  const text = event.target.closest?.(".text");
  const tokens = text ? [...text.querySelectorAll(".token")] : [];
  if (!tokens.length) return;
  const at = tokens.findIndex((token) => token.classList.contains("current"));
  const steps = { ArrowRight: at + 1, ArrowLeft: Math.max(at, 1) - 1, Home: 0, End: tokens.length - 1 };
  if (event.key === "Escape") return hideTip();
  if (!(event.key in steps)) return;
  event.preventDefault();
  const token = tokens[Math.min(steps[event.key], tokens.length - 1)];
  token.scrollIntoView({ block: "nearest" });
  showTip(token);
}

// ------------------------------------------------------------------------------------------------------------ grammar

function verdict(told, { kind, value }) {
  if (kind === "regex") return [matchVerdict(told.text, value)];
  let answer;
  try {
    answer = JSON.parse(told.text);
  } catch (error) {
    const cut = told.finish === "length" ? "the answer was cut off at its longest; raise max tokens" : error.message;
    return [element("p", "verdict bad", `No whole JSON: ${cut}`)];
  }
  const unchecked = new Set();
  const faults = violations(answer, value, value, "", unchecked);
  const rest = unchecked.size ? ` (not looked at here: ${[...unchecked].join(", ")})` : "";
  const line = faults.length
    ? element("p", "verdict bad", `JSON, but not of the schema: ${faults.join("; ")}`)
    : element("p", "verdict", `Valid JSON of the schema${rest}`);
  return [line, element("pre", "pretty", JSON.stringify(answer, null, 2))];
}

function matchVerdict(text, source) {
  try {
    const fits = new RegExp(`^(?:${source})$`, "su").test(text);
    return element("p", fits ? "verdict" : "verdict bad", fits ? "Matches the expression" : "Does not match the expression");
  } catch {
    return element("p", "verdict bad", "This browser cannot read the expression; the server could.");
  }
}

const TYPES = {
  object: (value) => value !== null && typeof value === "object" && !Array.isArray(value),
  array: Array.isArray,
  string: (value) => typeof value === "string",
  number: (value) => typeof value === "number",
  integer: Number.isInteger,
  boolean: (value) => typeof value === "boolean",
  null: (value) => value === null,
};
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const length = (text) => [...text].length;

// JSON schema's keywords, as far as a try-out needs them: what is wrong with a value, in words.
const KEYWORDS = {
  type: (value, types) => ([types].flat().some((type) => TYPES[type]?.(value)) ? "" : `is not ${[types].flat().join(" or ")}`),
  enum: (value, values) => (values.some((each) => same(each, value)) ? "" : "is none of the values allowed"),
  const: (value, only) => (same(only, value) ? "" : `is not ${JSON.stringify(only)}`),
  minimum: (value, bound) => (!(value < bound) ? "" : `is less than ${bound}`),
  maximum: (value, bound) => (!(value > bound) ? "" : `is more than ${bound}`),
  exclusiveMinimum: (value, bound) => (!(value <= bound) ? "" : `is not more than ${bound}`),
  exclusiveMaximum: (value, bound) => (!(value >= bound) ? "" : `is not less than ${bound}`),
  multipleOf: (value, unit) => (!TYPES.number(value) || Number.isInteger(value / unit) ? "" : `is no multiple of ${unit}`),
  minLength: (value, bound) => (!TYPES.string(value) || length(value) >= bound ? "" : `is shorter than ${bound}`),
  maxLength: (value, bound) => (!TYPES.string(value) || length(value) <= bound ? "" : `is longer than ${bound}`),
  pattern: (value, source) => (!TYPES.string(value) || new RegExp(source, "u").test(value) ? "" : `does not match ${source}`),
  minItems: (value, bound) => (!Array.isArray(value) || value.length >= bound ? "" : `has fewer than ${bound} items`),
  maxItems: (value, bound) => (!Array.isArray(value) || value.length <= bound ? "" : `has more than ${bound} items`),
  required: (value, names) => {
    const missing = TYPES.object(value) ? names.filter((name) => !Object.hasOwn(value, name)) : [];
    return missing.length ? `lacks ${missing.join(", ")}` : "";
  },
};
const SILENT = ["$schema", "$id", "$defs", "definitions", "title", "description", "default", "examples", "$comment"];

function violations(value, schema, root, path, unchecked) {
  if (typeof schema === "boolean") return schema ? [] : [`${path || "it"} may not be there`];
  const at = (child, inner, step) => violations(child, inner, root, `${path}${step}`, unchecked);
  const faults = [];
  for (const [keyword, rule] of Object.entries(schema)) {
    if (keyword in KEYWORDS) faults.push(...[KEYWORDS[keyword](value, rule)].filter(Boolean).map((fault) => `${path || "it"} ${fault}`));
    else if (keyword === "properties") faults.push(...propertiesFaults(value, rule, at));
    else if (keyword === "additionalProperties") faults.push(...additionalFaults(value, schema, at));
    else if (keyword === "items" && Array.isArray(value)) faults.push(...value.flatMap((item, index) => (index < (schema.prefixItems?.length ?? 0) ? [] : at(item, rule, `[${index}]`))));
    else if (keyword === "prefixItems" && Array.isArray(value)) faults.push(...rule.flatMap((inner, index) => (index < value.length ? at(value[index], inner, `[${index}]`) : [])));
    else if (keyword === "allOf") faults.push(...rule.flatMap((inner) => at(value, inner, "")));
    else if (keyword === "anyOf" || keyword === "oneOf") {
      const fitting = rule.filter((inner) => !at(value, inner, "").length).length;
      if (!fitting || (keyword === "oneOf" && fitting > 1)) faults.push(`${path || "it"} fits ${fitting || "none"} of ${keyword}`);
    } else if (keyword === "$ref") {
      const target = rule.startsWith("#") ? rule.slice(1).split("/").filter(Boolean).reduce((inner, step) => inner?.[decodeURIComponent(step).replaceAll("~1", "/").replaceAll("~0", "~")], root) : undefined;
      if (target === undefined) unchecked.add(keyword);
      else faults.push(...at(value, target, ""));
    } else if (!SILENT.includes(keyword) && !["items", "prefixItems"].includes(keyword)) unchecked.add(keyword);
  }
  return faults;
}

function propertiesFaults(value, properties, at) {
  if (!TYPES.object(value)) return [];
  return Object.entries(properties).flatMap(([name, inner]) => (Object.hasOwn(value, name) ? at(value[name], inner, `.${name}`) : []));
}

function additionalFaults(value, schema, at) {
  if (!TYPES.object(value)) return [];
  const known = Object.keys(schema.properties ?? {});
  const patterns = Object.keys(schema.patternProperties ?? {}).map((source) => new RegExp(source, "u"));
  const more = Object.keys(value).filter((name) => !known.includes(name) && !patterns.some((pattern) => pattern.test(name)));
  return more.flatMap((name) => at(value[name], schema.additionalProperties, `.${name}`));
}

// --------------------------------------------------------------------------------------------------------------- code

function showCode() {
  let request = state.last[state.tab];
  $("code-title").textContent = request ? "Code for the last request" : "Code for the next request";
  try {
    request ??= state.tab === "chat" ? chatRequest(conversation($("message").value || "Hello")) : rawRequest();
    $("snippet").textContent = { curl, hub, openai }[state.code](request);
  } catch (error) {
    $("snippet").textContent = error.message;
  }
}

function curl({ path, body, stream }) {
  const short = encode(body);
  const json = short.length < 90 ? short : encode(body, 2);
  const key = $("key").value ? ` \\\n  -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  const quoted = json.replaceAll("'", "'\\''");
  return `curl ${stream ? "-N " : ""}${new URL(path, BASE)}${key} \\\n  -H 'Content-Type: application/json' \\\n  -d '${quoted}'\n`;
}

function python(value, depth = 1) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const pad = "    ".repeat(depth);
  const inner = Array.isArray(value)
    ? value.map((item) => python(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const line = `${open}${inner.join(", ")}${close}`;
  if (line.length < 80 && !line.includes("\n")) return line;
  return `${open}\n${inner.map((item) => `${pad}    ${item},\n`).join("")}${pad}${close}`;
}

function call(name, fields) {
  const lines = Object.entries(given(fields)).map(([field, value]) => `    ${field}=${field === "seed" ? value : python(value)},\n`);
  return `${name}(\n${lines.join("")})`;
}

function script(library, client, lines) {
  const key = $("key").value;
  const secret = key ? `os.environ["${KEY_VARIABLE}"]` : '"-"';
  return [...(key ? ["import os", ""] : []), `from ${library} import ${client}`, "", `client = ${client}(base_url="${library === "openai" ? new URL("v1", BASE) : String(BASE).replace(/\/$/, "")}", api_key=${secret})`, ...lines, ""].join("\n");
}

function hub({ tab, body, stream }) {
  if (tab === "chat") {
    const { min_p: minP, ...fields } = body;
    const extra = minP === undefined ? undefined : { min_p: minP };
    const asked = call("client.chat_completion", { ...fields, extra_body: extra });
    return script("huggingface_hub", "InferenceClient", [`chat = ${asked}`, ...printed(stream)]);
  }
  const { min_p: minP, ...fields } = body.parameters;
  const lost = minP === undefined ? [] : ["# min_p is not among this client's arguments"];
  const asked = call("client.text_generation", { prompt: body.inputs, ...fields, return_full_text: false, stream: stream || undefined });
  const told = stream
    ? [`for event in ${asked}:`, '    print(event.token.text, end="", flush=True)']
    : [`answer = ${asked}`, "print(answer.generated_text)"];
  return script("huggingface_hub", "InferenceClient", [...lost, ...told]);
}

function openai({ tab, body, stream, grammar: asked }) {
  const fields = tab === "chat" ? { ...body } : completion(body, stream, asked);
  const extra = {};
  for (const name of ["min_p", "repetition_penalty", ...(tab === "raw" || asked?.kind === "regex" ? ["response_format"] : [])]) {
    if (fields[name] !== undefined) extra[name] = fields[name];
    delete fields[name];
  }
  const more = Object.keys(extra).length ? { extra_body: extra } : {};
  const lost = tab === "raw" ? ["top_k", "typical_p"].filter((name) => body.parameters[name] !== undefined) : [];
  const notes = lost.length ? [`# OpenAI's route has no ${lost.join(" and no ")}`] : [];
  const name = tab === "chat" ? "client.chat.completions.create" : "client.completions.create";
  return script("openai", "OpenAI", [...notes, `chat = ${call(name, { ...fields, ...more })}`, ...printed(stream, tab)]);
}

function completion({ inputs, parameters: given }, stream, asked) {
  return {
    model: "tgi",
    prompt: inputs,
    max_tokens: given.max_new_tokens,
    temperature: given.do_sample ? given.temperature : 0,
    top_p: given.top_p,
    min_p: given.min_p,
    best_of: given.best_of,
    repetition_penalty: given.repetition_penalty,
    frequency_penalty: given.frequency_penalty,
    seed: given.seed,
    stop: given.stop,
    logprobs: given.top_n_tokens,
    response_format: responseFormat(asked),
    stream: stream || undefined,
  };
}

function printed(stream, tab = "chat") {
  const [whole, piece] = tab === "chat" ? ["message.content", "delta.content"] : ["text", "text"];
  if (!stream) return [`print(chat.choices[0].${whole})`];
  return ["for chunk in chat:", "    if chunk.choices:", `        print(chunk.choices[0].${piece} or "", end="", flush=True)`];
}

async function copy() {
  const text = $("snippet").textContent;
  let copied = true;
  try {
    await navigator.clipboard.writeText(text); // only where the page is local or came by TLS
  } catch {
    const area = element("textarea", "hidden", text);
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
  }
  $("copy").textContent = copied ? "Copied" : "Copying failed";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// --------------------------------------------------------------------------------------------------------------- page

const conversation = (message) => [
  ...($("system").value.trim() ? [{ role: "system", content: $("system").value }] : []),
  ...state.history,
  { role: "user", content: message },
];

async function send() {
  const message = $("message").value;
  if (!message.trim() || state.running) return;
  const talk = $("talk");
  let request;
  talk.querySelector(".empty")?.remove();
  try {
    request = chatRequest(conversation(message));
  } catch (error) {
    return void talk.append(element("p", "problem", error.message));
  }
  const asked = element("div", "turn user");
  asked.append(element("div", "text", message));
  const turn = element("div", "turn");
  talk.append(asked, turn);
  talk.scrollTop = talk.scrollHeight;
  $("message").value = "";
  const answer = await run(request, new View(turn, talk));
  if (answer) state.history.push({ role: "user", content: message }, { role: "assistant", content: answer });
  $("message").focus();
}

async function generate() {
  if (state.running) return;
  const answer = $("answer");
  answer.replaceChildren();
  try {
    const request = rawRequest();
    await run(request, new View(answer, answer));
  } catch (error) {
    answer.append(element("p", "problem", error.message));
  }
}

function forget() {
  state.history = [];
  state.last.chat = null;
  $("talk").replaceChildren(element("p", "empty", "A new conversation."));
  showCode();
  $("message").focus();
}

function chooseTab(name) {
  state.tab = name;
  for (const each of ["chat", "raw"]) {
    const chosen = each === name;
    $(`tab-${each}`).setAttribute("aria-selected", chosen);
    $(`tab-${each}`).tabIndex = chosen ? 0 : -1;
    $(`panel-${each}`).hidden = !chosen;
  }
  for (const field of document.querySelectorAll("[data-tab]")) field.hidden = field.dataset.tab !== name;
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
  noteStream();
  showCode();
}

function chooseCode(name) {
  state.code = name;
  for (const tab of document.querySelectorAll("[data-code]")) {
    tab.setAttribute("aria-selected", tab.dataset.code === name);
    tab.tabIndex = tab.dataset.code === name ? 0 : -1;
  }
  $("snippet").setAttribute("aria-labelledby", `code-${name}`);
  showCode();
}

// Tabs as the keyboard expects them: the arrows choose.
function arrows(list) {
  list.addEventListener("keydown", (event) => {
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
  });
}

function noteStream() {
  const off = state.tab === "raw" && $("sample").checked && number("best-of") > 1;
  $("stream-note").textContent = off ? "not with best of" : "";
}

function chooseGrammar() {
  const kind = $("grammar-kind").value;
  const field = $("grammar");
  const untouched = field.value === "" || Object.values(EXAMPLES).includes(field.value);
  $("grammar-field").hidden = kind === "none";
  $("grammar-label").textContent = kind === "regex" ? "Regular expression" : "JSON schema";
  if (kind !== "none" && untouched) field.value = EXAMPLES[kind];
  field.rows = kind === "regex" ? 3 : 10;
}

async function introduce() {
  const served = $("served");
  served.classList.remove("bad");
  try {
    const response = await ask("info");
    if (!response.ok) throw await refused(response);
    const info = await response.json();
    served.replaceChildren(element("b", "", info.model_id), ` · ${info.max_total_tokens} tokens of context · ${info.model_dtype} on ${info.model_device_type} · Weir ${info.version}`);
    served.title = `at most ${info.max_input_tokens} tokens in, ${info.max_concurrent_requests} requests at once`;
    $("max-tokens").max = info.max_total_tokens - 1;
    $("best-of").max = info.max_best_of;
  } catch (error) {
    served.textContent = error instanceof Problem ? error.message.replaceAll("\n", " ") : "The server cannot be reached";
    served.classList.add("bad");
    if (!served.textContent.startsWith("401")) setTimeout(introduce, 3000);
  }
}

function fold(narrow) {
  $("settings").open = !narrow.matches;
}

function listen() {
  $("chat-form").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("raw-form").addEventListener("submit", (event) => (event.preventDefault(), generate()));
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && generate());
  for (const button of document.querySelectorAll("[data-stop]")) button.addEventListener("click", () => state.running?.abort());
  $("clear").addEventListener("click", forget);
  $("copy").addEventListener("click", copy);
  for (const name of ["chat", "raw"]) $(`tab-${name}`).addEventListener("click", () => chooseTab(name));
  for (const tab of document.querySelectorAll("[data-code]")) tab.addEventListener("click", () => chooseCode(tab.dataset.code));
  document.querySelectorAll("[role=tablist]").forEach(arrows);
  $("grammar-kind").addEventListener("change", chooseGrammar);
  $("key").addEventListener("change", introduce);
  $("sample").addEventListener("change", () => {
    for (const field of document.querySelectorAll(".sampling")) field.disabled = !$("sample").checked;
  });
  for (const form of ["settings-form", "chat-form", "raw-form"]) {
    $(form).addEventListener("input", () => (noteStream(), state.last[state.tab] || showCode()));
  }
  document.addEventListener("pointerover", (event) => (event.target.matches(".token") ? showTip(event.target) : hideTip()));
  document.addEventListener("keydown", walkTokens);
  document.addEventListener("scroll", hideTip, true);
  const narrow = matchMedia("(max-width: 56rem)");
  narrow.addEventListener("change", fold);
  fold(narrow);
}

listen();
chooseGrammar();
chooseTab(location.hash === "#raw" ? "raw" : "chat");
introduce();
