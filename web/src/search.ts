// search.js: the search of the home page, in <div id="search">. State lives in the address: #q=…&area=…&sort=year.

import { load, type Columns } from "./columns";
import { below, language, onLanguage, say, whenIdle, whenReady } from "./page";
import { buildIndex, indexing, rank, stem, tokens, type Documents, type Index, type Ranked } from "./ranking";
import { element } from "./try/dom";

const PAGE = 20;
const SHORT = 8; // values a facet shows before "more"
const KINDS: Record<string, [string, string]> = {
  m: ["model", "模型"],
  e: ["method", "方法"],
  t: ["technique", "技术"],
  r: ["reading", "阅读"],
};
const STATES: Record<string, [string, string]> = {
  code: ["has code", "有代码"],
  builds: ["builds", "可构建"],
  matches: ["matches a reference", "数值一致"],
  learns: ["learns", "可训练"],
  deploys: ["deploys", "可部署"],
  reproduces: ["reproduces its number", "可复现"],
  "not yet": ["no code yet", "尚无代码"],
};
const SORTS: Record<string, [string, string]> = {
  relevance: ["relevance", "相关度"],
  year: ["newest", "最新"],
  used: ["most built upon", "沿用最多"],
};

interface Facet {
  key: string;
  title: [string, string];
  values: string[][]; // of every work
  label: (value: string) => string;
  order: "count" | "value";
  isOpen: boolean;
}

interface State {
  query: string;
  chosen: Map<string, Set<string>>;
  sort: string;
}

async function start(): Promise<void> {
  const place = document.getElementById("search");
  if (place) new Search(place, await load("search")).open();
}

class Search {
  private index: Index | null = null;
  private state: State = { query: "", chosen: new Map(), sort: "" };
  private shown = PAGE;
  private waiting = 0; // the timer of what was typed
  private kept = "";
  private expanded = new Set<string>();
  private summaries: Partial<Record<"en" | "zh", string[]>> = {};
  private readonly facets: Facet[];
  private readonly all: number[];

  private readonly field = element("input", {
    type: "search",
    id: "search-field",
    autocomplete: "off",
    autocapitalize: "off",
    spellcheck: "false",
    enterkeyhint: "search",
    maxlength: "400",
  });
  private readonly fieldLabel = element("label", { for: "search-field", class: "visually-hidden" });
  private readonly hint = element("p", { class: "search-hint" });
  private readonly count = element("p", { class: "search-count", role: "status", "aria-live": "polite" });
  private readonly sorts = element("select", { id: "search-sort" });
  private readonly sortLabel = element("label", { for: "search-sort" });
  private readonly active = element("div", { class: "search-active" });
  private readonly filters = element("details", { class: "search-filters" });
  private readonly results = element("ol", { class: "search-results" });
  private readonly more = element("button", { type: "button", class: "search-more" });

  constructor(
    private readonly place: HTMLElement,
    private readonly columns: Columns,
  ) {
    this.facets = facets(columns);
    const { slugs, code, prior } = columns;
    this.all = slugs.map((_, i) => i);
    this.all.sort((a, b) => code[b]! - code[a]! || prior[b]! - prior[a]! || (slugs[a]! < slugs[b]! ? -1 : 1));
  }

  open(): void {
    const sorting = element("p", { class: "search-sorting" }, this.sortLabel, " ", this.sorts);
    const bar = element("div", { class: "search-bar" }, this.count, sorting);
    const found = element("div", { class: "search-found" }, bar, this.active, this.results, this.more);
    const box = element("div", { class: "search-box", role: "search" }, this.fieldLabel, this.field, this.hint);
    this.place.classList.add("is-live");
    this.place.replaceChildren(box, element("div", { class: "search-body" }, this.filters, found));
    this.filters.open = matchMedia("(min-width: 50rem)").matches;
    this.listen();
    this.fromAddress();
    this.caption();
    this.render();
    void this.loadRest();
  }

  // -- data ------------------------------------------------------------------------------------------------------------

