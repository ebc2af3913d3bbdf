// One tooltip for everything that has more to tell: shown on hover and on focus, gone on Escape.

const LINGER = 150; // milliseconds to get from the element into the tooltip

export class Tip {
  #anchor = null;
  #leaving = 0;

  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
    element.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    element.addEventListener("pointerleave", () => this.#leave());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.hide());
    const move = () => this.#anchor && this.#place();
    addEventListener("scroll", move, { passive: true, capture: true });
    addEventListener("resize", move);
  }

  /**
   * Tell more about what is in `container`.
   * @param {HTMLElement} container
   * @param {string} selector of the elements that have more to tell
   * @param {(element: Element) => Node} tell
   */
  watch(container, selector, tell) {
    const show = (event) => {
      const element = event.target.closest(selector);
      if (element && element !== this.#anchor) this.#show(element, tell(element));
    };
    container.addEventListener("pointerover", (event) => event.pointerType === "mouse" && show(event));
    container.addEventListener("pointerout", () => this.#leave());
    container.addEventListener("focusin", show);
    container.addEventListener("focusout", () => this.hide());
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
    this.element.hidden = true;
  }

  #show(anchor, content) {
    this.hide();
    this.#anchor = anchor;
    anchor.setAttribute("aria-describedby", this.element.id);
    this.element.replaceChildren(content);
    this.element.hidden = false;
    this.#place();
  }

  #leave() {
    clearTimeout(this.#leaving);
    this.#leaving = setTimeout(() => this.#anchor !== document.activeElement && this.hide(), LINGER);
  }

  #place() {
    const line = this.#anchor.getClientRects()[0];
    if (!line) return this.hide();
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const { clientWidth, clientHeight } = document.documentElement;
    const above = line.top - height - 4;
    const within = (from, size, all) => `${Math.max(8, Math.min(from, all - size - 8))}px`;
    this.element.style.setProperty("left", within(line.left, width, clientWidth));
    this.element.style.setProperty("top", within(above >= 8 ? above : line.bottom + 6, height, clientHeight));
  }
}
