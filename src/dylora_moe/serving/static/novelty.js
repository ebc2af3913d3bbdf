// Whether a prompt is of a kind that the mixture was taught.

import { fetchJson } from "./api.js";
import { make, nameTag } from "./experts.js";

/**
 * A badge that asks the server about a prompt.
 * @param {string} prompt
 * @param {import("./tip.js").Tip} tip
 * @param {AbortSignal} signal
 */
export function noveltyBadge(prompt, tip, signal) {
  const element = make("p", "novelty");
  element.setAttribute("role", "status");
  ask().catch((error) => {
    if (!signal.aborted) element.replaceChildren(make("span", "quiet", `Novelty: ${error.message}`));
  });
  return element;

  async function ask() {
    for (;;) {
      try {
        const found = await fetchJson("v1/novelty", { body: { input: prompt }, signal });
        return show(found.data[0]);
      } catch (error) {
        if (error.code !== "preparing") throw error;
        element.replaceChildren(make("span", "badge", "novelty: preparing"));
        await new Promise((resolve) => setTimeout(resolve, 1000 * (error.retryAfter ?? 5)));
        signal.throwIfAborted();
      }
    }
  }

  function show({ answer, skill, p, nearest }) {
    const badge = make("button", "badge");
    badge.type = "button";
    badge.dataset.answer = answer;
    if (answer === "known" || answer === "related") badge.append(`${answer}: `, nameTag(skill));
    else if (answer === "new") badge.append(`this looks like none of my skills, p = ${p.toPrecision(2)}`);
    else badge.append(`novelty: ${answer}`);
    tip.watch(element, ".badge", () => nearestOf(p, nearest));
    element.replaceChildren(badge);
  }
}

function nearestOf(p, nearest) {
  const content = make("div");
  const share = (100 * p).toPrecision(2);
  content.append(make("p", "", `Of the texts it was taught, ${share} % look as new (p = ${p.toPrecision(2)}).`));
  const list = make("ul", "weights");
  list.append(
    ...nearest.map(({ skill, score }) => {
      const item = nameTag(skill, "li");
      item.append(make("b", "", score.toFixed(2)));
      return item;
    }),
  );
  content.append(make("p", "quiet", "Nearest skills; the lower the score, the nearer"), list);
  return content;
}
