// graph.js: the graph of works in <div id="graph">, from the JSON inside of it (see paperzoo.serve.data.graph).
// The layout is computed before anything is drawn and is the same on every visit.

import { forceCollide, forceLink, forceManyBody, forceSimulation, forceX, forceY, type SimulationNodeDatum } from "d3-force";
import { select, type Selection } from "d3-selection";
import { zoom, zoomIdentity, type ZoomBehavior, type ZoomTransform } from "d3-zoom";
import { below, drawn, isStill, onLanguage, say, whenReady } from "./page";
import { element } from "./try/dom";
import "d3-transition";

interface Data {
  areas: [string, string, string][];
  nodes: [slug: string, name: string, year: number, area: number, code: number, uses: number][];
  imports: [number, number][];
  builds: [number, number][];
}

interface Work extends SimulationNodeDatum {
  place: number;
  slug: string;
  name: string;
  year: number;
  area: number;
  uses: number;
  radius: number;
  x: number;
  y: number;
}

interface Edge {
  source: Work;
  target: Work;
  isImport: boolean;
}

const NAMES = 30; // how many names are shown of the works that are lit up
const TIERS = [1.6, 2.6, 4.2]; // from these scales on, ever more names are shown

class Graph {
  private scope: "code" | "all" = location.hash === "#all" ? "all" : "code";
  private works: Work[] = [];
  private edges: Edge[] = [];
  private links = new Map<number, SVGAElement>();
  private held: number | null = null;

  private readonly controls = element("div", { class: "graph-controls" });
  private readonly stage = element("div", { class: "graph-stage" });
  private readonly told = element("p", { class: "graph-told", "aria-live": "polite" });
  private readonly legend = element("ul", { class: "graph-legend" });
  private readonly list = element("details", { class: "graph-list" });
  private width = 1000; // the picture's size in pixels when it was laid out
  private height = 600;
  private readonly svg = drawn("svg", { tabindex: 0, role: "group" });
  private readonly view = drawn("g");
  private readonly lit = drawn("g", { class: "graph-lit" });
  private readonly selection: Selection<SVGSVGElement, unknown, null, undefined>;
  private readonly zooming: ZoomBehavior<SVGSVGElement, unknown>;

  constructor(
    place: HTMLElement,
    private readonly data: Data,
  ) {
    this.svg.append(this.view);
    this.stage.append(this.svg);
    place.append(this.controls, this.stage, this.told, this.legend, this.list);
    const box = this.svg.getBoundingClientRect();
    if (box.width) [this.width, this.height] = [Math.round(box.width), Math.round(box.height)];
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.selection = select(this.svg);
    this.zooming = zoom<SVGSVGElement, unknown>()
      .scaleExtent([0.5, 14])
      .translateExtent([
        [-this.width, -this.height],
        [2 * this.width, 2 * this.height],
      ])
      .on("zoom", ({ transform }: { transform: ZoomTransform }) => this.zoomed(transform));
    this.selection.call(this.zooming).on("dblclick.zoom", null);
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.list.addEventListener("toggle", () => this.fillList());
    addEventListener("hashchange", () => this.choose(location.hash === "#all" ? "all" : "code"));
    onLanguage(() => this.draw());
    this.arrange();
    this.draw();
  }

  private choose(scope: "code" | "all"): void {
    if (scope === this.scope) return;
    this.scope = scope;
    this.held = null;
    history.replaceState(null, "", scope === "all" ? "#all" : location.pathname);
    this.arrange();
    this.draw();
    this.selection.call(this.zooming.transform, zoomIdentity);
  }

  // -- layout ----------------------------------------------------------------------------------------------------------

