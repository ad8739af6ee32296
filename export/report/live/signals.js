// Convert files to encoder inputs, with the same values as the Python runtime, and decoder outputs to files.

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

// Resample lines of `from` pixels to `to` pixels. `step` is the offset between the pixels of a line, `stride` between lines.
function pass(values, lines, from, to, step, stride) {
  if (from === to) return values;
  const out = new Uint8ClampedArray(lines * to * 3), plan = coefficients(from, to);
  const across = step === 3; // lines are rows; else columns
  for (let line = 0; line < lines; line++) {
    plan.forEach(({ low, whole }, place) => {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** 21;
        for (let x = 0; x < whole.length; x++) sum += values[line * stride + (low + x) * step + c] * whole[x];
        out[(across ? line * to + place : place * lines + line) * 3 + c] = Math.floor(sum / 2 ** 22);
      }
    });
  }
  return out;
}

// Crop the centered square of an image, and resize it to `side` pixels, RGB.
function square(image, side) {
  const { width, height, data } = image, short = Math.min(width, height);
  const left = Math.floor((width - short) / 2), top = Math.floor((height - short) / 2);
  const pixels = new Uint8ClampedArray(short * short * 3);
  for (let y = 0; y < short; y++) {
    for (let x = 0; x < short; x++) {
      const from = ((y + top) * width + x + left) * 4;
      pixels.set(data.subarray(from, from + 3), (y * short + x) * 3);
    }
  }
  const rows = pass(pixels, short, short, side, 3, short * 3);
  return pass(rows, side, short, side, side * 3, 3);
}

async function readPicture(file, about) {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const side = about.image_size, area = side * side;
  const pixels = square(context.getImageData(0, 0, bitmap.width, bitmap.height), side);
  const values = new Float32Array(3 * area);
  for (let place = 0; place < area; place++) {
    for (let c = 0; c < 3; c++) values[c * area + place] = Math.fround(pixels[place * 3 + c] / 127.5) - 1;
  }
  return { values, shape: [1, 3, side, side], length: 1 };
}

function paint(canvas, values, side) {
  const image = new ImageData(side, side), area = side * side;
  for (let place = 0; place < area; place++) {
    for (let c = 0; c < 3; c++) image.data[place * 4 + c] = (values[c * area + place] + 1) * 127.5;
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
