// Draws what an answer says over a picture. Knows no elements of the page: the same view is drawn on the
// screen and into files.
//
// A view has `points` (see geometry.js), `hidden` groups, `travel`, `sized`, `query`, `objects`, `lit`
// (an object) and `litPoints`; of a segmenter `labels`, their `opacity` and `litSegment`; of a model with windows `cell`, the size of one. `scale` is pixels of the canvas for each pixel of the picture, `unit`
// pixels of the canvas for each pixel of a screen.

import { baseRadius, cellsOf, relativeRadius, travelled } from "./geometry.js";
import { INK, PAPER, groupColour } from "./palette.js";

const FAINT = 0.22;
const THICKEST = 9;
const TILE = 0.84; // side of that of the heaviest cell, of a cell

export function draw(context, view) {
  const { canvas } = context;
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.lineJoin = context.lineCap = "round";
  if (view.query) veil(context, 0.42);
  else if (view.points.length) veil(context, 0.12);
  if (view.query?.window) unveil(context, view);
  if (view.labels) drawLabelled(context, view);
  view.objects.forEach((object, index) => drawMask(context, view, object, index));
  const points = placed(view);
  if (view.travel > 0.02) points.forEach((point) => drawWay(context, view, point));
  drawReferences(context, view);
  if (view.query?.window) drawWindow(context, view);
  else if (view.query) drawRays(context, view);
  points.forEach((point) => drawPoint(context, view, point));
  view.objects.forEach((object, index) => drawBox(context, view, object, index));
  drawLabels(context, view);
  if (view.query) drawQuery(context, view);
}

function veil(context, strength) {
  context.globalAlpha = strength;
  context.fillStyle = INK;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
  context.globalAlpha = 1;
}

// The points that are shown, with their place, radius and strength on the canvas.
function placed(view) {
  const shown = view.points.filter((point) => !view.hidden.has(point.group));
  const screen = [view.width, view.height].map((side) => (side * view.scale) / view.unit);
  const base = baseRadius(view.points.length, ...screen);
  const mean = shown.reduce((sum, point) => sum + (point.received ?? 0), 0) / (shown.length || 1);
  const keys = attended(view.query);
  return shown
    .map((point) => {
      const sized = view.sized && point.received !== null;
      const lit = view.litPoints ? view.litPoints.has(point) : null;
      const attendedTo = keys ? keys.has(`${point.group} ${point.key}`) : null;
      return {
        ...point,
        at: travelled(point, view.travel).map((value) => value * view.scale),
        from: point.reference.map((value) => value * view.scale),
        radius: base * (sized ? relativeRadius(point.received, mean) : 1) * view.unit,
        strong: lit ?? attendedTo ?? true,
      };
    })
    .sort((a, b) => a.strong - b.strong || b.radius - a.radius);
}

function attended(query) {
  if (!query) return null;
  return new Set(query.groups.flatMap((keys, group) => keys.map(({ key }) => `${group} ${key}`)));
}

function drawWay(context, view, point) {
  context.globalAlpha = point.strong && !view.query ? 0.5 : FAINT / 2;
  line(context, point.from, point.at, groupColour(point.group), 1.2 * view.unit);
  context.globalAlpha = 1;
}

function drawReferences(context, view) {
  const seen = new Set();
  context.globalAlpha = view.query || view.litPoints ? FAINT : 0.85;
  for (const point of view.points) {
    if (seen.has(point.key) || view.hidden.has(point.group)) continue;
    seen.add(point.key);
    const at = point.reference.map((value) => value * view.scale);
    circle(context, at, 1.8 * view.unit, PAPER, INK, 0.8 * view.unit);
  }
  context.globalAlpha = 1;
}

function drawPoint(context, view, point) {
  context.globalAlpha = point.strong ? 1 : FAINT;
  circle(context, point.at, point.radius, groupColour(point.group), INK, 1.2 * view.unit);
  context.globalAlpha = 1;
}

// From the query to its keys, as thick as their weights.
function drawRays(context, view) {
  const { query } = view;
  const from = query.centre.map((value) => value * view.scale);
  const where = new Map(view.points.map((point) => [`${point.group} ${point.key}`, point]));
  const heaviest = Math.max(...query.groups.flat().map(({ weight }) => weight), 1e-9);
  query.groups.forEach((keys, group) => {
    if (view.hidden.has(group)) return;
    for (const { key, weight } of keys.toReversed()) {
      const point = where.get(`${group} ${key}`);
      if (!point) continue;
      const to = travelled(point, view.travel).map((value) => value * view.scale);
      const width = Math.max(0.5, (THICKEST * weight) / heaviest) * view.unit;
      context.globalAlpha = 0.45;
      line(context, from, to, INK, width + 1.2 * view.unit);
      context.globalAlpha = 0.95;
      line(context, from, to, groupColour(group), width);
    }
  });
  context.globalAlpha = 1;
}

