// ort.js: ONNX Runtime Web with its WebAssembly inside, so that it also works on a page that was opened from a disk.
// One thread: more would need SharedArrayBuffer, which a page has only when its server sends special headers.

import * as ort from "onnxruntime-web/wasm";
import wasm from "gzip:onnxruntime-web/ort-wasm-simd-threaded.wasm";
import { shelf, Trouble, type Feed, type Model, type Result } from "./types";
import { bytesOf } from "./base64";

async function unpacked(text: string): Promise<ArrayBuffer> {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

let ready: Promise<void> | undefined;

function prepare(): Promise<void> {
  ready ??= (async () => {
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.proxy = false;
    ort.env.logLevel = "error";
    ort.env.wasm.wasmBinary = await unpacked(wasm);
  })();
  return ready;
}

function tensor({ data, shape }: Feed[number]): ort.Tensor {
  return data instanceof Float32Array ? new ort.Tensor("float32", data, shape) : new ort.Tensor("int64", data, shape);
}

function numbers(value: ort.Tensor): Result {
  const data = value.data;
  if (typeof data[0] === "string") throw new Trouble("model");
  return { data: data instanceof BigInt64Array ? Array.from(data, Number) : (data as ArrayLike<number>), shape: value.dims };
}

async function open(model: Uint8Array): Promise<Model> {
  await prepare();
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  // a graph may run once at a time: each call waits for the one before
  let last: Promise<unknown> = Promise.resolve();
  return {
    run(feed: Feed): Promise<Result[]> {
      const mine = last.then(async () => {
        const inputs = Object.fromEntries(session.inputNames.map((name, i) => [name, tensor(feed[i]!)]));
        const found = await session.run(inputs);
        return session.outputNames.map((name) => numbers(found[name]!));
      });
      last = mine.catch(() => undefined);
      return mine;
    },
  };
}

shelf().runtime = { open };
