// How experts look: a colour and a pattern each, and bars of how much they wrote.

import { largestFirst } from "./text.js";

export const BASE = "base";
const COLOURS = 7; // of Okabe and Ito; their black is the base's grey
const PATTERNS = 4;

const places = new Map(); // expert → when it was first seen, so that it keeps its colour whatever comes and goes

/** Give an element the colour and pattern of an expert; style.css says what they are. */
export function mark(element, expert) {
  if (expert !== BASE && !places.has(expert)) places.set(expert, places.size);
  const place = places.get(expert);
  element.dataset.colour = expert === BASE ? BASE : place % COLOURS;
  element.dataset.pattern = expert === BASE ? 0 : Math.floor(place / COLOURS) % PATTERNS;
  return element;
}

/** An element with a class and text. */
export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/** An expert's swatch and name. */
export function nameTag(expert, tag = "span") {
  const element = make(tag, "expert");
  const swatch = mark(make("i", "swatch"), expert);
  element.append(swatch, make("span", "", expert));
  return element;
}

/** 0.0123 → "1 %". */
export function percent(share) {
  const rounded = Math.round(100 * share);
  return `${rounded || share === 0 ? rounded : "<\u20091"}\u00a0%`;
}

/** How much each expert wrote of one answer: a bar of all, and the largest by name. */
export class Loads {
  #written = new Map();
  #bar = make("div", "stack");
  #names = make("ul", "loads");

  constructor() {
    this.element = make("div", "load");
    this.#bar.setAttribute("aria-hidden", "true");
    this.#names.setAttribute("aria-label", "Share of this answer");
    this.element.append(this.#bar, this.#names);
  }

  /** @param {import("./text.js").Piece} piece */
  add(piece) {
    for (const [name, weight] of piece.weights) {
      this.#written.set(name, (this.#written.get(name) ?? 0) + weight * piece.tokens);
    }
  }

  /** @returns {[string, number][]} expert and its share, the largest first */
  shares() {
    const total = [...this.#written.values()].reduce((sum, each) => sum + each, 0);
    return largestFirst(this.#written).map(([name, written]) => [name, written / total]);
  }

  paint() {
    const shares = this.shares();
    const shown = shares.slice(0, shares.length > 6 ? 5 : 6);
    const others = shares.slice(shown.length);
    const rest = others.reduce((sum, [, share]) => sum + share, 0);
    const parts = shown.map(([name, share]) => [mark(make("i"), name), nameTag(name, "li"), share]);
    if (others.length) parts.push([make("i"), make("li", "expert", `${others.length} others`), rest]);
    for (const [part, item, share] of parts) {
      part.style.setProperty("--share", share);
      item.append(make("b", "", percent(share)));
    }
    this.#bar.replaceChildren(...parts.map(([part]) => part));
    this.#names.replaceChildren(...parts.map(([, item]) => item));
  }
}

/**
 * The server's totals as bars.
 * @param {HTMLElement} list
 * @param {{id: string, tokens: number, state: string}[]} experts
 */
export function paintTotals(list, experts) {
  const largest = Math.max(1, ...experts.map((expert) => expert.tokens));
  list.replaceChildren(
    ...experts.map((expert) => {
      const item = make("li");
      const name = nameTag(expert.id);
      if (expert.state === "new") name.append(make("small", "", "not routed to yet"));
      const bar = mark(make("div", "bar"), expert.id);
      bar.style.setProperty("--share", expert.tokens / largest);
      item.append(name, make("b", "", Math.round(expert.tokens).toLocaleString("en")), bar);
      return item;
    }),
  );
}