  /** The chosen language's lines now, everything else when the page is at rest. */
  private async loadRest(): Promise<void> {
    await this.loadSummaries();
    whenIdle(async () => {
      const [en, zh, more] = await Promise.all([load("summaries-en"), load("summaries-zh"), load("more")]);
      this.summaries = { en, zh };
      const growing = indexing(this.columns, this.documents(more));
      const grow = () => {
        const { done, value } = growing.next();
        if (!done) return whenIdle(grow);
        this.index = value;
        rank(value, "a first query with an eror"); // compiles the ranking: the first key need not wait for it
        this.place.dataset.ready = "yes";
        if (this.state.query) this.render();
      };
      grow();
    });
  }

  private async loadSummaries(): Promise<void> {
    const key = language();
    this.summaries[key] ??= await load(`summaries-${key}`);
    if (key === language()) this.render();
  }

  /** The texts that have arrived, field by field. */
  private documents(more?: { authors: string[]; mechanism: string[] }): Documents {
    const { names, slugs, titles, words, venues, venue, years, aliases, keywords, data } = this.columns;
    return {
      name: names.map((name, i) => `${name} ${slugs[i]!.replaceAll("_", " ")}`),
      title: titles,
      task: words,
      summary: this.summaries.en ?? [],
      summary_zh: this.summaries.zh ?? [],
      venue: years.map((year, i) => `${venues[venue[i]!]?.name ?? ""} ${year}`),
      mechanism: more?.mechanism ?? [],
      aliases: aliases.map((row) => row.join(" ")),
      keywords,
      authors: more?.authors ?? [],
      data,
    };
  }

  // -- the address -----------------------------------------------------------------------------------------------------

  private fromAddress(): void {
    const said = new URLSearchParams(location.hash.slice(1) || location.search.slice(1));
    const chosen = new Map<string, Set<string>>();
    for (const { key } of this.facets) {
      const values = (said.get(key) ?? "").split(",").filter(Boolean);
      if (values.length) chosen.set(key, new Set(values));
    }
    const sort = said.get("sort") ?? "";
    this.state = { query: (said.get("q") ?? "").slice(0, 400), chosen, sort: sort in SORTS ? sort : "" };
    this.field.value = this.state.query;
    this.shown = PAGE;
    if (said.get("q") === "") this.field.focus();
  }

  private address(): string {
    const said = new URLSearchParams();
    if (this.state.query) said.set("q", this.state.query);
    for (const [key, values] of this.state.chosen) if (values.size) said.set(key, [...values].join(","));
    if (this.state.sort) said.set("sort", this.state.sort);
    const text = said.toString().replaceAll("%2C", ",");
    return location.pathname + (text ? `#${text}` : "");
  }

  /**
   * Writes the state into the address. Typing on changes the last entry of the history, once the keys rest (browsers limit how
   * often that may happen); everything else makes a new entry.
   */
  private keep(isTypingOn: boolean): void {
    if (isTypingOn) {
      clearTimeout(this.waiting);
      this.waiting = window.setTimeout(() => this.settle(), 300);
    } else {
      this.settle();
      history.pushState(null, "", this.address());
    }
    this.kept = this.address();
    this.shown = PAGE;
    this.render();
  }

  /** Writes what was typed last into the present entry of the history. */
  private settle(): void {
    if (!this.waiting) return;
    clearTimeout(this.waiting);
    this.waiting = 0;
    history.replaceState(null, "", this.kept);
  }

  // -- what the visitor does -------------------------------------------------------------------------------------------

  private listen(): void {
    this.field.addEventListener("input", () => {
      const isTypingOn = this.state.query !== "" && this.field.value !== "";
      this.state.query = this.field.value;
      this.keep(isTypingOn);
    });
    this.sorts.addEventListener("change", () => {
      this.state.sort = this.sorts.value === "relevance" ? "" : this.sorts.value;
      this.keep(false);
    });
    this.more.addEventListener("click", () => {
      const next = this.shown;
      this.shown += PAGE;
      this.render();
      this.links()[next]?.focus();
    });
    this.place.addEventListener("keydown", (event) => this.key(event));
    addEventListener("pagehide", () => this.settle());
    this.results.addEventListener("click", () => this.settle());
    const moved = () => {
      clearTimeout(this.waiting);
      this.waiting = 0;
      this.fromAddress();
      this.render();
    };
    addEventListener("popstate", moved);
    addEventListener("hashchange", moved);
    onLanguage(() => {
      this.caption();
      this.render();
      void this.loadSummaries();
    });
  }

