// Encode a file once; at each position of the slider, decode a prefix of its codes.

const about = JSON.parse(document.getElementById("about").textContent);
const find = (id) => document.getElementById(id);
const picture = about.modality === "image";
const ordered = about.tokens > 0; // a shorter code has fewer tokens; else fewer codebooks
const state = { rows: null, length: 0, size: null, name: "", values: null };
const reach = ordered ? about.tokens : about.codebook_sizes.length;
let graphs = null, files = 0;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(find(id).textContent.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function start() {
  const code = new Blob([await unpacked("runtime")], { type: "text/javascript" });
  const ort = await import(URL.createObjectURL(code));
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.proxy = false;
  ort.env.wasm.wasmBinary = (await unpacked("wasm")).buffer;
  const open = async (id) => ort.InferenceSession.create(await unpacked(id), { executionProviders: ["wasm"] });
  graphs = { ort, encoder: await open("encoder"), decoder: await open("decoder") };
}

const ready = start();

function tell(text, wrong = false) {
  find("told").textContent = text;
  find("told").classList.toggle("wrong", wrong);
}

// Run a graph; return the values of its output.
async function run(graph, type, values, shape) {
  const found = await graph.run({ [graph.inputNames[0]]: new graphs.ort.Tensor(type, values, shape) });
  return found[graph.outputNames[0]].data;
}

const encodeWhole = (values, shape) => run(graphs.encoder, "float32", values, shape);
const decodeWhole = (codes, shape) => run(graphs.decoder, "int64", codes, shape);

async function encode(file) {
  const read = await (picture ? readPicture(file, about) : readSound(file, about));
  const { values, shape, length, size, changes, cut } = read, count = about.codebook_sizes.length;
  await ready;
  const begin = performance.now();
  if (about.grid) {
    const part = (tile, sides) => encodeWhole(tile, [1, about.channels, ...sides]);
    state.rows = await encodeTiled(part, values, about.channels, size, count, about.grid);
  } else {
    const codes = await encodeWhole(values, shape), steps = codes.length / count;
    state.rows = about.codebook_sizes.map((_, row) => codes.slice(row * steps, (row + 1) * steps));
  }
  Object.assign(state, { length, size, values });
  const shown = `Encoded in ${(performance.now() - begin).toFixed(0)} ms${changes ? `: ${changes}` : ""}.`;
  tell(cut ? `${shown} Only the first ${about.most_seconds} s were encoded.` : shown);
}

async function openFile(file) {
  files++;
  try {
    tell(`Reading ${file.name} …`);
    const bytes = new Uint8Array(await file.slice(0, 4).arrayBuffer());
    if (file.name.endsWith(".vtk") || (bytes[0] === 0x89 && bytes[1] === 0x56)) {
      const { rows, length, size } = readContainer(new Uint8Array(await file.arrayBuffer()), about);
      await ready;
      Object.assign(state, { rows: rows.map((row) => BigInt64Array.from(row)), length, size, values: null });
      tell("This file contains codes; nothing was encoded.");
    } else {
      await encode(file);
    }
  } catch (error) {
    const broken = error instanceof DOMException || error instanceof RangeError; // RangeError: it ends within a header
    const reason = broken ? `this browser can't read it as ${about.noun}; use varitok encode` : error.message;
    tell(`${file.name}: ${reason}`, true);
    return;
  }
  state.name = file.name.replace(/\.[^.]*$/, "");
  const most = ordered ? state.rows[0].length : state.rows.length;
  find("kept").max = most;
  find("kept").value = most;
  find("most").textContent = most;
  find("results").hidden = false;
  showOriginal();
  await show();
}

// Show the example, unless the reader has opened a file already.
async function showExample() {
  if (about.example && !files) await openFile(new File([await unpacked("example")], about.example.name));
  if (files > 1 || (files && !about.example)) return;
  const shown = about.example ? ` This is the bundle's example: ${about.example.source}.` : "";
  tell(`Ready.${shown} Drop ${about.noun} or a .vtk file, or choose one.`);
}

function showOriginal() {
  find("original").hidden = !state.values;
  if (!state.values) return;
  if (picture) paint(find("before"), state.values, ...[...state.size].reverse());
  else play(find("before"), writeWave(state.values, about.channels, about.sampling_rate));
}

function play(player, wave) {
  const { currentTime, paused } = player;
  if (player.src) URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(wave);
  player.addEventListener("loadedmetadata", () => {
    player.currentTime = Math.min(currentTime, player.duration || 0);
    if (!paused) player.play().catch(() => {});
  }, { once: true });
}

function kept() {
  const count = Number(find("kept").value);
  return ordered ? state.rows.map((row) => row.slice(0, count)) : state.rows.slice(0, count);
}

// Return the signal of codes; of an image on a grid, of whole patches.
async function decode(rows) {
  if (about.grid) {
    const part = (codes, steps) => decodeWhole(codes, [1, rows.length, ...steps]);
    return decodeTiled(part, rows, about.channels, gridOf(state.size), about.grid);
  }
  return decodeWhole(BigInt64Array.from(rows.flatMap((row) => [...row])), [1, rows.length, rows[0].length]);
}

const gridOf = (size) => size.map((side, axis) => Math.ceil(side / about.grid.hop[axis]));

// A dragged slider moves faster than the decoder runs: skip all positions but the last.
let busy = false, again = false;
async function show() {
  if (busy) { again = true; return; }
  busy = true;
  do {
    again = false;
    const rows = kept(), begin = performance.now();
    const signal = await decode(rows), took = performance.now() - begin;
    const { bytes, payload } = writeContainer(rows, state.length, about, state.size);
    if (picture) {
      const [height, width] = state.size;
      paint(find("after"), signal, width, height, about.grid ? gridOf(state.size)[1] * about.grid.hop[1] : width);
    } else {
      const { length } = state, all = signal.length / about.channels;
      const values = new Float32Array(length * about.channels);
      for (let c = 0; c < about.channels; c++) values.set(signal.slice(c * all, c * all + length), c * length);
      state.wave = writeWave(values, about.channels, about.sampling_rate);
      play(find("after"), state.wave);
    }
    const count = Number(find("kept").value), unit = ordered ? "token" : "codebook";
    const rate = picture ? "" : `, ${((payload * 8) / (state.length / about.sampling_rate) / 1000).toFixed(2)} kbit/s`;
    const words = `${count} ${unit}${count === 1 ? "" : "s"}`;
    const sizes = `${payload} bytes of codes${rate}, ${bytes.length} as a file`;
    find("size").textContent = `${words}: ${sizes}; decoded in ${took.toFixed(0)} ms`;
    find("kept").setAttribute("aria-valuetext", words);
    state.container = bytes;
    state.shown = count;
  } while (again);
  busy = false;
}

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = state.name + suffix;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

find("kept").addEventListener("input", show);
find("file").addEventListener("change", ({ target }) => target.files[0] && openFile(target.files[0]));
find("save").addEventListener("click", () => save(new Blob([state.container]), ".vtk"));
find("save-signal").addEventListener("click", () => {
  if (picture) find("after").toBlob((blob) => save(blob, ".png"));
  else save(state.wave, ".wav");
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files[0]) openFile(event.dataTransfer.files[0]);
  });
}
find("kept").max = reach;
ready.then(showExample)
  .catch((error) => tell(`ONNX Runtime could not start in this browser (${error.message}); try a newer one.`, true));
