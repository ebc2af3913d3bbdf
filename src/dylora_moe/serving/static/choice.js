// Who answers: routed, base, or an expert; with many experts these are searched.

import { BASE, make, nameTag } from "./experts.js";

const FEW = 8; // experts that are shown as buttons

let made = 0;

/**
 * A model that can be asked; `expert` is null for the routed mixture.
 * @typedef {{id: string, label: string, expert: string | null}} Model
 */

export class Choice {
  #name = `choice-${++made}`;
  #models = /** @type {Model[]} */ ([]);

  constructor(/** @type {() => void} */ onchange) {
    this.onchange = onchange;
    this.element = make("fieldset", "choice");
    this.legend = make("legend");
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
    const experts = models.filter(isExpert);
    const many = experts.length > FEW;
    this.search = many ? new Search(experts, this.#name, (model) => this.#choose(model)) : null;
    const buttons = models.filter((model) => !many || !isExpert(model)).map((model) => this.#button(model));
    this.buttons.replaceChildren(...buttons, ...(this.search ? [this.search.element] : []));
    if (!this.select(this.model?.id)) this.select(models[0].id);
  }

  /** Choose a model by its id; false if there is none. */
  select(id) {
    const model = this.#models.find((each) => each.id === id);
    if (!model) return false;
    this.model = model;
    for (const radio of this.buttons.querySelectorAll("input[type=radio]")) radio.checked = radio.value === id;
    this.search?.show(isExpert(model) ? model : null);
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

const isExpert = (/** @type {Model} */ model) => model.expert !== null && model.expert !== BASE;

/** A combobox with a list that is narrowed by typing (ARIA Authoring Practices, list autocomplete). */
class Search {
  #chosen = /** @type {Model | null} */ (null);
  #active = /** @type {number | null} */ (null);

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
    this.#activate(wanted ? 0 : null);
  }

  #close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.#activate(null);
    this.show(this.#chosen);
  }

  /** Go to an option, round the ends, or to none. */
  #activate(/** @type {number | null} */ index) {
    const options = [...this.list.querySelectorAll("li[data-id]")];
    this.#active = index === null || !options.length ? null : (index + options.length) % options.length;
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
      if (event.key === "ArrowDown") this.#activate((this.#active ?? -1) + 1);
      else this.#activate((this.#active ?? 0) - 1);
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
