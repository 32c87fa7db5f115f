// What the network answered: bars, a tinted picture, boxes. Each also in one sentence, which screen readers are told.

import { element } from "./dom";
import type { Entry } from "./inputs";
import { canvasOf, decode, middleSquare, type Picture } from "./pixels";
import { bytesOf } from "./base64";
import { percent, type Strings } from "./strings";
import type { BoxesOutput, BoxTruth, ClassesOutput, MaskOutput, Output, Result } from "./types";

export interface Answer {
  sentence: string;
  parts: Node[];
}

/** A result as a sentence and something to look at. `size` is the network's height and width of pixels; null for texts. */
export async function answer(
  output: Output, size: [number, number] | null, results: Result[], entry: Entry, words: Strings,
): Promise<Answer> {
  if (output.kind === "classes") return classes(output, results, entry, words);
  if (output.kind === "mask") return mask(output, size!, results, entry, words);
  return boxes(output, size!, results, entry, words);
}

const MOST_BARS = 12;

function classes(output: ClassesOutput, results: Result[], entry: Entry, words: Strings): Answer {
  const shares = Array.from(results[0]!.data);
  let order = shares.map((_, i) => i);
  const ranked = [...order].sort((a, b) => shares[b]! - shares[a]!);
  if (order.length > MOST_BARS) order = ranked.slice(0, 5);
  const list = element("ol", { class: "try-bars" });
  for (const i of order) {
    const bar = element("span", { class: "try-bar" });
    bar.style.setProperty("--share", String(shares[i]));
    const row = element("li", i === ranked[0] ? { class: "try-best" } : {});
    row.append(element("span", {}, output.labels[i]!), bar, element("span", { class: "try-number" }, percent(shares[i]!)));
    list.append(row);
  }
  const truth = entry.sample ? ` ${words.isReally(String(entry.sample.truth))}` : "";
  return { sentence: words.most(output.labels[ranked[0]!]!, percent(shares[ranked[0]!]!)) + truth, parts: [list] };
}

function captioned(canvas: HTMLCanvasElement, caption: string): HTMLElement {
  return element("figure", { class: "try-picture" }, canvas, element("figcaption", {}, caption));
}

/** The picture enlarged by a whole number, so that its shorter side has at least 256 pixels, and that number. */
function enlarged(picture: Picture): { canvas: HTMLCanvasElement; pen: CanvasRenderingContext2D; scale: number } {
  const scale = Math.max(1, Math.ceil(256 / Math.min(picture.width, picture.height)));
  const canvas = document.createElement("canvas");
  const least = Math.min(1, 1024 / Math.max(picture.width, picture.height));
  const factor = scale > 1 ? scale : least;
  canvas.width = Math.round(picture.width * factor);
  canvas.height = Math.round(picture.height * factor);
  const pen = canvas.getContext("2d")!;
  pen.imageSmoothingEnabled = factor < 1;
  pen.drawImage(canvasOf(picture), 0, 0, canvas.width, canvas.height);
  return { canvas, pen, scale: factor };
}

// -- a class for each pixel -----------------------------------------------------------------------------------------------

function tinted(picture: Picture, ids: ArrayLike<number>, width: number, height: number, output: MaskOutput): HTMLCanvasElement {
  const { canvas, pen } = enlarged(picture);
  const layer = document.createElement("canvas");
  layer.width = width;
  layer.height = height;
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const id = ids[i]!;
    const colour = output.colours[id];
    if (colour === undefined || output.clear.includes(id)) continue;
    const value = parseInt(colour.slice(1), 16);
    image.data.set([value >> 16, (value >> 8) & 255, value & 255, 153], 4 * i);
  }
  layer.getContext("2d")!.putImageData(image, 0, 0);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(layer, 0, 0, canvas.width, canvas.height);
  outline(pen, ids, width, height);
  return canvas;
}

/** A white line between pixels of different classes: a tint alone may be hard to tell from the picture. */
function outline(pen: CanvasRenderingContext2D, ids: ArrayLike<number>, width: number, height: number): void {
  const [x, y] = [pen.canvas.width / width, pen.canvas.height / height];
  pen.strokeStyle = "#fff";
  pen.lineWidth = Math.max(1, pen.canvas.width / 256);
  pen.beginPath();
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < width; column++) {
      const id = ids[row * width + column];
      if (column + 1 < width && ids[row * width + column + 1] !== id) {
        pen.moveTo((column + 1) * x, row * y);
        pen.lineTo((column + 1) * x, (row + 1) * y);
      }
      if (row + 1 < height && ids[(row + 1) * width + column] !== id) {
        pen.moveTo(column * x, (row + 1) * y);
        pen.lineTo((column + 1) * x, (row + 1) * y);
      }
    }
  }
  pen.stroke();
}

