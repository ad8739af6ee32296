// Read files as data/decoding does, with equal values, and write decoder outputs to files.

const MOST_PIXELS = 2 ** 27; // larger images are rejected

const word = (view, at, count = 4) => String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + at, count));

// Yield the chunks of a RIFF file, such as WAV or WebP.
function* chunksOf(view) {
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const size = view.getUint32(at + 4, true);
    yield { name: word(view, at), at: at + 8, size: Math.min(size, view.byteLength - at - 8) };
    at += 8 + size + (size % 2);
  }
}

// Pillow's bicubic resize of 8-bit values: antialiased, separable, with 22-bit fixed-point coefficients.
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

function coefficients(from, to) {
  const scale = from / to, filter = Math.max(scale, 1), support = 2 * filter;
  return Array.from({ length: to }, (_, place) => {
    const center = (place + 0.5) * scale;
    const low = Math.max(0, Math.trunc(center - support + 0.5));
    const high = Math.min(from, Math.trunc(center + support + 0.5));
    const weights = Array.from({ length: high - low }, (_, x) => cubic((x + low - center + 0.5) / filter));
    const sum = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((weight) => {
      const value = (weight / sum) * 2 ** 22;
      return Math.trunc(value < 0 ? value - 0.5 : value + 0.5);
    });
    return { low, whole };
  });
}

// Resample lines of `from` RGBA pixels to `to` pixels. `step` is the offset between the pixels of a line, `stride` that
// between lines.
function pass(values, lines, from, to, step, stride) {
  if (from === to) return values;
  const out = new Uint8ClampedArray(lines * to * 4), plan = coefficients(from, to);
  const across = step === 4; // lines are rows; else columns
  for (let line = 0; line < lines; line++) {
    plan.forEach(({ low, whole }, place) => {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** 21;
        for (let x = 0; x < whole.length; x++) sum += values[line * stride + (low + x) * step + c] * whole[x];
        out[(across ? line * to + place : place * lines + line) * 4 + c] = Math.floor(sum / 2 ** 22);
      }
    });
  }
  return out;
}

// Transforms from stored to upright pixels for each EXIF orientation, given the stored width and height.
const TURNS = {
  2: (w) => [-1, 0, 0, 1, w, 0], 3: (w, h) => [-1, 0, 0, -1, w, h], 4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0], 6: (w, h) => [0, 1, -1, 0, h, 0], 7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

function orientationOf(exif) {
  const begin = word(exif, 0) === "Exif" ? 6 : 0, little = exif.getUint16(begin) === 0x4949;
  const entries = begin + exif.getUint32(begin + 4, little);
  for (let left = exif.getUint16(entries, little), at = entries + 2; left > 0; left--, at += 12) {
    if (exif.getUint16(at, little) === 0x112) return exif.getUint16(at + 8, little);
  }
  return 1;
}

// Browsers apply the EXIF orientation of all formats but WebP. Return that of a WebP file, and the file without it.
async function takeOrientation(file) {
  const view = new DataView(await file.arrayBuffer());
  if (view.byteLength < 12 || word(view, 0) !== "RIFF" || word(view, 8) !== "WEBP") return { file, orientation: 1 };
  let orientation = 1;
  for (const { name, at, size } of chunksOf(view)) {
    if (name !== "EXIF") continue;
    orientation = orientationOf(new DataView(view.buffer, at, size));
    view.setUint8(at - 8, 0x5f); // a chunk that is unknown, and so ignored
  }
  return { file: new Blob([view]), orientation };
}

// Return the centered square of an image file, upright and over white, as RGBA. Color profiles are ignored.
async function readSquare(given) {
  const { file, orientation } = await takeOrientation(given);
  const image = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  const { width, height } = image, side = Math.min(width, height);
  if (width * height > MOST_PIXELS) throw new Error(`${width} x ${height} pixels are too many`);
  const context = new OffscreenCanvas(side, side).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, side, side);
  const turn = TURNS[orientation], [across, down] = turn && orientation > 4 ? [height, width] : [width, height];
  context.translate(-Math.floor((across - side) / 2), -Math.floor((down - side) / 2));
  if (turn) context.transform(...turn(width, height));
  context.drawImage(image, 0, 0);
  return { side, pixels: context.getImageData(0, 0, side, side).data };
}

