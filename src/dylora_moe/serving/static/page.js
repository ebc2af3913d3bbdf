// The page: asks, shows what is answered, and keeps what the server tells of its experts up to date.

import { Answer } from "./answer.js";
import { fetchJson, streamJson } from "./api.js";
import { Choice } from "./choice.js";
import { BASE, make, mark, paintTotals } from "./experts.js";
import { noveltyBadge } from "./novelty.js";
import { Tip } from "./tip.js";

const FEW_TOTALS = 8;
const WHILE_ANSWERING = 2000; // milliseconds between looks at the totals
const WHILE_IDLE = 20000;
const MAX_TOKENS = 256;

/** @returns {any} */
const find = (id) => document.getElementById(id);
const tip = new Tip(find("tip"));
const choices = [new Choice(sharedAgain), new Choice(sharedAgain)];

/** One prompt with its answers, the second only side by side. @type {{prompt: string, answers: Answer[]}[]} */
const turns = [];
let mixture = null; // as /v1/experts tells it
let running = null; // the AbortController of the turn that is being answered
let looking = new AbortController(); // of the badges of this conversation
let showAll = false;
let timer = 0;

// ---------------------------------------------------------------- the mixture

async function refresh() {
  clearTimeout(timer);
  const before = mixture;
  mixture = await fetchJson("v1/experts");
  if (idsOf(before) !== idsOf(mixture)) showModels();
  showTotals();
  clearTimeout(timer);
  timer = setTimeout(refreshQuietly, running ? WHILE_ANSWERING : WHILE_IDLE);
}

/** Without a word about a server that is away; whoever asks it something is told. */
const refreshQuietly = () => refresh().catch(() => {});

const idsOf = (description) => description && modelsOf(description).map((model) => model.id).join(" ");

/** Routed, where there is anything to choose from, base, then the experts. */
function modelsOf(description) {
  const base = description.data.find((each) => each.id === BASE);
  const experts = description.data.filter((each) => each.id !== BASE);
  return [
    ...(description.routed ? [{ id: description.model, label: "Routed", expert: null }] : []),
    { id: base.model, label: "Base", expert: BASE },
    ...experts.map((each) => ({ id: each.model, label: each.id, expert: each.id })),
  ];
}

function showModels() {
  const models = modelsOf(mixture);
  for (const model of models) if (model.expert) mark(make("i"), model.expert); // colours in the experts' own order
  for (const choice of choices) choice.update(models);
  const count = mixture.data.length - 1;
  const top = mixture.top_k ? `, top ${mixture.top_k}` : "";
  document.title = `${mixture.model} · DyLoRA-MoE`;
  find("name").textContent = mixture.model;
  find("facts").textContent = `${count} expert${count === 1 ? "" : "s"}, routed per ${mixture.granularity}${top}`;
  const own = find("max-tokens");
  own.value ||= Math.min(MAX_TOKENS, Math.floor(mixture.slot_length / 2));
  own.max = mixture.slot_length;
  find("prompt").placeholder = mixture.chat ? "Say something …" : "A prompt; each is answered by itself …";
}

function showTotals() {
  const many = mixture.data.length > FEW_TOTALS + 1; // with the base
  const largestFirst = [...mixture.data].sort((a, b) => b.tokens - a.tokens);
  paintTotals(find("totals"), many ? largestFirst.slice(0, showAll ? undefined : FEW_TOTALS) : mixture.data);
  find("all").hidden = !many;
  find("all").textContent = showAll ? "Show the largest" : "Show all";
  const learning = mixture.learning;
  find("learning").textContent = learning ? `learning ${learning.name} for ${Math.round(learning.seconds)} s` : "";
}

// ---------------------------------------------------------------- asking

async function ask(prompt) {
  const models = find("compare").checked ? choices.map((choice) => choice.model) : [choices[0].model];
  const turn = { prompt, answers: models.map((model) => new Answer(model, tip, following)) };
  running = new AbortController();
  const controller = running;
  const bodies = turn.answers.map((answer, column) => bodyFor(answer.model.id, prompt, column));
  turns.push(turn);
  share(prompt);
  showTurn(turn);
  showRunning();
  say("Answering.");
  const refreshing = refreshQuietly();
  await Promise.all(turn.answers.map((answer, column) => stream(answer, bodies[column], controller.signal)));
  running = null;
  showRunning();
  say(turn.answers.map((answer) => answer.summary).join(" "));
  await refreshing;
  await refreshQuietly();
}

async function stream(answer, body, signal) {
  let reason = "";
  try {
    const path = mixture.chat ? "v1/chat/completions" : "v1/completions";
    for await (const { choices: [choice] } of streamJson(path, body, signal)) {
      if (choice?.routing?.length) answer.add(choice.routing);
      reason = choice?.finish_reason ?? reason;
    }
    answer.finish({ reason });
  } catch (error) {
    if (signal.aborted) answer.finish({ reason: "stopped" });
    else answer.finish({ error: error.message });
  }
}

function bodyFor(model, prompt, column) {
  const settings = { model, routing: true, max_tokens: find("max-tokens").valueAsNumber };
  for (const id of ["temperature", "seed"]) if (find(id).value) settings[id] = find(id).valueAsNumber;
  if (!mixture.chat) return { ...settings, prompt };
  const messages = turns.flatMap((turn) => {
    const { text } = turn.answers[column] ?? turn.answers[0];
    const asked = { role: "user", content: turn.prompt };
    return text ? [asked, { role: "assistant", content: text }] : []; // without an answer the turn is left out
  });
  return { ...settings, messages: [...messages, { role: "user", content: prompt }] };
}