async function mask(
  output: MaskOutput, [height, width]: [number, number], results: Result[], entry: Entry, words: Strings,
): Promise<Answer> {
  const ids = results[0]!.data;
  const counts = new Map<number, number>();
  for (let i = 0; i < ids.length; i++) counts.set(ids[i]!, (counts.get(ids[i]!) ?? 0) + 1);
  const order = [...counts.keys()].sort((a, b) => counts.get(b)! - counts.get(a)!);
  const shares = order.map((id) => `${output.labels[id]} ${percent(counts.get(id)! / ids.length)}`);
  const pictures = element("div", { class: "try-pictures" });
  pictures.append(captioned(tinted(entry.seen!, ids, width, height, output), words.answer));
  if (entry.sample) {
    const stored = await decode(new Blob([bytesOf((entry.sample.truth as string).split(",")[1]!)], { type: "image/png" }));
    const truth = middleSquare(stored);
    pictures.append(captioned(tinted(entry.seen!, truth.data, truth.width, truth.height, output), words.truth));
  }
  const legend = element("ul", { class: "try-legend" });
  for (const id of order.filter((id) => !output.clear.includes(id))) {
    const patch = element("span", { class: "try-patch" });
    patch.style.background = output.colours[id]!;
    legend.append(element("li", {}, patch, output.labels[id]!));
  }
  return { sentence: words.areas(shares.join(words.between)), parts: [pictures, legend] };
}

// -- boxes ------------------------------------------------------------------------------------------------------------------

interface Found {
  box: number[];
  text: string;
  colour: string;
}

function outlined(picture: Picture, factorX: number, factorY: number, found: Found[]): HTMLCanvasElement {
  const { canvas, pen, scale } = enlarged(picture);
  const letter = Math.max(11, Math.round(canvas.width / 22));
  pen.font = `600 ${letter}px system-ui, sans-serif`;
  pen.textBaseline = "top";
  pen.lineWidth = Math.max(2, canvas.width / 160);
  for (const { box, text, colour } of [...found].reverse()) {
    const [left, top, right, bottom] = box.map((v, i) => v * scale * (i % 2 ? factorY : factorX)) as [number, number, number, number];
    pen.strokeStyle = pen.fillStyle = colour;
    pen.strokeRect(left, top, right - left, bottom - top);
    const width = pen.measureText(text).width + 6;
    const x = Math.max(0, Math.min(left, canvas.width - width));
    const y = Math.max(0, top - letter - 4);
    pen.fillRect(x, y, width, letter + 4);
    pen.fillStyle = "#fff";
    pen.fillText(text, x + 3, y + 2);
  }
  return canvas;
}

function boxes(
  output: BoxesOutput, [height, width]: [number, number], results: Result[], entry: Entry, words: Strings,
): Answer {
  const [corners, scores, labels] = results.map((r) => r.data) as [ArrayLike<number>, ArrayLike<number>, ArrayLike<number>];
  const picture = entry.seen!;
  const all = Array.from(scores, (score, i) => ({
    score,
    label: output.labels[labels[i]!]!,
    colour: output.colours[labels[i]! % output.colours.length]!,
    box: Array.from({ length: 4 }, (_, k) => corners[4 * i + k]!),
  }));
  const pictures = element("div", { class: "try-pictures" });
  const moved = element("p", { class: "try-hint", role: "status" }); // what is left after the slider was moved
  const told = (least: number) => {
    const shown = all.filter(({ score }) => score >= least);
    const parts = shown.map(({ label, score }) => `${label} ${percent(score)}`);
    return { shown, text: parts.length ? words.found(parts.join(words.between)) : words.foundNothing };
  };
  let current: HTMLElement | null = null;
  const draw = (least: number) => {
    const { shown } = told(least);
    const found = shown.map(({ box, label, score, colour }) => ({ box, colour, text: `${label} ${Math.round(100 * score)}%` }));
    const next = captioned(outlined(picture, picture.width / width, picture.height / height, found), words.answer);
    if (current) current.replaceWith(next);
    else pictures.append(next);
    current = next;
  };
  draw(output.threshold);
  if (entry.sample) {
    const truth = entry.sample.truth as BoxTruth;
    const found = truth.boxes.map((box, i) => ({
      box,
      text: truth.labels[i]!,
      colour: output.colours[output.labels.indexOf(truth.labels[i]!) % output.colours.length]!,
    }));
    pictures.append(captioned(outlined(picture, 1, 1, found), words.truth));
  }
  const slider = element("input", { type: "range", min: "0.05", max: "0.95", step: "0.05", value: String(output.threshold) });
  const value = element("output", {}, output.threshold.toFixed(2));
  slider.addEventListener("input", () => {
    value.textContent = Number(slider.value).toFixed(2);
    draw(Number(slider.value));
    moved.textContent = told(Number(slider.value)).text;
  });
  const control = element("label", { class: "try-slider" }, `${words.threshold} `, slider, value);
  return { sentence: told(output.threshold).text, parts: [pictures, control, moved] };
}