  private arrange(): void {
    const { nodes, imports, builds } = this.data;
    const isAll = this.scope === "all";
    const joined = new Set(imports.flat());
    const most = Math.max(1, ...nodes.map((node) => node[5]));
    this.works = nodes
      .map(([slug, name, year, area, code, uses], place) => {
        const radius = isAll ? 3 + 7 * Math.sqrt(uses / most) : 6 + 10 * Math.sqrt(uses / most);
        return { place, slug, name, year, area, uses, radius, x: 0, y: 0, isCoded: code === 1 || joined.has(place) };
      })
      .filter((work) => isAll || work.isCoded);
    const known = new Map(this.works.map((work) => [work.place, work]));
    const edge = (isImport: boolean) => (pair: [number, number]): Edge[] => {
      const [source, target] = [known.get(pair[0]), known.get(pair[1])];
      return source && target ? [{ source, target, isImport }] : [];
    };
    this.edges = [...imports.flatMap(edge(true)), ...(isAll ? builds.flatMap(edge(false)) : [])];
    if (isAll) arrangeByArea(this.works, this.edges, this.data.areas.length);
    else arrangeFreely(this.works, this.edges);
    fit(this.works, this.width, this.height);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  private draw(): void {
    this.control();
    this.links.clear();
    const isAll = this.scope === "all";
    this.svg.classList.toggle("is-all", isAll);
    const count = say(
      `Graph of ${this.works.length} works and ${this.edges.length} relations. Plus and minus zoom, arrows move, 0 shows all. A list stands below.`,
      `${this.works.length} 篇论文与 ${this.edges.length} 条关系的图。加减号缩放，方向键移动，0 显示全部。下方有列表。`,
    );
    this.svg.setAttribute("aria-label", count);
    const paths = [false, true].map((isImport) => {
      const d = this.edges.filter((e) => e.isImport === isImport).map(line);
      return drawn("path", { class: isImport ? "graph-imports" : "graph-builds", d: d.join("") || "M0 0", "aria-hidden": "true" });
    });
    const order = [...this.works].sort((a, b) => a.uses - b.uses);
    const ranks = new Map([...order].reverse().map((work, rank) => [work.place, rank]));
    this.lit.replaceChildren();
    this.view.replaceChildren(...paths, this.lit, ...order.map((work) => this.node(work, isAll ? tier(ranks.get(work.place)!) : 0)));
    if (isAll) this.view.append(...this.areaNames());
    this.drawLegend();
    this.tell(null);
    this.list.open = false;
    this.list.replaceChildren(element("summary", {}, say("The same as a list: who builds on whom", "列表形式：谁建立在谁之上")));
  }

  private node(work: Work, level: number): SVGAElement {
    const link = drawn("a", { href: below(`papers/${work.slug}.html`), class: `graph-node tier-${level}`, "data-slug": work.slug });
    // hundreds of stops would make the page impassable with the Tab key; the list below serves it
    if (this.scope === "all") link.setAttribute("tabindex", "-1");
    link.setAttribute("aria-label", `${work.name} ${work.year}`);
    link.style.setProperty("--hue", String(hue(work.area)));
    link.setAttribute("transform", `translate(${work.x.toFixed(1)} ${work.y.toFixed(1)})`);
    link.append(drawn("circle", { r: work.radius.toFixed(1) }), drawn("text", { "aria-hidden": "true", y: -work.radius - 3 }, work.name));
    link.addEventListener("pointerenter", () => this.light(work.place));
    link.addEventListener("pointerleave", () => this.light(this.held));
    link.addEventListener("focus", () => this.light(work.place));
    link.addEventListener("blur", () => this.light(this.held));
    this.links.set(work.place, link);
    return link;
  }

  /** The areas' names at the middle of their works, the largest first, where they do not cover one another. */
  private areaNames(): SVGTextElement[] {
    const areas = this.data.areas.map(([, english, chinese], area) => {
      const own = this.works.filter((work) => work.area === area);
      const x = own.reduce((sum, work) => sum + work.x, 0) / own.length;
      const y = own.reduce((sum, work) => sum + work.y, 0) / own.length;
      const name = say(english, chinese || english);
      return { x, y, name, size: own.length, half: 4 + (/^[ -~]*$/.test(name) ? 3.7 : 6.5) * name.length };
    });
    const placed: typeof areas = [];
    for (const area of areas.sort((a, b) => b.size - a.size)) {
      const covers = (other: typeof area) => Math.abs(other.y - area.y) < 15 && Math.abs(other.x - area.x) < other.half + area.half;
      if (area.size > 3 && !placed.some(covers)) placed.push(area);
    }
    return placed.map(({ x, y, name }) => drawn("text", { class: "graph-area", x, y, "aria-hidden": "true" }, name));
  }

  private control(): void {
    const choice = (scope: "code" | "all", text: string) => {
      const made = element("button", { type: "button", "aria-pressed": String(this.scope === scope), id: `graph-${scope}` }, text);
      made.addEventListener("click", () => {
        this.choose(scope);
        document.getElementById(`graph-${scope}`)?.focus();
      });
      return made;
    };
    const act = (text: string, label: string, action: () => void) => {
      const made = element("button", { type: "button", "aria-label": label, title: label }, text);
      made.addEventListener("click", action);
      return made;
    };
    const names = element("datalist", { id: "graph-names" });
    names.append(...this.works.map((work) => element("option", { value: work.name })));
    const field = element("input", { id: "graph-find", list: "graph-names", autocomplete: "off", spellcheck: "false" });
    field.setAttribute("placeholder", say("find a work", "查找论文"));
    field.setAttribute("aria-label", say("Find a work in the graph", "在图中查找论文"));
    const look = (isFinal: boolean) => this.find(field.value, isFinal);
    field.addEventListener("input", () => look(false));
    field.addEventListener("change", () => look(true));
    const scopes = element("div", { class: "graph-scope", role: "group", "aria-label": say("What is shown", "显示内容") });
    scopes.append(choice("code", say("the code's imports", "代码的导入")), choice("all", say("all works", "全部论文")));
    const zooms = element("div", { class: "graph-zoom", role: "group", "aria-label": say("Zoom", "缩放") });
    zooms.append(
      act("+", say("Zoom in", "放大"), () => this.scaleBy(1.5)),
      act("−", say("Zoom out", "缩小"), () => this.scaleBy(1 / 1.5)),
      act(say("all", "全图"), say("Show all", "显示全部"), () => this.moveTo(zoomIdentity)),
    );
    this.controls.replaceChildren(scopes, element("div", { class: "graph-find" }, field, names), zooms);
  }

  private drawLegend(): void {
    const counts = new Map<number, number>();
    for (const { area } of this.works) counts.set(area, (counts.get(area) ?? 0) + 1);
    this.legend.setAttribute("aria-label", say("Areas", "领域"));
    this.legend.replaceChildren(
      ...[...counts].sort((a, b) => a[0] - b[0]).map(([area, count]) => {
        const [, english, chinese] = this.data.areas[area]!;
        const dot = element("span", { class: "graph-dot", "aria-hidden": "true" });
        dot.style.setProperty("--hue", String(hue(area)));
        const made = element("button", { type: "button" }, dot, `${say(english, chinese || english)} ${count}`);
        made.addEventListener("pointerenter", () => this.lightArea(area));
        made.addEventListener("pointerleave", () => this.light(this.held));
        made.addEventListener("focus", () => this.lightArea(area));
        made.addEventListener("blur", () => this.light(this.held));
        made.addEventListener("click", () => this.show(this.works.filter((work) => work.area === area)));
        return element("li", {}, made);
      }),
    );
  }

  /** The accessible equivalent: for every work those that it builds on. */
  private fillList(): void {
    if (!this.list.open || this.list.querySelector("ul")) return;
    const link = (work: Work) => element("a", { href: below(`papers/${work.slug}.html`) }, work.name);
    const rows = [...this.works].sort((a, b) => a.name.localeCompare(b.name)).flatMap((work) => {
      const others = this.edges.filter((edge) => edge.source === work).map((edge) => edge.target);
      if (!others.length) return [];
      const row = element("li", {}, link(work), say(" builds on ", " 建立在 "));
      others.forEach((other, i) => row.append(...(i ? [say(", ", "、")] : []), link(other)));
      row.append(say("", " 之上"));
      return [row];
    });
    this.list.append(element("ul", {}, ...rows));
  }

  // -- light -----------------------------------------------------------------------------------------------------------

  /** Lights up a work, what it builds on and what builds on it; null: nothing. */
  private light(place: number | null): void {
    const near = new Set<number>();
    this.lit.replaceChildren();
    if (place !== null) {
      near.add(place);
      for (const edge of this.edges) {
        const isOut = edge.source.place === place;
        if (!isOut && edge.target.place !== place) continue;
        near.add(edge.source.place).add(edge.target.place);
        this.lit.append(drawn("path", { class: isOut ? "is-out" : "is-in", d: line(edge) }));
      }
    }
    this.mark(near, true, place);
    this.tell(place);
  }

  private lightArea(area: number): void {
    this.lit.replaceChildren();
    this.mark(new Set(this.works.filter((work) => work.area === area).map((work) => work.place)), false);
  }

  /** Lights up some works, and names them: the one pointed at and the most used of the others. */
  private mark(near: Set<number>, areNamed: boolean, first: number | null = null): void {
    const known = this.works.filter((work) => near.has(work.place)).sort((a, b) => b.uses - a.uses);
    const named = new Set(areNamed ? known.slice(0, NAMES).map((work) => work.place) : []);
    if (first !== null) named.add(first);
    this.svg.classList.toggle("has-lit", near.size > 0);
    for (const [place, link] of this.links) {
      link.classList.toggle("is-lit", near.has(place));
      link.classList.toggle("is-named", named.has(place));
    }
  }

  private tell(place: number | null): void {
    const work = this.works.find((one) => one.place === place);
    if (!work) {
      this.told.textContent = say(
        "Point at a work to see what it builds on and what builds on it; click to open it.",
        "指向一篇论文可查看它的基础与后续；点击打开。",
      );
      return;
    }
    const names = (found: Work[]) => {
      const some = found.slice(0, 8).map((one) => one.name).join(say(", ", "、"));
      return found.length > 8 ? some + say(` and ${found.length - 8} more`, ` 等 ${found.length} 篇`) : some;
    };
    const on = this.edges.filter((edge) => edge.source === work).map((edge) => edge.target);
    const by = this.edges.filter((edge) => edge.target === work).map((edge) => edge.source);
    const parts = [
      on.length ? say(`builds on ${names(on)}`, `建立在 ${names(on)} 之上`) : "",
      by.length ? say(`used by ${names(by)}`, `被 ${names(by)} 使用`) : "",
    ].filter(Boolean);
    const link = element("a", { href: below(`papers/${work.slug}.html`) }, work.name);
    this.told.replaceChildren(link, ` ${work.year}`, parts.length ? `: ${parts.join(say("; ", "；"))}` : "");
  }

  // -- moving ----------------------------------------------------------------------------------------------------------

  private zoomed(transform: ZoomTransform): void {
    this.view.setAttribute("transform", transform.toString());
    this.view.style.setProperty("--scale", String(transform.k));
    const level = TIERS.filter((from) => transform.k >= from).length;
    this.svg.dataset.level = String(level);
  }

  private moveTo(target: ZoomTransform): void {
    if (isStill()) this.selection.call(this.zooming.transform, target);
    else this.selection.transition().duration(350).call(this.zooming.transform, target);
  }

  private scaleBy(factor: number): void {
    if (isStill()) this.selection.call(this.zooming.scaleBy, factor);
    else this.selection.transition().duration(200).call(this.zooming.scaleBy, factor);
  }

  /** Brings some works into view. */
  private show(found: Work[]): void {
    const xs = found.map((work) => work.x);
    const ys = found.map((work) => work.y);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const scale = Math.max(1, Math.min(5, 0.8 / Math.max((right - left) / this.width, (bottom - top) / this.height, 0.01)));
    const [x, y] = [(left + right) / 2, (top + bottom) / 2];
    this.moveTo(zoomIdentity.translate(this.width / 2, this.height / 2).scale(scale).translate(-x, -y));
  }

  /** Shows the work of this name: as soon as only one begins so, or the name is complete. */
  private find(text: string, isFinal: boolean): void {
    const wanted = text.trim().toLowerCase();
    const exact = this.works.filter((work) => work.name.toLowerCase() === wanted || work.slug === wanted);
    const begun = wanted ? this.works.filter((work) => work.name.toLowerCase().startsWith(wanted)) : [];
    const work = exact[0] ?? (begun.length === 1 || isFinal ? begun[0] : undefined);
    this.held = work?.place ?? null;
    this.light(this.held);
    if (work) this.show([work]);
  }

  private key(event: KeyboardEvent): void {
    const step = 60;
    const moves: Record<string, () => void> = {
      "+": () => this.scaleBy(1.5),
      "=": () => this.scaleBy(1.5),
      "-": () => this.scaleBy(1 / 1.5),
      "0": () => this.moveTo(zoomIdentity),
      ArrowLeft: () => this.selection.call(this.zooming.translateBy, step, 0),
      ArrowRight: () => this.selection.call(this.zooming.translateBy, -step, 0),
      ArrowUp: () => this.selection.call(this.zooming.translateBy, 0, step),
      ArrowDown: () => this.selection.call(this.zooming.translateBy, 0, -step),
    };
    const move = event.ctrlKey || event.metaKey || event.altKey ? undefined : moves[event.key];
    if (!move) return;
    event.preventDefault();
    move();
  }
}

// -- layout ------------------------------------------------------------------------------------------------------------

/** Few works: links pull, everything else pushes. */
function arrangeFreely(works: Work[], edges: Edge[]): void {
  forceSimulation(works)
    .force("link", forceLink<Work, Edge>(edges).distance(70))
    .force("push", forceManyBody().strength(-220))
    .force("room", forceCollide<Work>((work) => work.radius + 22))
    .force("x", forceX(0).strength(0.06))
    .force("y", forceY(0).strength(0.1))
    .stop()
    .tick(300);
}

/** Many works: areas first, near the areas that they build on; then every work inside of its area. */
function arrangeByArea(works: Work[], edges: Edge[], count: number): void {
  const sizes = Array.from({ length: count }, (_, area) => works.filter((work) => work.area === area).length);
  const circles = sizes.map((size) => ({ x: 0, y: 0, radius: 13 * Math.sqrt(size) + 6 }));
  circles.forEach((circle, i) => {
    circle.x = 240 * Math.cos((2 * Math.PI * i) / count);
    circle.y = 160 * Math.sin((2 * Math.PI * i) / count);
  });
  const between = new Map<string, { source: number; target: number; weight: number }>();
  for (const { source, target } of edges) {
    const [a, b] = [Math.min(source.area, target.area), Math.max(source.area, target.area)];
    if (a === b) continue;
    const known = between.get(`${a} ${b}`) ?? { source: a, target: b, weight: 0 };
    known.weight++;
    between.set(`${a} ${b}`, known);
  }
  const pulls = [...between.values()];
  forceSimulation(circles)
    .force("link", forceLink(pulls).distance(90).strength((pull) => Math.min(0.5, 0.02 * pull.weight)))
    .force("room", forceCollide<(typeof circles)[number]>((circle) => circle.radius).iterations(3))
    .force("x", forceX(0).strength(0.05))
    .force("y", forceY(0).strength(0.09))
    .stop()
    .tick(250);
  works.forEach((work, i) => {
    const circle = circles[work.area]!;
    work.x = circle.x + 30 * Math.cos(i * 2.4);
    work.y = circle.y + 30 * Math.sin(i * 2.4);
  });
  forceSimulation(works)
    .force("link", forceLink<Work, Edge>(edges).distance(40).strength(0.01))
    .force("room", forceCollide<Work>((work) => work.radius + 3.5).iterations(2))
    .force("x", forceX<Work>((work) => circles[work.area]!.x).strength(0.12))
    .force("y", forceY<Work>((work) => circles[work.area]!.y).strength(0.12))
    .alphaDecay(0.03)
    .stop()
    .tick(120);
}

/** Scales a layout into the picture, with room for names at its edge; a little more along its longer side. */
function fit(works: Work[], width: number, height: number): void {
  const xs = works.map((work) => work.x);
  const ys = works.map((work) => work.y);
  const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const [across, down] = [(width - Math.min(120, width / 6)) / (right - left || 1), (height - 60) / (bottom - top || 1)];
  const scale = Math.min(across, down, 1.7);
  for (const work of works) {
    work.x = width / 2 + (work.x - (left + right) / 2) * Math.min(across, scale * 1.6);
    work.y = height / 2 + (work.y - (top + bottom) / 2) * Math.min(down, scale * 1.6);
    work.radius *= Math.min(1, Math.sqrt(scale));
  }
}

function line({ source, target }: Edge): string {
  return `M${source.x.toFixed(1)} ${source.y.toFixed(1)}L${target.x.toFixed(1)} ${target.y.toFixed(1)}`;
}

/** From which level on a work's name is shown: the most used first. */
function tier(rank: number): number {
  return rank < 0 ? 0 : rank < 40 ? 1 : rank < 200 ? 2 : 3;
}

/** A colour for an area: neighbours in the alphabet are far apart on the wheel. */
function hue(area: number): number {
  return Math.round((area * 137.508) % 360);
}

whenReady(() => {
  const place = document.getElementById("graph");
  const text = place?.querySelector('script[type="application/json"]')?.textContent;
  if (place && text) new Graph(place, JSON.parse(text) as Data);
});
