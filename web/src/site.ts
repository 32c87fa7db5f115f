// site.js: theme, language, copying, the way to the search, the menu on phones. What was chosen before is set by a script
// in the page's head, before anything is drawn; a page without it gets it here.
//
//   #theme-button, #language-button, #menu-button   the last names with aria-controls what it opens
//   button[data-copy="id"]                           copies the text of the element with that id
//   [data-en][data-zh]                               placeholder and label in both languages

import { below, language, onLanguage, say, whenReady } from "./page";

const page = document.documentElement;

// -- what is remembered ------------------------------------------------------------------------------------------------

function recall(key: string): string | null {
  try {
    return localStorage.getItem(`paperzoo-${key}`);
  } catch {
    return null; // a browser may refuse storage to files
  }
}

function remember(key: string, value: string): void {
  try {
    localStorage.setItem(`paperzoo-${key}`, value);
  } catch {
    // then the choice holds for this page
  }
}

function setLanguage(chosen: string): void {
  page.dataset.lang = chosen;
  page.lang = chosen === "zh" ? "zh-CN" : "en";
}

const isChinese = (navigator.language || "").toLowerCase().startsWith("zh");
const saved = { language: recall("language"), theme: recall("theme") };
setLanguage(saved.language === "zh" || saved.language === "en" ? saved.language : isChinese ? "zh" : "en");

const dark = matchMedia("(prefers-color-scheme: dark)");
page.dataset.theme = saved.theme === "dark" || saved.theme === "light" ? saved.theme : dark.matches ? "dark" : "light";
dark.addEventListener("change", () => {
  if (!recall("theme")) page.dataset.theme = dark.matches ? "dark" : "light";
});

// -- buttons -----------------------------------------------------------------------------------------------------------

const ACTIONS: Record<string, (button: HTMLElement) => void> = {
  "theme-button"() {
    page.dataset.theme = page.dataset.theme === "dark" ? "light" : "dark";
    remember("theme", page.dataset.theme);
    label();
  },
  "language-button"() {
    setLanguage(language() === "zh" ? "en" : "zh");
    remember("language", language());
  },
  "menu-button"(button) {
    const open = button.getAttribute("aria-expanded") !== "true";
    button.setAttribute("aria-expanded", String(open));
    document.getElementById(button.getAttribute("aria-controls") ?? "")?.classList.toggle("is-open", open);
  },
};

function label(): void {
  const key = language() === "zh" ? "zh" : "en";
  for (const element of document.querySelectorAll<HTMLElement>("[data-en][data-zh]")) {
    const text = element.dataset[key] ?? "";
    if (element.hasAttribute("placeholder")) element.setAttribute("placeholder", text);
    if (element.hasAttribute("aria-label") || !element.hasAttribute("placeholder")) element.setAttribute("aria-label", text);
    if (element.hasAttribute("title")) element.setAttribute("title", text);
  }
  const theme = document.getElementById("theme-button");
  theme?.setAttribute("title", page.dataset.theme === "dark" ? say("to the light theme", "切换到浅色") : say("to the dark theme", "切换到深色"));
}

// -- copying -----------------------------------------------------------------------------------------------------------

async function copy(button: HTMLElement): Promise<void> {
  const text = document.getElementById(button.dataset.copy ?? "")?.textContent ?? "";
  const isDone = await written(text.trim());
  const before = [...button.childNodes];
  if (button.dataset.told) return;
  button.dataset.told = "yes";
  button.setAttribute("aria-live", "polite");
  button.textContent = isDone ? say("Copied", "已复制") : say("Not allowed here; select and copy", "此处不允许，请手动复制");
  setTimeout(() => {
    button.replaceChildren(...before);
    delete button.dataset.told;
  }, 1500);
}

async function written(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // pages from a disk may not have the clipboard; the old way asks for no permission
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "copy-source";
    document.body.append(area);
    area.select();
    const isDone = document.execCommand("copy");
    area.remove();
    return isDone;
  }
}

// -- start -------------------------------------------------------------------------------------------------------------

/** The field one searches in on this page: the home page's, else one in the page's head. */
function searchField(): HTMLInputElement | null {
  return document.querySelector("#search input[type=search], input[type=search]");
}

document.addEventListener("click", (event) => {
  const button = (event.target as Element).closest<HTMLElement>("button");
  if (button?.dataset.copy !== undefined) void copy(button);
  else if (button) ACTIONS[button.id]?.(button);
});

document.addEventListener("keydown", (event) => {
  const target = event.target as HTMLElement;
  if (event.key === "/" && !event.ctrlKey && !event.metaKey && !event.altKey && !isTyping(target)) {
    event.preventDefault();
    const field = searchField();
    if (field) field.focus(), field.select();
    else location.href = below("index.html#q=");
  }
  if (event.key === "Escape") {
    const menu = document.getElementById("menu-button");
    if (menu?.getAttribute("aria-expanded") === "true") menu.click(), menu.focus();
  }
});

function isTyping(element: HTMLElement): boolean {
  if (element.isContentEditable || ["TEXTAREA", "SELECT"].includes(element.tagName)) return true;
  return element instanceof HTMLInputElement && !["checkbox", "radio", "button", "range"].includes(element.type);
}

whenReady(label);
onLanguage(label);
