// try.js: turns every <section class="try" data-slug="…" data-lang="en"> into a widget when it comes near the window.

import { fill } from "./widget";

function start(): void {
  const sections = document.querySelectorAll<HTMLElement>("section.try[data-slug]");
  const observer = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        observer.unobserve(target);
        void fill(target as HTMLElement);
      }
    },
    { rootMargin: "200px" },
  );
  sections.forEach((section) => observer.observe(section));
}

if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
else start();
