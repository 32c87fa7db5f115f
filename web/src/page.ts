// What every script of the site asks of the page it runs on.

export type Language = "en" | "zh";

const page = document.documentElement;

export function language(): Language {
  return page.dataset.lang === "zh" ? "zh" : "en";
}

/** The text of the language shown. */
export function say(english: string, chinese: string): string {
  return language() === "zh" ? chinese : english;
}

/** The address of a file of the site, whatever folder the page lies in. */
export function below(file: string): string {
  return `${page.dataset.root ?? ""}${file}`;
}

/** Calls back when the visitor changes the language. */
export function onLanguage(changed: () => void): void {
  let shown = language();
  new MutationObserver(() => {
    if (shown === language()) return;
    shown = language();
    changed();
  }).observe(page, { attributes: true, attributeFilter: ["data-lang"] });
}

export function isStill(): boolean {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

/** Calls back once the page's elements are there. */
export function whenReady(start: () => void): void {
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}

/** Calls back when the browser has nothing better to do. */
export function whenIdle(work: () => void): void {
  if (typeof requestIdleCallback === "function") requestIdleCallback(work, { timeout: 2000 });
  else setTimeout(work, 200); // Safari
}

const SVG = "http://www.w3.org/2000/svg";

/** An SVG element with attributes and children. */
export function drawn<K extends keyof SVGElementTagNameMap>(
  name: K,
  attributes: Record<string, string | number> = {},
  ...children: (Node | string)[]
): SVGElementTagNameMap[K] {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}
