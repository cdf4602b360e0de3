"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const SIZE = 1000, MARGIN = 45, MOST_ZOOM = 20; // units of a map
const DOT = 5.5, THUMB = 40, REACH = 16; // pixels on the screen
const COLOURS = ["#3b82c4", "#d9700f", "#2f9e44", "#d6404a", "#9467bd", "#a0683f", "#d45fa8", "#1d9aa6", "#8f9312", "#7b8490"];
const SHAPES = ["M-1,0a1,1,0,1,0,2,0a1,1,0,1,0,-2,0z", "M-.9-.9h1.8v1.8h-1.8z", "M0-1.25L1.2.95H-1.2z", "M0-1.3L1.3,0L0,1.3L-1.3,0z"];

// Past ten classes colours go round the circle by the golden angle, so that neighbouring classes differ.
const colourOf = label =>
  label < 0 ? "var(--s0)" : data.classes.length <= COLOURS.length ? COLOURS[label] : `hsl(${(label * 137.5) % 360} 58% 52%)`;
const shapeOf = label => SHAPES[Math.max(label, 0) % SHAPES.length];

function html(name, attributes = {}, ...children) {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...children);
  return element;
}

function svg(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function show(image, place) {
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 32);
  image.src = data.thumbnails[place];
  return image;
}

const thumb = (place, classes = "") =>
  show(html("img", {className: `thumb ${classes}`, alt: data.titles[place], title: data.titles[place]}), place);

function neighbours(number, model) {
  const label = data.labels[data.mapped[number]];
  return html("ol", {className: "found"}, ...data.neighbours[model][number].map(other => {
    const place = data.mapped[other], known = label >= 0 && data.labels[place] >= 0;
    const same = label === data.labels[place];
    return html("li", {}, thumb(place, known ? (same ? "same" : "other") : ""), known ? (same ? "✓" : "✗") : "");
  }));
}

for (const image of document.querySelectorAll("[data-thumbnail]")) show(image, image.dataset.thumbnail);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
// On a phone one opens what one wants to read.
if (matchMedia("(max-width: 40rem)").matches) for (const part of document.querySelectorAll("details[open]")) part.open = false;