function showTurn(turn) {
  const element = make("section", "turn");
  const asked = make("div", "asked");
  const title = make("h2", "prompt", turn.prompt);
  const link = make("a", "plain", "Copy link");
  link.href = location.hash;
  link.addEventListener("click", (event) => copy(event, link));
  asked.append(title);
  const below = make("div", "below");
  if (mixture.novelty !== "none") below.append(noveltyBadge(turn.prompt, tip, looking.signal));
  below.append(link);
  asked.append(below);
  const answers = make("div", turn.answers.length > 1 ? "answers two" : "answers");
  answers.append(...turn.answers.map((answer) => answer.element));
  element.append(asked, answers);
  find("welcome").hidden = true;
  find("turns").append(element);
  element.scrollIntoView({ block: "start" });
}

function showRunning() {
  const focused = document.activeElement;
  find("send").hidden = Boolean(running);
  find("stop").hidden = !running;
  find("clear").hidden = Boolean(running) || !turns.length;
  if (focused === find("send") || focused === find("stop")) find("prompt").focus();
}

/** Paint, and keep the end in view if it was. */
function following(paint) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 64;
  paint();
  if (atEnd) page.scrollTop = page.scrollHeight;
}

function say(text) {
  find("status").textContent = text;
}

// ---------------------------------------------------------------- links

/** The address of a prompt, with who answers it. */
function share(prompt) {
  const shared = new URLSearchParams({ prompt, model: choices[0].model.id });
  if (find("compare").checked) shared.set("compare", choices[1].model.id);
  history.replaceState(null, "", `#${shared}`);
}

function sharedAgain() {
  const { prompt } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  if (prompt && prompt === find("prompt").value) share(prompt);
}

/** Take over what a link shares; nothing is asked yet. */
function openShared() {
  const shared = new URLSearchParams(location.hash.slice(1));
  if (!shared.has("prompt")) return;
  find("prompt").value = shared.get("prompt");
  find("compare").checked = shared.has("compare");
  const missing = ["model", "compare"].filter((key, side) => shared.has(key) && !choices[side].select(shared.get(key)));
  const names = missing.map((key) => shared.get(key)).join(", ");
  showFailure(names && `The link asks for ${names}, which is not served here.`);
  showCompare();
  fit();
  find("prompt").focus();
}

async function copy(event, link) {
  event.preventDefault();
  history.replaceState(null, "", link.href);
  const copied = await (navigator.clipboard?.writeText(link.href) ?? Promise.reject()).then(() => true, () => false);
  link.textContent = copied ? "Copied" : "See the address bar"; // there is no clipboard without https
  say(copied ? "Link copied." : "The link stands in the address bar.");
  setTimeout(() => (link.textContent = "Copy link"), 2000);
}

// ---------------------------------------------------------------- the form

function showCompare() {
  const both = find("compare").checked;
  choices[1].element.hidden = !both;
  choices[0].legend.textContent = both ? "First" : "Answered by";
  choices[1].legend.textContent = "Second";
}

function showSettings(shown) {
  find("panel").hidden = !shown;
  find("settings").setAttribute("aria-expanded", String(shown));
}

/** The prompt's field is as high as the prompt, within bounds that style.css sets. */
function fit() {
  const field = find("prompt");
  field.style.setProperty("height", "auto");
  field.style.setProperty("height", `${field.scrollHeight}px`);
}

function showFailure(message, again = null) {
  find("failure").replaceChildren(...(message ? [make("p", "error", message)] : []));
  if (!again) return;
  const button = make("button", "plain", "Try again");
  button.addEventListener("click", again);
  find("failure").firstChild.append(" ", button);
}

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = find("prompt").value;
  if (running || !prompt.trim()) return;
  showFailure("");
  find("prompt").value = "";
  fit();
  ask(prompt);
});
find("composer").addEventListener("invalid", () => showSettings(true), { capture: true });
find("prompt").addEventListener("input", fit);
find("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("composer").requestSubmit();
});
find("stop").addEventListener("click", () => running?.abort());
find("compare").addEventListener("change", () => {
  showCompare();
  sharedAgain();
});
find("settings").addEventListener("click", () => showSettings(find("panel").hidden));
find("clear").addEventListener("click", () => {
  looking.abort();
  looking = new AbortController();
  turns.length = 0;
  find("turns").replaceChildren();
  find("welcome").hidden = false;
  history.replaceState(null, "", location.pathname);
  showRunning();
  find("prompt").focus();
});
find("all").addEventListener("click", () => {
  showAll = !showAll;
  showTotals();
});
addEventListener("hashchange", openShared);

async function start() {
  showFailure("");
  try {
    await refresh();
  } catch (error) {
    showFailure(error.message, start);
    return;
  }
  find("choices").replaceChildren(...choices.map((choice) => choice.element));
  find("experts").open = matchMedia("(min-width: 60rem)").matches;
  for (const id of ["composer", "experts"]) find(id).hidden = false;
  find("welcome").hidden = turns.length > 0;
  if (mixture.data.length > 2) choices[1].select(mixture.data.at(-1).model);
  showCompare();
  openShared();
  find("prompt").focus();
}

start();
