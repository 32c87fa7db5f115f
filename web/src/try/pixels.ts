// Pictures to the network's numbers, bit for bit as Python does it.

import { Trouble, type Resize } from "./types";

/** Red, green and blue 0 … 255, planes one after the other (3, height, width). */
export interface Picture {
  data: Uint8ClampedArray | Float32Array;
  width: number;
  height: number;
}

const MOST_PIXELS = 40e6;
const MOST_BYTES = 60e6;

/**
 * A picture file's pixels, upright by its EXIF tag, colours untouched. Half-transparent pixels lose a little, as canvases keep
 * them multiplied with their opacity.
 */
export async function decode(file: Blob): Promise<Picture> {
  if (file.type && !file.type.startsWith("image/")) throw new Trouble("type");
  if (file.size > MOST_BYTES) throw new Trouble("large");
  const size = await announcedSize(file);
  if (size && size[0] * size[1] > MOST_PIXELS) throw new Trouble("large");
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Trouble("broken");
  }
  try {
    if (bitmap.width * bitmap.height > MOST_PIXELS) throw new Trouble("large");
    const canvas = document.createElement("canvas");
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    if (!pen) throw new Trouble("broken");
    pen.drawImage(bitmap, 0, 0);
    return planes(pen.getImageData(0, 0, canvas.width, canvas.height));
  } finally {
    bitmap.close();
  }
}

/** Width and height that the header of a PNG, GIF or JPEG file states, so that a huge picture is refused before it is decoded. */
async function announcedSize(file: Blob): Promise<[number, number] | null> {
  const view = new DataView(await file.slice(0, 262144).arrayBuffer());
  const length = view.byteLength;
  if (length < 30) return null;
  if (view.getUint32(0) === 0x89504e47) return [view.getUint32(16), view.getUint32(20)];
  if (view.getUint32(0) === 0x47494638) return [view.getUint16(6, true), view.getUint16(8, true)];
  if (view.getUint16(0) !== 0xffd8) return null;
  for (let at = 2; at + 9 < length; ) {
    const marker = view.getUint16(at);
    const isFrame = marker >= 0xffc0 && marker <= 0xffcf && ![0xffc4, 0xffc8, 0xffcc].includes(marker);
    if (isFrame) return [view.getUint16(at + 7), view.getUint16(at + 5)];
    if (marker >> 8 !== 0xff) return null;
    at += 2 + view.getUint16(at + 2);
  }
  return null;
}

export function planes(image: ImageData): Picture {
  const count = image.width * image.height;
  const data = new Uint8ClampedArray(3 * count);
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) data[c * count + i] = image.data[4 * i + c]!;
  }
  return { data, width: image.width, height: image.height };
}

/** A picture on a canvas of its own size. */
export function canvasOf(picture: Picture): HTMLCanvasElement {
  const { data, width, height } = picture;
  const image = new ImageData(width, height);
  const count = width * height;
  for (let i = 0; i < count; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = data[c * count + i]!;
    image.data[4 * i + 3] = 255;
  }
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d")!.putImageData(image, 0, 0);
  return canvas;
}

export function crop(picture: Picture, left: number, top: number, width: number, height: number): Picture {
  const data = new Uint8ClampedArray(3 * width * height);
  for (let c = 0; c < 3; c++) {
    for (let y = 0; y < height; y++) {
      const from = (c * picture.height + top + y) * picture.width + left;
      data.set(picture.data.subarray(from, from + width), (c * height + y) * width);
    }
  }
  return { data, width, height };
}

/** The middle square of a picture. */
export function middleSquare(picture: Picture): Picture {
  const side = Math.min(picture.width, picture.height);
  if (picture.width === picture.height) return picture;
  return crop(picture, (picture.width - side) >> 1, (picture.height - side) >> 1, side, side);
}

// -- torchvision's antialiased resize of uint8 pictures --------------------------------------------------------------

interface Weights {
  first: Int32Array;
  count: Int32Array;
  table: Int16Array;
  most: number;
  bits: number;
}

