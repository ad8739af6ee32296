"use strict";
// Show the reconstructions from the number of tokens or codebooks that a slider selects.

const media = JSON.parse(document.getElementById("media").textContent);
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

// Switch to another source at the same playback position, and keep playing if the last one did. A dragged slider
// changes sources faster than they load: keep the position of the last one that played.
function swap(player, source) {
  player.place ??= { time: player.currentTime, playing: !player.paused };
  player.src = source;
}

function resume(player) {
  const { time, playing } = player.place ?? { time: 0, playing: false };
  player.place = undefined;
  if (time) player.currentTime = Math.min(time, player.duration);
  if (playing) player.play().catch(() => {});
}

for (const [id, { rungs, samples }] of Object.entries(media)) {
  const section = document.getElementById(id);
  const slider = section.querySelector("input[type=range]");
  const figures = [...section.querySelectorAll(".sample")];

  const show = () => {
    const at = Number(slider.value);
    section.querySelector("output").textContent = rungs[at].told;
    slider.setAttribute("aria-valuetext", rungs[at].name);
    section.querySelector(".name").textContent = rungs[at].name;
    for (const row of section.querySelectorAll("tr[data-rung]")) {
      row.classList.toggle("current", Number(row.dataset.rung) === at);
    }
    figures.forEach((figure, number) => {
      const [picture, player, told] = samples[number][at];
      const decoded = figure.querySelector(".decoded");
      decoded.querySelector("p").textContent = told;
      const image = decoded.querySelector("img");
      if (image) {
        image.src = picture;
        image.alt = `${image.dataset.name}, from ${rungs[at].name}`;
      }
      const played = decoded.querySelector("audio, video");
      if (played) swap(played, player);
    });
  };

  for (const player of section.querySelectorAll(".decoded audio, .decoded video")) {
    player.addEventListener("loadedmetadata", () => resume(player));
  }
  slider.addEventListener("input", show);
  show();
}

for (const video of document.querySelectorAll("video")) {
  video.controls = still;
  if (video.closest(".decoded")) video.place = { time: 0, playing: !still };
  else if (!still) video.play().catch(() => {});
}

// Play only one audio element at a time.
document.addEventListener("play", ({ target }) => {
  if (target.tagName !== "AUDIO") return;
  for (const other of document.querySelectorAll("audio")) if (other !== target) other.pause();
}, true);
