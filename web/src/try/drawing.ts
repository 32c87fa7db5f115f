// A drawing with finger, pen or mouse, and how it becomes a scan like those that the network learned from.

import type { Picture } from "./pixels";
import type { DrawingRule } from "./types";

export type Point = [number, number];
export type Strokes = Point[][];

/**
 * The strokes as a scan (3, size, size), white on black.
 *
 * The scans of the training data were fitted into 32 x 32 black-and-white pixels from top to bottom, counted in blocks of 4 x 4 to
 * 8 x 8 numbers, and enlarged again. So here: the strokes' middle goes to the middle of the picture, their height fills it, and
 * a width far from the scans' is drawn nearer to theirs; the pen is as wide as the scans' ink, however large the drawing was; then
 * pixels are counted and enlarged in the same way.
 */
export function scan(strokes: Strokes, rule: DrawingRule): Picture {
  const { size, block } = rule;
  const ink = blackAndWhite(strokes, rule);
  const cells = size / block;
  const counts = new Float64Array(cells * cells);
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      counts[Math.floor(y / block) * cells + Math.floor(x / block)]! += ink[y * size + x]! / block ** 2;
    }
  }
  const grey = bicubic(counts, cells, size).map((v) => Math.round(255 * Math.min(1, Math.max(0, v))));
  const data = new Uint8ClampedArray(3 * size * size);
  for (let c = 0; c < 3; c++) data.set(grey, c * size * size);
  return { data, width: size, height: size };
}

/** The fitted strokes as zeros and ones (size, size). */
function blackAndWhite(strokes: Strokes, rule: DrawingRule): Uint8Array {
  const { size, stroke } = rule;
  const xs = strokes.flat().map(([x]) => x);
  const ys = strokes.flat().map(([, y]) => y);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
  const [width, height] = [right - left, bottom - top];
  const widest = rule.widest - stroke;
  const flat = height < 0.2 * width; // a dash stays a dash
  const scaleY = flat ? widest / width : height ? (size - stroke) / height : 0;
  const narrow = width > 0.35 * height && width * scaleY < rule.narrowest - stroke; // a one is as narrow as it is
  const fitted = narrow ? Math.min(1.4 * scaleY, (rule.narrowest - stroke) / width) : scaleY;
  const scaleX = width * scaleY > widest ? widest / width : fitted;

  const finer = 4; // drawn larger, so that a pixel can be black when at least half of it is covered
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size * finer;
  const pen = canvas.getContext("2d", { willReadFrequently: true })!;
  pen.scale(finer, finer);
  pen.translate(size / 2, size / 2);
  pen.lineWidth = stroke;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "#fff";
  for (const line of strokes) {
    pen.beginPath();
    line.forEach(([x, y], i) => {
      const [px, py] = [(x - (left + right) / 2) * scaleX, (y - (top + bottom) / 2) * scaleY];
      if (i) pen.lineTo(px, py);
      else pen.moveTo(px, py);
      if (line.length === 1) pen.lineTo(px + 0.01, py); // a dot
    });
    pen.stroke();
  }
  const fine = pen.getImageData(0, 0, size * finer, size * finer).data;
  const covered = new Float64Array(size * size);
  for (let y = 0; y < size * finer; y++) {
    for (let x = 0; x < size * finer; x++) {
      const alpha = fine[4 * (y * size * finer + x) + 3]!;
      covered[Math.floor(y / finer) * size + Math.floor(x / finer)]! += alpha / 255 / finer ** 2;
    }
  }
  return Uint8Array.from(covered, (share) => (share >= 0.5 ? 1 : 0));
}

/** torch's bicubic enlargement (coefficient -0.75, edges repeated) of (from, from) to (to, to). */
function bicubic(values: Float64Array, from: number, to: number): Float64Array {
  const near = (t: number) => (1.25 * t - 2.25) * t * t + 1;
  const far = (t: number) => ((-0.75 * t + 3.75) * t - 6) * t + 3;
  const rows: { at: number[]; weight: number[] }[] = [];
  for (let i = 0; i < to; i++) {
    const centre = ((i + 0.5) * from) / to - 0.5;
    const low = Math.floor(centre);
    const t = centre - low;
    const at = [low - 1, low, low + 1, low + 2].map((k) => Math.min(from - 1, Math.max(0, k)));
    rows.push({ at, weight: [far(t + 1), near(t), near(1 - t), far(2 - t)] });
  }
  const result = new Float64Array(to * to);
  rows.forEach((row, y) =>
    rows.forEach((column, x) => {
      let sum = 0;
      for (let j = 0; j < 4; j++) {
        for (let i = 0; i < 4; i++) {
          sum += row.weight[j]! * column.weight[i]! * values[row.at[j]! * from + column.at[i]!]!;
        }
      }
      result[y * to + x] = sum;
    }),
  );
  return result;
}

/** A canvas to draw on. `changed` is called after every movement of the pen, with all strokes. */
export class Pad {
  readonly canvas = document.createElement("canvas");
  private strokes: Strokes = [];
  private open: Point[] | null = null;

  constructor(label: string, private readonly changed: (strokes: Strokes) => void) {
    this.canvas.width = this.canvas.height = 512;
    this.canvas.className = "try-pad";
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", label);
    this.canvas.addEventListener("pointerdown", (event) => this.begin(event));
    this.canvas.addEventListener("pointermove", (event) => this.move(event));
    for (const name of ["pointerup", "pointercancel"] as const) {
      this.canvas.addEventListener(name, () => (this.open = null));
    }
    this.paint();
  }

  get empty(): boolean {
    return this.strokes.length === 0;
  }

  clear(): void {
    this.strokes = [];
    this.open = null;
    this.paint();
  }

  undo(): void {
    this.strokes.pop();
    this.open = null;
    this.paint();
    this.changed(this.strokes);
  }

  /** A picture in the place of a drawing. */
  show(picture: HTMLCanvasElement): void {
    this.clear();
    const pen = this.canvas.getContext("2d")!;
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
  }

  private place(event: PointerEvent): Point {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  }

  private begin(event: PointerEvent): void {
    if (event.button !== 0) return;
    event.preventDefault();
    this.canvas.setPointerCapture(event.pointerId);
    this.open = [this.place(event)];
    this.strokes.push(this.open);
    this.paint();
    this.changed(this.strokes);
  }

  private move(event: PointerEvent): void {
    if (!this.open) return;
    const events = event.getCoalescedEvents?.() ?? [];
    for (const each of events.length ? events : [event]) this.open.push(this.place(each));
    this.paint();
    this.changed(this.strokes);
  }

  private paint(): void {
    const pen = this.canvas.getContext("2d")!;
    const size = this.canvas.width;
    pen.fillStyle = "#000";
    pen.fillRect(0, 0, size, size);
    pen.strokeStyle = "#fff";
    pen.lineWidth = size / 14;
    pen.lineCap = pen.lineJoin = "round";
    for (const line of this.strokes) {
      pen.beginPath();
      line.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      if (line.length === 1) pen.lineTo(line[0]![0] + 0.1, line[0]![1]);
      pen.stroke();
    }
  }
}