/** Triangle filters for one axis, as whole numbers of 16 bits: Pillow's scheme, which torch follows on the CPU. */
function weights(from: number, to: number): Weights {
  const scale = from / to;
  const support = Math.max(1, scale);
  const most = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(to);
  const count = new Int32Array(to);
  const exact = new Float64Array(to * most);
  let largest = 0;
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5);
    const low = Math.max(Math.trunc(centre - support + 0.5), 0);
    const n = Math.min(Math.trunc(centre + support + 0.5), from) - low;
    let total = 0;
    for (let k = 0; k < n; k++) {
      const w = Math.max(0, 1 - Math.abs((low + k - centre + 0.5) / support));
      exact[i * most + k] = w;
      total += w;
    }
    for (let k = 0; k < n; k++) {
      exact[i * most + k]! /= total;
      largest = Math.max(largest, exact[i * most + k]!);
    }
    first[i] = low;
    count[i] = n;
  }
  let bits = 0;
  while (bits < 22 && Math.trunc(0.5 + largest * 2 ** (bits + 1)) < 2 ** 15) bits++;
  return { first, count, most, bits, table: Int16Array.from(exact, (w) => Math.trunc(w * 2 ** bits + 0.5)) };
}

/** Along the rows, then along the columns, with whole numbers of 8 bits in between. */
export function resizeAntialiased(picture: Picture, width: number, height: number): Picture {
  let { data, width: w, height: h } = picture;
  if (w !== width) {
    const rule = weights(w, width);
    const next = new Uint8ClampedArray(3 * h * width);
    for (let row = 0; row < 3 * h; row++) along(data, row * w, 1, next, row * width, 1, width, rule);
    [data, w] = [next, width];
  }
  if (h !== height) {
    const rule = weights(h, height);
    const next = new Uint8ClampedArray(3 * height * w);
    for (let c = 0; c < 3; c++) {
      for (let x = 0; x < w; x++) along(data, c * h * w + x, w, next, c * height * w + x, w, height, rule);
    }
    [data, h] = [next, height];
  }
  return { data, width: w, height: h };
}

function along(
  source: Picture["data"], from: number, step: number,
  target: Uint8ClampedArray, to: number, stride: number, length: number, rule: Weights,
): void {
  const half = 2 ** (rule.bits - 1);
  for (let i = 0; i < length; i++) {
    let sum = half;
    const at = from + rule.first[i]! * step;
    for (let k = 0; k < rule.count[i]!; k++) sum += source[at + k * step]! * rule.table[i * rule.most + k]!;
    target[to + i * stride] = Math.floor(sum / 2 ** rule.bits);
  }
}

/** torch's bilinear interpolation without antialiasing: (3, h, w) of fractions. */
export function resizeBilinear(picture: Picture, width: number, height: number): Picture {
  const { data, width: w, height: h } = picture;
  if (w === width && h === height) return picture;
  const result = new Float32Array(3 * width * height);
  for (let y = 0; y < height; y++) {
    const sy = Math.max(0, ((y + 0.5) * h) / height - 0.5);
    const y0 = Math.min(Math.floor(sy), h - 1);
    const y1 = Math.min(y0 + 1, h - 1);
    for (let x = 0; x < width; x++) {
      const sx = Math.max(0, ((x + 0.5) * w) / width - 0.5);
      const x0 = Math.min(Math.floor(sx), w - 1);
      const x1 = Math.min(x0 + 1, w - 1);
      for (let c = 0; c < 3; c++) {
        const at = (py: number, px: number) => data[(c * h + py) * w + px]!;
        const top = at(y0, x0) * (1 - (sx - x0)) + at(y0, x1) * (sx - x0);
        const bottom = at(y1, x0) * (1 - (sx - x0)) + at(y1, x1) * (sx - x0);
        result[(c * height + y) * width + x] = top * (1 - (sy - y0)) + bottom * (sy - y0);
      }
    }
  }
  return { data: result, width, height };
}

/** Python's round: halves to the even number. */
function roundHalfEven(value: number): number {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}

/** The part of a picture that the network looks at, at the picture's own size, and the network's pixels of it. */
export function toNetwork(picture: Picture, rule: Resize): { seen: Picture; pixels: Picture } {
  const seen = rule.rule === "cover" ? middleSquare(picture) : picture;
  const resize = rule.antialias ? resizeAntialiased : resizeBilinear;
  if (rule.rule !== "shortest") return { seen, pixels: resize(seen, rule.to, rule.to) };
  const { width, height } = picture;
  const long = Math.trunc((rule.to * Math.max(width, height)) / Math.min(width, height));
  const large = width <= height ? resize(picture, rule.to, long) : resize(picture, long, rule.to);
  const side = rule.crop ?? rule.to;
  const left = roundHalfEven((large.width - side) / 2);
  const top = roundHalfEven((large.height - side) / 2);
  return { seen, pixels: crop(large, left, top, side, side) };
}

/** 0 … 255 to fractions. */
export function fractions(picture: Picture): Float32Array {
  return Float32Array.from(picture.data, (v) => v / 255);
}