if (byId("maps")) {
  const state = {chosen: null, pane: null, selected: new Set(), classes: new Set(), text: "", images: false};
  const labelOf = number => data.labels[data.mapped[number]];
  const titleOf = number => data.titles[data.mapped[number]];
  const isShown = number =>
    (!state.classes.size || state.classes.has(labelOf(number))) && titleOf(number).toLowerCase().includes(state.text);
  const isFiltered = () => state.classes.size || state.text;
  const shown = () => [...data.mapped.keys()].filter(isShown);
  const panes = [...document.querySelectorAll(".pane")].map(makePane);

  function makePane(figure) {
    const map = figure.querySelector(".map"), model = figure.querySelector("select");
    const stage = figure.querySelector(".stage"), bubble = figure.querySelector(".bubble:not(.hint)");
    const hint = figure.querySelector(".hint"), pointers = new Map();
    let view = {x: 0, y: 0, width: SIZE}, points = [], marks = [], start = null, band = null;

    const pixel = () => view.width / (map.clientWidth || 1); // units
    const toUnits = (x, y) => {
      const box = map.getBoundingClientRect();
      return [view.x + (x - box.left) * pixel(), view.y + (y - box.top) * pixel()];
    };

    function draw() {
      points = data.maps[model.value].map(place => place.map(share => MARGIN + share * (SIZE - 2 * MARGIN)));
      marks = points.map((_, number) => {
        const mark = svg("g", {class: "mark", "data-number": number}), colour = colourOf(labelOf(number));
        if (state.images) {
          const corner = {x: -THUMB / 2, y: -THUMB / 2, width: THUMB, height: THUMB};
          mark.append(svg("image", {...corner, preserveAspectRatio: "xMidYMid slice", href: data.thumbnails[data.mapped[number]]}));
          mark.append(svg("rect", {...corner, rx: 3, stroke: colour}));
        } else {
          const dot = {d: shapeOf(labelOf(number)), fill: colour, transform: `scale(${DOT})`};
          mark.append(svg("path", {...dot, "vector-effect": "non-scaling-stroke"}));
        }
        mark.append(svg("circle", {class: "ring", r: state.images ? THUMB * 0.74 : DOT * 2}));
        return mark;
      });
      map.replaceChildren(...marks);
      move();
      paint();
    }

    function move() {
      view.width = Math.min(Math.max(view.width, SIZE / MOST_ZOOM), SIZE);
      for (const axis of ["x", "y"]) view[axis] = Math.min(Math.max(view[axis], 0), SIZE - view.width);
      map.setAttribute("viewBox", `${view.x} ${view.y} ${view.width} ${view.width}`);
      map.classList.toggle("zoomed", view.width < SIZE);
      points.forEach(([x, y], number) => marks[number].setAttribute("transform", `translate(${x} ${y}) scale(${pixel()})`));
      placeBubble();
    }

    function zoom(factor, [x, y] = [view.x + view.width / 2, view.y + view.width / 2]) {
      const width = Math.min(Math.max(view.width / factor, SIZE / MOST_ZOOM), SIZE), share = width / view.width;
      view = {x: x - (x - view.x) * share, y: y - (y - view.y) * share, width};
      move();
    }

    function paint() {
      hint.hidden = true;
      const near = state.chosen === null ? [] : data.neighbours[model.value][state.chosen];
      marks.forEach((mark, number) => {
        mark.classList.toggle("dim", !isShown(number));
        mark.classList.toggle("selected", state.selected.has(number));
        mark.classList.toggle("near", near.includes(number));
        mark.classList.toggle("chosen", number === state.chosen);
        if (near.includes(number) || (isShown(number) && isFiltered())) map.append(mark); // on top
      });
      bubble.hidden = state.chosen === null || state.pane !== figure;
      if (state.chosen === null) return;
      map.append(marks[state.chosen]);
      if (bubble.hidden) return;
      const select = html("button", {
        type: "button",
        textContent: state.selected.has(state.chosen) ? "Take out of the selection" : "Add to the selection",
        onclick: () => toggleSelected(state.chosen),
      });
      const close = html("button", {type: "button", className: "close", textContent: "×", onclick: () => choose(null)});
      close.setAttribute("aria-label", "Close");
      bubble.replaceChildren(
        html("div", {className: "query"}, thumb(data.mapped[state.chosen]), titleOf(state.chosen)), close,
        html("small", {textContent: `Nearest under ${model.value}`}), neighbours(state.chosen, model.value), select);
      placeBubble();
    }

    // Beside the point where there is room, else above or below it.
    function beside(element, number) {
      const [x, y] = [0, 1].map(axis => (points[number][axis] - view["xy"[axis]]) / pixel());
      const [width, height, side] = [element.offsetWidth, element.offsetHeight, map.clientWidth], gap = 18;
      element.style.visibility = x < 0 || y < 0 || x > side || y > side ? "hidden" : "";
      const isRight = x + gap + width <= side, isBeside = isRight || x - gap - width >= 0;
      const left = isBeside ? (isRight ? x + gap : x - gap - width) : Math.min(Math.max(x - width / 2, 0), side - width);
      const top = isBeside ? Math.min(Math.max(y - height / 2, 0), side - height) : y > side / 2 ? y - gap - height : y + gap;
      Object.assign(element.style, {left: `${left}px`, top: `${top}px`});
    }

    function placeBubble() {
      if (!bubble.hidden && state.chosen !== null) beside(bubble, state.chosen);
    }

    function under(event) {
      const [x, y] = toUnits(event.clientX, event.clientY);
      let found = null, least = (state.images ? THUMB * 0.7 : event.pointerType === "touch" ? REACH * 1.6 : REACH) * pixel();
      points.forEach(([px, py], number) => {
        const distance = Math.hypot(px - x, py - y);
        if (distance < least && isShown(number)) [found, least] = [number, distance];
      });
      return found;
    }

    map.addEventListener("pointerdown", event => {
      pointers.set(event.pointerId, [event.clientX, event.clientY]);
      map.setPointerCapture(event.pointerId);
      start = {x: event.clientX, y: event.clientY, view, moved: pointers.size > 1};
      start.selects = event.shiftKey || byId("rectangle").ariaPressed === "true";
    });
    map.addEventListener("pointermove", event => {
      if (!pointers.has(event.pointerId)) {
        const number = event.pointerType === "mouse" ? under(event) : null;
        hint.hidden = number === null || (number === state.chosen && !bubble.hidden);
        if (hint.hidden) return;
        hint.replaceChildren(thumb(data.mapped[number]), titleOf(number));
        beside(hint, number);
        return;
      }
      const before = [...pointers.values()];
      pointers.set(event.pointerId, [event.clientX, event.clientY]);
      const now = [...pointers.values()];
      hint.hidden = true;
      if (now.length > 1) {
        const spread = ([[ax, ay], [bx, by]]) => Math.hypot(ax - bx, ay - by) || 1;
        zoom(spread(now) / spread(before), toUnits((now[0][0] + now[1][0]) / 2, (now[0][1] + now[1][1]) / 2));
        return;
      }
      const [dx, dy] = [event.clientX - start.x, event.clientY - start.y];
      start.moved ||= Math.hypot(dx, dy) > 5;
      if (start.selects && start.moved) {
        const [left, top] = toUnits(Math.min(start.x, event.clientX), Math.min(start.y, event.clientY));
        band ??= map.appendChild(svg("rect", {class: "band"}));
        band.box = {x: left, y: top, width: Math.abs(dx) * pixel(), height: Math.abs(dy) * pixel()};
        for (const [key, value] of Object.entries(band.box)) band.setAttribute(key, value);
      } else if (start.moved) {
        view = {...start.view, x: start.view.x - dx * pixel(), y: start.view.y - dy * pixel()};
        move();
      }
    });
    const end = event => {
      if (!pointers.delete(event.pointerId)) return;
      if (band) {
        const {x, y, width, height} = band.box;
        band.remove();
        band = null;
        const isIn = number => points[number][0] >= x && points[number][0] <= x + width
          && points[number][1] >= y && points[number][1] <= y + height;
        select(shown().filter(isIn));
      } else if (event.type === "pointerup" && !start.moved) {
        choose(under(event), figure);
      }
    };
    map.addEventListener("pointerup", end);
    map.addEventListener("pointercancel", end);
    map.addEventListener("pointerleave", () => { hint.hidden = true; });
    map.addEventListener("wheel", event => {
      // The page scrolls on over a map that nobody has clicked.
      if (!event.ctrlKey && document.activeElement !== map) return;
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 400), toUnits(event.clientX, event.clientY));
    }, {passive: false});
    map.addEventListener("keydown", event => {
      const way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
      const done = {
        Escape: () => choose(null), "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => zoom(0),
        " ": () => state.chosen !== null && toggleSelected(state.chosen),
      }[event.key];
      if (!way && !done) return;
      event.preventDefault();
      if (done) return void done();
      if (state.chosen === null) return choose(shown()[0] ?? null, figure);
      const [x, y] = points[state.chosen];
      let best = null, least = Infinity;
      for (const number of shown()) {
        const ahead = (points[number][0] - x) * way[0] + (points[number][1] - y) * way[1];
        const aside = Math.abs((points[number][0] - x) * way[1]) + Math.abs((points[number][1] - y) * way[0]);
        if (ahead > 0.01 && ahead + 2 * aside < least) [best, least] = [number, ahead + 2 * aside];
      }
      if (best !== null) choose(best, figure);
    });
    for (const [action, factor] of [["in", 1.5], ["out", 1 / 1.5], ["all", 0]]) {
      figure.querySelector(`[data-zoom=${action}]`).addEventListener("click", () => zoom(factor));
    }
    model.addEventListener("change", draw);
    new ResizeObserver(move).observe(map);
    draw();
    return {draw, paint};
  }

  function choose(number, pane = state.pane) {
    Object.assign(state, {chosen: number, pane});
    paintAll();
    byId("chosen").textContent = number === null ? "No image is chosen." : `Chosen: ${titleOf(number)}.`;
    byId("nearest").replaceChildren(...(number === null ? [] : Object.keys(data.neighbours).map(model =>
      html("div", {}, html("small", {textContent: model}), neighbours(number, model)))));
  }

  function select(numbers) {
    for (const number of numbers) state.selected.add(number);
    paintAll();
  }

  function toggleSelected(number) {
    if (!state.selected.delete(number)) state.selected.add(number);
    paintAll();
  }

  function paintAll() {
    for (const pane of panes) pane.paint();
    const number = shown().length, selected = state.selected.size;
    byId("count").textContent = number < data.mapped.length ? `${number} of ${data.mapped.length} images shown.` : "";
    byId("select-shown").textContent = `Select the ${number} shown`;
    byId("selected").textContent = `${selected} selected`;
    byId("export").disabled = byId("unselect").disabled = !selected;
  }

  function exportNames() {
    const quoted = text => `"${text.replaceAll('"', '""')}"`;
    const rows = [...state.selected].sort((a, b) => a - b).map(number => {
      const place = data.mapped[number], label = data.labels[place];
      return [data.names[place], label < 0 ? "" : data.classes[label]].map(quoted).join(",");
    });
    const file = new Blob([["name,class", ...rows, ""].join("\r\n")], {type: "text/csv"});
    const link = html("a", {href: URL.createObjectURL(file), download: "selection.csv"});
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  for (const [label, name] of data.classes.entries()) {
    const number = data.mapped.filter(place => data.labels[place] === label).length;
    if (!number) continue;
    const swatch = svg("svg", {viewBox: "-1.6 -1.6 3.2 3.2", "aria-hidden": true});
    swatch.append(svg("path", {d: shapeOf(label), fill: colourOf(label), }));
    const button = html("button", {type: "button", ariaPressed: "false"}, swatch, `${name} (${number})`);
    button.addEventListener("click", () => {
      if (!state.classes.delete(label)) state.classes.add(label);
      button.ariaPressed = String(state.classes.has(label));
      paintAll();
    });
    byId("legend").append(button);
  }
  byId("find").addEventListener("input", event => {
    state.text = event.target.value.trim().toLowerCase();
    paintAll();
  });
  byId("find").addEventListener("keydown", event => {
    if (event.key === "Enter") choose(shown()[0] ?? null, document.querySelector(".pane"));
  });
  byId("images").addEventListener("click", event => {
    state.images = !state.images;
    event.currentTarget.ariaPressed = String(state.images);
    for (const pane of panes) pane.draw();
  });
  byId("rectangle").addEventListener("click", event => {
    const isOn = event.currentTarget.ariaPressed !== "true";
    event.currentTarget.ariaPressed = String(isOn);
    byId("maps").parentElement.classList.toggle("selecting", isOn);
  });
  byId("select-shown").addEventListener("click", () => select(shown()));
  byId("unselect").addEventListener("click", () => {
    state.selected.clear();
    paintAll();
  });
  byId("export").addEventListener("click", exportNames);
  paintAll();
}
