// Bundles what pages include into src/paperzoo/serve/static/. A new bundle is one line in `bundles`.
import { readFileSync, rmSync, mkdirSync, statSync } from "node:fs";
import { gzipSync } from "node:zlib";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = fileURLToPath(new URL(".", import.meta.url));
const target = `${here}../src/paperzoo/serve/static`;

// what is written -> what it is made of
const bundles = {
  "ort.js": "src/try/runtime.ts", // first: try.js states its size
  "try.js": "src/try/main.ts",
  "try.css": "src/try/try.css",
  "site.js": "src/site.ts",
  "search.js": "src/search.ts",
  "plot.js": "src/plot.ts",
  "graph.js": "src/graph.ts",
  "widgets.css": "src/widgets.css",
};
const sizes = {};

// `import text from "gzip:some-package/file"`: the file, gzipped, in base64
const gzipped = {
  name: "gzip",
  setup(build) {
    build.onResolve({ filter: /^gzip:/ }, ({ path }) => ({ path: path.slice(5), namespace: "gzip" }));
    build.onLoad({ filter: /.*/, namespace: "gzip" }, ({ path }) => {
      const content = readFileSync(fileURLToPath(import.meta.resolve(path)));
      const text = gzipSync(content, { level: 9 }).toString("base64");
      return { contents: `export default ${JSON.stringify(text)}`, loader: "js" };
    });
  },
};

mkdirSync(target, { recursive: true });
for (const [output, source] of Object.entries(bundles)) {
  const file = `${target}/${output}`;
  rmSync(file, { force: true });
  await build({
    entryPoints: [`${here}${source}`],
    outfile: file,
    bundle: true,
    minify: true,
    format: "iife",
    target: ["chrome105", "firefox115", "safari16.4"],
    charset: "utf8",
    legalComments: "inline",
    // the runtime asks where it lies; as a plain script it lies nowhere, and needs no other file
    define: { "import.meta.url": '"file:///ort.js"', RUNTIME_BYTES: String(sizes["ort.js"] ?? 0) },
    plugins: [gzipped],
    logLevel: "warning",
    absWorkingDir: here,
  });
  sizes[output] = statSync(file).size;
  console.log(`${output.padEnd(12)} ${(sizes[output] / 1000).toFixed(1).padStart(9)} kB`);
}
