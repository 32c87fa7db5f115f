// plot.js: fills <figure class="plot"> from the JSON inside of it (see paperzoo.serve.data.points): results of a board against
// the year, size, work or speed. A table with the same values stands beside it on the page.

import { scaleLinear, scaleLog, type ScaleContinuousNumeric } from "d3-scale";
import { below, drawn, language, onLanguage, say, whenReady } from "./page";
import { element } from "./try/dom";

interface Point {
  slug: string;
  name: string;
  y: number;
  shown: string;
  setting: string;
  state: string;
  year: number;
  parameters?: number;
  flops?: number;
  cpu?: number;
  gpu?: number;
  fps?: number;
}

type Axis = "year" | "parameters" | "flops" | "cpu" | "gpu" | "fps";

interface Board {
  label: string;
  unit: string;
  better: "higher" | "lower";
  axes: Axis[];
  points: Point[];
  records: number[];
}

interface Data {
  title: { en: string; zh: string };
  boards: Board[];
}

const AXES: Record<Axis, [string, string]> = {
  year: ["year", "年份"],
  parameters: ["parameters", "参数量"],
  flops: ["FLOPs or multiply-adds, as published", "计算量（论文所述）"],
  cpu: ["milliseconds measured on a CPU, batch 1", "CPU 实测毫秒，批量 1"],
  gpu: ["milliseconds measured on a GPU, batch 1", "GPU 实测毫秒，批量 1"],
  fps: ["frames per second, as published", "每秒帧数（论文所述）"],
};
const MARGIN = { top: 12, right: 16, bottom: 44, left: 56 };
type Scale = ScaleContinuousNumeric<number, number>;

let made = 0;

class Plot {
  private board = 0;
  private axis: Axis = "year";
  private isLog = { x: false, y: false };
  private readonly id = `plot-${++made}`;
  private readonly controls = element("div", { class: "plot-controls" });
  private readonly stage = element("div", { class: "plot-stage" });
  private readonly tip = element("div", { class: "plot-tip", role: "status", "aria-live": "polite" });
  private width = 0;

