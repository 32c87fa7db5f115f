// Every sentence of the widget, in both languages.

import type { Language, Spec } from "./types";

const ENGLISH = {
  title: "Try it",
  draw: "Draw a digit here with mouse, pen or finger. Without them, choose one of the scans below.",
  clear: "Clear",
  undo: "Undo",
  drawHint: "Draw one digit, as large as you like.",
  seen: "What the network sees",
  choose: "Choose a picture",
  drop: "or drop one here",
  text: "Text",
  textHint: "Write or paste a text.",
  samples: "Held-out samples, which the network has not learned from",
  sample: (n: number, of: number) => `Sample ${n} of ${of}`,
  load: (size: string) => `Load the model (${size})`,
  loading: (size: string) => `Loading the model (${size}) …`,
  waiting: "The answer appears here.",
  answer: "Answer",
  truth: "Truth",
  isReally: (truth: string) => `Truth: ${truth}.`,
  most: (label: string, share: string) => `${label}, with a probability of ${share}.`,
  areas: (parts: string) => `Share of the picture: ${parts}.`,
  found: (parts: string) => `Found: ${parts}.`,
  foundNothing: "Nothing found with this score or a higher one.",
  threshold: "Lowest score shown",
  took: (ms: string) => `The network took ${ms} ms on your device.`,
  about: (count: string, seconds: number, data: string, score: string) =>
    `This is a small network (${count} parameters), trained by this paper's code in ${seconds} seconds on ${data}. On samples that it had not seen: ${score}.`,
  middle: (size: number) => `Of a picture it sees the middle square, scaled to ${size} × ${size} pixels.`,
  cut: (length: number) => `Of a long text it reads the first ${length - 2} tokens.`,
  local: "Everything runs on your device; what you enter stays there.",
  between: ", ",
  troubles: {
    type: "This file is not a picture; PNG, JPEG, WebP and GIF files can be read.",
    large: "This picture is too large; choose one with at most 40 megapixels.",
    broken: "This picture cannot be read; the file may be damaged, or its format unknown to this browser.",
    missing: "The model could not be loaded; check the connection and try again.",
    model: "The model was loaded but could not be started in this browser.",
    wasm: "This browser cannot run the model, because it lacks WebAssembly or has it switched off.",
  } as Record<string, string>,
  metrics: {
    accuracy: (v: number) => `accuracy ${percent(v)}`,
    miou: (v: number) => `mean intersection over union ${v.toFixed(2)}`,
    mAP: (v: number) => `mean average precision (COCO) ${v.toFixed(2)}`,
    AR10: (v: number) => `average recall with 10 proposals ${v.toFixed(2)}`,
  } as Record<string, (v: number) => string>,
};

const CHINESE: typeof ENGLISH = {
  title: "试一试",
  draw: "用鼠标、笔或手指在这里写一个数字；不便书写时，请选择下面的扫描图。",
  clear: "清除",
  undo: "撤销",
  drawHint: "写一个数字，大小随意。",
  seen: "网络看到的",
  choose: "选择图片",
  drop: "或把图片拖到这里",
  text: "文本",
  textHint: "输入或粘贴一段文字。",
  samples: "留出的样本，网络没有学过",
  sample: (n, of) => `样本 ${n}，共 ${of} 个`,
  load: (size) => `加载模型（${size}）`,
  loading: (size) => `正在加载模型（${size}）…`,
  waiting: "答案会显示在这里。",
  answer: "答案",
  truth: "真值",
  isReally: (truth) => `真值：${truth}。`,
  most: (label, share) => `${label}，概率 ${share}。`,
  areas: (parts) => `占图片的比例：${parts}。`,
  found: (parts) => `找到：${parts}。`,
  foundNothing: "没有找到达到这个分数的目标。",
  threshold: "显示的最低分数",
  took: (ms) => `网络在你的设备上用了 ${ms} 毫秒。`,
  about: (count, seconds, data, score) =>
    `这是一个小网络（${count} 个参数），由本论文的代码用 ${seconds} 秒训练而成，数据是${data}。在没见过的样本上：${score}。`,
  middle: (size) => `它只看图片中间的正方形，缩放到 ${size} × ${size} 像素。`,
  cut: (length) => `长文本只读前 ${length - 2} 个词元。`,
  local: "一切都在你的设备上运行，你输入的内容不会离开设备。",
  between: "，",
  troubles: {
    type: "这个文件不是图片；可以读取 PNG、JPEG、WebP 和 GIF 文件。",
    large: "这张图片太大；请选择不超过四千万像素的图片。",
    broken: "无法读取这张图片；文件可能已损坏，或者浏览器不认识它的格式。",
    missing: "模型加载失败；请检查网络连接后重试。",
    model: "模型已加载，但无法在这个浏览器中启动。",
    wasm: "这个浏览器缺少 WebAssembly 或已将其关闭，无法运行模型。",
  },
  metrics: {
    accuracy: (v) => `准确率 ${percent(v)}`,
    miou: (v) => `平均交并比 ${v.toFixed(2)}`,
    mAP: (v) => `平均精度均值（COCO）${v.toFixed(2)}`,
    AR10: (v) => `10 个候选框的平均召回率 ${v.toFixed(2)}`,
  },
};

export type Strings = typeof ENGLISH;

export function strings(language: Language): Strings {
  return language === "zh" ? CHINESE : ENGLISH;
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)}%`;
}

export function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** What model this is, what it learned from, how good it is, what it cannot do. */
export function about(spec: Spec, language: Language): string {
  const words = strings(language);
  const value = spec.metrics[spec.metric] ?? NaN;
  const score = words.metrics[spec.metric]?.(value) ?? `${spec.metric} ${value.toPrecision(3)}`;
  const count = spec.parameters.toLocaleString(language === "zh" ? "zh-CN" : "en-GB");
  const parts = [words.about(count, spec.seconds, spec.learned_from[language], score), spec.limits[language]];
  if (spec.input.kind === "image" && spec.input.resize.rule === "cover") parts.push(words.middle(spec.input.resize.to));
  if (spec.input.kind === "text") parts.push(words.cut(spec.input.length));
  return [...parts, words.local].join(language === "zh" ? "" : " ");
}
