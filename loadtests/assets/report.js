// A time line that follows the pointer over all panels, and the tip of whatever it points at.
const figure = document.querySelector("figure");
const svg = document.getElementById("picture");
const cross = document.getElementById("cross");
const tip = document.getElementById("tip");
const { left, right, end } = svg.dataset;

svg.addEventListener("pointermove", (event) => {
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const inside = x >= +left && x <= +right;
  cross.style.opacity = inside ? 0.45 : 0;
  if (inside) {
    cross.setAttribute("x1", x);
    cross.setAttribute("x2", x);
  }
  const seconds = ((x - left) / (right - left)) * end;
  tip.textContent = event.target.dataset.tip || (inside ? `${seconds.toFixed(1)} s` : "");
  tip.style.display = tip.textContent ? "block" : "none";
  const frame = figure.getBoundingClientRect();
  const place = event.clientX - frame.left;
  tip.style.left = `${Math.max(0, Math.min(place + 14, frame.width - tip.offsetWidth))}px`;
  tip.style.top = `${event.clientY - frame.top + 16}px`;
});
svg.addEventListener("pointerleave", () => {
  cross.style.opacity = 0;
  tip.style.display = "none";
});
