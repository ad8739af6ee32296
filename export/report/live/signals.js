// Read files as data/decoding does, with equal values, and write decoder outputs to files.

const MOST_PIXELS = 2 ** 27; // of an image
const LEAST_RATE = 2000, MOST_RATE = 768000; // Hz
const LARGEST = 8; // largest peak of a sound; beyond it, the values can't be meant as [-1, 1]
// Of the resampling kernel: zero crossings on either side, cutoff by the lower Nyquist frequency, Kaiser window.
const ZEROS = 64, ROLLOFF = 0.9475937167399596, BETA = 14.769656459379492;
const FINEST_RATIO = 512; // largest denominator of a ratio of rates
const HALF_EVEN = 1.5 * 2 ** 52; // adding and subtracting it rounds to an integer, half to even

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

// Return an image file or its centered square, upright and over white, as RGBA. Color profiles are ignored.
async function readImage(given, square) {
  const { file, orientation } = await takeOrientation(given);
  const image = await createImageBitmap(file, { premultiplyAlpha: "none", colorSpaceConversion: "none" });
  const { width, height } = image;
  if (width * height > MOST_PIXELS) throw new Error(`${width} x ${height} pixels are too many`);
  const turn = TURNS[orientation], [across, down] = turn && orientation > 4 ? [height, width] : [width, height];
  const [wide, high] = square ? [Math.min(width, height), Math.min(width, height)] : [across, down];
  const context = new OffscreenCanvas(wide, high).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, wide, high);
  context.translate(-Math.floor((across - wide) / 2), -Math.floor((down - high) / 2));
  if (turn) context.transform(...turn(width, height));
  context.drawImage(image, 0, 0);
  return { high, wide, pixels: context.getImageData(0, 0, wide, high).data };
}

// Return the values of an image: of its own size if the codec takes any, else of a square of `image_size`.
async function readPicture(file, about) {
  const side = about.image_size, image = await readImage(file, Boolean(side));
  let { high, wide, pixels } = image;
  if (side) {
    pixels = pass(pass(pixels, high, wide, side, 4, wide * 4), side, high, side, side * 4, 4);
    high = wide = side;
  }
  const area = high * wide, values = new Float32Array(3 * area);
  for (let place = 0; place < area; place++) {
    for (let c = 0; c < 3; c++) values[c * area + place] = Math.fround(pixels[place * 4 + c] / 127.5) - 1;
  }
  return { values, shape: [1, 3, high, wide], length: 1, size: [high, wide] };
}

