// From the bytes of tokens to pieces of text: whole characters only, each with its routing weights.

/**
 * A token as the server tells it.
 * @typedef {{bytes: number[], expert: string, weights: Object<string, number>}} Token
 *
 * Text that is shown as one: a token, or the tokens that share a character, with the mean of their weights.
 * @typedef {{text: string, expert: string, weights: Map<string, number>, tokens: number}} Piece
 */

/** The pieces of one answer as it grows. Bytes that belong to no character are left out, as the server does. */
export class Pieces {
  /** @type {Token[]} */
  #held = [];
  /** @type {number[]} */
  #bytes = [];

  /**
   * @param {Token} token
   * @returns {Piece[]} what is whole now; nothing while a character waits for its other bytes
   */
  add(token) {
    // a character that does not go on never will
    const broken = token.bytes.length && (token.bytes[0] < 0x80 || token.bytes[0] > 0xbf) ? this.rest() : [];
    this.#held.push(token);
    this.#bytes.push(...token.bytes);
    return endsInside(this.#bytes) ? broken : [...broken, this.#take()];
  }

  /** @returns {Piece[]} what was held back, when nothing more comes */
  rest() {
    return this.#held.length ? [this.#take()] : [];
  }

  #take() {
    const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(Uint8Array.from(this.#bytes));
    const piece = { text: text.replaceAll("\ufffd", ""), ...meanOf(this.#held), tokens: this.#held.length };
    this.#held = [];
    this.#bytes = [];
    return piece;
  }
}

/** Whether the last bytes are the beginning of a character whose other bytes are still to come. */
function endsInside(/** @type {number[]} */ bytes) {
  for (let back = 1; back <= Math.min(3, bytes.length); back++) {
    const byte = bytes[bytes.length - back];
    if (byte >= 0xc2 && byte <= 0xf4) return back < (byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2);
    if (byte < 0x80 || byte > 0xbf) return false;
  }
  return false;
}

function meanOf(/** @type {Token[]} */ tokens) {
  const weights = new Map();
  for (const token of tokens) {
    for (const [name, weight] of Object.entries(token.weights)) {
      weights.set(name, (weights.get(name) ?? 0) + weight / tokens.length);
    }
  }
  const expert = tokens.length === 1 ? tokens[0].expert : largestFirst(weights)[0][0];
  return { expert, weights };
}

/**
 * @param {Map<string, number>} weights
 * @returns {[string, number][]}
 */
export function largestFirst(weights) {
  return [...weights].sort((a, b) => b[1] - a[1]);
}
