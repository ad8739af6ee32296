// Read and write packed containers (.vtk); export/bitstream/CONTAINER.md specifies the format.

const MAGIC = [0x89, 0x56, 0x54, 0x4b];
const CHUNK = 65536; // approximate number of codes per written chunk

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function checksum(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC[(crc ^ byte) & 255] ^ (crc >>> 8);
  crc = (crc ^ 0xffffffff) >>> 0;
  return [crc & 255, (crc >>> 8) & 255, (crc >>> 16) & 255, crc >>> 24];
}

function varint(number) {
  const out = [];
  for (; number > 127; number = Math.floor(number / 128)) out.push((number % 128) + 128);
  return [...out, number];
}

const widthOf = (size) => Math.ceil(Math.log2(size));
const common = (a, b) => (b ? common(b, a % b) : a);
const multiple = (strides) => strides.reduce((a, b) => (a * b) / common(a, b), 1);

// Pack the codes of steps `begin` to `end` into bytes. `rows` has one array of BigInts per codebook; a codebook of
// stride s stores a code at every s-th step only. Of a grid, row by row, each code is a step here.
function pack(rows, begin, end, about) {
  const out = [];
  let byte = 0, filled = 0;
  for (let step = begin; step < end; step++) {
    rows.forEach((row, codebook) => {
      if ((step - begin) % about.codebook_strides[codebook]) return;
      for (let bit = widthOf(about.codebook_sizes[codebook]) - 1; bit >= 0; bit--) {
        byte = (byte << 1) | Number((row[step] >> BigInt(bit)) & 1n);
        if (++filled === 8) { out.push(byte); byte = filled = 0; }
      }
    });
  }
  if (filled) out.push(byte << (8 - filled));
  return out;
}

function sizeOf(codebooks, steps, about) {
  const bits = about.codebook_sizes.slice(0, codebooks)
    .reduce((sum, size, codebook) => sum + Math.ceil(steps / about.codebook_strides[codebook]) * widthOf(size), 0);
  return Math.ceil(bits / 8);
}

// Return a container's bytes and its payload size in bytes. `length` is the number of audio samples, or 1 for an image;
// `size` the height and width of an image on a grid.
function writeContainer(rows, length, about, size) {
  const runs = [];
  rows.forEach((_, codebook) => {
    const kind = [about.codebook_sizes[codebook], about.codebook_strides[codebook]];
    const last = runs.at(-1);
    if (last && last[1] === kind[0] && last[2] === kind[1]) last[0]++;
    else runs.push([1, ...kind]);
  });
  const identity = about.identity.match(/../g).map((pair) => parseInt(pair, 16));
  const facts = about.grid ? size : about.facts, inner = about.grid ? [Math.ceil(size[1] / about.grid.hop[1])] : [];
  const numbers = [runs.length, ...runs.flat(), inner.length, ...inner, facts.length, ...facts].flatMap(varint);
  const head = [...MAGIC, 1, about.modality === "audio" ? 1 : 0, ...identity, 0, ...numbers];
  const out = [...head, ...checksum(head)];
  const [across = 1] = inner, whole = multiple(about.codebook_strides.slice(0, rows.length));
  const steps = rows[0].length / across;
  const each = Math.max(1, Math.floor(Math.max(1, Math.floor(CHUNK / rows.length / across)) / whole)) * whole;
  let done = 0, payload = 0;
  for (let begin = 0; begin < steps; begin += each) {
    const end = Math.min(begin + each, steps), codes = pack(rows, begin * across, end * across, about);
    const reached = about.modality === "audio" ? Math.min(end * about.hop, length) : 1;
    const body = [...varint(end - begin), ...varint(reached - done), ...varint(codes.length)];
    for (const code of codes) body.push(code);
    for (const byte of body) out.push(byte);
    out.push(...checksum(body));
    done = reached;
    payload += codes.length;
  }
  out.push(0);
  return { bytes: Uint8Array.from(out), payload };
}