async function readPicture(file, about) {
  const square = await readSquare(file), short = square.side, side = about.image_size, area = side * side;
  const rows = pass(square.pixels, short, short, side, 4, short * 4);
  const pixels = pass(rows, side, short, side, side * 4, 4);
  const values = new Float32Array(3 * area);
  for (let place = 0; place < area; place++) {
    for (let c = 0; c < 3; c++) values[c * area + place] = Math.fround(pixels[place * 4 + c] / 127.5) - 1;
  }
  return { values, shape: [1, 3, side, side], length: 1 };
}

function paint(canvas, values, side) {
  const image = new ImageData(side, side), area = side * side;
  for (let place = 0; place < area; place++) {
    for (let c = 0; c < 3; c++) {
      const pixel = Math.fround(Math.fround(values[c * area + place] + 1) * 127.5);
      image.data[place * 4 + c] = pixel; // clamped, and rounded half to even
    }
    image.data[place * 4 + 3] = 255;
  }
  canvas.width = canvas.height = side;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Read a 16-bit WAV file of the bundle's sample rate directly; let the browser decode and resample all else.
async function readSound(file, about) {
  const bytes = await file.arrayBuffer();
  let channels = parseWave(bytes, about.sampling_rate);
  if (!channels) {
    const context = new OfflineAudioContext(1, 1, about.sampling_rate);
    const decoded = await context.decodeAudioData(bytes);
    channels = Array.from({ length: decoded.numberOfChannels }, (_, c) => decoded.getChannelData(c));
  }
  const length = Math.min(channels[0].length, Math.round(about.most_seconds * about.sampling_rate));
  if (!length) throw new Error("The file holds no audio samples.");
  const values = new Float32Array(length * about.channels);
  for (let place = 0; place < length; place++) {
    const mean = channels.reduce((sum, channel) => sum + channel[place], 0) / channels.length;
    for (let c = 0; c < about.channels; c++) {
      const value = channels.length === about.channels ? channels[c][place] : mean;
      values[c * length + place] = Math.min(1, Math.max(-1, value));
    }
  }
  return { values, shape: [1, about.channels, length], length, cut: length < channels[0].length };
}

function parseWave(bytes, rate) {
  const view = new DataView(bytes), word = (at) => String.fromCharCode(...new Uint8Array(bytes, at, 4));
  if (bytes.byteLength < 44 || word(0) !== "RIFF" || word(8) !== "WAVE") return null;
  let format = null;
  for (let at = 12; at + 8 <= bytes.byteLength; ) {
    const size = view.getUint32(at + 4, true), body = at + 8;
    if (word(at) === "fmt ") {
      format = { kind: view.getUint16(body, true), channels: view.getUint16(body + 2, true),
        rate: view.getUint32(body + 4, true), bits: view.getUint16(body + 14, true) };
    } else if (word(at) === "data" && format) {
      if (format.kind !== 1 || format.bits !== 16 || format.rate !== rate) return null;
      const count = Math.floor(Math.min(size, bytes.byteLength - body) / 2 / format.channels);
      return Array.from({ length: format.channels }, (_, c) =>
        Float32Array.from({ length: count }, (_, place) => view.getInt16(body + 2 * (place * format.channels + c), true) / 32768));
    }
    at = body + size + (size % 2);
  }
  return null;
}

function writeWave(values, channels, rate) {
  const length = values.length / channels, view = new DataView(new ArrayBuffer(44 + 2 * values.length));
  const text = (at, word) => [...word].forEach((letter, place) => view.setUint8(at + place, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * values.length, true); text(8, "WAVEfmt "); view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); view.setUint16(22, channels, true); view.setUint32(24, rate, true);
  view.setUint32(28, 2 * channels * rate, true); view.setUint16(32, 2 * channels, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * values.length, true);
  for (let place = 0; place < length; place++) {
    for (let c = 0; c < channels; c++) {
      const value = Math.round(Math.min(1, Math.max(-1, values[c * length + place])) * 32767);
      view.setInt16(44 + 2 * (place * channels + c), value, true);
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