// Paint an image: the upper left `width` x `height` pixels of planes whose rows have `across` values.
function paint(canvas, values, width, height = width, across = width) {
  const image = new ImageData(width, height), area = values.length / 3;
  for (let place = 0, y = 0; y < height; y++) {
    for (let x = 0; x < width; x++, place++) {
      for (let c = 0; c < 3; c++) {
        const pixel = Math.fround(Math.fround(values[c * area + y * across + x] + 1) * 127.5);
        image.data[place * 4 + c] = pixel; // clamped, and rounded half to even
      }
      image.data[place * 4 + 3] = 255;
    }
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Return the numerator and denominator of the fraction nearest to a / b, as Python's Fraction.limit_denominator does.
function nearest(a, b, largest) {
  let [up, down, before, under] = [1, 0, 0, 1], [n, d] = [a, b]; // the last convergent, and the one before
  while (d) {
    const whole = Math.floor(n / d);
    if (under + whole * down > largest) {
      const times = Math.floor((largest - under) / down), between = [before + times * up, under + times * down];
      return 2 * d * between[1] <= b ? [up, down] : between;
    }
    [up, down, before, under] = [before + whole * up, under + whole * down, up, down];
    [n, d] = [d, n - whole * d];
  }
  return [up, down];
}

// The modified Bessel function of order 0, by its power series.
function bessel(x) {
  let sum = 1;
  for (let k = 1, term = 1; term > 1e-17 * sum; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

// Resample to `up` / `down` times the rate; return the first `length` samples. The formula is that of
// data/decoding/resampling.py.
function resample(sound, up, down, length) {
  if (up === down) return sound.slice(0, length);
  const cutoff = ROLLOFF * Math.min(down, up), reach = (ZEROS * down) / cutoff;
  const kernels = Array.from({ length: up }, (_, phase) => {
    const center = (phase * down) / up, first = Math.ceil(center - reach);
    const weights = Float64Array.from({ length: Math.floor(center + reach) - first + 1 }, (_, tap) => {
      const time = cutoff * ((first + tap) / down - phase / up), angle = Math.PI * time;
      const window = bessel(BETA * Math.sqrt(Math.max(0, 1 - (time / ZEROS) ** 2))) / bessel(BETA);
      return ((angle ? Math.sin(angle) / angle : 1) * window * cutoff) / down;
    });
    return { first, weights };
  });
  const out = new Float32Array(length);
  for (let place = 0; place < length; place++) {
    const { first, weights } = kernels[place % up], start = Math.floor(place / up) * down + first;
    const end = Math.min(weights.length, sound.length - start);
    let sum = 0;
    for (let tap = Math.max(0, -start); tap < end; tap++) sum += sound[start + tap] * weights[tap];
    out[place] = sum;
  }
  return out;
}

// Samples of a WAV file by format and number of bytes, scaled as libsndfile does.
const SAMPLES = {
  "1 1": (view, at) => (view.getUint8(at) - 128) / 2 ** 7,
  "1 2": (view, at) => view.getInt16(at, true) / 2 ** 15,
  "1 3": (view, at) => (view.getInt8(at + 2) * 2 ** 16 + view.getUint16(at, true)) / 2 ** 23,
  "1 4": (view, at) => view.getInt32(at, true) / 2 ** 31,
  "3 4": (view, at) => view.getFloat32(at, true),
  "3 8": (view, at) => view.getFloat64(at, true),
};

// Return the sample rate of a WAV file, and the channels of its first seconds unless the browser must decode them.
function readWave(view, seconds) {
  let rate, count, bytes, sample;
  for (const { name, at, size } of chunksOf(view)) {
    if (name === "fmt ") {
      const format = view.getUint16(at, true), extensible = format === 0xfffe;
      [count, rate] = [view.getUint16(at + 2, true), view.getUint32(at + 4, true)];
      bytes = Math.ceil(view.getUint16(at + 14, true) / 8);
      sample = SAMPLES[`${extensible ? view.getUint16(at + 24, true) : format} ${bytes}`];
    } else if (name === "data" && sample && count) {
      const length = Math.min(Math.floor(size / bytes / count), seconds * rate);
      const channels = Array.from({ length: count }, () => new Float32Array(length));
      for (let place = 0; place < length; place++) {
        for (let c = 0; c < count; c++) channels[c][place] = sample(view, at + bytes * (place * count + c));
      }
      return { rate, channels };
    }
  }
  return { rate };
}

// Yield the offset of each box of an MP4 file at a path of names, past its header.
function* boxesOf(view, [name, ...inner], begin = 0, end = view.byteLength) {
  for (let at = begin; at + 8 <= end; ) {
    const long = view.getUint32(at) === 1, body = at + (long ? 16 : 8);
    const size = long ? Number(view.getBigUint64(at + 8)) : view.getUint32(at) || end - at;
    if (word(view, at + 4) === name && inner.length) yield* boxesOf(view, inner, body, Math.min(at + size, end));
    else if (word(view, at + 4) === name) yield body;
    at += Math.max(size, 8);
  }
}

const MP3_RATES = [44100, 48000, 32000];
const AAC_RATES = [96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350];
// Headers of Opus, Vorbis and FLAC, which Ogg and WebM files contain.
const CODECS = {
  OpusHead: () => 48000,
  "\x01vorbis": (view, at) => view.getUint32(at + 12, true),
  fLaC: (view, at) => view.getUint32(at + 18) >>> 12,
};

// Return the sample rate in the header of an MP4, MP3, AAC, FLAC, Ogg or WebM file; undefined if there is none.
function sampleRate(view) {
  if (word(view, 4) === "ftyp") {
    for (const at of boxesOf(view, ["moov", "trak", "mdia", "minf", "stbl", "stsd"])) {
      if (["mp4a", "alac", "fLaC", "Opus"].includes(word(view, at + 12))) return view.getUint16(at + 40);
    }
    return undefined;
  }
  // An ID3 tag may precede the first frame; its size has 7 bits a byte.
  const size = [6, 7, 8, 9].reduce((sum, at) => sum * 128 + view.getUint8(at), 0);
  const tag = word(view, 0, 3) === "ID3" ? 10 + size : 0;
  const frame = view.getUint32(tag), layer = (frame >> 17) & 3;
  if (frame >>> 20 === 0xfff && !layer) return AAC_RATES[(frame >> 10) & 15];
  if (frame >>> 21 === 0x7ff) return MP3_RATES[(frame >> 10) & 3] / [4, NaN, 2, 1][(frame >> 19) & 3];
  const head = new TextDecoder("latin1").decode(new Uint8Array(view.buffer, tag).subarray(0, 1 << 16));
  for (const [mark, rate] of Object.entries(CODECS)) {
    if (head.includes(mark)) return rate(view, tag + head.indexOf(mark));
  }
}

// Chromium divides 16-bit samples by 32767 if they are positive, else by 32768; libsndfile divides all by 32768.
function scaleEvenly(channels) {
  const positive = (value) => Math.abs(value * 32767 - Math.round(value * 32767)) < 0.01;
  const whole = (value) => (value > 0 ? positive(value) : Number.isInteger(value * 32768));
  if (!channels.every((channel) => channel.every(whole))) return channels;
  return channels.map((channel) => channel.map((value) => (value > 0 ? Math.round(value * 32767) / 32768 : value)));
}

// Return a sound's sample rate and the channels of its first seconds. A context of another rate would resample.
async function decodeSound(bytes, seconds) {
  const view = new DataView(bytes), wave = word(view, 0) === "RIFF" && word(view, 8) === "WAVE";
  const { rate, channels } = wave ? readWave(view, seconds) : { rate: sampleRate(view) };
  if (!rate) throw new Error("this page can't find its sample rate; use varitok encode");
  if (rate < LEAST_RATE || rate > MOST_RATE) {
    throw new Error(`a sample rate of ${rate} Hz, not ${LEAST_RATE} to ${MOST_RATE}`);
  }
  if (channels) return { rate, channels };
  const decoded = await new OfflineAudioContext(1, 1, rate).decodeAudioData(bytes);
  const all = Array.from({ length: decoded.numberOfChannels }, (_, c) => decoded.getChannelData(c));
  return { rate, channels: scaleEvenly(all.map((channel) => channel.subarray(0, seconds * rate))) };
}

function checkRange(channels) {
  if (!channels.every((channel) => channel.every(Number.isFinite))) {
    throw new Error("contains values that are not finite");
  }
  const peak = (most, channel) => channel.reduce((one, value) => Math.max(one, Math.abs(value)), most);
  const found = channels.reduce(peak, 0);
  if (found > LARGEST) throw new Error(`contains values up to ${Number(found.toPrecision(3))}, not in [-1, 1]`);
}

// Average all channels to mono; copy mono to all channels; otherwise drop surplus channels.
function mix(channels, wanted) {
  const given = channels.length;
  if (wanted === 1 && given > 1) {
    const sum = new Float32Array(channels[0].length);
    for (const channel of channels) channel.forEach((value, place) => { sum[place] += value; });
    return [sum.map((value) => value / given)];
  }
  if (wanted > given && given > 1) throw new Error(`${given} channels are fewer than ${wanted}`);
  return Array.from({ length: wanted }, (_, c) => channels[given > 1 ? c : 0]);
}

// Describe how the samples differ from the file's; empty if they don't.
function describeChanges(rate, given, about) {
  const { sampling_rate: wanted, channels } = about, found = [];
  if (rate !== wanted) found.push(`${rate} Hz resampled to ${wanted} Hz`);
  const how = channels === 1 ? "averaged" : given === 1 ? `copied to ${channels}` : `cut to ${channels}`;
  if (given !== channels) found.push(`${given} channel${given > 1 ? "s" : ""} ${how}`);
  return found.join(", ");
}

async function readSound(file, about) {
  const bytes = await file.arrayBuffer();
  const { rate, channels } = await decodeSound(bytes, about.most_seconds + 1); // the last sample depends on later ones
  const [up, down] = nearest(about.sampling_rate, rate, FINEST_RATIO), most = about.most_seconds * about.sampling_rate;
  const given = channels[0].length, whole = Math.ceil((given * up) / down), length = Math.min(whole, most);
  if (!length) throw new Error("no samples");
  checkRange(channels);
  const values = new Float32Array(length * about.channels);
  mix(channels, about.channels).forEach((channel, c) => {
    const sound = resample(channel, up, down, length);
    values.set(sound.map((value) => Math.min(1, Math.max(-1, value))), c * length);
  });
  const changes = describeChanges(rate, channels.length, about);
  return { values, shape: [1, about.channels, length], length, changes, cut: length < whole };
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
      const value = values[c * length + place] * 32768 + HALF_EVEN - HALF_EVEN;
      view.setInt16(44 + 2 * (place * channels + c), Math.min(32767, Math.max(-32768, value)), true);
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
