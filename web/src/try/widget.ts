// One widget: the section on the page, from the first look at it to the answers.

import { button, element } from "./dom";
import { inputArea, sampleButtons, type Entry } from "./inputs";
import { beside, loadModel, loadSpec } from "./load";
import { answer } from "./outputs";
import { about, megabytes, strings } from "./strings";
import { Trouble, type Language, type Model, type Spec } from "./types";

declare const RUNTIME_BYTES: number; // of ort.js, from the build

const PAUSE = 60; // milliseconds without a change before the network runs

/** Fills a section; a heading and other content that it has stay above. What stands in `.try-fallback` goes. The model and the runtime are loaded at the first entry, or by the button that names their size. */
export async function fill(section: HTMLElement): Promise<void> {
  const slug = section.dataset.slug ?? "";
  const language: Language = section.dataset.lang === "zh" ? "zh" : "en";
  const words = strings(language);
  const folder = new URL(`${section.dataset.model ?? beside(`models/${slug}`)}/`, document.baseURI).href;
  const alert = element("p", { class: "try-alert", role: "alert", hidden: "" });
  section.lang = language === "zh" ? "zh-CN" : "en";
  section.querySelectorAll(".try-fallback").forEach((each) => each.remove());
  section.append(alert);
  const fail = (error: unknown) => {
    const name = error instanceof Trouble ? error.message : "model";
    alert.textContent = words.troubles[name] ?? words.troubles.model!;
    alert.hidden = false;
    section.dataset.state = "trouble";
  };
  let spec: Spec;
  try {
    spec = await loadSpec(slug, folder);
  } catch (error) {
    return fail(error);
  }

  const size = megabytes(RUNTIME_BYTES + (spec.bytes * 4) / 3);
  const sentence = element("p", { class: "try-sentence", role: "status", "aria-live": "polite" }, words.waiting);
  const shown = element("div", { class: "try-shown" });
  const time = element("p", { class: "try-hint try-time" });
  let model: Promise<Model> | undefined;
  const load = button(words.load(size), () => void ready(), "try-button try-load");

  function ready(): Promise<Model> {
    if (!model) {
      section.dataset.state = "loading";
      load.disabled = true;
      load.textContent = words.loading(size);
      model = loadModel(slug, folder);
      model.then(
        () => {
          load.remove();
          if (section.dataset.state === "loading") section.dataset.state = "ready";
        },
        (error) => {
          model = undefined;
          load.disabled = false;
          load.textContent = words.load(size);
          fail(error);
        },
      );
    }
    return model;
  }

  let latest = 0;
  let timer = 0;

  async function run(entry: Entry, mine: number): Promise<void> {
    let open: Model;
    try {
      open = await ready();
    } catch {
      return; // told by `ready`
    }
    if (mine !== latest) return;
    try {
      const start = performance.now();
      const results = await open.run(entry.feed);
      const took = performance.now() - start;
      const network = spec.input.kind === "text" ? null : spec.input.size;
      const told = await answer(spec.output, network, results, entry, words);
      if (mine !== latest) return;
      sentence.textContent = told.sentence;
      shown.replaceChildren(...told.parts);
      time.textContent = words.took(took < 10 ? took.toFixed(1) : took.toFixed(0));
      section.dataset.state = "done";
      section.dispatchEvent(new CustomEvent("try:result", { detail: { results, took }, bubbles: true }));
    } catch (error) {
      fail(error);
    }
  }

  const area = inputArea(spec, words, {
    entered(entry) {
      alert.hidden = true;
      const mine = ++latest;
      section.dataset.state = "running";
      section.dispatchEvent(new CustomEvent("try:entered", { detail: { feed: entry.feed }, bubbles: true }));
      window.clearTimeout(timer);
      timer = window.setTimeout(() => void run(entry, mine), PAUSE);
    },
    emptied() {
      latest++;
      window.clearTimeout(timer);
      alert.hidden = true;
      sentence.textContent = words.waiting;
      shown.replaceChildren();
      time.textContent = "";
      section.dataset.state = "ready";
    },
    failed(error) {
      latest++;
      window.clearTimeout(timer);
      fail(error);
    },
  });

  const result = element("div", { class: "try-output" }, load, sentence, shown, time);
  const samples = sampleButtons(spec, words, (sample) => area.choose(sample));
  const stage = element("div", { class: "try-stage" }, area.element, alert, result);
  if (spec.input.kind === "image") area.element.append(samples); // where a drawing would be
  if (!section.querySelector("h2, h3, h4")) section.append(element("h2", { class: "try-title" }, words.title));
  section.append(stage, ...(spec.input.kind === "image" ? [] : [samples]));
  section.append(element("p", { class: "try-about" }, about(spec, language)));
  section.dataset.state = "ready";
}
