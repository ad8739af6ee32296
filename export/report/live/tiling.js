// Encode and decode images on a grid in overlapping tiles, as export/runtime/tiling.py does.

const OVERLAP = 4; // neighboring windows overlap by 1 / OVERLAP of a window, the last two by more if needed

// Split an axis into windows of at most `size` steps; of each, the codes in [first, last) are kept.
function windowsOf(steps, size) {
  const found = [], stride = Math.max(1, size - Math.max(1, Math.floor(size / OVERLAP)));
  let begin = 0, first = 0;
  while (steps > begin + size) {
    const follows = Math.min(begin + stride, steps - size), last = Math.floor((follows + begin + size) / 2);
    found.push({ begin, end: begin + size, first, last });
    [begin, first] = [follows, last];
  }
  found.push({ begin, end: steps, first, last: steps });
  return found;
}

// Return each pair of a window of rows and one of columns; `tile` is in pixels.
function tilesOf(grid, hop, tile) {
  const [rows, columns] = grid.map((steps, axis) => windowsOf(steps, Math.floor(tile[axis] / hop[axis])));
  return rows.flatMap((down) => columns.map((across) => ({ down, across, rows, columns })));
}

// Copy the box of `size` (planes, height, width) at (top, left) of an array of planes to one of its own.
function boxOf(values, [height, width], [planes, down, across], top, left, Kind) {
  const out = new Kind(planes * down * across);
  for (let plane = 0; plane < planes; plane++) {
    for (let y = 0; y < down; y++) {
      const at = (plane * height + top + y) * width + left;
      out.set(values.subarray(at, at + across), (plane * down + y) * across);
    }
  }
  return out;
}

// Return the codes (codebooks, *grid) of values (c, *size), an array for each codebook; `run` returns those of a tile.
async function encodeTiled(run, values, channels, size, codebooks, { hop, tile }) {
  const grid = size.map((side, axis) => Math.ceil(side / hop[axis])), [rows, columns] = grid;
  const codes = Array.from({ length: codebooks }, () => new BigInt64Array(rows * columns));
  for (const { down, across } of tilesOf(grid, hop, tile.encoder)) {
    const [top, left] = [down.begin * hop[0], across.begin * hop[1]];
    const sides = [Math.min(down.end * hop[0], size[0]) - top, Math.min(across.end * hop[1], size[1]) - left];
    const part = await run(boxOf(values, size, [channels, ...sides], top, left, Float32Array), sides);
    const width = across.end - across.begin, area = (down.end - down.begin) * width;
    codes.forEach((row, codebook) => {
      for (let y = down.first; y < down.last; y++) {
        const at = codebook * area + (y - down.begin) * width - across.begin;
        row.set(part.subarray(at + across.first, at + across.last), y * columns + across.first);
      }
    });
  }
  return codes;
}

// Return a window's blending weight at each of its pixels; those of all windows sum to 1.
function fadeOf(one, among, step) {
  const tent = ({ begin, end }, place) => {
    const rise = Math.max(1, Math.floor((end - begin) / OVERLAP)) * step;
    return Math.min(1, Math.max(0, Math.min(place - begin * step, end * step - place) / rise));
  };
  return Float32Array.from({ length: (one.end - one.begin) * step }, (_, at) => {
    const place = one.begin * step + at + 0.5;
    return tent(one, place) / among.reduce((sum, other) => sum + tent(other, place), 0);
  });
}

// Return the signal (c, *(grid * hop)) of codes (codebooks, *grid); `run` returns that of a tile's codes.
async function decodeTiled(run, codes, channels, grid, { hop, tile }) {
  const [height, width] = grid.map((steps, axis) => steps * hop[axis]);
  const signal = new Float32Array(channels * height * width);
  for (const { down, across, rows, columns } of tilesOf(grid, hop, tile.decoder)) {
    const steps = [down.end - down.begin, across.end - across.begin], area = steps[0] * steps[1];
    const given = new BigInt64Array(codes.length * area);
    codes.forEach((row, codebook) => {
      given.set(boxOf(row, grid, [1, ...steps], down.begin, across.begin, BigInt64Array), codebook * area);
    });
    const part = await run(given, steps), [high, wide] = [steps[0] * hop[0], steps[1] * hop[1]];
    const fade = [fadeOf(down, rows, hop[0]), fadeOf(across, columns, hop[1])];
    for (let c = 0; c < channels; c++) {
      for (let y = 0; y < high; y++) {
        const at = (c * height + down.begin * hop[0] + y) * width + across.begin * hop[1];
        for (let x = 0; x < wide; x++) signal[at + x] += part[(c * high + y) * wide + x] * fade[0][y] * fade[1][x];
      }
    }
  }
  return signal;
}
