// The ranking of paperzoo.catalog.search: the same words, weights and order. Whoever changes one changes the other;
// a test compares the two on all judged queries.

import type { Columns } from "./columns";

// in this order every word's weight is put together
const FIELDS = "name title task summary summary_zh venue mechanism aliases keywords authors data".split(" ") as (keyof Documents)[];
const WORD = /[a-z0-9]+|[\u3400-\u9fff]+/g;
const CHINESE = /^[\u3400-\u9fff]/;
const NUMBER = /^[0-9]+$/;
const PLAIN = /^[\x00-\x7f]*$/;

/** One text a work for every field. */
export interface Documents {
  name: string[];
  title: string[];
  task: string[];
  summary: string[];
  summary_zh: string[];
  venue: string[];
  mechanism: string[];
  aliases: string[];
  keywords: string[];
  authors: string[];
  data: string[];
}

interface Postings {
  documents: number[];
  weights: number[];
}

export interface Index {
  columns: Columns;
  postings: Map<string, Postings>;
  sorted: string[]; // the terms without Chinese, in order
  byLength: string[][]; // the same by their number of letters
  names: Map<string, number[]>;
  members: Map<string, [number, number][]>; // concept -> (work, weight)
  phrases: { parts: Set<string>; concepts: string[] }[];
}

export interface Ranked {
  order: number[]; // works, best first
  terms: Set<string>; // the indexed words that the query's words met, for marking them
}

// -- words ------------------------------------------------------------------------------------------------------------

/** Lower case, compatible forms, without accents. */
export function plainText(text: string): string {
  const lower = text.toLowerCase().replace(/ß/g, "ss");
  return PLAIN.test(lower) ? lower : lower.normalize("NFKD").replace(/\p{Mn}/gu, "");
}

function plain(text: string): string {
  return text.toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");
}

const stems = new Map<string, string>();

/** One form for plural and singular, British and American: colours -> color, optimization -> optimisation. */
export function stem(word: string): string {
  let known = stems.get(word);
  if (known === undefined) stems.set(word, (known = stemOf(word)));
  return known;
}

function stemOf(word: string): string {
  if (word.length < 4 || NUMBER.test(word)) return word;
  const one = word.replaceAll("our", "or").replaceAll("ll", "l").replace(/(?<=[a-z])([iy])z(?=[aei])/g, "$1s");
  if (one.endsWith("ies")) return `${one.slice(0, -3)}y`;
  return one.endsWith("s") && !/(ss|us|is)$/.test(one) ? one.slice(0, -1) : one;
}

/** Words as they are indexed: stems; Chinese in pairs of characters. */
export function tokens(text: string): string[] {
  const found: string[] = [];
  for (const part of plainText(text).match(WORD) ?? []) {
    if (!CHINESE.test(part)) found.push(stem(part));
    else if (part.length === 1) found.push(part);
    else for (let i = 0; i + 1 < part.length; i++) found.push(part.slice(i, i + 2));
  }
  return found;
}

// -- the index ---------------------------------------------------------------------------------------------------------

