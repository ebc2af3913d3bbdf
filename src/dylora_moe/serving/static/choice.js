// Who answers: routed, base, or an expert; with many experts these are searched.

import { make, nameTag } from "./experts.js";

const FEW = 8; // experts that are shown as buttons

let made = 0;

/**
 * A model that can be asked; `expert` is null for the routed mixture.
 * @typedef {{id: string, label: string, expert: string | null}} Model
 */

export class Choice {
  #name = `choice-${++made}`;
  #models = /** @type {Model[]} */ ([]);

  /**
   * @param {string} title
   * @param {() => void} onchange
   */
  constructor(title, onchange) {
    this.onchange = onchange;
    this.element = make("fieldset", "choice");
    this.legend = make("legend", "", title);
    this.buttons = make("div", "pills");
    this.element.append(this.legend, this.buttons);
    /** @type {Model} */
    this.model = null;
  }

  /**
   * The models there are now. What was chosen stays chosen while there is such a model.
   * @param {Model[]} models routed, base, then the experts
   */
  update(models) {
    this.#models = models;
    const many = models.length - 2 > FEW;
    this.search = many ? new Search(models.slice(2), this.#name, (model) => this.#choose(model)) : null;
    this.buttons.replaceChildren(
      ...models.slice(0, many ? 2 : undefined).map((model) => this.#button(model)),
      ...(this.search ? [this.search.element] : []),
    );
    this.select(this.model?.id) || this.select(models[0].id);
  }

  /** Choose a model by its id; false if there is none. */
  select(id) {
    const model = this.#models.find((each) => each.id === id);
    if (!model) return false;
    this.model = model;
    for (const radio of this.buttons.querySelectorAll("input[type=radio]")) radio.checked = radio.value === id;
    this.search?.show(this.#models.indexOf(model) >= 2 ? model : null);
    return true;
  }

  #choose(model) {
    this.select(model.id);
    this.onchange();
  }

  #button(/** @type {Model} */ model) {
    const label = make("label", "pill");
    const radio = make("input");
    Object.assign(radio, { type: "radio", name: this.#name, value: model.id });
    radio.addEventListener("change", () => this.#choose(model));
    label.append(radio, model.expert ? nameTag(model.expert) : make("span", "", model.label));
    return label;
  }
}

/** A combobox with a list that is narrowed by typing (ARIA Authoring Practices, list autocomplete). */
class Search {
  #chosen = /** @type {Model | null} */ (null);
  #active = -1;

  constructor(/** @type {Model[]} */ models, name, choose) {
    this.models = models;
    this.choose = choose;
    this.element = make("div", "search");
    this.input = make("input", "pill");
    this.list = make("ul", "options");
    this.list.id = `${name}-options`;
    this.list.hidden = true;
    this.list.setAttribute("role", "listbox");
    this.list.setAttribute("aria-label", "Experts");
    const attributes = {
      role: "combobox", "aria-label": "Expert", "aria-autocomplete": "list", "aria-expanded": "false",
      "aria-controls": this.list.id, autocomplete: "off", spellcheck: "false",
      placeholder: `${models.length} experts …`,
    };
    for (const [key, value] of Object.entries(attributes)) this.input.setAttribute(key, value);
    this.element.append(this.input, this.list);
    this.input.addEventListener("focus", () => this.input.select());
    this.input.addEventListener("click", () => this.#open(""));
    this.input.addEventListener("input", () => this.#open(this.input.value));
    this.input.addEventListener("blur", () => this.#close());
    this.input.addEventListener("keydown", (event) => this.#key(event));
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    this.list.addEventListener("click", (event) => this.#take(event.target.closest("li[data-id]")));
  }

  /** Show which expert is chosen, if one is. */
  show(/** @type {Model | null} */ model) {
    this.#chosen = model;
    this.input.value = model?.expert ?? "";
    this.element.classList.toggle("chosen", model !== null);
  }

  #open(typed) {
    const wanted = typed.trim().toLowerCase();
    const found = this.models.filter((model) => model.expert.toLowerCase().includes(wanted));
    this.list.replaceChildren(
      ...found.map((model, index) => {
        const option = nameTag(model.expert, "li");
        option.id = `${this.list.id}-${index}`;
        option.dataset.id = model.id;
        option.setAttribute("role", "option");
        option.setAttribute("aria-selected", String(model.id === this.#chosen?.id));
        return option;
      }),
    );
    if (!found.length) {
      const none = make("li", "quiet", "No such expert");
      none.setAttribute("role", "option");
      none.setAttribute("aria-disabled", "true");
      this.list.append(none);
    }
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.#activate(wanted && found.length ? 0 : -1);
  }

  #close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.#activate(-1);
    this.show(this.#chosen);
  }

  #activate(index) {
    const options = [...this.list.querySelectorAll("li[data-id]")];
    this.#active = options.length && index >= 0 ? (index + options.length) % options.length : -1;
    options.forEach((option, at) => option.classList.toggle("active", at === this.#active));
    const active = options[this.#active];
    if (active) this.input.setAttribute("aria-activedescendant", active.id);
    else this.input.removeAttribute("aria-activedescendant");
    active?.scrollIntoView({ block: "nearest" });
  }

  #take(option) {
    const model = this.models.find((each) => each.id === option?.dataset.id);
    if (!model) return;
    this.choose(model);
    this.#close();
  }

  #key(/** @type {KeyboardEvent} */ event) {
    const closed = this.list.hidden;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (closed) this.#open("");
      const down = event.key === "ArrowDown";
      this.#activate(closed || this.#active < 0 ? (down ? 0 : this.list.children.length - 1) : this.#active + (down ? 1 : -1));
    } else if (event.key === "Enter") {
      if (!closed) this.#take(this.list.querySelector(".active"));
    } else if (event.key === "Escape" && !closed) {
      this.#close();
    } else {
      return;
    }
    event.preventDefault();
  }
}
