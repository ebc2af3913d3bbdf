// One answer: its tokens as they come, coloured by their experts.

import { Loads, make, mark, nameTag, percent } from "./experts.js";
import { Pieces, largestFirst } from "./text.js";

const REASONS = { length: "max tokens reached", stop: "" };

export class Answer {
  #pieces = new Pieces();
  #loads = new Loads();
  /** @type {import("./text.js").Token[]} */
  #waiting = [];
  #frame = 0;
  /** @type {{expert: string, element: HTMLElement, letters: number, labelled: boolean}} */
  #run = null;
  /** @type {HTMLElement[]} */
  #spans = [];
  /** @type {WeakMap<Element, {index: number, piece: import("./text.js").Piece}>} */
  #known = new WeakMap();
  #first = 0;

  /**
   * @param {{id: string, label: string, expert: string | null}} model that answers
   * @param {import("./tip.js").Tip} tip
   * @param {(paint: () => void) => void} growing paints, and keeps the end of the page in view
   */
  constructor(model, tip, growing) {
    this.model = model;
    /** All of it, white space at the beginning included. */
    this.text = "";
    this.tokens = 0;
    this.growing = growing;

    this.element = make("article", "answer");
    const head = make("header");
    const title = make("h3");
    title.append(model.expert ? nameTag(model.expert) : make("span", "", model.label));
    this.state = make("p", "quiet", "waiting");
    head.append(title, this.state);
    this.body = make("div", "text");
    this.body.setAttribute("role", "group");
    this.body.setAttribute("aria-label", `Answer, ${model.label}`);
    this.error = make("div");
    this.error.setAttribute("role", "alert");
    this.table = make("details", "table");
    this.table.hidden = true;
    this.table.append(make("summary", "", "Weights as a table"));
    this.table.addEventListener("toggle", () => this.table.open && this.#tabulate());
    this.#loads.element.hidden = true;
    this.element.setAttribute("aria-busy", "true");
    this.element.append(head, this.body, this.error, this.#loads.element, this.table);

    tip.watch(this.body, ".token", (span) => weightsOf(this.#known.get(span).piece));
    this.body.addEventListener("keydown", (event) => this.#walk(event));
    this.body.addEventListener("focusin", (event) => this.#stand(event.target));
  }

  /** Take in what came; it is shown with the next frame. */
  add(/** @type {import("./text.js").Token[]} */ tokens) {
    this.#first ||= performance.now();
    this.#waiting.push(...tokens);
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /**
   * Nothing more comes.
   * @param {{reason?: string, error?: string}} end why
   */
  finish({ reason = "", error = "" }) {
    const seconds = (performance.now() - this.#first) / 1000;
    this.#paint();
    this.growing(() => this.#append(this.#pieces.rest()));
    const rate = this.tokens > 1 && seconds ? `${Number(((this.tokens - 1) / seconds).toPrecision(2))} tokens/s` : "";
    const count = `${this.tokens} token${this.tokens === 1 ? "" : "s"}`;
    this.state.textContent = [count, rate, REASONS[reason] ?? reason].filter(Boolean).join(" · ");
    this.element.removeAttribute("aria-busy");
    if (error) this.error.append(make("p", "error", error));
    else if (!this.#spans.length) this.body.append(make("span", "quiet", "The answer is empty."));
    this.table.hidden = !this.#spans.length;
  }

  /** In one sentence, for those who do not see it. */
  get summary() {
    const [largest] = this.#loads.shares();
    const mostly = largest ? `, ${percent(largest[1])} ${largest[0]}` : "";
    return `${this.model.label}: ${this.state.textContent}${mostly}.`;
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const tokens = this.#waiting;
    this.#waiting = [];
    this.growing(() => this.#append(tokens.flatMap((token) => this.#pieces.add(token))));
    if (tokens.length) this.state.textContent = `${this.tokens} tokens`;
  }

  #append(/** @type {import("./text.js").Piece[]} */ pieces) {
    for (const piece of pieces) {
      this.tokens += piece.tokens;
      this.text += piece.text;
      this.#loads.add(piece);
      const text = this.#spans.length ? piece.text : piece.text.trimStart();
      if (text) this.#show({ ...piece, text });
    }
    if (this.tokens) {
      this.#loads.element.hidden = false;
      this.#loads.paint();
    }
  }

  #show(/** @type {import("./text.js").Piece} */ piece) {
    if (this.#run?.expert !== piece.expert) {
      this.#run = { expert: piece.expert, element: make("span", "run"), letters: 0, labelled: false };
      this.body.append(this.#run.element);
    }
    const run = this.#run;
    const span = mark(make("span", "token", piece.text), piece.expert);
    span.style.setProperty("--weight", (piece.weights.get(piece.expert) ?? 0).toFixed(3));
    span.tabIndex = this.#spans.length ? -1 : 0;
    this.#known.set(span, { index: this.#spans.length, piece });
    this.#spans.push(span);
    run.element.append(span);
    run.letters += piece.text.length;
    if (!run.labelled && run.letters > 0.7 * piece.expert.length + 1) run.labelled = label(run.element, piece.expert);
  }

  #walk(/** @type {KeyboardEvent} */ event) {
    const at = this.#known.get(event.target)?.index;
    const last = this.#spans.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last }[event.key];
    if (at === undefined || to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#spans[Math.max(0, Math.min(to, last))].focus();
  }

  /** Tab comes back to the token that had the focus last. */
  #stand(/** @type {HTMLElement} */ span) {
    if (!this.#known.has(span)) return;
    for (const each of this.body.querySelectorAll("[tabindex='0']")) each.tabIndex = -1;
    span.tabIndex = 0;
  }

  #tabulate() {
    const table = make("table");
    const head = table.createTHead().insertRow();
    for (const title of ["Text", "Tokens", "Mean weights"]) {
      const cell = make("th", "", title);
      cell.scope = "col";
      head.append(cell);
    }
    const body = table.createTBody();
    for (const run of this.body.querySelectorAll(".run")) {
      const pieces = [...run.querySelectorAll(".token")].map((span) => this.#known.get(span).piece);
      const loads = new Loads();
      for (const piece of pieces) loads.add(piece);
      const row = body.insertRow();
      row.insertCell().textContent = pieces.map((piece) => piece.text).join("");
      row.insertCell().textContent = pieces.reduce((sum, piece) => sum + piece.tokens, 0);
      row.insertCell().textContent = loads.shares().map(([name, share]) => `${name} ${share.toFixed(2)}`).join(", ");
    }
    const scroll = make("div", "scroll");
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Weights as a table");
    scroll.append(table);
    this.table.querySelector(".scroll")?.remove();
    this.table.append(scroll);
  }
}

/**
 * Write the expert's name over the first word of a run, which need not move for it; style.css shows `data-label`.
 * @returns {boolean} whether there is a word
 */
function label(/** @type {HTMLElement} */ run, expert) {
  const token = [...run.children].find((each) => each.textContent.trim());
  if (!token) return false;
  const [, space, rest] = token.textContent.match(/^(\s*)(.*)$/s);
  const word = make("span", "word", rest);
  word.dataset.label = expert;
  token.replaceChildren(space, word);
  return true;
}

/** All weights of a piece, the largest first. */
function weightsOf(/** @type {import("./text.js").Piece} */ piece) {
  const content = make("div");
  const shown = piece.text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  const title = make("p", "piece", shown);
  if (piece.tokens > 1) title.append(make("small", "", `mean of ${piece.tokens} tokens`));
  const list = make("ul", "weights");
  list.append(
    ...largestFirst(piece.weights).map(([name, weight]) => {
      const item = nameTag(name, "li");
      const bar = mark(make("i", "bar"), name);
      bar.style.setProperty("--share", weight);
      item.append(bar, make("b", "", weight < 0.005 ? "<.01" : weight.toFixed(2)));
      return item;
    }),
  );
  if (piece.weights.size > 12) list.classList.add("many");
  content.append(title, list);
  return content;
}