// Return each codebook's codes, the signal's length and an image's size; an error's message is for the user.
function readContainer(bytes, about) {
  let at = 0;
  const take = (count) => {
    if (at + count > bytes.length) throw new Error("truncated; varitok decode can still decode its first chunks");
    at += count;
    return bytes.subarray(at - count, at);
  };
  const number = () => {
    let found = 0, scale = 1, byte;
    do {
      [byte] = take(1);
      found += (byte & 127) * scale;
      scale *= 128;
      if (found > Number.MAX_SAFE_INTEGER) throw new Error("damaged: a number is too large");
    } while (byte > 127);
    return found;
  };
  const check = (begin, what) => {
    const body = bytes.subarray(begin, at);
    const given = take(4);
    if (checksum(body).some((byte, place) => byte !== given[place])) {
      throw new Error(`damaged: the checksum of ${what} differs`);
    }
  };
  if (MAGIC.some((byte, place) => byte !== bytes[place])) throw new Error("not a varitok container (.vtk)");
  take(4);
  const [version, modality] = take(2);
  if (version !== 1) throw new Error(`version ${version} of the container format; this page reads version 1`);
  const identity = Array.from(take(8), (byte) => byte.toString(16).padStart(2, "0")).join("");
  const [coding] = take(1);
  if (coding > 1) take(8);
  const codebooks = [];
  for (let runs = number(); runs > 0; runs--) {
    const [count, size, stride] = [number(), number(), number()];
    if (count > 4096) throw new Error("damaged: more than 4096 codebooks");
    for (let codebook = 0; codebook < count; codebook++) codebooks.push([size, stride]);
  }
  const inner = Array.from({ length: number() }, number), facts = Array.from({ length: number() }, number);
  check(0, "the header");
  const wanted = about.modality === "audio" ? 1 : 0;
  if (modality !== wanted) throw new Error(`codes of another modality, not ${about.modality}`);
  const { codebook_sizes: sizes, codebook_strides: strides } = about;
  if (identity !== about.identity || inner.length !== (about.grid ? 1 : 0) || codebooks.length > sizes.length ||
      codebooks.some(([size, stride], codebook) => size !== sizes[codebook] || stride !== strides[codebook])) {
    throw new Error("codes of another tokenizer; decode them with its own bundle");
  }
  const [across = 1] = inner, side = about.image_size, size = about.grid ? facts : [side, side];
  if (about.grid && (facts.length !== 2 || across !== Math.ceil(facts[1] / about.grid.hop[1]))) {
    throw new Error("damaged: the image's size is not that of its codes");
  }
  if (!about.grid && facts.join() !== about.facts.join()) {
    throw new Error(`codes of another sample rate, not ${about.facts} Hz`);
  }
  if (coding) throw new Error("entropy-coded; this page reads packed codes only, use varitok decode");
  const rows = codebooks.map(() => []);
  let length = 0;
  for (;;) {
    const begin = at, steps = number();
    if (!steps) break;
    length += number();
    const count = number();
    const wrong = steps * across > 2 ** 24 || count !== sizeOf(codebooks.length, steps * across, about);
    if (wrong) throw new Error("damaged: the size of a chunk is wrong");
    const payload = take(count);
    check(begin, "a chunk");
    unpack(payload, steps * across, rows, about);
  }
  if (!rows[0].length) throw new Error("no codes");
  const tokens = rows[0].length, most = about.tokens || Infinity;
  if (tokens > most) throw new Error(`${tokens} tokens, not 1 to ${most}`);
  if (about.grid && tokens !== across * Math.ceil(size[0] / about.grid.hop[0])) {
    throw new Error("damaged: the image's size is not that of its codes");
  }
  return { rows, length, size };
}

function unpack(payload, steps, rows, about) {
  let bit = 0;
  for (let step = 0; step < steps; step++) {
    rows.forEach((row, codebook) => {
      if (step % about.codebook_strides[codebook]) { row.push(row.at(-1)); return; }
      let code = 0n;
      for (let left = widthOf(about.codebook_sizes[codebook]); left > 0; left--, bit++) {
        code = (code << 1n) | BigInt((payload[bit >> 3] >> (7 - (bit & 7))) & 1);
      }
      if (code >= BigInt(about.codebook_sizes[codebook])) throw new Error("damaged: a code is outside its codebook");
      row.push(code);
    });
  }
}
