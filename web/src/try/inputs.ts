// What a visitor enters: a drawing, a picture or a text, or one of the samples. Each change is handed on as an `Entry`.

import { bytesOf } from "./base64";
import { Pad, scan } from "./drawing";
import { button, element } from "./dom";
import { canvasOf, decode, fractions, toNetwork, type Picture } from "./pixels";
import type { Strings } from "./strings";
import { Tokenizer } from "./tokenizer";
import type { DrawingInput, Feed, PictureInput, Sample, Spec, TextInput } from "./types";

/** One thing entered: what the graph is fed, the picture it belongs to, and the sample that it is. */
export interface Entry {
  feed: Feed;
  seen?: Picture;
  sample?: Sample;
}

export interface Handlers {
  /** something was entered; called after each change, however small */
  entered(entry: Entry): void;
  emptied(): void;
  failed(error: unknown): void;
}

export interface InputArea {
  element: HTMLElement;
  choose(sample: Sample): void;
}

/** The part of the widget in which a visitor enters something. */
export function inputArea(spec: Spec, words: Strings, handlers: Handlers): InputArea {
  const { input } = spec;
  if (input.kind === "drawing") return drawingArea(input, words, handlers);
  if (input.kind === "image") return pictureArea(input, words, handlers);
  return textArea(input, words, handlers);
}

function pictureFeed(picture: Picture, input: PictureInput | DrawingInput): Pick<Entry, "feed" | "seen"> {
  const { seen, pixels } = toNetwork(picture, input.resize);
  return { seen, feed: [{ data: fractions(pixels), shape: [1, 3, ...input.size] }] };
}

async function samplePicture(sample: Sample): Promise<Picture> {
  return decode(new Blob([bytesOf(sample.image!.split(",")[1]!)], { type: "image/png" }));
}

function drawingArea(input: DrawingInput, words: Strings, handlers: Handlers): InputArea {
  const preview = element("canvas", { class: "try-seen", "aria-hidden": "true" });
  const show = (picture: Picture) => {
    preview.width = picture.width;
    preview.height = picture.height;
    preview.getContext("2d")!.drawImage(canvasOf(picture), 0, 0);
  };
  const empty = () => {
    preview.getContext("2d")!.clearRect(0, 0, preview.width, preview.height);
    handlers.emptied();
  };
  const pad = new Pad(words.draw, (strokes) => {
    if (!strokes.length) return empty();
    const picture = scan(strokes, input.drawing);
    show(picture);
    handlers.entered(pictureFeed(picture, input));
  });
  const clear = button(words.clear, () => {
    pad.clear();
    empty();
  });
  const tools = element("div", { class: "try-tools" }, clear, button(words.undo, () => pad.undo()));
  const small = element("figure", { class: "try-small" }, preview, element("figcaption", {}, words.seen));
  const hint = element("p", { class: "try-hint" }, words.drawHint);
  return {
    element: element("div", { class: "try-input" }, hint, pad.canvas, element("div", { class: "try-below" }, tools, small)),
    async choose(sample) {
      try {
        const picture = await samplePicture(sample);
        pad.show(canvasOf(picture));
        show(picture);
        handlers.entered({ ...pictureFeed(picture, input), sample });
      } catch (error) {
        handlers.failed(error);
      }
    },
  };
}

function pictureArea(input: PictureInput, words: Strings, handlers: Handlers): InputArea {
  let latest = 0;
  const take = async (source: () => Promise<Picture>, sample?: Sample) => {
    const mine = ++latest;
    try {
      const picture = await source();
      if (mine === latest) handlers.entered({ ...pictureFeed(picture, input), ...(sample ? { sample } : {}) });
    } catch (error) {
      if (mine === latest) handlers.failed(error);
    }
  };
  const file = element("input", { type: "file", accept: "image/*", class: "try-file" });
  file.addEventListener("change", () => {
    const chosen = file.files?.[0];
    if (chosen) void take(() => decode(chosen));
    file.value = "";
  });
  const label = element("label", { class: "try-drop" }, file);
  label.append(element("span", { class: "try-button" }, words.choose), element("span", { class: "try-hint" }, words.drop));
  const over = (event: DragEvent, inside: boolean) => {
    event.preventDefault();
    label.classList.toggle("try-over", inside);
  };
  label.addEventListener("dragover", (event) => over(event, true));
  label.addEventListener("dragleave", (event) => over(event, false));
  label.addEventListener("drop", (event) => {
    over(event, false);
    const dropped = event.dataTransfer?.files[0];
    if (dropped) void take(() => decode(dropped));
  });
  return {
    element: element("div", { class: "try-input" }, label),
    choose: (sample) => void take(() => samplePicture(sample), sample),
  };
}

let areas = 0;

function textArea(input: TextInput, words: Strings, handlers: Handlers): InputArea {
  const tokenizer = new Tokenizer(input.tokenizer);
  const id = `try-text-${++areas}`;
  const area = element("textarea", { id, class: "try-text", rows: "6", placeholder: words.textHint, maxlength: "20000" });
  const enter = (sample?: Sample) => {
    if (!area.value.trim()) return handlers.emptied();
    const shape = [1, input.length];
    const ids = BigInt64Array.from(tokenizer.pack(area.value, input.length), BigInt);
    const types = new BigInt64Array(input.length);
    handlers.entered({ feed: [{ data: ids, shape }, { data: types, shape }], ...(sample ? { sample } : {}) });
  };
  area.addEventListener("input", () => enter());
  return {
    element: element("div", { class: "try-input" }, element("label", { for: id, class: "try-label" }, words.text), area),
    choose(sample) {
      area.value = sample.text!;
      enter(sample);
    },
  };
}

/** The samples as buttons: small pictures, or the texts' beginnings. */
export function sampleButtons(spec: Spec, words: Strings, choose: (sample: Sample) => void): HTMLElement {
  const row = element("div", { class: `try-samples try-samples-${spec.input.kind}`, role: "group", "aria-label": words.samples });
  spec.samples.forEach((sample, i) => {
    const made = button("", () => choose(sample), "try-sample");
    if (sample.image) {
      made.setAttribute("aria-label", words.sample(i + 1, spec.samples.length));
      made.append(element("img", { src: sample.image, alt: "" }));
    } else {
      made.textContent = sample.text!;
    }
    row.append(made);
  });
  return element("div", {}, element("p", { class: "try-hint" }, words.samples), row);
}
