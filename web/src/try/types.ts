// What a page knows of a model: `spec.js`, written by `paperzoo.serve.browser.write`. The Python side is `Recipe.browser`.

export type Language = "en" | "zh";
export type Bilingual = Record<Language, string>;

/** How a picture becomes the network's square or rectangle of pixels. */
export interface Resize {
  /** square: both sides to `to`, stretched. shortest: the shortest side to `to`, then the middle `crop`. cover: the middle square, to `to`. */
  rule: "square" | "shortest" | "cover";
  to: number;
  crop?: number;
  /** true: uint8 with antialiasing, as torchvision's transforms; false: plain bilinear on fractions. */
  antialias: boolean;
}

/** How strokes become a scan: see `DIGIT_DRAWING` in paperzoo/tasks/classification.py. */
export interface DrawingRule {
  size: number;
  block: number;
  stroke: number;
  /** wide drawings are pressed to `widest`, narrow ones (not a one) stretched to `narrowest`, as the scans are about equally wide */
  narrowest: number;
  widest: number;
}

export interface PictureInput {
  kind: "image";
  size: [number, number];
  resize: Resize;
}

export interface DrawingInput {
  kind: "drawing";
  size: [number, number];
  resize: Resize;
  drawing: DrawingRule;
}

export interface WordPieceTables {
  kind: "wordpiece";
  tokens: string[];
  special: string[];
  lowercase: boolean;
  continuation: string;
  longest_word: number;
  unknown: number;
  pad: number;
  start: number;
  end: number;
}

export interface TextInput {
  kind: "text";
  length: number;
  tokenizer: WordPieceTables;
}

export type Input = PictureInput | DrawingInput | TextInput;

/** The graph returns probabilities (1, K). */
export interface ClassesOutput {
  kind: "classes";
  labels: string[];
}

/** The graph returns class ids int32 (1, H, W) and their probabilities (1, H, W). Classes in `clear` are not tinted. */
export interface MaskOutput {
  kind: "mask";
  labels: string[];
  colours: string[];
  clear: number[];
}

/** The graph returns boxes (N, 4) in the network's pixels, scores (N,), labels int64 (N,), best first. */
export interface BoxesOutput {
  kind: "boxes";
  labels: string[];
  colours: string[];
  threshold: number;
}

export type Output = ClassesOutput | MaskOutput | BoxesOutput;

export interface BoxTruth {
  boxes: number[][];
  labels: string[];
}

export interface Sample {
  image?: string;
  text?: string;
  truth: string | BoxTruth;
}

export interface Spec {
  slug: string;
  task: string;
  input: Input;
  output: Output;
  samples: Sample[];
  learned_from: Bilingual;
  limits: Bilingual;
  inputs: { name: string; shape: number[]; type: string }[];
  parameters: number;
  bytes: number;
  /** of training */
  seconds: number;
  metric: string;
  metrics: Record<string, number>;
}

/** What a run of the graph returns: for each output its numbers and its shape. */
export interface Result {
  data: ArrayLike<number>;
  shape: readonly number[];
}

export type Feed = { data: Float32Array | BigInt64Array; shape: number[] }[];

export interface Model {
  run(feed: Feed): Promise<Result[]>;
}

/** `ort.js` puts this on the page. */
export interface Runtime {
  open(model: Uint8Array): Promise<Model>;
}

export interface Shelf {
  specs: Record<string, Spec>;
  models: Record<string, string>;
  runtime?: Runtime;
}

declare global {
  var paperzooTry: Shelf | undefined;
}

/** The table that spec.js, model.js and ort.js write to. */
export function shelf(): Shelf {
  return (globalThis.paperzooTry ??= { specs: {}, models: {} });
}

/** Something to tell the visitor: the message is the key of a sentence in strings.ts. */
export class Trouble extends Error {}
