// Theme and language, before anything is painted: what the reader chose here, else what the system and the browser say.
(function () {
  var page = document.documentElement;
  function kept(key) {
    try {
      return localStorage.getItem(key);
    } catch (error) {
      return null; // storage is switched off
    }
  }
  page.classList.add("script");
  var dark = matchMedia("(prefers-color-scheme: dark)").matches;
  var theme = kept("paperzoo-theme");
  var language = kept("paperzoo-language");
  page.dataset.theme = theme === "light" || theme === "dark" ? theme : dark ? "dark" : "light";
  page.dataset.lang = language === "en" || language === "zh" ? language : /^zh/i.test(navigator.language) ? "zh" : "en";

  function pass() {
    document.querySelectorAll("section.try").forEach(function (section) {
      section.dataset.lang = page.dataset.lang; // read when the section comes near the window
    });
  }
  document.addEventListener("DOMContentLoaded", pass);
  new MutationObserver(pass).observe(page, { attributes: true, attributeFilter: ["data-lang"] });
})();
