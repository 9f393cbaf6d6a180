// The picture with what is drawn over it; where people point and walk with the keys.

import { draw } from "./drawing.js";
import { find, prefersCalm, show } from "./elements.js";
import { cellsOf, isIn, layerName, pointsOf } from "./geometry.js";
import { Found } from "./objects.js";
import { first } from "./sides.js";
import { store } from "./store.js";

const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const MOVE_MS = 900;

export class Stage {
  // `side` is what is shown; the names of the elements of the second one begin with `prefix`.
  constructor(side, prefix = "") {
    this.side = side;
    this.element = find(`${prefix}stage`);
    this.picture = find(`${prefix}picture`);
    this.overlay = find(`${prefix}overlay`);
    this.prepared = { objects: [], labels: null, points: [] }; // of the answer that is shown, kept between drawings
    this.moving = 0;
    this.element.addEventListener("click", (event) => this.point(event));
    this.element.addEventListener("keydown", (event) => this.walk(event));
    this.element.addEventListener("pointermove", (event) => this.hover(event));
    this.element.addEventListener("pointerleave", () => store.now.lit !== null && store.change({ lit: null }));
    new ResizeObserver(() => this.redraw()).observe(this.element);
    store.listen((_, changed) => {
      if (["chosen", "model", "beside"].some((part) => changed.has(part))) this.change();
      this.redraw();
    });
  }

  // Show another picture, or the next frame of a camera.
  change() {
    const { chosen } = store.now;
    const shown = chosen?.shown ?? null;
    show(this.picture, Boolean(shown));
    show(this.overlay, Boolean(shown));
    if (!shown) return;
    this.picture.width = shown.width;
    this.picture.height = shown.height;
    this.picture.getContext("2d").drawImage(shown, 0, 0);
    const [width, height] = chosen.size;
    // As large as there is room, and never so high that the page has to be scrolled for it.
    this.element.style.setProperty("aspect-ratio", `${width} / ${height}`);
    this.element.style.setProperty("--shape", String(width / height));
    const seen = store.now.beside ? `, as ${this.side.model?.name} sees it` : "";
    this.element.setAttribute("aria-label", `Picture ${chosen.name}${seen}`);
  }

