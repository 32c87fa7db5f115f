// Scripts are the one thing that a page may load both from a server and from a disk.

import { bytesOf } from "./base64";
import { shelf, Trouble, type Model, type Runtime, type Spec } from "./types";

const own = document.currentScript instanceof HTMLScriptElement ? document.currentScript.src : location.href;

/** The address of a file beside try.js. */
export function beside(file: string): string {
  return new URL(file, own).href;
}

const running = new Map<string, Promise<void>>();

/** Runs a script once; a failed one may be tried again. */
function script(address: string): Promise<void> {
  let started = running.get(address);
  if (!started) {
    started = new Promise((resolve, reject) => {
      const tag = document.createElement("script");
      tag.src = address;
      tag.onload = () => resolve();
      tag.onerror = () => {
        tag.remove();
        running.delete(address);
        reject(new Trouble("missing"));
      };
      document.head.append(tag);
    });
    running.set(address, started);
  }
  return started;
}

export async function loadSpec(slug: string, folder: string): Promise<Spec> {
  if (!shelf().specs[slug]) await script(new URL("spec.js", folder).href);
  const spec = shelf().specs[slug];
  if (!spec) throw new Trouble("missing");
  return spec;
}

async function loadRuntime(): Promise<Runtime> {
  if (typeof WebAssembly !== "object" || typeof DecompressionStream !== "function") throw new Trouble("wasm");
  if (!shelf().runtime) await script(beside("ort.js"));
  const runtime = shelf().runtime;
  if (!runtime) throw new Trouble("missing");
  return runtime;
}

/** The runtime and the model, ready to run. */
export async function loadModel(slug: string, folder: string): Promise<Model> {
  const [runtime] = await Promise.all([loadRuntime(), shelf().models[slug] ? null : script(new URL("model.js", folder).href)]);
  const text = shelf().models[slug];
  if (!text) throw new Trouble("missing");
  try {
    return await runtime.open(bytesOf(text));
  } catch (error) {
    const isWasm = error instanceof Error && /webassembly|wasm/i.test(error.message);
    throw new Trouble(isWasm ? "wasm" : "model");
  }
}