// The outline of a window, and in each cell a tile whose area is the weight of the cell.
function drawWindow(context, view) {
  const { query, scale, unit } = view;
  const colour = groupColour(0);
  const [left, top, right, bottom] = windowOf(view);
  const sides = view.cell.map((side) => side * scale * TILE);
  const cells = cellsOf(query, view.hidden);
  const heaviest = cells[0]?.weight || 1;
  for (const { point, weight } of cells) {
    const [width, height] = sides.map((side) => side * Math.sqrt(weight / heaviest));
    const [x, y] = point.map((value) => value * scale);
    const place = [x - width / 2, y - height / 2, width, height];
    context.globalAlpha = 0.6;
    context.fillStyle = colour;
    context.fillRect(...place);
    context.globalAlpha = 1;
    outline(context, place, colour, unit);
  }
  outline(context, [left, top, right - left, bottom - top], colour, 2.2 * unit);
}

// What is seen of a window: its padding lies beyond the picture, and its outline is to be seen.
function windowOf({ query, scale, width, height, unit }) {
  const inset = 3 * unit;
  const [right, bottom] = [width * scale - inset, height * scale - inset];
  const [x1, y1, x2, y2] = query.window.map((value) => value * scale);
  return [Math.max(x1, inset), Math.max(y1, inset), Math.min(x2, right), Math.min(y2, bottom)];
}

function unveil(context, view) {
  const [left, top, right, bottom] = windowOf(view);
  context.clearRect(left, top, right - left, bottom - top);
}

function outline(context, place, colour, width) {
  context.strokeStyle = INK;
  context.lineWidth = 2.5 * width;
  context.strokeRect(...place);
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.strokeRect(...place);
}

function drawQuery(context, view) {
  const at = view.query.centre.map((value) => value * view.scale);
  const { unit } = view;
  circle(context, at, 9 * unit, "#ffffff00", INK, 5 * unit);
  circle(context, at, 9 * unit, "#ffffff00", PAPER, 2.4 * unit);
  circle(context, at, 3 * unit, PAPER, INK, 1.2 * unit);
}

function drawLabelled(context, view) {
  context.globalAlpha = view.opacity;
  context.drawImage(view.labels.paint(view.litSegment), 0, 0, view.width * view.scale, view.height * view.scale);
  context.globalAlpha = 1;
}

function drawMask(context, view, object, index) {
  if (!object.paint) return;
  context.globalAlpha = view.lit === null ? 0.42 : view.lit === index ? 0.6 : 0.12;
  const { paint, mask } = object;
  const place = [mask.left, mask.top, mask.width, mask.height].map((value) => value * view.scale);
  context.drawImage(paint, ...place);
  context.globalAlpha = 1;
}

function drawBox(context, view, object, index) {
  const [x1, y1, x2, y2] = object.box.map((value) => value * view.scale);
  context.globalAlpha = isStrong(view, index) ? 1 : 0.35;
  const place = [x1, y1, x2 - x1, y2 - y1];
  const width = (view.lit === index ? 3 : 2) * view.unit;
  context.strokeStyle = INK;
  context.lineWidth = width + 2 * view.unit;
  context.strokeRect(...place);
  context.strokeStyle = object.colour;
  context.lineWidth = width;
  context.strokeRect(...place);
  context.globalAlpha = 1;
}

// Labels stand above their boxes, in them, or below them, where they cover no other label.
function drawLabels(context, view) {
  const { unit } = view;
  const { width: right, height: bottom } = context.canvas;
  const taken = [];
  context.font = `600 ${12 * unit}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  for (const [index, object] of view.objects.entries()) {
    if (!isStrong(view, index)) continue;
    const [x1, y1, , y2] = object.box.map((value) => value * view.scale);
    const text = `${object.label} ${Math.round(object.score * 100)} %`;
    const width = context.measureText(text).width + 10 * unit;
    const height = 18 * unit;
    const left = Math.min(Math.max(x1 - unit, 0), right - width);
    const place = [y1 - height, y1, y2 - height, y2]
      .filter((top) => top >= 0 && top + height <= bottom)
      .map((top) => [left, top, left + width, top + height])
      .find((tried) => !taken.some((other) => overlap(tried, other)));
    if (!place) continue; // the list beside the picture has it
    taken.push(place);
    context.fillStyle = object.colour;
    context.fillRect(left, place[1], width, height);
    context.fillStyle = INK;
    context.fillText(text, left + 5 * unit, place[1] + height / 2 + unit / 2);
  }
}

function isStrong(view, index) {
  return view.lit === null ? !view.query : view.lit === index;
}

function overlap(one, other) {
  return one[0] < other[2] && other[0] < one[2] && one[1] < other[3] && other[1] < one[3];
}

function line(context, from, to, colour, width) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.beginPath();
  context.moveTo(...from);
  context.lineTo(...to);
  context.stroke();
}

function circle(context, at, radius, fill, stroke, width) {
  context.beginPath();
  context.arc(at[0], at[1], radius, 0, 2 * Math.PI);
  context.fillStyle = fill;
  context.fill();
  context.strokeStyle = stroke;
  context.lineWidth = width;
  context.stroke();
}
