"use strict";
// The sliders: the range input's value is where the picture before ends and the one after begins.
for (const input of document.querySelectorAll(".compare input")) {
  const show = () => {
    input.parentElement.style.setProperty("--at", input.value + "%");
    input.setAttribute("aria-valuetext", Math.round(input.value) + " %");
  };
  input.addEventListener("input", show);
  show();
}
// The heat maps: a cell is read by pointing at it, or with the arrow keys.
for (const figure of document.querySelectorAll(".heat")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const cells = figure.querySelector(".cells"), mark = figure.querySelector(".cell"), output = figure.querySelector("output");
  const rows = data.values.length, columns = data.columns.length;
  let row = 0, column = 0;
  const show = (r, c) => {
    row = Math.min(Math.max(r, 0), rows - 1);
    column = Math.min(Math.max(c, 0), columns - 1);
    const value = data.values[row][column];
    const error = value === null ? "not finite" : (100 * value).toPrecision(3) + " %";
    output.textContent = `${error} · ${data.layers[data.worst[row][column]]} · timestep ${data.columns[column]}`;
    mark.hidden = false;
    mark.style.cssText = `left:${100 * column / columns}%;top:${100 * row / rows}%;` +
      `width:${100 / columns}%;height:${100 / rows}%`;
  };
  cells.addEventListener("pointermove", (event) => {
    const box = cells.getBoundingClientRect();
    show(Math.floor(rows * (event.clientY - box.top) / box.height), Math.floor(columns * (event.clientX - box.left) / box.width));
  });
  cells.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    if (mark.hidden) show(0, 0); else show(row + move[0], column + move[1]);
  });
}