/** The index; pauses now and then, so that a page may be used while it grows. */
export function* indexing(columns: Columns, documents: Documents): Generator<void, Index> {
  const postings = new Map<string, Postings>();
  const names = new Map<string, number[]>();
  const members = new Map<string, [number, number][]>();
  const put = <Value>(map: Map<string, Value[]>, key: string, value: Value) => {
    const row = map.get(key);
    if (row) row.push(value);
    else map.set(key, [value]);
  };
  for (const [number, slug] of columns.slugs.entries()) {
    if (number % 40 === 39) yield;
    for (const [term, weight] of weigh(columns.weights, documents, number)) {
      const row = postings.get(term);
      if (row) row.documents.push(number), row.weights.push(rounded(weight));
      else postings.set(term, { documents: [number], weights: [rounded(weight)] });
    }
    const spellings = new Set([slug, columns.names[number]!, ...columns.aliases[number]!]);
    for (const name of spellings) put(names, plain(plainText(name)), number);
    columns.of_tasks[number]!.forEach((t, i) => put(members, `tasks:${t}`, [number, i ? 0.7 : 1]));
    columns.of_methods[number]!.forEach((m, i) => put(members, `methods:${m}`, [number, i ? 0.45 : 0.6]));
    put(members, `areas:${columns.area[number]}`, [number, 0.5]);
  }
  yield;
  const phrases = new Map<string, string[]>();
  for (const kind of ["tasks", "methods", "areas"] as const) {
    columns[kind].forEach(({ name, zh, words }, place) => {
      if (!members.has(`${kind}:${place}`)) return;
      for (const spelling of [name, ...(zh ? [zh] : []), ...words]) {
        put(phrases, tokens(spelling).join(" ") || spelling, `${kind}:${place}`);
      }
    });
  }
  const sorted = [...postings.keys()].filter((term) => PLAIN.test(term)).sort();
  const byLength: string[][] = [];
  for (const term of sorted) (byLength[term.length] ??= []).push(term);
  return {
    columns,
    postings,
    sorted,
    byLength,
    names,
    members,
    phrases: [...phrases].map(([phrase, concepts]) => ({ parts: new Set(phrase.split(" ")), concepts })),
  };
}

/** The index at once. */
export function buildIndex(columns: Columns, documents: Documents): Index {
  const growing = indexing(columns, documents);
  for (;;) {
    const { done, value } = growing.next();
    if (done) return value;
  }
}

/** term -> the weight of its best field, and a little for each other field it stands in. */
function weigh(fields: Record<string, number>, documents: Documents, number: number): Map<string, number> {
  const weights = new Map<string, number>();
  for (const field of FIELDS) {
    const weight = fields[field] ?? 0;
    for (const term of new Set(tokens(documents[field][number] ?? ""))) {
      const old = weights.get(term) ?? 0;
      weights.set(term, Math.max(old, weight) + 0.25 * Math.min(old, weight));
    }
  }
  return weights;
}

/** Two decimals; halves to the even neighbour, as Python rounds. */
function rounded(value: number): number {
  const hundredths = Math.floor(value * 100);
  const isHalf = value * 100 - hundredths === 0.5;
  return (isHalf ? hundredths + (hundredths % 2) : Math.round(value * 100)) / 100;
}

// -- ranking -----------------------------------------------------------------------------------------------------------

/** All works that match the words of a query, best first. */
export function rank(index: Index, query: string): Ranked {
  const all = [...new Set(tokens(query))];
  const some = all.filter((word) => !index.columns.stop.includes(word));
  const words = some.length ? some : all;
  const terms = new Set<string>();
  if (!words.length) return { order: [], terms };
  const count = index.columns.slugs.length;
  const scores = new Map<number, number>();
  const covered = new Map<number, Set<number>>();
  const add = (number: number, score: number, places: Iterable<number>) => {
    scores.set(number, (scores.get(number) ?? 0) + score);
    let seen = covered.get(number);
    if (!seen) covered.set(number, (seen = new Set()));
    for (const place of places) seen.add(place);
  };
  words.forEach((word, place) => {
    const best = new Map<number, number>();
    for (const [term, quality] of matches(index, word, place + 1 === words.length)) {
      terms.add(term);
      const row = index.postings.get(term)!;
      const rarity = Math.log(1 + count / row.documents.length) / Math.log(1 + count);
      row.documents.forEach((number, i) => {
        best.set(number, Math.max(best.get(number) ?? 0, row.weights[i]! * rarity * quality));
      });
    }
    for (const [number, score] of best) add(number, score, [place]);
  });
  for (const [concept, [strength, places]] of concepts(index, words)) {
    for (const [number, weight] of index.members.get(concept)!) add(number, 9 * strength * weight * places.size ** 0.5, places);
  }
  const places = [...words.keys()];
  for (const [number, bonus] of named(index, query, words)) add(number, bonus, places);
  for (const [number, score] of scores) {
    const share = covered.get(number)!.size / words.length;
    scores.set(number, score * (0.2 + 0.8 * share ** 1.5) * (1 + 0.15 * index.columns.prior[number]!));
  }
  const slugs = index.columns.slugs;
  const order = [...scores.keys()].sort(
    (a, b) => scores.get(b)! - scores.get(a)! || (slugs[a]! < slugs[b]! ? -1 : 1),
  );
  return { order, terms };
}

