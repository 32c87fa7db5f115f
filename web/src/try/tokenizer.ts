// WordPiece as `TextTokenizer` does it in Python (through the library `tokenizers`): equal ids for equal text.

import type { WordPieceTables } from "./types";

const SPACE = /\p{White_Space}/u;
// ASCII's $ + < = > ^ ` | ~ count as punctuation too, as BERT has it
const PUNCTUATION = /[\p{P}$+<=>^`|~]/u;

export class Tokenizer {
  private readonly ids: Map<string, number>;
  private readonly special: RegExp;

  constructor(private readonly tables: WordPieceTables) {
    this.ids = new Map(tables.tokens.map((token, id) => [token, id]));
    const escaped = tables.special.map((token) => token.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"));
    this.special = new RegExp(`(${escaped.join("|") || "(?!)"})`);
  }

  /** Ids without start and end. A special token that is written out in the text is that token. */
  encode(text: string): number[] {
    const ids: number[] = [];
    text.split(this.special).forEach((part, i) => {
      if (i % 2 === 1) ids.push(this.ids.get(part)!);
      else for (const word of this.words(part)) ids.push(...this.pieces(word));
    });
    return ids;
  }

  /** Start, ids, end, padded on the right to `length`; longer texts are cut. */
  pack(text: string, length: number): number[] {
    const { start, end, pad } = this.tables;
    const ids = [start, ...this.encode(text).slice(0, length - 2), end];
    return [...ids, ...new Array<number>(length - ids.length).fill(pad)];
  }

  private words(text: string): string[] {
    // letter by letter: a whole word's lower case would know the Greek final sigma, which the library does not
    const letters = Array.from(text.normalize("NFKC"));
    const plain = this.tables.lowercase ? letters.flatMap((c) => Array.from(c.toLowerCase())) : letters;
    const words: string[] = [];
    let open = "";
    for (const c of plain) {
      const apart = SPACE.test(c) || PUNCTUATION.test(c);
      if (apart && open) {
        words.push(open);
        open = "";
      }
      if (!apart) open += c;
      else if (!SPACE.test(c)) words.push(c);
    }
    return open ? [...words, open] : words;
  }

  /** The longest token that fits, again and again; a word that cannot be spelled is one unknown token. */
  private pieces(word: string): number[] {
    const letters = Array.from(word);
    if (letters.length > this.tables.longest_word) return [this.tables.unknown];
    const found: number[] = [];
    for (let start = 0; start < letters.length; ) {
      let end = letters.length;
      let id: number | undefined;
      for (; end > start && id === undefined; end--) {
        id = this.ids.get((start ? this.tables.continuation : "") + letters.slice(start, end).join(""));
      }
      if (id === undefined) return [this.tables.unknown];
      found.push(id);
      start = end + 1;
    }
    return found;
  }
}