  redraw() {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.drawNow());
  }

  drawNow() {
    const { chosen } = store.now;
    if (!chosen?.shown || !this.side.model) return;
    const { width, height } = this.element.getBoundingClientRect();
    const unit = devicePixelRatio || 1;
    this.overlay.width = Math.max(1, Math.round(width * unit));
    this.overlay.height = Math.max(1, Math.round(height * unit));
    const view = this.view(this.overlay.width / chosen.size[0], unit);
    draw(this.overlay.getContext("2d"), view);
    this.tell(view);
  }

  // What `drawing.js` draws, at a scale.
  view(scale, unit) {
    const { chosen, travel, sized, threshold, opacity } = store.now;
    const { layer, query, grid, hidden } = this.side;
    const [width, height] = chosen.size;
    const lit = this.side === first ? store.now.lit : null; // chosen among the objects of that
    const prepared = this.prepare();
    const objects = prepared.objects.filter(({ score }) => score >= threshold);
    const shownLit = lit === null ? null : objects.findIndex(({ index }) => index === lit);
    const litObject = shownLit === null || shownLit < 0 ? null : objects[shownLit];
    const { points, labels } = prepared;
    const litSegment = labels && lit !== null && lit < labels.segments.length ? lit : null;
    return {
      width, height, scale, unit, points, hidden, travel, sized, objects, layer, labels, opacity, litSegment,
      lit: litObject ? shownLit : null,
      litPoints: points.length ? litPoints(points, litObject, labels, litSegment) : null,
      query,
      cell: grid?.pitch ?? null,
    };
  }

  // Points of the layer and masks of the objects, made once for an answer.
  prepare() {
    const { answered, layer } = this.side;
    const received = answered?.received.get(layer);
    const { prepared } = this;
    if (prepared.answered !== answered) {
      prepared.objects = (answered?.result.detections ?? []).map((one, index) => new Found(one, index));
      prepared.labels = answered?.labels ?? null;
    }
    if (prepared.answered !== answered || prepared.layer !== layer || prepared.received !== received) {
      const found = answered?.layers.find((one) => layerName(one) === layer);
      prepared.points = found ? pointsOf(found, received) : [];
    }
    return Object.assign(prepared, { answered, layer, received });
  }

  // What is drawn, for those who cannot see it drawn, and for tests.
  tell(view) {
    const { query } = view;
    Object.assign(this.element.dataset, {
      picture: store.now.chosen.name,
      points: view.points.filter((point) => !view.hidden.has(point.group)).length,
      objects: view.objects.length,
      segments: view.labels?.segments.length ?? 0,
      opacity: view.opacity,
      lit: view.litPoints?.size ?? "",
      layer: view.layer ?? "",
      travel: view.travel.toFixed(2),
      query: query ? `${query.row},${query.column}` : "",
      keys: query ? keysOf(query, view.hidden) : 0,
      window: query?.window?.join() ?? "",
    });
  }

  place(event) {
    const { left, top, width, height } = this.element.getBoundingClientRect();
    const [w, h] = store.now.chosen.size;
    return [((event.clientX - left) / width) * w, ((event.clientY - top) / height) * h];
  }

  point(event) {
    const { answered, grid } = this.side;
    if (!answered?.grids.size) return;
    if (!grid) {
      store.change({ query: inPicture(this.place(event)) }); // its cell is told with the layer
      return;
    }
    // A cell that is chosen already is let go again.
    const cell = grid.nearest(this.place(event));
    const now = store.now.query && grid.nearest(store.now.query);
    const same = now && now.row === cell.row && now.column === cell.column;
    store.change({ query: same ? null : inPicture(grid.centre(cell)) });
  }

  walk(event) {
    if (event.key === "Escape" && store.now.query) {
      store.change({ query: null });
      event.preventDefault();
      return;
    }
    const { grid } = this.side;
    const step = STEPS[event.key];
    if (!step || !grid || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const { chosen, query } = store.now;
    const middle = [chosen.size[0] / 2, chosen.size[1] / 2];
    const cell = grid.nearest(query ?? middle);
    const next = query ? grid.within({ row: cell.row + step[0], column: cell.column + step[1] }) : cell;
    store.change({ query: inPicture(grid.centre(next)) });
  }

  hover(event) {
    if (event.pointerType === "touch" || !store.now.chosen?.size || this.side !== first) return;
    const place = this.place(event);
    const lit = this.under(place);
    if (lit !== store.now.lit) store.change({ lit });
  }

  // The index of the segment, or of the smallest object, at a place.
  under(place) {
    const { objects, labels } = this.prepare();
    if (labels) return labels.at(place);
    const found = objects
      .filter(({ score }) => score >= store.now.threshold)
      .filter((object) => isIn(place, object, null))
      .sort((a, b) => area(a.box) - area(b.box));
    return found[0]?.index ?? null;
  }

  // Move the points from their references to where the model read.
  play() {
    cancelAnimationFrame(this.moving);
    if (prefersCalm()) {
      store.change({ travel: 1 });
      return;
    }
    const begun = performance.now();
    const step = (now) => {
      const share = Math.min(1, Math.max(0, (now - begun) / MOVE_MS));
      store.change({ travel: 1 - (1 - share) ** 3 });
      if (share < 1) this.moving = requestAnimationFrame(step);
    };
    store.change({ travel: 0 });
    this.moving = requestAnimationFrame(step);
  }

  stop() {
    cancelAnimationFrame(this.moving);
  }
}

// The points in what is lit, an object or a segment; null where nothing is.
function litPoints(points, object, labels, segment) {
  if (object) return new Set(points.filter(({ location }) => isIn(location, object, object.mask)));
  if (segment === null) return null;
  return new Set(points.filter(({ location }) => labels.at(location) === segment));
}

function area([x1, y1, x2, y2]) {
  return (x2 - x1) * (y2 - y1);
}

// Centres of cells at the rim may lie a little outside.
function inPicture([x, y]) {
  const [width, height] = store.now.chosen.size;
  return [Math.min(Math.max(x, 0), width), Math.min(Math.max(y, 0), height)];
}

function keysOf(query, hidden) {
  if (query.window) return cellsOf(query, hidden).length;
  return query.groups.filter((_, group) => !hidden.has(group)).flat().length;
}