/** (indexed term, quality): the word itself; as the last one also what it begins; else the nearest spellings. */
function matches(index: Index, word: string, isLast: boolean): [string, number][] {
  const { postings } = index;
  const found: [string, number][] = postings.has(word) ? [[word, 1]] : [];
  if (CHINESE.test(word)) {
    if (word.length > 1) return found;
    return [...postings.keys()].filter((term) => term.includes(word)).map((term) => [term, 0.7]);
  }
  if (isLast && word.length >= (found.length ? 5 : 3)) {
    for (let i = firstFrom(index.sorted, word); index.sorted[i]?.startsWith(word); i++) {
      if (index.sorted[i] !== word) found.push([index.sorted[i]!, 0.6]);
    }
  }
  if (found.length || word.length < 4 || NUMBER.test(word)) return found;
  const reach = word.length < 7 ? 1 : 2;
  let closest = reach;
  let near: string[] = [];
  for (let length = word.length - reach; length <= word.length + reach; length++) {
    for (const term of index.byLength[length] ?? []) {
      const away = distance(word, term, closest);
      if (away < closest) (closest = away), (near = []);
      if (away === closest) near.push(term);
    }
  }
  return near.map((term) => [term, 0.8 - 0.15 * closest]);
}

/** The place of the first text of a sorted list that is not before `text`. */
function firstFrom(sorted: string[], text: string): number {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle]! < text) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Insertions, deletions, substitutions and swaps of neighbours from a to b; most + 1 when there are more. */
export function distance(a: string, b: string, most: number): number {
  if (a[0] !== b[0] && a[1] !== b[1] && a[0] !== b[1]) return most + 1;
  let before: number[] = [];
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const older = before;
    before = row;
    row = [i];
    let least = i;
    for (let j = 1; j <= b.length; j++) {
      let cost = Math.min(before[j]! + 1, row[j - 1]! + 1, before[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) cost = Math.min(cost, older[j - 2]! + 1);
      row.push(cost);
      least = Math.min(least, cost);
    }
    if (least > most) return most + 1;
  }
  return row[b.length]!;
}

/** concept -> (strength in 0..1, the places of the query's words that it explains). */
function concepts(index: Index, words: string[]): Map<string, [number, Set<number>]> {
  const found = new Map<string, [number, Set<number>]>();
  for (const { parts, concepts } of index.phrases) {
    const hit = [...words.keys()].filter((place) => parts.has(words[place]!));
    if (!hit.length) continue;
    let strength: number;
    if (hit.length === parts.size) strength = 1;
    else if (hit.length === words.length && (hit.length > 1 || !PLAIN.test(words[hit[0]!]!))) strength = (hit.length / parts.size) ** 0.5;
    else if (hit.length > 1) strength = (0.6 * hit.length) / parts.size;
    else continue;
    strength *= 0.4 + (0.6 * hit.length) / words.length;
    for (const concept of concepts) {
      const old = found.get(concept);
      found.set(concept, [Math.max(strength, old?.[0] ?? 0), new Set([...(old?.[1] ?? []), ...hit])]);
    }
  }
  return found;
}

/** Works whose name the query is, begins, or contains. */
function named(index: Index, query: string, words: string[]): Map<number, number> {
  const whole = plain(plainText(query));
  const found = new Map<number, number>();
  for (const [name, numbers] of index.names) {
    let bonus = 0;
    if (name === whole) bonus = 100;
    else if (whole.length >= 4 && name.startsWith(whole)) bonus = 12;
    else if (name.length > 2 && words.includes(name)) bonus = 15;
    else continue;
    for (const number of numbers) found.set(number, Math.max(found.get(number) ?? 0, bonus));
  }
  return found;
}