  constructor(
    private readonly figure: HTMLElement,
    private readonly data: Data,
  ) {
    this.tip.hidden = true;
    figure.append(this.controls, this.stage);
    this.control();
    // the observer's first call draws; later ones follow the figure's width
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry?.contentRect.width ?? 0);
      if (width && width !== this.width) (this.width = width), this.draw();
    }).observe(this.stage);
    onLanguage(() => {
      this.control();
      this.draw();
    });
    figure.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.tip.hidden = true;
    });
  }

  private get shown(): Board {
    return this.data.boards[this.board]!;
  }

  // -- controls --------------------------------------------------------------------------------------------------------

  private control(): void {
    const { boards } = this.data;
    const parts: HTMLElement[] = [];
    if (boards.length > 1) {
      const choices = boards.map((board, i): [string, string] => [String(i), board.label]);
      parts.push(this.select("board", say("Board", "榜单"), choices, String(this.board), (value) => (this.board = Number(value))));
    }
    if (!this.shown.axes.includes(this.axis)) this.axis = "year";
    if (this.shown.axes.length > 1) {
      const choices = this.shown.axes.map((axis): [string, string] => [axis, say(...AXES[axis])]);
      const choose = (value: string) => {
        this.axis = value as Axis;
        this.isLog.x = value !== "year";
      };
      parts.push(this.select("axis", say("Against", "横轴"), choices, this.axis, choose));
    }
    if (this.axis !== "year") parts.push(this.check("x", say("log x", "横轴取对数")));
    if (this.shown.points.every((point) => point.y > 0)) parts.push(this.check("y", say("log y", "纵轴取对数")));
    this.controls.replaceChildren(...parts);
  }

  private select(name: string, text: string, choices: [string, string][], value: string, choose: (value: string) => void) {
    const made = element("select", { id: `${this.id}-${name}` });
    for (const [key, label] of choices) made.append(element("option", { value: key }, label));
    made.value = value;
    made.addEventListener("change", () => {
      choose(made.value);
      this.control();
      this.draw();
      this.figure.querySelector<HTMLElement>(`#${this.id}-${name}`)?.focus();
    });
    return element("label", { for: made.id }, `${text} `, made);
  }

  private check(side: "x" | "y", text: string): HTMLElement {
    const box = element("input", { type: "checkbox", id: `${this.id}-log-${side}` });
    box.checked = this.isLog[side];
    box.addEventListener("change", () => {
      this.isLog[side] = box.checked;
      this.draw();
    });
    return element("label", { for: box.id }, box, ` ${text}`);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  private draw(): void {
    if (!this.width) return;
    const { shown: board, axis, width } = this;
    const height = Math.round(Math.max(300, Math.min(420, width * 0.5)));
    const points = board.points.map((point, place) => ({ point, place, x: point[axis] })).filter(hasX);
    const x = scale(points.map((p) => p.x), this.isLog.x && axis !== "year", [MARGIN.left, width - MARGIN.right], 0.04);
    const y = scale(points.map((p) => p.point.y), this.isLog.y, [height - MARGIN.bottom, MARGIN.top], 0.06);
    const label = say(
      `${board.label} against ${AXES[axis][0]}: ${points.length} results`,
      `${board.label}，横轴为${AXES[axis][1]}：${points.length} 个结果`,
    );
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label });
    svg.append(this.grid(x, y, width, height));
    if (axis === "year") svg.append(this.record(x, y));
    const records = new Set(axis === "year" ? board.records : []);
    const drawnPoints = points
      .sort((a, b) => a.x - b.x || a.point.y - b.point.y)
      .map((p) => ({ ...p, link: this.point(p.point, x(p.x), y(p.point.y), records.has(p.place)) }));
    svg.append(...drawnPoints.map((p) => p.link), ...labels(drawnPoints, records, this.recordBoxes(x, y), x, y, width));
    this.tip.hidden = true;
    this.stage.replaceChildren(svg, this.tip);
  }

  private grid(x: Scale, y: Scale, width: number, height: number): SVGGElement {
    const group = drawn("g", { class: "plot-grid", "aria-hidden": "true" });
    const bottom = height - MARGIN.bottom;
    const format = (value: number) => (this.axis === "year" ? String(value) : short(value));
    for (const value of ticks(x, this.axis === "year", Math.max(3, Math.floor(width / 90)))) {
      group.append(drawn("line", { x1: x(value), x2: x(value), y1: MARGIN.top, y2: bottom }));
      group.append(drawn("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, format(value)));
    }
    for (const value of ticks(y, false, Math.floor(height / 55))) {
      group.append(drawn("line", { x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      group.append(drawn("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    const middle = (MARGIN.left + width - MARGIN.right) / 2;
    group.append(drawn("text", { class: "plot-title", x: middle, y: height - 6, "text-anchor": "middle" }, say(...AXES[this.axis])));
    const unit = this.shown.unit ? ` (${this.shown.unit})` : "";
    const better = this.shown.better === "lower" ? say("lower is better", "越低越好") : say("higher is better", "越高越好");
    const title = `${this.shown.label.split(" · ")[1] ?? ""}${unit}, ${better}`;
    const at = { x: 0, y: 0, "text-anchor": "middle", transform: `translate(13 ${(MARGIN.top + bottom) / 2}) rotate(-90)` };
    group.append(drawn("text", { class: "plot-title", ...at }, title));
    return group;
  }

  /** The record as steps from year to year. */
  private record(x: Scale, y: Scale): SVGPathElement {
    const { points, records } = this.shown;
    let path = "";
    for (const place of records) {
      const { year, y: value } = points[place]!;
      path += path ? `H${x(year)}V${y(value)}` : `M${x(year)} ${y(value)}`;
    }
    const last = Math.max(...points.map((point) => point.year));
    return drawn("path", { class: "plot-record", d: path ? `${path}H${x(last)}` : "M0 0", "aria-hidden": "true" });
  }

  /** Where the record's steps run, as boxes that names keep clear of. */
  private recordBoxes(x: Scale, y: Scale): Box[] {
    const { points, records } = this.shown;
    if (this.axis !== "year") return [];
    return records.flatMap((place, i) => {
      const [from, next] = [points[place]!, points[records[i + 1] ?? -1]];
      const level = { left: x(from.year), right: next ? x(next.year) : this.width, top: y(from.y) - 1, bottom: y(from.y) + 1 };
      if (!next) return [level];
      const [top, bottom] = [Math.min(y(from.y), y(next.y)), Math.max(y(from.y), y(next.y))];
      return [level, { left: x(next.year) - 1, right: x(next.year) + 1, top, bottom }];
    });
  }

  private point(point: Point, x: number, y: number, isRecord: boolean): SVGAElement {
    const link = drawn("a", { href: below(`papers/${point.slug}.html`), class: "plot-point", "data-slug": point.slug });
    const extra = isRecord ? say(", record", "，纪录") : "";
    link.setAttribute("aria-label", [`${point.name} ${point.year}: ${point.shown}${extra}`, point.setting].filter(Boolean).join(", "));
    if (isRecord) link.classList.add("is-record");
    if (point.state !== "as published") link.classList.add(`is-${point.state}`);
    link.append(drawn("circle", { class: "plot-reach", cx: x, cy: y, r: 11 }), drawn("circle", { class: "plot-dot", cx: x, cy: y, r: this.width < 500 ? 3.5 : 4.5 }));
    const show = () => this.tell(point, x, y, isRecord);
    const hide = () => (this.tip.hidden = true);
    link.addEventListener("pointerenter", show);
    link.addEventListener("pointerleave", hide);
    link.addEventListener("focus", show);
    link.addEventListener("blur", hide);
    return link;
  }

  private tell(point: Point, x: number, y: number, isRecord: boolean): void {
    const state = { reproduced: say("reproduced here", "已在此复现"), unconfirmed: say("unconfirmed", "未确认") }[point.state];
    const facts = [
      point.parameters !== undefined && say(`${short(point.parameters)} parameters`, `${short(point.parameters)} 参数`),
      point.flops !== undefined && `${short(point.flops)} FLOPs`,
      point.cpu !== undefined && `${point.cpu} ms (CPU)`,
      point.gpu !== undefined && `${point.gpu} ms (GPU)`,
      point.fps !== undefined && `${point.fps} FPS`,
      isRecord && say("the record of its year", "当年纪录"),
      state,
    ].filter((fact): fact is string => Boolean(fact));
    const head = element("p", {}, element("strong", {}, point.name), ` ${point.year}`);
    const value = element("p", { class: "plot-value" }, point.shown);
    this.tip.replaceChildren(head, value);
    if (point.setting) this.tip.append(element("p", {}, point.setting));
    if (facts.length) this.tip.append(element("p", {}, facts.join(", ")));
    this.tip.hidden = false;
    const box = this.tip.getBoundingClientRect();
    const left = Math.max(0, Math.min(this.width - box.width, x + 14 + box.width > this.width ? x - 14 - box.width : x + 14));
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${Math.max(0, y - box.height - 12)}px`;
  }
}

interface Placed {
  point: Point;
  place: number;
  x: number;
}

function hasX(point: { point: Point; place: number; x: number | undefined }): point is Placed {
  return point.x !== undefined;
}

/** A scale over the values with some air at both ends. */
function scale(values: number[], isLog: boolean, range: [number, number], air: number): Scale {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (isLog && low > 0) {
    const factor = (high / low) ** air * 1.05;
    return scaleLog([low / factor, high * factor], range);
  }
  if (low === high) (low -= Math.abs(low) * 0.05 || 1), (high += Math.abs(high) * 0.05 || 1);
  const room = (high - low) * air;
  return scaleLinear([low - room, high + room], range);
}

/** Round values along a scale, about `count` of them; whole ones for years. */
function ticks(along: Scale, areYears: boolean, count: number): number[] {
  const [low, high] = along.domain() as [number, number];
  let found = along.ticks(count);
  if (found.length > count * 1.5) {
    // a logarithmic scale gives 1, 2, 3 … 9 of every decade: keep 1, 2, 5, then 1
    const steps = [[1, 2, 5], [1, 5], [1]].map((kept) => found.filter((value) => kept.includes(first(value))));
    found = steps.find((some) => some.length <= count * 1.5 && some.length > 1) ?? scaleLinear([low, high], [0, 1]).ticks(count);
  }
  return areYears ? [...new Set(found.map(Math.round))].filter((year) => year >= low && year <= high) : found;
}

/** The first digit of a number. */
function first(value: number): number {
  return Number(value.toExponential()[0]);
}

/** Names beside the points: records first, where they do not cover one another. */
function labels(points: Placed[], records: Set<number>, lines: Box[], x: Scale, y: Scale, width: number): SVGTextElement[] {
  const dots = points.map((p) => ({ left: x(p.x) - 5, right: x(p.x) + 5, top: y(p.point.y) - 5, bottom: y(p.point.y) + 5 }));
  const taken = [...dots, ...lines];
  const texts: SVGTextElement[] = [];
  const ranked = [...points].sort((a, b) => Number(records.has(b.place)) - Number(records.has(a.place)) || a.place - b.place);
  const seen = new Set<string>();
  for (const p of ranked) {
    if (seen.has(p.point.slug)) continue;
    const [px, py, long] = [x(p.x), y(p.point.y), p.point.name.length * 6.6 + 4];
    const spots: [anchor: string, at: number, top: number][] = [
      ["start", px + 9, py - 8],
      ["end", px - 9, py - 8],
      ["middle", px, py - 22],
      ["middle", px, py + 7],
      ["end", px - 9, py - 20],
      ["start", px + 9, py + 4],
    ];
    const box = spots
      .map(([anchor, at, top]) => {
        const left = at - long * { start: 0, middle: 0.5, end: 1 }[anchor]!;
        return { anchor, at, left, top, right: left + long, bottom: top + 15 };
      })
      .find((b) => b.left > MARGIN.left && b.right < width && b.top > 0 && !taken.some((o) => overlaps(b, o)));
    if (!box) continue;
    seen.add(p.point.slug);
    taken.push(box);
    texts.push(drawn("text", { class: "plot-name", x: box.at, y: box.top + 12, "text-anchor": box.anchor, "aria-hidden": "true" }, p.point.name));
  }
  return texts;
}

interface Box {
  left: number;
  right: number;
  top: number;
  bottom: number;
}

function overlaps(a: Box, b: Box): boolean {
  return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
}

/** 25557032 as 25.6M. */
function short(value: number): string {
  const locale = language() === "zh" ? "zh-CN-u-nu-latn" : "en";
  if (Math.abs(value) < 10000) return value.toLocaleString(locale, { maximumSignificantDigits: 4 });
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]] as [number, string][]) {
    if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))}${letter}`;
  }
  return String(value);
}

whenReady(() => {
  for (const figure of document.querySelectorAll<HTMLElement>("figure.plot")) {
    const text = figure.querySelector('script[type="application/json"]')?.textContent;
    if (text) new Plot(figure, JSON.parse(text) as Data);
  }
});
