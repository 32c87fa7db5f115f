// The catalogue's columns as the scripts below data/ bring them: deflated JSON in base64.

import { bytesOf } from "./try/base64";
import { below } from "./page";

export interface Term {
  id: string;
  name: string;
  zh: string;
  words: string[];
}

/** One value a work in every column from `slugs` on; see paperzoo.serve.data.columns. */
export interface Columns {
  areas: Term[];
  tasks: Term[];
  methods: Term[];
  venues: Term[];
  readiness: Term[];
  steps: string[];
  weights: Record<string, number>; // of the fields
  stop: string[]; // words that say nothing
  slugs: string[];
  names: string[];
  titles: string[];
  aliases: string[][];
  keywords: string[];
  words: string[];
  data: string[];
  years: number[];
  venue: number[];
  area: number[];
  of_tasks: number[][];
  of_methods: number[][];
  kind: string;
  badge: string;
  ready: number[];
  code: number[];
  prior: number[];
  uses: number[];
}

type Name = "search" | "summaries-en" | "summaries-zh" | "more";

declare global {
  interface Window {
    PAPERZOO_SEARCH?: Partial<Record<Name, string>>;
  }
}

const asked = new Map<Name, Promise<unknown>>();

/** The content of data/<name>.js, loaded once. */
export function load(name: "search"): Promise<Columns>;
export function load(name: "more"): Promise<{ authors: string[]; mechanism: string[] }>;
export function load(name: "summaries-en" | "summaries-zh"): Promise<string[]>;
export function load(name: Name): Promise<unknown> {
  let known = asked.get(name);
  if (!known) asked.set(name, (known = arrival(name).then(unpacked).then((raw) => READERS[name](raw))));
  return known;
}

function arrival(name: Name): Promise<string> {
  const here = window.PAPERZOO_SEARCH?.[name];
  if (here) return Promise.resolve(here);
  return new Promise((resolve, reject) => {
    const tag = document.createElement("script");
    tag.src = below(`data/${name}.js`);
    tag.onload = () => resolve(window.PAPERZOO_SEARCH?.[name] ?? "");
    tag.onerror = () => reject(new Error(`data/${name}.js is missing`));
    document.head.append(tag);
  });
}

async function unpacked(packed: string): Promise<any> {
  const stream = new Blob([bytesOf(packed)]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

const lines = (text: string) => text.split("\n");
const parts = (text: string) => lines(text).map((line) => (line ? line.split("|") : []));
const terms = (rows: [string, string, string?, string[]?][]): Term[] =>
  rows.map(([id, name, zh = "", words = []]) => ({ id, name, zh, words }));

const READERS: Record<Name, (raw: any) => unknown> = {
  search: (raw) => ({
    ...raw,
    areas: terms(raw.areas),
    tasks: terms(raw.tasks),
    methods: terms(raw.methods),
    venues: terms(raw.venues),
    readiness: terms(raw.readiness),
    slugs: lines(raw.slugs),
    names: lines(raw.names),
    titles: lines(raw.titles),
    aliases: parts(raw.aliases),
    keywords: lines(raw.keywords).map((line) => line.replaceAll("|", " ")),
    words: lines(raw.words),
    data: lines(raw.data).map((line) => line.replaceAll("|", " ")),
  }),
  "summaries-en": lines,
  "summaries-zh": lines,
  more: (raw) => ({
    authors: lines(raw.authors).map((line) => line.replaceAll("|", " ")),
    mechanism: lines(raw.mechanism),
  }),
};