  private links(): HTMLAnchorElement[] {
    return [...this.results.querySelectorAll<HTMLAnchorElement>("a.found-name")];
  }

  private key(event: KeyboardEvent): void {
    const links = this.links();
    const at = links.indexOf(document.activeElement as HTMLAnchorElement);
    const isInField = document.activeElement === this.field;
    if (event.key === "Escape") {
      if (this.state.query || this.state.chosen.size) {
        this.state.chosen.clear();
        this.state.query = this.field.value = "";
        this.keep(false);
      }
      this.field.focus();
    } else if (event.key === "ArrowDown" && (isInField || at >= 0)) links[Math.min(at + 1, links.length - 1)]?.focus();
    else if (event.key === "ArrowUp" && at >= 0) (links[at - 1] ?? this.field).focus();
    else if (event.key === "Enter" && isInField && this.state.query) links[0]?.click();
    else return;
    event.preventDefault();
  }

  private toggle(key: string, value: string, isOn: boolean): void {
    const values = this.state.chosen.get(key) ?? new Set();
    if (isOn) values.add(value);
    else values.delete(value);
    if (values.size) this.state.chosen.set(key, values);
    else this.state.chosen.delete(key);
    this.keep(false);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  private caption(): void {
    this.fieldLabel.textContent = say("Search the catalogue", "搜索目录");
    this.field.placeholder = say("a name, a task, an idea: real-time segmentation, 小样本, ResNet", "名称、任务或想法：实时分割、few-shot、ResNet");
    this.hint.replaceChildren(
      element("kbd", {}, "/"),
      say(" to search, ", " 搜索，"),
      element("kbd", {}, "↓"),
      say(" to the results, ", " 到结果，"),
      element("kbd", {}, "Enter"),
      say(" opens, ", " 打开，"),
      element("kbd", {}, "Esc"),
      say(" clears", " 清除"),
    );
    this.sortLabel.textContent = say("Order", "排序");
    this.more.textContent = say("Show more", "显示更多");
    this.sorts.replaceChildren(...Object.entries(SORTS).map(([key, text]) => element("option", { value: key }, say(...text))));
    document.querySelector(".search-filters > summary")?.remove();
    this.filters.prepend(element("summary", {}, say("Filter", "筛选")));
  }

  private render(): void {
    const { query, sort } = this.state;
    let ranked: Ranked = { order: this.all, terms: new Set() };
    if (query.trim()) {
      this.index ??= buildIndex(this.columns, this.documents());
      ranked = rank(this.index, query);
    }
    const allowed = this.facets.map((facet) => this.passes(facet));
    const found = ranked.order.filter((i) => allowed.every((passes) => passes[i]));
    const { years, uses } = this.columns;
    if (sort === "year") found.sort((a, b) => years[b]! - years[a]!);
    if (sort === "used") found.sort((a, b) => uses[b]! - uses[a]!);
    this.sorts.value = sort || "relevance";
    this.count.textContent =
      found.length === 1 ? say("1 work", "1 篇") : say(`${found.length} works`, `${found.length} 篇`);
    this.results.replaceChildren(...found.slice(0, this.shown).map((i) => this.item(i, ranked.terms)));
    if (!found.length) this.results.replaceChildren(this.nothing());
    this.more.hidden = found.length <= this.shown;
    this.drawFacets(ranked.order, allowed);
    this.drawActive();
  }

  private nothing(): HTMLElement {
    const advice = say(
      "Nothing matches. Try fewer words, another spelling, or take a filter away.",
      "没有匹配的结果。请减少词语、换一种写法，或去掉一个筛选条件。",
    );
    return element("li", { class: "search-nothing" }, advice);
  }

  private item(i: number, terms: Set<string>): HTMLElement {
    const { slugs, names, titles, years, venues, venue, badge, code, steps } = this.columns;
    const slug = slugs[i]!;
    const name = element("a", { class: "found-name", href: below(`papers/${slug}.html`) }, ...marked(names[i]!, terms));
    const where = [venues[venue[i]!]?.name, years[i]].filter(Boolean).join(" ");
    const head = element("p", { class: "found-head" }, name, element("span", { class: "found-where" }, where));
    if (code[i]) {
      const letters = badge.slice(5 * i, 5 * i + 5);
      const passed = steps.filter((_, step) => /[A-Z]/.test(letters[step]!));
      const text = passed.map((step) => say(...(STATES[step] ?? [step, step]))).join(say(", ", "、"));
      const label = text ? say(`passed: ${text}`, `已通过：${text}`) : say("has code", "有代码");
      head.append(element("span", { class: "found-badge", title: label, role: "img", "aria-label": label }, letters));
    }
    const made = element("li", { class: "found" }, head);
    if (titles[i] !== names[i]) made.append(element("p", { class: "found-title" }, ...marked(titles[i]!, terms)));
    const summary = this.summaries[language()]?.[i];
    made.append(element("p", { class: "found-line" }, ...marked(summary ?? "\u00a0", terms)));
    return made;
  }

  /** For every work whether one facet lets it pass. */
  private passes(facet: Facet): boolean[] {
    const wanted = this.state.chosen.get(facet.key);
    return facet.values.map((values) => !wanted?.size || values.some((value) => wanted.has(value)));
  }

  /** Every value with the number of works there would be with it: all other facets hold. */
  private drawFacets(order: number[], allowed: boolean[][]): void {
    const focused = (document.activeElement as HTMLElement | null)?.dataset.facet;
    const groups = this.facets.map((facet, at) => {
      const counts = new Map<string, number>();
      for (const i of order) {
        if (!allowed.every((passes, other) => other === at || passes[i])) continue;
        for (const value of facet.values[i]!) counts.set(value, (counts.get(value) ?? 0) + 1);
      }
      return this.group(facet, counts);
    });
    this.filters.replaceChildren(this.filters.querySelector("summary")!, ...groups);
    if (focused) this.filters.querySelector<HTMLElement>(`[data-facet="${CSS.escape(focused)}"]`)?.focus();
  }

  private group(facet: Facet, counts: Map<string, number>): HTMLElement {
    const chosen = this.state.chosen.get(facet.key) ?? new Set<string>();
    for (const value of chosen) if (!counts.has(value)) counts.set(value, 0);
    const rows = [...counts];
    if (facet.order === "count") rows.sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
    else if (facet.key === "year") rows.sort((a, b) => Number(b[0]) - Number(a[0]));
    const isLong = this.expanded.has(facet.key);
    const visible = rows.filter(([value], place) => isLong || place < SHORT || chosen.has(value));
    const group = element("fieldset", { class: "facet" }, element("legend", {}, say(...facet.title)));
    for (const [value, number] of visible) {
      const box = element("input", { type: "checkbox", "data-facet": `${facet.key}:${value}` });
      box.checked = chosen.has(value);
      box.addEventListener("change", () => this.toggle(facet.key, value, box.checked));
      const count = element("span", { class: "facet-count" }, String(number));
      group.append(element("label", {}, box, element("span", { class: "facet-name" }, facet.label(value)), count));
    }
    if (rows.length > SHORT) {
      const text = isLong ? say("fewer", "收起") : say(`all ${rows.length}`, `全部 ${rows.length} 个`);
      const button = element("button", { type: "button", class: "facet-more", "data-facet": `${facet.key}/more` }, text);
      button.setAttribute("aria-expanded", String(isLong));
      button.addEventListener("click", () => {
        if (isLong) this.expanded.delete(facet.key);
        else this.expanded.add(facet.key);
        this.render();
      });
      group.append(button);
    }
    return group;
  }

  /** What is chosen, each with a button that takes it away. */
  private drawActive(): void {
    const chips: HTMLElement[] = [];
    for (const facet of this.facets) {
      for (const value of this.state.chosen.get(facet.key) ?? []) {
        const text = `${facet.label(value)} ×`;
        const chip = element("button", { type: "button", class: "search-chip" }, text);
        chip.setAttribute("aria-label", say(`Remove the filter ${facet.label(value)}`, `去掉筛选：${facet.label(value)}`));
        chip.addEventListener("click", () => {
          this.toggle(facet.key, value, false);
          this.field.focus();
        });
        chips.push(chip);
      }
    }
    this.active.replaceChildren(...chips);
    this.active.hidden = !chips.length;
  }
}

function facets(columns: Columns): Facet[] {
  const { areas, tasks, venues, readiness, steps, badge, slugs } = columns;
  const named = (terms: { id: string; name: string; zh: string }[]) => {
    const known = new Map(terms.map((term) => [term.id, term]));
    return (value: string) => say(known.get(value)?.name ?? value, known.get(value)?.zh || (known.get(value)?.name ?? value));
  };
  const from = (table: Record<string, [string, string]>) => (value: string) => say(...(table[value] ?? [value, value]));
  const kinds = Object.fromEntries(Object.values(KINDS).map((pair) => [pair[0], pair]));
  const passed = slugs.map((_, i) => {
    if (!columns.code[i]) return columns.kind[i] === "r" ? [] : ["not yet"];
    return ["code", ...steps.filter((_, step) => /[A-Z]/.test(badge[5 * i + step]!))];
  });
  const make = (
    key: string,
    title: [string, string],
    values: string[][],
    label: (value: string) => string,
    order: "count" | "value" = "count",
  ): Facet => ({ key, title, values, label, order, isOpen: true });
  return [
    make("area", ["Area", "领域"], columns.area.map((a) => (areas[a] ? [areas[a].id] : [])), named(areas)),
    make("task", ["Task", "任务"], columns.of_tasks.map((row) => row.map((t) => tasks[t]!.id)), named(tasks)),
    make("status", ["Code", "代码"], passed, from(STATES)),
    make("ready", ["Readiness", "就绪度"], columns.ready.map((r) => [readiness[r]!.id]), named(readiness)),
    make("kind", ["Kind", "类型"], [...columns.kind].map((letter) => [KINDS[letter]![0]]), from(kinds)),
    make("year", ["Year", "年份"], columns.years.map((year) => [String(year)]), (value) => value, "value"),
    make("venue", ["Venue", "出处"], columns.venue.map((v) => (venues[v] ? [venues[v].id] : [])), named(venues)),
  ];
}

/** A text in which the words that the query met are marked. */
function marked(text: string, terms: Set<string>): (Node | string)[] {
  if (!terms.size) return [text];
  const made: (Node | string)[] = [];
  let end = 0;
  for (const part of text.matchAll(/[\p{L}\p{N}]+/gu)) {
    for (const [from, to] of hits(part[0], terms)) {
      if (part.index + from > end) made.push(text.slice(end, part.index + from));
      made.push(element("mark", {}, text.slice(part.index + from, part.index + to)));
      end = part.index + to;
    }
  }
  return end ? [...made, text.slice(end)] : [text];
}

/** The parts of one run of letters that stand among the terms: all of a word, or pairs of Chinese characters. */
function hits(run: string, terms: Set<string>): [number, number][] {
  if (!/[\u3400-\u9fff]/.test(run)) return tokens(run).some((word) => terms.has(word)) || terms.has(stem(run)) ? [[0, run.length]] : [];
  const found: [number, number][] = [];
  for (let i = 0; i + 1 < run.length; i++) {
    if (!terms.has(run.slice(i, i + 2).toLowerCase())) continue;
    const last = found.at(-1);
    if (last && last[1] >= i) last[1] = i + 2;
    else found.push([i, i + 2]);
  }
  return found;
}

whenReady(() => void start());
